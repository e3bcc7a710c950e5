"""Reads tensors from the safetensors files of a folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from fusion_jax.checkpoint.files import INDEX, WEIGHTS, shard_names
from fusion_jax.errors import InputError

FLOATS = ("F64", "F32", "F16", "BF16")
"""The floating-point dtypes that can be read, as safetensors calls them."""


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
        places = self._places()
        for file in sorted(set(places.values())) or [WEIGHTS]:
            try:
                handle = safetensors.safe_open(folder / file, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(
                    f"{folder / file} is truncated or corrupt ({error}); download it again"
                ) from None
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
