"""Fingerprints of models and data, by which a resumed run checks that they are the same."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt

from fusion_jax.checkpoint.files import TOKENIZER
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.surgery import path_name
from fusion_jax.training.engine.batches import BatchSource

SAMPLE = 256
"""Numbers sampled from each array, so that fingerprints of large models cost little."""
_VOCABULARY = re.compile("tokenizer|special|added|vocab|merges|spiece|sentencepiece")
MOST_BATCHES = 100_000
"""Batches of an epoch that are read for a fingerprint; of more, these are spread over the epoch."""


@on_auto_axes
def fingerprint_of_model(model: nnx.Module) -> str:
    """Returns 8 hexadecimal digits made from names, shapes and sampled bits of the variables."""
    return _fingerprint(
        {path: (x.shape, np.asarray(_sampled(x))) for path, x in _arrays_of(model).items()}
    )


@on_auto_axes
def fingerprint_of_all_bits(model: nnx.Module) -> str:
    """Returns 8 hexadecimal digits made from names, shapes and all bits of the variables."""
    arrays = _arrays_of(model)
    sums = bit_sums(list(arrays.values()))
    facts = [
        [path, x.shape, str(x.dtype), total]
        for (path, x), total in zip(arrays.items(), sums, strict=True)
    ]
    return fingerprint_of_values(facts)


def _arrays_of(model: nnx.Module) -> dict[str, Array]:
    """Returns the variables of a model by path, in the order of the paths."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    arrays = {
        path_name(path): jnp.asarray(variable[...])
        for path, variable in state
        if not isinstance(variable, nnx.RngState)
    }
    return dict(sorted(arrays.items()))


def bit_sums(arrays: Sequence[Array]) -> list[int]:
    """Returns a checksum of the bits of each array, computed where the array is.

    Args:
        arrays: Arrays of any shape, dtype and sharding.

    Returns:
        Numbers below 2^32, the same on all backends. One changed number always changes its sum.

    References:
        The mixing is lowbias32 of C. Wellons' hash-prospector.
    """
    # Small programs, which arrays of one shape share. Each is waited for: with several at a time,
    # processes could wait for each other in different ones.
    return [int(_bit_sum(x)) for x in arrays]


@jax.jit
def _bit_sum(x: Array) -> UInt[Array, ""]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype != bool:
        size = 8 * min(4, x.dtype.itemsize)
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{size}"))
    bits = x.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        # Neither a number for each place nor a reshape, which would move shards between devices.
        place = place * jnp.uint32(0x01000193)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # One to one, so that one changed number changes the sum; and it mixes the bits, so that many
    # changes, such as of all signs, do not cancel.
    mixed = bits ^ place * jnp.uint32(0x9E3779B1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return (mixed ^ (mixed >> jnp.uint32(16))).sum(dtype=jnp.uint32)


def fingerprint_of_batches(source: BatchSource) -> str:
    """Returns 8 hexadecimal digits made from names and bits of the batches of the first epoch."""
    count = len(source)
    steps = np.unique(np.linspace(0, count - 1, min(count, MOST_BATCHES)).astype(int))
    return fingerprint_of_values(sorted(source(int(step)).items()) for step in steps)


def fingerprint_of_tokenizer(model: nnx.Module) -> str | None:
    """Returns 8 hexadecimal digits made from the tokenizer's files, or None without such files."""
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Provenance):
        return None
    folder = Path(provenance.folder)
    # What else is copied beside the weights concerns other things, such as how texts are generated.
    files = [folder / name for name in TOKENIZER if _VOCABULARY.match(name)]
    found = sorted((file.name, file) for file in files if file.is_file())
    return fingerprint_of_values(found) if found else None


def fingerprint_of_values(values: object) -> str:
    """Returns 8 hexadecimal digits made from nested values.

    Args:
        values: Texts, numbers, arrays, None, files (`pathlib.Path`: their bytes), and mappings and
            iterables of such values.
    """
    return f"{_checksum(values, 0):08x}"


def _checksum(value: object, start: int) -> int:
    # What the value is, and how long it is, so that parts cannot move from one value to the next.
    def text(value: str) -> int:
        raw = value.encode("utf-8", "surrogatepass")
        return zlib.crc32(raw, zlib.crc32(f"text {len(raw)} ".encode(), start))

    if isinstance(value, str):
        return text(value)
    if isinstance(value, os.PathLike):
        return zlib.crc32(Path(value).read_bytes(), start)
    if isinstance(value, np.ndarray | jax.Array) and value.dtype != object:
        value = np.asarray(value)
        start = zlib.crc32(f"{value.dtype} {value.shape}".encode(), start)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), start)
    if isinstance(value, Mapping):
        value = value.items()
    if isinstance(value, Iterable):
        start = zlib.crc32(b"(", start)
        for each in value:
            start = _checksum(each, start)
        return zlib.crc32(b")", start)
    return text(repr(value))


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
