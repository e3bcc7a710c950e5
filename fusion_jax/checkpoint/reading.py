"""Reads the weights of an opened checkpoint, one tensor at a time."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.tensor_files import FLOATS, TensorFiles, aligned
from fusion_jax.errors import InputError
from fusion_jax.methods.registry import LINEAR_FORMS, MODULES
from fusion_jax.models.base import Family, Model
from fusion_jax.models.provenance import CLASS_HEADS, Head, Provenance
from fusion_jax.models.rules import KeyRules, TensorLocation
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import at, path_name, replaced
from fusion_jax.nn.uneven_experts import UnevenExperts, take_experts
from fusion_jax.progress import show_progress

_OTHER_HEADS = re.compile(r"(qa_outputs|score|classifi(er|cation_head)|(v|value|reward)_head)\..+")
"""The tensors of heads for tasks that this library does not have."""
_HEAD_PARTS = ("head", "lm_head", "pooler")
"""The parts of a model that depend on its head."""
_LANGUAGE_HEADS = re.compile(r"(lm_head|embed_out|cls)\..+")
_log = logging.getLogger("fusion_jax")

VariablePath = tuple[Any, ...]
"""The path of a variable in a model."""


class FoundTensors(NamedTuple):
    """The tensors of the files that make up a variable.

    Args:
        names: One tensor, or one for each expert; empty if the files do not have the variable.
        location: How the tensors are laid out.
        outputs: Where a layer joins several of the model: the first output of the variable, the one
            after its last, and the number of them in the files' layer.
    """

    names: list[str]
    location: TensorLocation
    outputs: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The opened files of a model.

    Args:
        family: The architecture.
        config: The configuration.
        provenance: Where the model comes from.
        tensors: The weights, not read yet.
        dtype: The dtype that was asked for, or None for that of the files.
        artefact: The fields of ``fusion.json``, or None for a Hugging Face checkpoint.
        new_head: Whether the head is made anew, even if the files have one.
    """

    family: Family
    config: Any
    provenance: Provenance
    tensors: TensorFiles
    dtype: DTypeLike | None
    artefact: dict[str, Any] | None
    new_head: bool = False

    def locate(self, path: str) -> TensorLocation:
        """Returns where a variable of the model can be in the files."""
        if self.artefact is not None:
            return TensorLocation((path,), transposed=False)
        return self._rules.locate(path)

    @property
    def _head(self) -> Head | None:
        return self.provenance.head

    @property
    def _rules(self) -> KeyRules:
        return self.family.rules(self.config, self._head)

    @property
    def other_head(self) -> Head | None:
        """The head in the files, if it is another one whose tensors have the same names."""
        similar: tuple[Head, ...] = CLASS_HEADS
        if self.artefact is not None:
            similar = (*CLASS_HEADS, "question-answering")
            stated = self.artefact.get("head")
        else:
            stated = self.family.stated_head(json.loads(self.provenance.config))
        both = stated in similar and self._head in similar
        return stated if both and stated != self._head else None

    def find(self, path: str, shape: tuple[int, ...] = (1,)) -> FoundTensors:
        """Finds the tensors that make up a variable.

        Args:
            path: The path of the variable.
            shape: Its shape, whose first axis is the number of experts where there are experts.

        Returns:
            The tensors; without names if the files do not have the variable.
        """
        location, names = self.locate(path), []
        decisive = () if self.artefact is not None else self._rules.decisive
        every = [location] if self.artefact is not None else self._rules.locations(path)
        for possible in every:
            ordered = sorted(possible.names, key=lambda name: name not in decisive)
            candidates = (possible.tensors(name, shape) for name in ordered)
            names = next((n for n in candidates if n[0] in self.tensors.shapes), [])
            if names:
                location = possible
                break
        outputs = self._outputs(path, location.joined) if location.joined else None
        return FoundTensors(names, location, outputs)

    def _outputs(self, path: str, joined: Sequence[str]) -> tuple[int, int, int]:
        sizes = [self._shapes[other][-1] for other in joined]
        at = joined.index(path)
        return sum(sizes[:at]), sum(sizes[: at + 1]), sum(sizes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each variable of the model."""
        state = nnx.to_flat_state(nnx.state(self.abstract))
        return {path_name(path): variable.get_value().shape for path, variable in state}

    def untied(self) -> Checkpoint:
        """Returns the checkpoint with its tied tensors apart where the files have different ones.

        As in transformers since version 5: what the files hold counts, not ``config.json``.
        """
        if self.artefact is not None:
            apart = self.artefact.get("untied", [])
        else:
            apart = [twin for twin, path in self._rules.twins.items() if self._differ(twin, path)]
        if not apart:
            return self
        provenance = replace(self.provenance, untied=tuple(apart))
        return replace(self, config=self.family.untied(self.config, apart), provenance=provenance)

    def _differ(self, twin: str, path: str) -> bool:
        names = [n for n in self.locate(path).names if n in self.tensors.shapes and n != twin]
        if twin not in self.tensors.shapes or not names or twin in self._rules.decisive:
            return False
        return not self.tensors.equal(twin, names[0])

    def has(self, layer: str) -> bool:
        """Returns whether the files have a variable, or a linear layer in any form."""
        forms, names = (self.artefact or {}).get("forms", {}), [f"{layer}.kernel", layer]
        if self.artefact is None:
            every = [location for name in names for location in self._rules.locations(name)]
            names = [name for location in every for name in location.names]
        return layer in forms or any(name in self.tensors.shapes for name in names)

    @cached_property
    def abstract(self) -> Model:
        """The model with shapes in place of arrays."""
        optional = {part: self.has(part) for part in self.family.optional}
        try:
            model = nnx.eval_shape(lambda: self._make(_same_key(), optional))
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError) as error:
            where = self.tensors.folder / files.CONFIG
            raise InputError(f"{where} describes a model that cannot be ({error})") from error
        if self.artefact is not None:
            specs, saved = self.artefact["sites"], self.artefact.get("head")
            for site in sites(model):
                if site.path not in specs and saved != self._head:
                    raise InputError(
                        f"{self.tensors.folder} was saved with the head {saved!r} and has no "
                        f"{site.path}; load it with that head"
                    )
                with self._reading(f"site {site.path}"):
                    module = module_of(site.mlp, specs[site.path])
                model = replaced(model, site.path, module)
            forms = self.artefact.get("forms", {})
            for path, spec in ((p, f) for p, f in forms.items() if not _left_out(model, p)):
                with self._reading(f"form {path}"):
                    fields = dict(spec)
                    form = LINEAR_FORMS[fields.pop("form")].abstract(at(model, path), **fields)
                model = replaced(model, path, form)
        model.provenance = self.provenance
        return model

    def _make(self, rngs: nnx.Rngs, optional: Mapping[str, bool]) -> Model:
        given = {"head": self._head, "param_dtype": self._param_dtype(), **optional}
        return self.family.model(self.config, rngs=rngs, **given)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{self.tensors.folder / files.FUSION}: cannot read {what} ({error})"
            ) from None

    def _param_dtype(self) -> DTypeLike:
        x64 = jax.config.read("jax_enable_x64")
        asked = self.artefact["dtype"] if self.dtype is None and self.artefact else self.dtype
        if asked is not None:
            names = [str(known) for known in FLOATS.values()]
            if isinstance(asked, str) and asked not in names:
                raise InputError(f"dtype must be a floating-point type; got {asked[:100]}")
            dtype = jnp.dtype(asked)
            if dtype == jnp.float64 and not x64:
                raise InputError("dtype float64 needs jax.config.update('jax_enable_x64', True)")
            if not jnp.issubdtype(dtype, jnp.floating):
                raise InputError(f"dtype must be a floating-point type; got {dtype}")
            return dtype
        stored = self._stored_dtype()
        return jnp.float32 if stored == jnp.float64 and not x64 else stored

    def _stored_dtype(self) -> DTypeLike:
        """Returns the dtype that ``config.json`` states, or else that of most of the weights."""
        fields = json.loads(self.provenance.config)
        stated = fields.get("dtype") or fields.get("torch_dtype")
        known = {str(dtype): dtype for dtype in FLOATS.values()}
        if stated in known:
            return known[stated]
        sizes: Counter[str] = Counter()
        for name, size in self.tensors.float_sizes().items():
            if not self._rules.ignores(name):
                sizes[self.tensors.dtypes[name]] += size
        if not sizes:
            raise InputError(f"{self.tensors.folder} has no floating-point weights")
        return FLOATS[sizes.most_common(1)[0][0]]

    def read(self, key: Key[Array, ""] | None = None) -> Model:
        """Reads the weights into the model.

        Args:
            key: Random key of a new head, if the files do not have the head.

        Raises:
            InputError: Tensors do not fit the model; the message lists all of them.
        """
        graph, state = nnx.split(self.abstract)
        flat = dict(nnx.to_flat_state(state))
        found = self._found(flat)
        new = self._check(flat, found, key)
        initial = {} if key is None or not new else self._initial(new, key)
        with show_progress(f"Loading {self.tensors.folder}", len(flat)) as advance:
            for path, variable in flat.items():
                value = initial[path] if path in initial else self.value(found[path], variable)
                flat[path] = variable.replace(value)
                advance(path_name(path))
        model = nnx.merge(graph, nnx.from_flat_state(flat))
        if initial:
            model.provenance = replace(
                model.provenance, labels=None, problem_type=None, new_head=True
            )
        return model

    def _found(self, flat: Mapping[VariablePath, nnx.Variable]) -> dict[VariablePath, FoundTensors]:
        return {path: self.find(path_name(path), v.get_value().shape) for path, v in flat.items()}

    def check_all(self) -> None:
        """Raises `InputError` if the tensors do not fit the model, as `read` does."""
        flat = dict(nnx.to_flat_state(nnx.state(self.abstract)))
        found = self._found(flat)
        self._check(flat, found, None)

    def value(self, found: FoundTensors, variable: nnx.Variable) -> Array:
        """Reads a variable, in its dtype and layout."""
        want = variable.get_value()
        whole = aligned(want.shape, want.dtype)
        transposed = found.location.transposed
        if found.location.packed:
            self._read_packed(found, whole)
            return jax.device_put(whole)
        for name, part in zip(
            found.names, whole if found.location.stacked else [whole], strict=True
        ):
            if found.outputs is None:
                self.tensors.read_into(name, part, transposed=transposed)
                continue
            groups = found.location.groups
            first, step = found.outputs[0] // groups, found.outputs[2] // groups
            for group, outputs in enumerate(np.split(part, groups, axis=-1)):
                at = group * step + first
                self.tensors.read_into(name, outputs, transposed=transposed, first=at)
        return jax.device_put(whole)  # without a copy on a CPU, as `whole` is aligned

    def _read_packed(self, found: FoundTensors, whole: np.ndarray) -> None:
        """Reads all experts of a variable from one tensor, expert by expert."""
        (name,), location = found.names, found.location
        own: slice | None = None
        if found.outputs is not None:
            first, last, _ = found.outputs
            step = len(location.joined) if location.interleaved else None
            own = slice(first // (last - first), None, step) if step else slice(first, last)
        for e, part in enumerate(whole):
            theirs = np.empty(self.tensors.shapes[name][1:], whole.dtype)
            self.tensors.read_into(name, theirs, first=e * len(theirs))
            ours = theirs.T if location.transposed else theirs
            part[...] = ours if own is None else ours[..., own]

    def _check(
        self,
        flat: Mapping[VariablePath, nnx.Variable],
        found: Mapping[VariablePath, FoundTensors],
        key: Key[Array, ""] | None,
    ) -> list[VariablePath]:
        """Returns the paths of a new head; one error lists everything that does not fit."""
        shapes = self.tensors.shapes
        missing = [path for path in flat if not found[path].names]
        # A classification head of BERT includes the pooler.
        heads = ("head", "lm_head", *(["pooler"] if self._head else []))
        new = [p for p in missing if p[0] in heads]
        lost = [p for p in missing if p not in new or key is None]
        used = {name for f in found.values() for name in f.names}
        if self.new_head:
            replaced = {p: f for p, f in found.items() if p[0] in ("head", "lm_head")}
            new = list(dict.fromkeys([*new, *replaced]))
            found = {p: f for p, f in found.items() if p not in replaced}
        rules = self._rules
        extra = [n for n in shapes if n not in used]
        if self.artefact is None:
            extra = [n for n in self._without_other_heads(extra) if not rules.ignores(n)]
        elif self.artefact.get("head") != self._head:
            parts = {n: n.partition(".")[0] for n in extra}
            extra = [n for n in extra if parts[n] not in _HEAD_PARTS]
            extra = [n for n in extra if not _left_out(self.abstract, n)]
            if {"head", "lm_head"} & set(parts.values()):
                head = self.artefact["head"]
                _log.warning("%s: the head %s is left out", self.tensors.folder, head)
        wrong, absent, misfits = [], [], []
        for path, (names, location, outputs) in found.items():
            want = flat[path].get_value().shape[1 if location.stacked else 0 :]
            want = want if outputs is None else (*want[:-1], outputs[-1])
            want = tuple(want[axis] for axis in location.axes(len(want)))
            absent += [name for name in names if name not in shapes]
            fits = [shapes.get(name, want) == want for name in names]
            misfits += [] if all(fits) else [path]
            wrong += [
                f"{name} is {shapes[name]}, should be {want}"
                for name, fit in zip(names, fits, strict=True)
                if not fit
            ]
        problems = []
        if lost or absent:
            names = [self.locate(path_name(p)).names[0] for p in lost] + absent
            hint = ""
            if key is None and not absent and all(p in new for p in lost):
                hint = (
                    f" (the files have no {self._head} head; to make a new one: key= in Python, "
                    "--new-head on the command line)"
                )
            problems.append(f"missing{hint}: {', '.join(names)}")
        if extra:
            problems.append(f"not part of the model: {', '.join(sorted(extra))}")
        types = [f"{n} is {self.tensors.dtypes[n]}" for n in self._other_types(found, flat)]
        if types:
            problems.append(f"not of a floating-point type that can be read: {', '.join(types)}")
        if wrong:
            heads_only = all(p[0] in ("head", "lm_head") for p in misfits)
            hint = " (new_head=True, or --new-head, replaces the head)" if heads_only else ""
            problems.append(f"of another shape{hint}: {'; '.join(wrong)}")
        if problems:
            kind = self.family.architectures[self._head]
            where = self.tensors.folder
            raise InputError("\n  ".join([f"{where} does not fit {kind}:", *problems]))
        return new

    def _other_types(
        self,
        found: Mapping[VariablePath, FoundTensors],
        flat: Mapping[VariablePath, nnx.Variable],
    ) -> list[str]:
        """Returns the tensors that do not have a floating-point type, though the variable does."""
        floats = [p for p in found if jnp.issubdtype(flat[p].get_value().dtype, jnp.floating)]
        names = [name for path in floats for name in found[path].names]
        return [n for n in names if self.tensors.dtypes.get(n, "F32") not in FLOATS]

    def _without_other_heads(self, names: Sequence[str]) -> list[str]:
        """Returns the names that do not belong to a head of another task; logs these heads."""
        other = {n: m[1] for n in names if (m := _OTHER_HEADS.fullmatch(n))}
        if self._head is None and not getattr(self.config, "tie_word_embeddings", False):
            other |= {n: m[1] for n in names if (m := _LANGUAGE_HEADS.fullmatch(n))}
        if other:
            heads = ", ".join(dict.fromkeys(other.values()))
            _log.warning("%s: the head %s is left out", self.tensors.folder, heads)
        return [n for n in names if n not in other]

    def _initial(self, new: list[VariablePath], key: Key[Array, ""]) -> dict[VariablePath, Array]:
        """Returns initial values of a new head; the rest of the model is not computed."""

        @jax.jit
        def make(key: Array) -> dict[VariablePath, Array]:
            model = self._make(nnx.Rngs(key), dict.fromkeys(self.family.optional, True))
            flat = dict(nnx.to_flat_state(nnx.state(model)))
            return {path: flat[path].get_value() for path in new}

        return make(key)


def _left_out(model: Model, path: str) -> bool:
    """Returns whether a part does not belong to a model with this head, such as T5's decoder."""
    return getattr(model, path.partition(".")[0], model) is None


class _SameKey(nnx.RngStream):
    """Gives the same key each time: for shapes, which do not depend on keys.

    A stream that counts its keys takes most of the time of an abstract model.
    """

    def __call__(self) -> Array:
        return self.key.get_value()


def _same_key() -> nnx.Rngs:
    rngs: Any = nnx.Rngs(0)
    rngs.default = _SameKey(0, tag="default")
    return rngs


def module_of(original: Any, spec: Mapping[str, Any]) -> Any:
    """Returns the module, without weights, whose `Mlp.spec` is given, for the original module."""
    spec = dict(spec)
    name = spec.pop("module")
    if name != UnevenExperts.__name__:
        return original.abstract(MODULES[name], **spec)
    groups = [dict(group) for group in spec["groups"]]
    members = [group.pop("members") for group in groups]
    parts = [
        module_of(jax.eval_shape(partial(take_experts, members=which), original), group)
        for which, group in zip(members, groups, strict=True)
    ]
    return UnevenExperts(parts, members)
