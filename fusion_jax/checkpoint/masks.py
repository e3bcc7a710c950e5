"""Writes masks to files: one bit for each weight, beside a reference to the base model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from flax import nnx

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.mask_files import BaseReference, base_reference, fingerprint, masked
from fusion_jax.checkpoint.opening import open_base, open_checkpoint
from fusion_jax.checkpoint.writing import dtype_name, labels_of, provenance_of, write_artefact
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.linear_forms import Masked, find_forms
from fusion_jax.nn.surgery import path_name


def save_masks(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Saves a masked model as one bit for each masked weight.

    `fusion_jax.load` reads the folder like any artefact: it loads the weights from the base model
    and applies the masks. The folder therefore holds only the masks, the tensors that differ from
    the base (such as a trained head), the name of the base, and a fingerprint of each of its
    tensors. Loading refuses a base with other weights. If the base moves, see `rebase`.

    Args:
        model: A model from `fusion_jax.load` whose layers were masked, for example by
            `fusion_jax.MaskPrune` or `fusion_jax.static_prune`.
        folder: The folder to write; it must not exist or be empty. Writing is atomic.
        base: The hub id or folder of the base model, whose weights are not written. None for the
            one that the model was loaded from.

    Returns:
        The folder.

    Raises:
        InputError: The model has no masks or did not come from `fusion_jax.load`, the base cannot
            be read, or the folder is not empty.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.

    Example:
        >>> pruned, report = compress(model, MaskPrune(keep=0.5), key=key)  # doctest: +SKIP
        >>> save_masks(pruned, "masks")  # doctest: +SKIP
        >>> pruned = load("masks")  # doctest: +SKIP
    """
    layers = {path for path, form in find_forms(model).items() if isinstance(form, Masked)}
    if not layers:
        raise InputError("the model has no masks; save it with fusion_jax.save")
    provenance = provenance_of(model)
    files.check_new_folder(folder)
    reference = _reference(provenance) if base is None else base_reference(base)
    try:
        base_model = open_base(reference, provenance.head, *labels_of(model), dtype_name(model))
    except InputError as error:
        raise InputError(f"the base model {reference['name']} does not fit: {error}") from None
    flat = {
        path_name(path): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    shapes, fingerprints, own = {}, {}, {}
    for name, value in flat.items():
        layer, _, leaf = name.rpartition(".")
        if layer in layers and leaf == "mask":
            shapes[name], own[name] = list(value.shape), np.packbits(value)
            continue
        original = base_model.read(name)
        # Weights that the mask sets to 0 may differ from the base.
        mask = flat[f"{layer}.mask"] if layer in layers and leaf == "kernel" else None
        if (
            original is not None
            and original.shape == value.shape
            and fingerprint(masked(mask, original)) == fingerprint(masked(mask, value))
        ):
            fingerprints[name] = fingerprint(original)
        else:
            own[name] = value
    fields = {"base": reference, "shapes": shapes, "prints": fingerprints}
    return write_artefact(model, folder, own.items(), {"masks": fields})


def rebase(folder: str | os.PathLike[str], base: str | os.PathLike[str]) -> None:
    """Updates the path of the base model that a mask artefact refers to.

    The weights of the new base are compared with the fingerprints in the artefact first.

    Args:
        folder: The folder that `save_masks` wrote; its ``fusion.json`` is replaced atomically.
        base: The hub id of the base model, or the folder where it is now.

    Raises:
        InputError: The folder does not hold masks, or ``base`` is not the model that they belong
            to.

    Example:
        >>> save_masks(pruned, "masks")  # doctest: +SKIP
        >>> rebase("masks", "/models/bert-base-uncased")  # doctest: +SKIP
    """
    opened = open_checkpoint(folder, base=base)
    opened.read()
    assert opened.artefact is not None
    masks = {**opened.artefact["masks"], "base": base_reference(base)}
    fields = {**opened.artefact, "masks": masks}
    files.write_text(opened.tensors.folder / files.FUSION, json.dumps(fields, indent=2) + "\n")


def _reference(provenance: Provenance) -> BaseReference:
    """Returns where a model's files are, in terms that another program can use."""
    if provenance.base is not None:
        return base_reference(provenance.base)
    folder = Path(provenance.folder)
    if (folder / files.FUSION).is_file():
        _, fields = files.read_json(folder / files.FUSION)
        return fields["masks"]["base"] if "masks" in fields else base_reference(folder)
    # In the hub's cache: models--owner--name/snapshots/commit.
    if f"models--{provenance.name.replace('/', '--')}" in folder.parts:
        return {"name": provenance.name, "revision": folder.name}
    return base_reference(folder)
