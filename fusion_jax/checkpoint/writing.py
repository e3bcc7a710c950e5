"""Saves models as artefacts, and exports them as Hugging Face checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.any_module import write_module
from fusion_jax.checkpoint.card import write_card
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import CLASS_HEADS, Provenance
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.rules import KeyRules
from fusion_jax.nn.linear_forms import Frozen, find_forms, multiplied_out, params_dtype
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import path_name, replaced
from fusion_jax.report import Report, num_params

_ALIGNMENT = 16
"""The width of an exported expert is a multiple of this many bytes."""


def save(
    model: nnx.Module, folder: str | os.PathLike[str], *, report: Report | None = None
) -> Path:
    """Saves a model as an artefact: `load` returns the same model, bit by bit.

    A model that did not come from `load` is saved too, and read by `load_into`: the artefact then
    has no ``config.json`` and no tokenizer, and the caller builds the model.

    An artefact is a folder with the weights (``model.safetensors``), the original ``config.json``,
    a description of every compressed MLP (``fusion.json``), and the tokenizer's files. It holds no
    pickle.

    Args:
        model: A model from `load`, or any other NNX module, compressed or not.
        folder: The folder to write; it must not exist or be empty. Writing is atomic.
        report: The report of the compression, written as ``report.json``.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, or the model holds something that cannot be saved.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.

    Example:
        >>> smaller, report = compress(model, Fusion(width=384), key=key)  # doctest: +SKIP
        >>> save(smaller, "minilm-fused", report=report)  # doctest: +SKIP
        >>> smaller = load("minilm-fused")  # doctest: +SKIP
    """
    if not isinstance(model, nnx.Module):
        raise InputError(f"model must be a Flax NNX module; got {type(model).__name__}")
    came_from_load = isinstance(getattr(model, "provenance", None), Provenance)
    if not isinstance(model, Model) or not came_from_load:
        return write_module(model, folder, report)
    tensors = (
        (path_name(path), np.asarray(variable.get_value()))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    )
    return write_artefact(model, folder, tensors, report=report)


def write_artefact(
    model: Model,
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    fields: Mapping[str, object] | None = None,
    *,
    report: Report | None = None,
) -> Path:
    """Writes an artefact of tensors, with further ``fields`` in ``fusion.json``; see `save`."""
    provenance_of(model)
    with files.new_folder(folder) as new:
        files.write_tensors(new, tensors)
        write_description(new, model, fields, report=report)
    return Path(folder)


def write_description(
    new: Path,
    model: Model,
    fields: Mapping[str, object] | None = None,
    *,
    report: Report | None = None,
) -> None:
    """Writes all of an artefact but its tensors into a folder; the model may be abstract."""
    provenance = provenance_of(model)
    num_labels, label_ids = labels_of(model)
    fields = {
        "format": files.FORMAT,
        "base": provenance.name,
        "model_type": model.config.model_type,
        "head": provenance.head,
        "num_labels": num_labels,
        "label_ids": label_ids,
        "labels": provenance.labels,
        "problem_type": provenance.problem_type,
        "new_head": provenance.new_head,
        "untied": provenance.untied,
        "dtype": dtype_name(model),
        "sites": {site.path: site.mlp.spec() for site in sites(model)},
        "forms": {path: form.spec() for path, form in find_forms(model).items()},
        "history": [json.loads(step) for step in provenance.history],
        "versions": files.versions(),
        **(fields or {}),
    }
    (new / files.CONFIG).write_text(provenance.config, encoding="utf-8")
    files.write_json(new / files.FUSION, fields)
    if report is not None:
        files.write_json(new / files.REPORT, report.to_json())
    files.copy_companions(Path(provenance.folder), new, sentences=provenance.head is None)
    write_card(new, model, report)


def export_hf(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    report: Report | None = None,
    round_to: int = 1,
) -> Path:
    """Writes a plain Hugging Face checkpoint that gives the same logits in `transformers`.

    Everything that `transformers` does not know is computed: cluster sizes are multiplied into the
    output weights, and factored matrices are multiplied out. Hugging Face configurations have one
    width for the MLPs of all layers (or of all layers of one kind). Where widths differ, zero units
    pad the narrower MLPs, which changes no output. They also pad experts to a multiple of 16 bytes,
    which PyTorch's grouped matrix product requires. A head of label words becomes the
    masked-language-model head that it is part of: the logits of the classes are
    ``logits[:, 0, config.label_ids]``. Large models are written in shards, tensor by tensor.

    Args:
        model: A model from `load`, compressed or not.
        folder: The folder to write; it must not exist or be empty. Writing is atomic.
        report: The report of the compression, for the model card; None for that of the artefact
            that the model was loaded from.
        round_to: Zero units pad every width to a multiple of this, as servers ask for.

    Returns:
        The folder.

    Raises:
        InputError: The folder is not empty, ``round_to`` is below 1, the model did not come from
            `load`, or it multiplies label words without a masked-language-model head, which
            `transformers` cannot do.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.

    Example:
        >>> export_hf(smaller, "minilm-hf")  # doctest: +SKIP
        >>> from transformers import AutoModel  # doctest: +SKIP
        >>> AutoModel.from_pretrained("minilm-hf")  # doctest: +SKIP
    """
    check_at_least(1, round_to=round_to)
    provenance = provenance_of(model)
    config = model.config
    family = FAMILIES[config.model_type]
    fields = json.loads(provenance.config)
    width_fields: dict[str, str | None] = {}
    factors: dict[str, int] = {}
    usual = family.width_field
    usual = usual(config) if callable(usual) else usual
    for site in sites(model):
        first, last = site.path.partition(".")[0], site.path.rpartition(".")[2]
        named = (family.width_fields[x] for x in (last, first) if x in family.width_fields)
        width_fields[site.path] = next(named, usual)
        factors[site.path] = family.width_factor(config, site.path)
    widths: dict[str | None, int] = {}
    if usual is None:
        widths[None] = config.intermediate_size
    for site in sites(model):
        width, name = -(-site.mlp.width // factors[site.path]), width_fields[site.path]
        unit = max(1, _ALIGNMENT // site.mlp.dtype.itemsize) if site.mlp.stack else 1
        unit = math.lcm(unit, round_to)
        width = -(-width // unit) * unit
        widths[name] = max(width, widths.get(name, 0))
    plain = multiplied_out(model)
    padded: dict[str, tuple[int, int]] = {}
    for site in sites(plain):
        wider = site.mlp.padded(widths[width_fields[site.path]] * factors[site.path])
        if wider.width > site.mlp.width:
            padded[site.path] = wider.width, num_params(wider) - num_params(site.mlp)
        plain = replaced(plain, site.path, wider)
    head = provenance.head
    stated = {name: width for name, width in widths.items() if name} | dict(family.export(head))
    for name, value in stated.items():
        _state(fields, name, value)
    _, label_ids = labels_of(model)
    if label_ids is not None:
        if not config.label_transform:
            raise InputError(
                "transformers has no head that multiplies hidden states with label words; only "
                "label words in a masked-language-model head can be exported"
            )
        head, fields["label_ids"] = "masked-lm", label_ids
    fields["architectures"] = [family.architectures[head]]
    if provenance.untied:
        fields["tie_word_embeddings"] = config.tie_word_embeddings
    if provenance.head in CLASS_HEADS:
        fields |= _class_fields(provenance, config.num_labels)
    if provenance.head == "question-answering":
        fields |= _class_fields(provenance, 2)  # the start and the end of the answer
    for stale in ("torch_dtype", "quantization_config"):  # of the weights before
        fields.pop(stale, None)
    fields["dtype"] = dtype_name(plain)
    with files.new_folder(folder) as new:
        files.write_tensors(new, _exported(plain, family.rules(config, head)))
        files.write_json(new / files.CONFIG, fields)
        files.copy_companions(Path(provenance.folder), new, sentences=head is None)
        write_card(new, model, report or _report_of(provenance), padded)
    return Path(folder)


def _state(fields: dict[str, Any], name: str, value: object) -> None:
    """Sets a field of a ``config.json``; old files of CLIP have nested ones twice."""
    outer, _, inner = name.rpartition(".")
    if not outer:
        fields[inner] = value
        return
    for where in (outer, f"{outer}_dict"):
        if where == outer or isinstance(fields.get(where), dict):
            fields[where] = {**(fields.get(where) or {}), inner: value}


def _report_of(provenance: Provenance) -> Report | None:
    """Returns the report of the artefact that a model was loaded from, if it is still the last."""
    folder = Path(provenance.folder)
    try:
        _, described = files.read_json(folder / files.FUSION)
        if described.get("history") != [json.loads(step) for step in provenance.history]:
            return None
        return Report.from_json(files.read_json(folder / files.REPORT)[1])
    except (OSError, InputError):  # not an artefact, or one without a report
        return None


def _class_fields(provenance: Provenance, num_labels: int) -> dict[str, object]:
    """Returns the fields of ``config.json`` that describe the classes of a head."""
    names = provenance.labels or [f"LABEL_{i}" for i in range(num_labels)]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "num_labels": num_labels,
        "problem_type": provenance.problem_type,
    }


def _exported(model: Model, rules: KeyRules) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a model under their Hugging Face names, one after the other."""
    state = nnx.state(model, lambda _, v: isinstance(v, nnx.Param | Frozen))
    params = {path_name(p): v for p, v in nnx.to_flat_state(state)}
    for path in params:
        location = rules.locate(path)
        joined = location.joined or (path,)
        if path != joined[0]:
            continue  # written with the first one
        arrays = [np.asarray(params[other].get_value()) for other in joined]
        value = arrays[0] if len(arrays) == 1 else _joined(arrays, location.groups)
        if location.interleaved:
            value = np.stack(arrays, axis=-1).reshape(value.shape)
        parts = value if location.stacked else [value]
        names = location.tensors(location.names[0], value.shape)
        yield from ((copy, value) for copy in rules.copies.get(path, ()))
        for name, part in zip(names, parts, strict=True):
            yield name, part.transpose(location.axes(part.ndim))


def _joined(arrays: list[np.ndarray], groups: int) -> np.ndarray:
    """Joins the outputs of linear layers, in groups that have outputs of each of them."""
    parts = [np.split(array, groups, axis=-1) for array in arrays]
    return np.concatenate([part for group in zip(*parts, strict=True) for part in group], axis=-1)


def labels_of(model: Model) -> tuple[int | None, list[int] | None]:
    """Returns the number of classes and the label words of a head with classes, or None."""
    if provenance_of(model).head not in CLASS_HEADS:
        return None, None
    ids = getattr(model.config, "label_ids", None)
    return model.config.num_labels, None if ids is None else list(ids)


def dtype_name(model: Model) -> str:
    """Returns the name of the dtype of a model's parameters."""
    return str(params_dtype(model))


def provenance_of(model: nnx.Module) -> Provenance:
    """Returns where a model came from; raises `InputError` if it did not come from `load`."""
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Provenance):
        raise InputError(
            "only models that came from fusion_jax.load have what this needs; fusion_jax.save "
            "saves any module, and fusion_jax.load_into reads it"
        )
    return provenance
