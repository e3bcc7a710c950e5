"""Reads matrices that are stored in eight bits, as FP8 checkpoints of DeepSeek-V3 and Qwen3 are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fusion_jax.checkpoint.tensor_files import FLOATS, TensorFiles
from fusion_jax.errors import InputError

_SCALE = "_scale_inv"
_ROWS = 1024
"""Rows that are computed at once."""


class Fp8Files(TensorFiles):
    """The tensors in the files of a folder, where some are computed from eight bits and scales.

    A matrix (rows, columns) is there in E4M3, with one number for each block of it, by which the
    block is multiplied, or with one number in all. The scales of activations are left out: outputs
    are those of the matrices in full precision.

    Args:
        folder: A folder with ``model.safetensors``, or with an index and its shards.
        settings: The ``quantization_config`` of its ``config.json``.

    Raises:
        InputError: As for `TensorFiles`, or a matrix has no scales that fit it.

    References:
        DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        super().__init__(folder)
        block = settings.get("weight_block_size")
        valid = isinstance(block, list | tuple) and len(block) == 2
        if block is not None and not (valid and all(type(n) is int and n > 0 for n in block)):
            raise InputError(f"{folder}: weight_block_size must be two sizes; got {block!r}")
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])
        self._scales: dict[str, np.ndarray] = {}
        for name in [n.removesuffix(_SCALE) for n in self._shapes if n.endswith(_SCALE)]:
            scales, shape = name + _SCALE, self._shapes.get(name)
            if self._dtypes.get(name) != "F8_E4M3" or self._dtypes[scales] not in FLOATS:
                raise InputError(f"{folder}: {name} and {scales} are not a matrix in FP8")
            assert shape is not None
            wanted = () if self._block is None else tuple(map(_parts, shape, self._block))
            value = np.empty(self._shapes[scales], np.float32)
            super().read_into(scales, value)
            if len(shape) != 2 or (value.shape != wanted and not (value.size == 1 and not wanted)):
                raise InputError(
                    f"{folder}: {scales} must be {wanted} for {name}, {shape}; got {value.shape}"
                )
            self._scales[name] = value.reshape(wanted)
            self._dtypes[name] = "BF16"
            base = name.rpartition(".")[0]
            for other in (scales, f"{base}.activation_scale", f"{base}.input_scale"):
                self._shapes.pop(other, None)
                self._dtypes.pop(other, None)

    def _matrix(self, name: str, first: int, count: int) -> np.ndarray:
        """Returns rows of a matrix in float32."""
        columns, scale = self._shapes[name][1], self._scales[name]
        with open(self._files[name], "rb") as file:
            file.seek(self._starts[name] + first * columns)
            stored = np.frombuffer(file.read(count * columns), jnp.float8_e4m3fn)
        value = stored.reshape(count, columns).astype(np.float32)
        if self._block is not None:
            rows = (first + np.arange(count)) // self._block[0]
            scale = np.repeat(scale[rows], self._block[1], axis=1)[:, :columns]
        value *= scale
        return value

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        if name not in self._scales:
            return super().read(name)
        return self._matrix(name, 0, self._shapes[name][0])

    def read_into(
        self, name: str, out: np.ndarray, *, transposed: bool = False, first: int = 0
    ) -> None:
        """Reads rows of one tensor into an array, see `TensorFiles.read_into`."""
        if name not in self._scales:
            super().read_into(name, out, transposed=transposed, first=first)
            return
        target = out.T if transposed else out
        for i in range(0, len(target), _ROWS):
            part = target[i : i + _ROWS]
            part[...] = self._matrix(name, first + i, len(part))


def _parts(size: int, block: int) -> int:
    return -(-size // block)
