"""Loads models from Hugging Face checkpoints and artefacts; saves and exports them.

An artefact is a folder with ``model.safetensors`` under this library's own names, the base model's
``config.json`` verbatim, ``fusion.json``, and the tokenizer's files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

import fusion_jax
from fusion_jax import files
from fusion_jax.errors import InputError, nearest
from fusion_jax.forms import Form, at, forms, multiplied_out, params_dtype, replaced
from fusion_jax.methods import FORMS, MODULES
from fusion_jax.mlp import Mlp
from fusion_jax.models import FAMILIES, Family
from fusion_jax.models.base import Head, Model
from fusion_jax.models.rules import KeyRules, Source
from fusion_jax.origin import Origin
from fusion_jax.report import Report
from fusion_jax.sites import Site, sites
from fusion_jax.text import load_tokenizer
from fusion_jax.uneven import UnevenExperts, some

FORMAT = 1
"""The version of ``fusion.json`` that is written; older ones are read."""

_ALIGNED = 16
"""Bytes that the width of an exported expert is a multiple of."""

_DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}


def load(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: Any = None,
    key: Key[Array, ""] | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Model:
    """Loads a model from the hub, a Hugging Face folder, or an artefact of `save`.

    Tensors are read one at a time into a model that holds only shapes before, so that no second
    copy of the model is in memory.

    Args:
        name: A hub id or a folder.
        head: ``"classification"``, ``"masked-lm"``, or None for the base model alone (for an
            artefact: for the head it was saved with).
        num_labels: Classes of the classification head; None for what the files say.
        label_words: A word or token id for each class, for a classification head that needs no
            training (BERT and RoBERTa): the logits of these words in the files' masked-LM head at
            the first position; if they have no such head, the first hidden state times the words'
            embeddings. Words are such as stand after a space.
        dtype: The dtype of the parameters, in which the model also computes; None for that of the
            files.
        key: Random key of a head that the files do not have; without it that is an error.
        revision: Branch, tag or commit on the hub.
        base: For what `save_masks` wrote: the model that it was made of, if it is not where it was.

    Returns:
        The model: a Flax NNX module with the attributes ``config`` and ``origin``.

    Raises:
        InputError: There is no such model, its type is unknown, a file is damaged, or tensors are
            missing, left over or of another shape; all of these are listed in one message.

    Example:
        >>> model = load("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    """
    opened = open_checkpoint(
        name,
        head=head,
        num_labels=num_labels,
        label_words=label_words,
        dtype=dtype,
        revision=revision,
        base=base,
    )
    return opened.read(key)


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: Any = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Opens a model's files without reading the weights; the arguments are those of `load`.

    Args:
        name: A hub id or a folder.
        head: The head, or None.
        num_labels: Classes of the classification head.
        label_words: A word or token id for each class.
        dtype: The dtype of the parameters.
        revision: Branch, tag or commit on the hub.
        base: For what `save_masks` wrote: the model that it was made of.

    Returns:
        The opened checkpoint, whose ``abstract`` is the model with shapes for arrays.

    Raises:
        InputError: As `load`, except for what only the weights tell.
    """
    folder = files.find_folder(name, revision)
    text, fields = files.read_json(folder / files.CONFIG)
    artefact = None
    if (folder / files.FUSION).is_file():
        _, artefact = files.read_json(folder / files.FUSION)
        if artefact.get("format", FORMAT + 1) > FORMAT:
            raise InputError(f"{folder} was written by a newer fusion-jax; update to read it")
        head = artefact["head"] if head is None else head
        if num_labels is None and head == artefact["head"]:
            num_labels = artefact.get("num_labels")
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{folder} has model_type {model_type!r}{nearest(str(model_type), FAMILIES)}"
        )
    family = FAMILIES[model_type]
    family.check_head(head)
    if num_labels is not None:
        if head != "classification":
            raise InputError("num_labels is for head='classification'")
        if num_labels < 1:
            raise InputError(f"num_labels must be at least 1; got {num_labels}")
        fields = {**fields, "num_labels": num_labels}
    if label_words is None and head == "classification":
        label_words = (artefact or {}).get("label_ids") or fields.get("label_ids")
    if label_words is not None:
        fields = {**fields, "label_ids": _label_ids(folder, label_words, head, num_labels)}
    try:
        config = family.config(fields)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    origin = Origin(os.fspath(name), str(folder.absolute()), text, head)
    if artefact is not None:
        history = tuple(json.dumps(step) for step in artefact["history"])
        origin = Origin(artefact["base"], origin.folder, text, head, history)
    if artefact is not None and "masks" in artefact:
        from fusion_jax.masks import MaskFiles

        tensors = MaskFiles(folder, artefact, base)
    elif base is not None:
        raise InputError(f"base is for what fusion_jax.save_masks wrote; {folder} is none of it")
    else:
        tensors = files.TensorFiles(folder)
    opened = Checkpoint(family, config, origin, tensors, dtype, artefact)
    if label_words is None:
        return opened
    if not hasattr(config, "label_ids"):
        raise InputError(f"{folder}: only BERT and RoBERTa take label words, not {model_type}")
    # A model that was made without the head's layers stays so.
    if not opened.has("head.dense"):
        opened = replace(opened, config=replace(config, label_transform=False))
    return opened


def _label_ids(
    folder: Path, words: Sequence[str] | Sequence[int], head: str | None, num_labels: int | None
) -> list[int]:
    """The token ids of label words; raises `InputError` if a word is not one token."""
    if head != "classification":
        raise InputError("label_words is for head='classification'")
    if num_labels not in (None, len(words)):
        raise InputError(f"num_labels is {num_labels}, but label_words are {len(words)}")
    ids = []
    tokenizer = None
    for word in words:
        if isinstance(word, str):
            tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
            # As inside a text: RoBERTa's tokens of words hold the space before them.
            found = tokenizer.encode(f" {word}", add_special_tokens=False)
            if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                raise InputError(f"label word {word!r} is not one token of {folder}; use another")
            word = found[0]
        ids.append(word)
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"label words must be different from each other; got {list(words)}")
    return ids


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
        origin: Where it comes from.
        tensors: Its weights, not read yet.
        dtype: The dtype asked for, or None.
        artefact: The fields of ``fusion.json``, or None for a Hugging Face checkpoint.
    """

    family: Family
    config: Any
    origin: Origin
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
        return self.origin.head

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
        model.origin = self.origin
        return model

    def _site_module(self, site: Site) -> Mlp:
        assert self.artefact is not None
        try:
            return _module(site.mlp, self.artefact["sites"][site.path])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{self.tensors.folder / files.FUSION}: cannot read site {site.path} ({error})"
            ) from None

    def _form(self, model: nnx.Module, path: str, spec: Mapping[str, Any]) -> Form:
        fields = dict(spec)
        try:
            layer = at(model, path)
            return FORMS[fields.pop("form")].abstract(layer, **fields)
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
        found = {path: self.find(_join(path), v.get_value().shape) for path, v in flat.items()}
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
            names = [self.source(_join(p)).names[0] for p in lost] + absent
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


def save(model: Model, folder: str | os.PathLike[str], *, report: Report | None = None) -> Path:
    """Saves a model as an artefact, from which `load` gives it back equal to the bit.

    Args:
        model: A model that came from `load`, compressed or not.
        folder: Where; must not exist or be empty. It appears whole or not at all.
        report: The report of the compression, kept as ``report.json``.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, or the model did not come from `load`.
        OSError: Writing failed; nothing is left behind.

    Example:
        >>> save(model, "minilm-fused")  # doctest: +SKIP
    """
    tensors = (
        (_join(path), np.asarray(variable.get_value()))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    )
    return write_artefact(model, folder, tensors, report=report)


def write_artefact(
    model: Model,
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    fields: Mapping[str, Any] | None = None,
    *,
    report: Report | None = None,
) -> Path:
    """Writes an artefact with given tensors; the other arguments are those of `save`.

    Args:
        model: The model.
        folder: Where.
        tensors: What to write, by name.
        fields: Further fields of ``fusion.json``.
        report: The report of the compression.

    Returns:
        The folder.
    """
    origin = origin_of(model)
    config = model.config
    num_labels, label_ids = labels_of(model)
    fields = {
        "format": FORMAT,
        "base": origin.name,
        "model_type": config.model_type,
        "head": origin.head,
        "num_labels": num_labels,
        "label_ids": label_ids,
        "dtype": dtype_name(model),
        "sites": {site.path: site.mlp.spec() for site in sites(model)},
        "forms": {path: form.spec() for path, form in forms(model).items()},
        "history": [json.loads(step) for step in origin.history],
        "versions": {m.__name__: m.__version__ for m in (fusion_jax, jax, flax)},
        **(fields or {}),
    }
    with files.new_folder(folder) as new:
        files.write_tensors(new, tensors)
        (new / files.CONFIG).write_text(origin.config, encoding="utf-8")
        _write_json(new / files.FUSION, fields)
        if report is not None:
            _write_json(new / "report.json", report.to_json())
        files.copy_tokenizer(Path(origin.folder), new)
    return Path(folder)


def export_hf(model: Model, folder: str | os.PathLike[str]) -> Path:
    """Writes a plain Hugging Face checkpoint with the same logits, for `transformers`.

    Cluster sizes are folded into the output weights, and factored matrices multiplied out. Large
    models are written in shards, tensor by tensor. Hugging Face configurations have one width for
    the MLPs of all layers, or of one kind: where widths differ, units that are all zero fill up to
    the widest, which changes no output. They also fill experts up to a multiple of 16 bytes,
    without which PyTorch's product of groups does not run. A head of label words becomes the
    masked-LM head that it is part of: the logits of the classes are
    ``logits[:, 0, config.label_ids]``.

    Args:
        model: A model that came from `load`, compressed or not.
        folder: Where; must not exist or be empty. It appears whole or not at all.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, the model did not come from `load`, or its label words
            are multiplied without a masked-LM head, which `transformers` cannot do.
        OSError: Writing failed; nothing is left behind.

    Example:
        >>> export_hf(model, "minilm-hf")  # doctest: +SKIP
    """
    origin = origin_of(model)
    config = model.config
    family = FAMILIES[config.model_type]
    named = {
        site.path: family.width_fields.get(site.path.rsplit(".")[-1], family.width_field)
        for site in sites(model)
    }
    widths: dict[str, int] = {}
    for site in sites(model):
        width = site.mlp.width
        if site.mlp.stack:
            unit = max(1, _ALIGNED // site.mlp.dtype.itemsize)
            width = -(-width // unit) * unit
        widths[named[site.path]] = max(width, widths.get(named[site.path], 0))
    made = multiplied_out(model)
    for site in sites(made):
        made = replaced(made, site.path, site.mlp.padded(widths[named[site.path]]))
    head: Any = origin.head
    fields = {**json.loads(origin.config), **widths}
    _, label_ids = labels_of(model)
    if label_ids is not None:
        if not config.label_transform:
            raise InputError(
                "transformers has no head that multiplies hidden states with label words; export "
                "is for label words of a masked-LM head"
            )
        head, fields["label_ids"] = "masked-lm", label_ids
    fields["architectures"] = [family.architectures[head]]
    if head == "classification" and len(fields.get("id2label", ())) != config.num_labels:
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(config.num_labels)}
    fields.pop("torch_dtype", None)
    fields["dtype"] = dtype_name(made)
    with files.new_folder(folder) as new:
        files.write_tensors(new, _exported(made, family.rules(config, head)))
        _write_json(new / files.CONFIG, fields)
        files.copy_tokenizer(Path(origin.folder), new)
    return Path(folder)


def _module(original: Mlp, spec: Mapping[str, Any]) -> Mlp:
    """The module, without weights, of which `Mlp.spec` says how it came from the original."""
    spec = dict(spec)
    name = spec.pop("module")
    if name != UnevenExperts.__name__:
        return original.abstract(MODULES[name], **spec)
    groups = [dict(group) for group in spec["groups"]]
    members = [group.pop("members") for group in groups]
    parts = [
        _module(jax.eval_shape(partial(some, members=which), original), group)
        for which, group in zip(members, groups, strict=True)
    ]
    return UnevenExperts(parts, members)


def _exported(model: Model, rules: KeyRules) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model under their Hugging Face names, one after the other."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        source = rules.source(_join(path))
        value = np.asarray(variable.get_value())
        parts = value if source.stacked else [value]
        names = source.tensors(source.names[0], value.shape)
        for name, part in zip(names, parts, strict=True):
            yield name, part.T if source.transposed else part


def _laid_out(value: np.ndarray, source: Source, dtype: Any) -> Array:
    return jnp.asarray(value.T if source.transposed else value).astype(dtype)


def labels_of(model: Model) -> tuple[int | None, list[int] | None]:
    """The classes of a model's classification head, and its label words if it has such."""
    if origin_of(model).head != "classification":
        return None, None
    ids = getattr(model.config, "label_ids", None)
    return model.config.num_labels, None if ids is None else list(ids)


def dtype_name(model: Model) -> str:
    """The name of the dtype of a model's parameters."""
    return str(params_dtype(model))


def origin_of(model: nnx.Module) -> Origin:
    """Where a model came from; raises `InputError` if it did not come from `load`."""
    origin = getattr(model, "origin", None)
    if not isinstance(origin, Origin):
        raise InputError("only models that came from fusion_jax.load can be saved and exported")
    return origin


def _join(path: tuple) -> str:
    return ".".join(map(str, path))


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
