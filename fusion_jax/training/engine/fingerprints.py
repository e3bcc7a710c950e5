"""Fingerprints of models and batches: whether a run is gone on with the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fusion_jax.meshes import on_auto_axes

SAMPLE = 256
"""Numbers of each array that are looked at, so that large models cost little."""


@on_auto_axes
def fingerprint_of_model(model: Any) -> str:
    """Eight hexadecimal digits of the names, shapes and sampled bits of a model's variables."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    arrays = {
        ".".join(map(str, path)): jnp.asarray(variable[...])
        for path, variable in state
        if not isinstance(variable, nnx.RngState)
    }
    return _fingerprint(
        {path: (x.shape, np.asarray(_sampled(x))) for path, x in sorted(arrays.items())}
    )


def fingerprint_of_batch(batch: Mapping[str, np.ndarray]) -> str:
    """Eight hexadecimal digits of the names and bits of a batch."""
    return _fingerprint({name: (x.shape, np.asarray(x)) for name, x in sorted(batch.items())})


@jax.jit
def _sampled(x: Any) -> Any:
    return x.reshape(-1)[:: max(1, x.size // SAMPLE)]


def _fingerprint(arrays: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    found = 0
    for name, (shape, values) in arrays.items():
        found = zlib.crc32(f"{name} {shape} {values.dtype}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(values).tobytes(), found)
    return f"{found:08x}"
