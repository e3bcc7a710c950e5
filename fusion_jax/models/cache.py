"""The cache of decoders, and what each position attends to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

KeysValues = tuple[Float[Array, "b s g f"], Float[Array, "b s g v"]]
"""The keys and the values of attention."""


class Cache(NamedTuple):
    """The keys and values of the tokens that a decoder has read, in a fixed number of slots.

    Args:
        keys: (b, s, g, f) for each layer: s slots, g key-value heads of f features.
        values: (b, s, g, v) for each layer.
        real: (b, s), which slots hold a token that is not padding.
        length: The number of slots in use.
    """

    keys: tuple[Float[Array, "b s g f"], ...]
    values: tuple[Float[Array, "b s g v"], ...]
    real: Bool[Array, "b s"]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls,
        b: int,
        slots: int,
        layers: int,
        groups: int,
        f: int,
        dtype: Any,
        *,
        v: int | None = None,
    ) -> Cache:
        """Returns a cache without tokens; values have ``f`` features too unless ``v`` is given."""
        sizes = f, f if v is None else v
        keys, values = ((jnp.zeros((b, slots, groups, n), dtype),) * layers for n in sizes)
        return cls(keys, values, jnp.zeros((b, slots), bool), jnp.int32(0))


class Chunk(NamedTuple):
    """Says that tokens attend to those before them in their chunk of the text alone.

    Args:
        size: The number of tokens of a chunk.
    """

    size: int


Reach = int | Chunk | None
"""How far back a token attends: so many slots with its own, the slots of its chunk, or all."""


class Window(NamedTuple):
    """What the tokens of one call can attend to: the tokens in the cache, and each other.

    Args:
        visible: (b, 1, t, s), the slots that each token attends to.
        real: (b, s), which slots hold a token that is not padding, including this call's tokens.
        slots: (t,) the slots of this call's tokens.
        positions: (b, t) the position of each token in its text, without padding.
    """

    visible: Bool[Array, "b 1 t s"]
    real: Bool[Array, "b s"]
    slots: Int[Array, " t"]
    positions: Int[Array, "b t"]


def window(real: Bool[Array, "b t"], cache: Cache | None, size: Reach = None) -> Window:
    """Returns what the tokens of a causal decoder can attend to.

    Args:
        real: (b, t), where this call's tokens are not padding.
        cache: The cache after earlier calls, if there is one.
        size: What a token attends to.
    """
    t = real.shape[1]
    slots = jnp.arange(t)
    if cache is not None:
        slots = slots + cache.length
        real = lax.dynamic_update_slice(cache.real, real, (jnp.int32(0), cache.length))
    counts = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(counts[:, slots] - 1, 0)
    distance = slots[:, None] - jnp.arange(real.shape[1])[None]
    if isinstance(size, Chunk):
        begin = real.argmax(axis=1).astype(slots.dtype)[:, None]  # chunks begin after padding
        own, all_ = ((s[None] - begin) // size.size for s in (slots, jnp.arange(real.shape[1])))
        seen = (distance >= 0)[None] & (own[:, :, None] == all_[:, None])
        return Window(seen[:, None] & real[:, None, None], real, slots, positions)
    seen = (distance >= 0) & (distance < (real.shape[1] if size is None else size))
    return Window(seen[None, None] & real[:, None, None], real, slots, positions)


class CacheUpdate:
    """Updates a cache layer by layer, within one call of a model.

    Args:
        cache: The cache before the call; None for a call without a cache.
    """

    def __init__(self, cache: Cache | None):
        self.cache = cache
        self._new: list[tuple[Array, Array]] = []
        self._kept: dict[int, KeysValues] = {}

    def extended(
        self, key: Float[Array, "b t g f"], value: Float[Array, "b t g v"], keep: int | None = None
    ) -> KeysValues:
        """Adds the keys and values of the next layer; returns them with those of the cache.

        Args:
            key: The keys.
            value: The values.
            keep: The name under which `reused` returns the same to a later layer, if any.
        """
        both = self._extended(key, value)
        if keep is not None:
            self._kept[keep] = both
        return both

    def reused(self, name: int) -> KeysValues:
        """Returns keys and values that an earlier layer kept, for the next, which has none."""
        state = self.state()
        if state is not None:
            self.replace(*state)
        return self._kept[name]

    def _extended(self, key: Array, value: Array) -> KeysValues:
        if self.cache is None:
            return key, value
        layer, zero = len(self._new), jnp.int32(0)
        at = (zero, self.cache.length, zero, zero)
        old = self.cache.keys[layer], self.cache.values[layer]
        k, v = (lax.dynamic_update_slice(o, n, at) for o, n in zip(old, (key, value), strict=True))
        self._new.append((k, v))
        return k, v

    def state(self) -> tuple[Array, Array] | None:
        """Returns what the cache holds for the next layer; None without a cache."""
        layer = len(self._new)
        return None if self.cache is None else (self.cache.keys[layer], self.cache.values[layer])

    def replace(self, first: Array, second: Array) -> None:
        """Replaces what the cache holds for the next layer, where that is not keys and values."""
        if self.cache is not None:
            self._new.append((first, second))

    def result(self, seen: Window) -> Cache | None:
        """Returns the cache after all layers."""
        if self.cache is None:
            return None
        keys, values = zip(*self._new, strict=True)
        return Cache(keys, values, seen.real, self.cache.length + len(seen.slots))
