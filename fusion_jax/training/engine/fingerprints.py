"""Fingerprints of models and batches, by which a resumed run checks that they are the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.surgery import path_name

SAMPLE = 256
"""Numbers sampled from each array, so that fingerprints of large models cost little."""


@on_auto_axes
def fingerprint_of_model(model: nnx.Module) -> str:
    """Returns 8 hexadecimal digits made from names, shapes and sampled bits of the variables."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    arrays = {
        path_name(path): jnp.asarray(variable[...])
        for path, variable in state
        if not isinstance(variable, nnx.RngState)
    }
    return _fingerprint(
        {path: (x.shape, np.asarray(_sampled(x))) for path, x in sorted(arrays.items())}
    )


def fingerprint_of_batch(batch: Mapping[str, np.ndarray]) -> str:
    """Returns 8 hexadecimal digits made from the names and bits of a batch."""
    return _fingerprint({name: (x.shape, np.asarray(x)) for name, x in sorted(batch.items())})


@jax.jit
def _sampled(x: Array) -> Array:
    return x.reshape(-1)[:: max(1, x.size // SAMPLE)]


def _fingerprint(arrays: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> str:
    checksum = 0
    for name, (shape, values) in arrays.items():
        checksum = zlib.crc32(f"{name} {shape} {values.dtype}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(values).tobytes(), checksum)
    return f"{checksum:08x}"
