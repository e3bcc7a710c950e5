"""Reads the weights of an opened checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.checkpoint import files
from fusion_jax.errors import InputError
from fusion_jax.methods.registry import LINEAR_FORMS, MODULES
from fusion_jax.models.base import Family, Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.rules import KeyRules, Source
from fusion_jax.nn.linear_forms import LinearForm
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import Site, sites
from fusion_jax.nn.surgery import at, replaced
from fusion_jax.nn.uneven_experts import UnevenExperts, take_experts

_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


class Found(NamedTuple):
    """Where a variable is in the files.

    Args:
        names: Its tensors: one, or one for each expert; none if it is not there.
        source: How they are laid out.
    """

    names: list[str]
    source: Source


@dataclass(frozen=True)
class Checkpoint:
    """A model's opened files.

    Args:
        family: Its architecture.
        config: Its configuration.
        provenance: Where it comes from.
        tensors: Its weights, not read yet.
        dtype: The dtype asked for, or None.
        artefact: The fields of ``fusion.json``, or None for a Hugging Face checkpoint.
    """

    family: Family
    config: Any
    provenance: Provenance
    tensors: files.TensorFiles
    dtype: Any
    artefact: dict[str, Any] | None

    def source(self, path: str) -> Source:
        """Where a variable of the model is in the files."""
        if self.artefact is not None:
            return Source((path,), transposed=False)
        return self._rules.source(path)

    @property
    def _head(self) -> Any:
        return self.provenance.head

    @property
    def _rules(self) -> KeyRules:
        return self.family.rules(self.config, self._head)

    def find(self, path: str, shape: tuple[int, ...] = (1,)) -> Found:
        """Which tensors of the files make up a variable.

        Args:
            path: The variable.
            shape: Its shape, which says how many experts there are.

        Returns:
            The tensors; without names if there are none.
        """
        source = self.source(path)
        sets = (source.tensors(name, shape) for name in source.names)
        names = next((n for n in sets if n[0] in self.tensors.shapes), [])
        return Found(names, source)

    def has(self, layer: str) -> bool:
        """Whether a linear layer is in the files, plain or in another form."""
        formed = (self.artefact or {}).get("forms", {})
        return layer in formed or bool(self.find(f"{layer}.kernel").names)

    @cached_property
    def abstract(self) -> Model:
        """The model with shapes in place of arrays."""
        dtype = self._param_dtype()
        optional = {part: self.has(part) for part in self.family.optional}
        model = nnx.eval_shape(
            lambda: self.family.model(
                self.config,
                head=self._head,
                param_dtype=dtype,
                rngs=nnx.Rngs(0),
                **optional,
            )
        )
        if self.artefact is not None:
            for site in sites(model):
                model = replaced(model, site.path, self._site_module(site))
            for path, spec in self.artefact.get("forms", {}).items():
                model = replaced(model, path, self._form(model, path, spec))
        model.provenance = self.provenance
        return model

    def _site_module(self, site: Site) -> AnyMlp:
        assert self.artefact is not None
        try:
            return _module(site.mlp, self.artefact["sites"][site.path])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{self.tensors.folder / files.FUSION}: cannot read site {site.path} ({error})"
            ) from None

    def _form(self, model: nnx.Module, path: str, spec: Mapping[str, Any]) -> LinearForm:
        fields = dict(spec)
        try:
            layer = at(model, path)
            return LINEAR_FORMS[fields.pop("form")].abstract(layer, **fields)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"{self.tensors.folder / files.FUSION}: cannot read form {path} ({error})"
            ) from None

    def _param_dtype(self) -> Any:
        x64 = jax.config.read("jax_enable_x64")
        asked = self.artefact["dtype"] if self.dtype is None and self.artefact else self.dtype
        if asked is not None:
            dtype = jnp.dtype(asked)
            if dtype == jnp.float64 and not x64:
                raise InputError("dtype float64 needs jax.config.update('jax_enable_x64', True)")
            if not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"dtype must be a floating-point type; got {dtype}")
            return dtype
        stored = self.tensors.float_dtypes(iter(self.tensors.shapes))
        if not stored:
            raise InputError(f"{self.tensors.folder} has no floating-point weights")
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*(_DTYPES[name] for name in stored)) if x64 else None
            return dtype or jnp.result_type(*(_DTYPES[n] for n in stored - {"F64"} or {"F32"}))

    def read(self, key: Key[Array, ""] | None = None) -> Model:
        """Reads the weights.

        Args:
            key: Random key of a head that the files do not have.

        Returns:
            The model.

        Raises:
            InputError: Tensors do not fit; all of them are listed.
        """
        graph, state = nnx.split(self.abstract)
        flat = dict(nnx.to_flat_state(state))
        found = {
            path: self.find(files.name_of(path), v.get_value().shape) for path, v in flat.items()
        }
        new = self._check(flat, found, key)
        fresh = self._initial(new, key) if new else {}
        for path, variable in flat.items():
            value = fresh[path] if path in fresh else self.value(found[path], variable)
            flat[path] = variable.replace(value)
        return nnx.merge(graph, nnx.from_flat_state(flat))

    def value(self, found: Found, variable: Any) -> Array:
        """Reads a variable, in its dtype and layout."""
        want = variable.get_value()
        if not found.source.stacked:
            return _laid_out(self.tensors.read(found.names[0]), found.source, want.dtype)
        # One expert after the other: no second copy of them all.
        whole = np.empty(want.shape, want.dtype)
        for i, name in enumerate(found.names):
            whole[i] = _laid_out(self.tensors.read(name), found.source, want.dtype)
        return jnp.asarray(whole)

    def _check(self, flat: Mapping, found: Mapping[Any, Found], key: Any) -> list[tuple]:
        """The paths of a new head; raises one error for all that does not fit."""
        shapes = self.tensors.shapes
        missing = [path for path in flat if not found[path].names]
        # A classification head of BERT includes the pooler.
        heads = ("head", "lm_head", *(["pooler"] if self._head else []))
        new = [p for p in missing if p[0] in heads]
        lost = [p for p in missing if p not in new or key is None]
        used = {name for f in found.values() for name in f.names}
        rules = self._rules
        extra = [n for n in shapes if n not in used and (self.artefact or not rules.ignores(n))]
        wrong = []
        absent = []
        for path, (names, source) in found.items():
            want = flat[path].get_value().shape[1 if source.stacked else 0 :]
            want = want[::-1] if source.transposed else want
            absent += [name for name in names if name not in shapes]
            wrong += [
                f"{name} is {shapes[name]}, should be {want}"
                for name in names
                if shapes.get(name, want) != want
            ]
        problems = []
        if lost or absent:
            names = [self.source(files.name_of(p)).names[0] for p in lost] + absent
            hint = ""
            if key is None and not absent and all(p in new for p in lost):
                hint = f" (the files have no {self._head} head; give key= to make a new one)"
            problems.append(f"missing{hint}: {', '.join(names)}")
        if extra:
            problems.append(f"not part of the model: {', '.join(sorted(extra))}")
        if wrong:
            problems.append(f"of another shape: {'; '.join(wrong)}")
        if problems:
            kind = self.family.architectures[self._head]
            where = self.tensors.folder
            raise InputError("\n  ".join([f"{where} does not fit {kind}:", *problems]))
        return new

    def _initial(self, new: list[tuple], key: Any) -> dict[tuple, Array]:
        """Initial values of a new head's variables; the rest of the model is not computed."""

        @jax.jit
        def make(key: Array) -> dict[tuple, Array]:
            model = self.family.model(
                self.config,
                head=self._head,
                param_dtype=self._param_dtype(),
                rngs=nnx.Rngs(key),
                **dict.fromkeys(self.family.optional, True),
            )
            flat = dict(nnx.to_flat_state(nnx.state(model)))
            return {path: flat[path].get_value() for path in new}

        return make(key)


def _module(original: Any, spec: Mapping[str, Any]) -> Any:
    """The module, without weights, of which `Mlp.spec` says how it came from the original."""
    spec = dict(spec)
    name = spec.pop("module")
    if name != UnevenExperts.__name__:
        return original.abstract(MODULES[name], **spec)
    groups = [dict(group) for group in spec["groups"]]
    members = [group.pop("members") for group in groups]
    parts = [
        _module(jax.eval_shape(partial(take_experts, members=which), original), group)
        for which, group in zip(members, groups, strict=True)
    ]
    return UnevenExperts(parts, members)


def _laid_out(value: np.ndarray, source: Source, dtype: Any) -> Array:
    return jnp.asarray(value.T if source.transposed else value).astype(dtype)
