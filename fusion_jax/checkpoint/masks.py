"""Masks in files: one bit for each weight, beside a reference to the model that they are for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from flax import nnx

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.opening import open_checkpoint
from fusion_jax.checkpoint.writing import dtype_name, labels_of, provenance_of, write_artefact
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.linear_forms import Masked, find_forms


def save_masks(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Saves a masked model as its masks, one bit for each weight, and what differs from its base.

    The folder is an artefact like those of `save`: `fusion_jax.load` takes the weights of the base
    and applies the masks. What the base does not have, such as a trained head, is written in full.
    Where the base is gets written too, and a print of each of its tensors, so that other weights
    are refused.

    Args:
        model: A model from `fusion_jax.load` with `Masked` layers.
        folder: Where; must not exist or be empty. It appears whole or not at all.
        base: The model, on the hub or in a folder, whose weights are not written; None for the one
            that the model was loaded from.

    Returns:
        The folder.

    Raises:
        InputError: The model has no masks or did not come from `fusion_jax.load`, the base cannot
            be read, or the folder is not empty.
        OSError: Writing failed; nothing is left behind.

    Example:
        >>> save_masks(pruned, "masks")  # doctest: +SKIP
        >>> pruned = load("masks")  # doctest: +SKIP
    """
    masked = {path for path, form in find_forms(model).items() if isinstance(form, Masked)}
    if not masked:
        raise InputError("the model has no masks; fusion_jax.save keeps it whole")
    provenance = provenance_of(model)
    files.check_new_folder(folder)
    where = _reference(provenance) if base is None else _place(base)
    try:
        opened = _Base(where, provenance.head, *labels_of(model), dtype_name(model))
    except InputError as error:
        raise InputError(f"the base, {where['name']}, does not fit: {error}") from None
    flat = {
        files.name_of(path): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    shapes, prints, own = {}, {}, {}
    for name, value in flat.items():
        layer, _, leaf = name.rpartition(".")
        if layer in masked and leaf == "mask":
            shapes[name], own[name] = list(value.shape), np.packbits(value)
            continue
        theirs = opened.read(name)
        mask = flat[f"{layer}.mask"] if layer in masked and leaf == "kernel" else None
        fits = theirs is not None and theirs.shape == value.shape
        if (
            theirs is not None
            and fits
            and _print(_under(mask, theirs)) == _print(_under(mask, value))
        ):
            prints[name] = _print(theirs)
        else:
            own[name] = value
    fields = {"base": where, "shapes": shapes, "prints": prints}
    return write_artefact(model, folder, own.items(), {"masks": fields})


def rebase(folder: str | os.PathLike[str], base: str | os.PathLike[str]) -> None:
    """Writes down where the base of masks is now, after it was moved.

    Args:
        folder: What `save_masks` wrote.
        base: The base, on the hub or in a folder.

    Raises:
        InputError: The folder holds no masks, or this is not the base that they are for.
    """
    opened = open_checkpoint(folder, base=base)
    opened.read()
    assert opened.artefact is not None
    fields = {**opened.artefact, "masks": {**opened.artefact["masks"], "base": _place(base)}}
    path = opened.tensors.folder / files.FUSION
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    os.replace(new, path)


class MaskFiles(files.TensorFiles):
    """The tensors of a model that was saved as masks, each as `fusion_jax.save` would have it.

    Args:
        folder: What `save_masks` wrote.
        artefact: Its ``fusion.json``.
        base: Where the base is, or None for where it was.

    Raises:
        InputError: The base cannot be read, or is another model; of the weights, that is found out
            when they are read.
    """

    def __init__(
        self, folder: Path, artefact: Mapping[str, Any], base: str | os.PathLike[str] | None
    ):
        super().__init__(folder)
        about = artefact["masks"]
        self._masks = {name: tuple(shape) for name, shape in about["shapes"].items()}
        self._prints: dict[str, str] = about["prints"]
        where = about["base"] if base is None else _place(base)
        self.base: str = where["name"]
        given = [artefact[name] for name in ("head", "num_labels", "label_ids", "dtype")]
        try:
            self._base = _Base(where, *given)
        except InputError as error:
            raise InputError(
                f"{folder} holds masks for {self.base}, which cannot be read ({error}); if it is "
                f"elsewhere now: fusion-jax rebase {folder} BASE, or load(..., base=BASE)"
            ) from None
        self._shapes |= self._masks
        for name, text in self._prints.items():
            about = self._base.about(name)
            if about is None or not text.startswith(_said(*about)):
                self._refuse(name)
            self._shapes[name] = about[0]

    def _refuse(self, name: str) -> NoReturn:
        raise InputError(
            f"{self.base} is not the model that the masks in {self.folder} are for: {name} differs"
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if name in self._masks:
            shape = self._masks[name]
            bits = np.unpackbits(super().read(name), count=math.prod(shape))
            return bits.view(bool).reshape(shape)
        if name not in self._prints:
            return super().read(name)
        value = self._base.read(name)
        if value is None or _print(value) != self._prints[name]:
            self._refuse(name)
        layer, _, leaf = name.rpartition(".")
        mask = f"{layer}.mask"
        return _under(self.read(mask), value) if leaf == "kernel" and mask in self._masks else value


class _Base:
    """The variables of a base under our names, in a dtype.

    Args:
        where: Its name and revision.
        head: The head of the masked model.
        num_labels: Its classes, or None.
        label_ids: Its label words, or None.
        dtype: Its dtype.
    """

    def __init__(
        self,
        where: Mapping[str, Any],
        head: Any,
        num_labels: int | None,
        label_ids: list[int] | None,
        dtype: str,
    ):
        self._opened = open_checkpoint(
            where["name"],
            head=head,
            num_labels=num_labels,
            label_words=label_ids,
            dtype=dtype,
            revision=where["revision"],
        )
        flat = nnx.to_flat_state(nnx.state(self._opened.abstract))
        self._variables = {files.name_of(path): variable for path, variable in flat}

    def about(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """The shape and dtype of a variable; None if the files do not have it."""
        if name not in self._variables:
            return None
        want = self._variables[name].get_value()
        if not self._opened.find(name, want.shape).names:
            return None
        return want.shape, str(want.dtype)

    def read(self, name: str) -> np.ndarray | None:
        """A variable; None if the files do not have it."""
        if self.about(name) is None:
            return None
        variable = self._variables[name]
        found = self._opened.find(name, variable.get_value().shape)
        return np.asarray(self._opened.value(found, variable))


def _reference(provenance: Provenance) -> dict[str, Any]:
    """Where a model's files are, as far as another program can find them."""
    if provenance.base is not None:
        return _place(provenance.base)
    folder = Path(provenance.folder)
    if (folder / files.FUSION).is_file():
        _, fields = files.read_json(folder / files.FUSION)
        return fields["masks"]["base"] if "masks" in fields else _place(folder)
    # In the hub's cache: models--owner--name/snapshots/commit.
    if f"models--{provenance.name.replace('/', '--')}" in folder.parts:
        return {"name": provenance.name, "revision": folder.name}
    return _place(folder)


def _place(base: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(base).expanduser()
    return {"name": str(path.absolute()) if path.is_dir() else os.fspath(base), "revision": None}


def _under(mask: np.ndarray | None, value: np.ndarray) -> np.ndarray:
    return value if mask is None else np.where(mask, value, np.zeros((), value.dtype))


def _said(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} {'x'.join(map(str, shape))} "


def _print(value: np.ndarray) -> str:
    """Dtype, shape and checksum of an array: equal for equal bits."""
    digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return _said(value.shape, str(value.dtype)) + digest[:32]
