"""Reads masks from files: one bit for each weight, and the weights from the base model."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import NoReturn, TypedDict

import numpy as np
from flax import nnx

from fusion_jax.checkpoint.reading import Checkpoint
from fusion_jax.checkpoint.tensor_files import TensorFiles
from fusion_jax.errors import InputError
from fusion_jax.nn.surgery import path_name


class BaseModel:
    """The variables of the model that masks belong to, under the names of this library.

    Args:
        opened: The checkpoint of the base model.
    """

    def __init__(self, opened: Checkpoint):
        self._opened = opened
        flat = nnx.to_flat_state(nnx.state(opened.abstract))
        self._variables = {path_name(path): variable for path, variable in flat}

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str] | None:
        """Returns the shape and dtype of a variable; None if the files do not have it."""
        if name not in self._variables:
            return None
        want = self._variables[name].get_value()
        if not self._opened.find(name, want.shape).names:
            return None
        return want.shape, str(want.dtype)

    def read(self, name: str) -> np.ndarray | None:
        """Reads a variable; None if the files do not have it."""
        if self.shape_and_dtype(name) is None:
            return None
        variable = self._variables[name]
        found = self._opened.find(name, variable.get_value().shape)
        return np.asarray(self._opened.value(found, variable))


class MaskFields(TypedDict):
    """The field ``masks`` of ``fusion.json``, see `fusion_jax.save_masks`."""

    base: BaseReference
    shapes: dict[str, list[int]]
    prints: dict[str, str]


class MaskFiles(TensorFiles):
    """The tensors of a model that was saved as masks, each as `fusion_jax.save` would write it.

    Args:
        folder: The folder that `fusion_jax.save_masks` wrote.
        fields: The field ``masks`` of its ``fusion.json``.
        base: The base model.
        base_name: Its hub id or folder, for error messages.

    Raises:
        InputError: The base is another model; different weights are noticed when they are read.
    """

    def __init__(self, folder: Path, fields: MaskFields, base: BaseModel, base_name: str):
        super().__init__(folder)
        self._masks = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        self._fingerprints: dict[str, str] = fields["prints"]
        self._base = base
        self._base_name = base_name
        self._shapes |= self._masks
        for name, fingerprint in self._fingerprints.items():
            found = base.shape_and_dtype(name)
            if found is None or not fingerprint.startswith(_fingerprint_start(*found)):
                self._refuse(name)
            self._shapes[name] = found[0]

    def _refuse(self, name: str) -> NoReturn:
        raise InputError(
            f"{self._base_name} is not the model that the masks in {self.folder} belong to: {name} "
            "differs"
        )

    def read_into(
        self, name: str, out: np.ndarray, *, transposed: bool = False, first: int = 0
    ) -> None:
        """Reads one tensor into an array, whose dtype it gets."""
        assert not transposed and not first  # artefacts have our layout
        out[...] = self.read(name)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        if name in self._masks:
            shape = self._masks[name]
            bits = np.unpackbits(super().read(name), count=math.prod(shape))
            return bits.view(bool).reshape(shape)
        if name not in self._fingerprints:
            return super().read(name)
        value = self._base.read(name)
        if value is None or fingerprint(value) != self._fingerprints[name]:
            self._refuse(name)
        layer, _, leaf = name.rpartition(".")
        mask = f"{layer}.mask"
        return masked(self.read(mask), value) if leaf == "kernel" and mask in self._masks else value


class BaseReference(TypedDict):
    """The place of a base model in files: an absolute path or a hub id, and its revision."""

    name: str
    revision: str | None


def base_reference(base: str | os.PathLike[str]) -> BaseReference:
    """Returns what files say about the place of a base model: absolute path or hub id."""
    path = Path(base).expanduser()
    return {"name": str(path.absolute()) if path.is_dir() else os.fspath(base), "revision": None}


def masked(mask: np.ndarray | None, value: np.ndarray) -> np.ndarray:
    """Returns the value with zeros where the mask is false; unchanged if there is no mask."""
    return value if mask is None else np.where(mask, value, np.zeros((), value.dtype))


def fingerprint(value: np.ndarray) -> str:
    """Returns dtype, shape and checksum of an array as text: equal texts mean equal bits."""
    digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return _fingerprint_start(value.shape, str(value.dtype)) + digest[:32]


def _fingerprint_start(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} {'x'.join(map(str, shape))} "
