"""Saves models as artefacts, and exports them as Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fusion_jax.checkpoint import files
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.rules import KeyRules
from fusion_jax.nn.linear_forms import find_forms, multiplied_out, params_dtype
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import replaced
from fusion_jax.report import Report

_ALIGNED = 16
"""Bytes that the width of an exported expert is a multiple of."""


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
        (files.name_of(path), np.asarray(variable.get_value()))
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
    provenance = provenance_of(model)
    config = model.config
    num_labels, label_ids = labels_of(model)
    fields = {
        "format": files.FORMAT,
        "base": provenance.name,
        "model_type": config.model_type,
        "head": provenance.head,
        "num_labels": num_labels,
        "label_ids": label_ids,
        "dtype": dtype_name(model),
        "sites": {site.path: site.mlp.spec() for site in sites(model)},
        "forms": {path: form.spec() for path, form in find_forms(model).items()},
        "history": [json.loads(step) for step in provenance.history],
        "versions": {
            name.replace("-", "_"): version(name) for name in ("fusion-jax", "jax", "flax")
        },
        **(fields or {}),
    }
    with files.new_folder(folder) as new:
        files.write_tensors(new, tensors)
        (new / files.CONFIG).write_text(provenance.config, encoding="utf-8")
        _write_json(new / files.FUSION, fields)
        if report is not None:
            _write_json(new / "report.json", report.to_json())
        files.copy_tokenizer(Path(provenance.folder), new)
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
    provenance = provenance_of(model)
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
    head: Any = provenance.head
    fields = {**json.loads(provenance.config), **widths}
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
        files.copy_tokenizer(Path(provenance.folder), new)
    return Path(folder)


def _exported(model: Model, rules: KeyRules) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model under their Hugging Face names, one after the other."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        source = rules.source(files.name_of(path))
        value = np.asarray(variable.get_value())
        parts = value if source.stacked else [value]
        names = source.tensors(source.names[0], value.shape)
        for name, part in zip(names, parts, strict=True):
            yield name, part.T if source.transposed else part


def labels_of(model: Model) -> tuple[int | None, list[int] | None]:
    """The classes of a model's classification head, and its label words if it has such."""
    if provenance_of(model).head != "classification":
        return None, None
    ids = getattr(model.config, "label_ids", None)
    return model.config.num_labels, None if ids is None else list(ids)


def dtype_name(model: Model) -> str:
    """The name of the dtype of a model's parameters."""
    return str(params_dtype(model))


def provenance_of(model: nnx.Module) -> Provenance:
    """Where a model came from; raises `InputError` if it did not come from `load`."""
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Provenance):
        raise InputError("only models that came from fusion_jax.load can be saved and exported")
    return provenance


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
