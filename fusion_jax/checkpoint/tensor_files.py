"""Reads tensors from the safetensors files of a folder."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from fusion_jax.checkpoint.files import INDEX, WEIGHTS, shard_names
from fusion_jax.errors import InputError

FLOATS: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The floating-point dtypes that can be read, by the names that safetensors gives them."""

_CHUNK = 1 << 21
"""Bytes that a thread reads at once."""
_ROWS = 64
"""Rows that are transposed at once, so that what is read and written stays in caches."""
_THREADS = 8
"""The most threads that read; more would wait for the memory."""


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Returns an array without values, which JAX can take on a CPU without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class TensorFiles:
    """The tensors in the safetensors files of a folder, read one at a time.

    Args:
        folder: A folder with ``model.safetensors``, or with an index and its shards.

    Raises:
        InputError: There are no weights, a shard is missing, a file is truncated or corrupt, or the
            index and the shards contradict each other.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._open: dict[str, safetensors.safe_open] = {}
        self._files: dict[str, Path] = {}
        self._starts: dict[str, int] = {}
        places = self._places()
        for file in sorted(set(places.values())) or [WEIGHTS]:
            try:
                handle = safetensors.safe_open(folder / file, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(
                    f"{folder / file} is truncated or corrupt ({error}); download it again"
                ) from None
            starts = _starts(folder / file)  # of a file that safetensors has checked
            for name in handle.keys():
                if places.get(name, file) != file:
                    continue  # the index says which of several shards counts
                if name in self._open:
                    raise InputError(
                        f"{folder}: two files have the tensor {name}, and {INDEX} does not say "
                        "which one counts"
                    )
                view = handle.get_slice(name)
                self._shapes[name] = tuple(view.get_shape())
                self._dtypes[name] = view.get_dtype()
                self._open[name] = handle
                self._files[name], self._starts[name] = folder / file, starts[name]
        absent = [name for name in places if name not in self._open]
        if absent:
            raise InputError(f"{folder}: {places[absent[0]]} lacks {absent[0]}, against {INDEX}")

    def _places(self) -> dict[str, str]:
        """Returns the file of each tensor; empty if there is one file without an index."""
        if (self.folder / WEIGHTS).is_file():
            return {}
        if not (self.folder / INDEX).is_file():
            pickled = any(self.folder.glob("pytorch_model*.bin"))
            hint = "; its weights are pickled: convert them to safetensors" if pickled else ""
            raise InputError(f"{self.folder} has no {WEIGHTS}{hint}")
        places = shard_names(self.folder / INDEX)
        missing = sorted({f for f in places.values() if not (self.folder / f).is_file()})
        if missing:
            raise InputError(f"{self.folder} lacks {', '.join(missing)}")
        return places

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, str]:
        """The dtype of each tensor by name, as safetensors calls it, such as ``"BF16"``."""
        return self._dtypes

    def float_sizes(self) -> Counter[str]:
        """Returns the number of values of each tensor with a floating-point dtype, by name."""
        return Counter(
            {n: math.prod(self._shapes[n]) for n, d in self._dtypes.items() if d in FLOATS}
        )

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        return self._open[name].get_tensor(name)

    def read_into(
        self, name: str, out: np.ndarray, *, transposed: bool = False, first: int = 0
    ) -> None:
        """Reads rows of one tensor into an array, cast to its dtype, without a second copy.

        The file is not mapped into memory: its pages would count as memory of the process, and the
        model would change, or the process crash, when another program overwrites the file. Threads
        share the work, as new memory and transposing take longer than reading.

        Args:
            name: The tensor.
            out: (rows, ...) the array; with ``transposed`` (columns, rows).
            transposed: Whether to write the transposed matrix.
            first: The first row to read; the shape of ``out`` says how many.
        """
        target = out.T if transposed else out
        stored = FLOATS.get(self._dtypes[name])
        if stored is None or not target.ndim:
            value = self.read(name)
            target[...] = value[first : first + len(target)] if target.ndim else value
            return
        if stored == target.dtype:  # NumPy copies plain integers faster, and lets threads run
            stored = np.dtype(f"u{stored.itemsize}")
            target = target.view(stored)
        width = math.prod(target.shape[1:])
        direct = stored == target.dtype and target.flags.c_contiguous
        count = _ROWS * max(1, _CHUNK // (_ROWS * max(width * stored.itemsize, 1)))

        def read_rows(i: int) -> None:
            part = target[i : i + count]
            values = part if direct else np.empty(part.shape, stored)
            with open(self._files[name], "rb", buffering=0) as file:
                file.seek(self._starts[name] + (first + i) * width * stored.itemsize)
                _fill(file, values)
            if not transposed:
                if not direct:
                    part[...] = values
                return
            # A few rows at a time, a bit apart: where their distance is a power of two, all values
            # of a column would have the same few places in the caches.
            apart = np.empty((_ROWS, width + 64 // stored.itemsize), stored)
            strip = apart[:, :width].reshape(_ROWS, *part.shape[1:])
            for j in range(0, len(part), _ROWS):
                rows = strip[: len(part) - j]
                rows[...] = values[j : j + _ROWS]
                part[j : j + _ROWS] = rows

        starts = range(0, len(target), count)
        if len(starts) > 1:
            list(self._threads.map(read_rows, starts))
        elif starts:
            read_rows(0)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))

    def equal(self, a: str, b: str) -> bool:
        """Returns whether two tensors have the same values, without reading all of them at once."""
        shape = self._shapes[a]
        if shape != self._shapes[b]:
            return False
        rows = max(1, _CHUNK // max(1, math.prod(shape[1:]) * 4))
        for i in range(0, shape[0] if shape else 1, rows):
            part = (min(rows, shape[0] - i), *shape[1:]) if shape else ()
            parts = [np.empty(part, FLOATS.get(self._dtypes[name], np.float64)) for name in (a, b)]
            for name, values in zip((a, b), parts, strict=True):
                self.read_into(name, values, first=i)
            if not np.array_equal(parts[0], parts[1]):
                return False
        return True


def _fill(file: io.FileIO | io.BufferedReader, array: np.ndarray) -> None:
    """Reads as many bytes as an array has."""
    view = array.view(np.uint8).reshape(-1).data
    while len(view):
        got = file.readinto(view)
        if not got:
            raise InputError(f"{file.name} is truncated; download it again")
        view = view[got:]


def _starts(path: Path) -> dict[str, int]:
    """Returns where the values of each tensor of a safetensors file begin, in bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }
