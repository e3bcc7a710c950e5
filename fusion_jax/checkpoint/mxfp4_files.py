"""Reads matrices of experts that are stored in MXFP4, as gpt-oss is: four bits for each weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fusion_jax.checkpoint.tensor_files import TensorFiles
from fusion_jax.errors import InputError

_HALF = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
VALUES = np.concatenate([_HALF, -_HALF])
"""The numbers that four bits stand for, in the order of the bits."""
_BIAS = 127
"""Files store each exponent plus this number."""
_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4Files(TensorFiles):
    """The tensors in the files of a folder, where some are computed from MXFP4.

    A matrix (in, out) of each expert is there as (e, out, in / 32, 16) bytes of two numbers each,
    the first in the lower bits, and as (e, out, in / 32) exponents of powers of two, by which the
    blocks of 32 numbers are multiplied.

    Args:
        folder: A folder with ``model.safetensors``, or with an index and its shards.

    Raises:
        InputError: As for `TensorFiles`, or blocks and exponents do not fit together.

    References:
        OCP Microscaling Formats (MX) Specification, version 1.0, sections 5.2 and 6.3.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._packed: set[str] = set()
        for name in [n.removesuffix(_BLOCKS) for n in self._shapes if n.endswith(_BLOCKS)]:
            blocks, scales = name + _BLOCKS, name + _SCALES
            *shape, size = self._shapes[blocks]
            kinds = {self._dtypes.get(each) for each in (blocks, scales)}
            if len(shape) != 3 or size != 16 or self._shapes.get(scales) != tuple(shape):
                raise InputError(f"{folder}: {blocks} and {scales} are not a tensor in MXFP4")
            if kinds != {"U8"}:
                raise InputError(f"{folder}: {blocks} and {scales} are not bytes, as in MXFP4")
            self._packed.add(name)
            count, rows, groups = shape
            self._shapes[name], self._dtypes[name] = (count, groups * 32, rows), "BF16"
            for each in (blocks, scales):
                del self._shapes[each], self._dtypes[each]

    def _expert(self, name: str, e: int) -> np.ndarray:
        """Returns the matrix (in, out) of one expert in float32, which holds all values."""
        blocks, scales = (
            self._open[name + end].get_slice(name + end)[e] for end in (_BLOCKS, _SCALES)
        )
        pairs = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
        values = pairs.reshape(*blocks.shape[:2], -1)
        scaled = np.ldexp(values, scales[..., None].astype(np.int32) - _BIAS)
        return scaled.reshape(len(scaled), -1).T

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        if name not in self._packed:
            return super().read(name)
        return np.stack([self._expert(name, e) for e in range(self._shapes[name][0])])

    def read_into(
        self, name: str, out: np.ndarray, *, transposed: bool = False, first: int = 0
    ) -> None:
        """Reads rows of one tensor into an array, see `TensorFiles.read_into`; of one expert."""
        if name not in self._packed:
            super().read_into(name, out, transposed=transposed, first=first)
            return
        rows = self._shapes[name][1]
        assert not transposed and not first % rows and len(out) == rows  # as packed experts are
        out[...] = self._expert(name, first // rows)
