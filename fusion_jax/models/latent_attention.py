"""Attention whose keys and values are computed from a few numbers for each token, as in DeepSeek.

Axis letters in shapes: b examples, t positions, s slots of the cache, h heads, d features of the
model, r rank of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.models.cache import CacheUpdate
from fusion_jax.models.layers import Dropout, RmsNorm, attention
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import LINEAR, NORM, KeyRule


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The sizes of latent attention; the features with positions are ``head_dim`` of the model.

    Args:
        query_rank: The rank of queries; None if one matrix makes them.
        rank: The rank of keys and values.
        plain: The features of queries and keys without positions.
        values: The features of values.
    """

    query_rank: int | None
    rank: int
    plain: int
    values: int


class LatentAttention(nnx.Module):
    """Multi-head latent attention.

    A token has r numbers, from which the keys and values of all heads are computed, and one key
    with its position, which all heads share. The cache holds only these.

    References:
        DeepSeek-V2 (arXiv 2405.04434), section 2.1; for the scale YaRN (arXiv 2309.00071).
    """

    def __init__(self, config: Any, rope: Rope, make: Any):
        d, f, heads, sizes = (
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.latent,
        )
        self.rope, self.features, self.sizes = rope, f, sizes
        width = sizes.plain + f
        down, up = (
            lambda *shape: make.linear(*shape, use_bias=config.qkv_bias),
            lambda *shape: make.linear(*shape, use_bias=False),
        )
        norm = lambda n: RmsNorm(n, epsilon=1e-6, param_dtype=make.dtype, rngs=make.rngs)  # noqa: E731
        rank = sizes.query_rank
        self.query = up(d, heads * width) if rank is None else None
        self.query_down = None if rank is None else down(d, rank)
        self.query_rank_norm = None if rank is None else norm(rank)
        self.query_up = None if rank is None else up(rank, heads * width)
        self.down = down(d, sizes.rank + f)
        self.rank_norm = norm(sizes.rank)
        self.up = up(sizes.rank, heads * (sizes.plain + sizes.values))
        self.out = make.linear(heads * sizes.values, d, use_bias=config.out_bias)
        self.dropout = Dropout(config.attention_dropout)
        self.scale = width**-0.5
        if rope.rope_type != "default" and rope.mscale_all_dim and rope.factor > 1:
            self.scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2

    def __call__(
        self,
        x: Float[Array, "b t d"],
        visible: Bool[Array, "b 1 t s"],
        cache: CacheUpdate,
        context: Mapping[Rope | None, Float[Array, "b t *half"]],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        b, t, _ = x.shape
        plain, own = self.sizes.plain, context[self.rope]
        if self.query is not None:
            q = self.query(x)
        else:
            assert self.query_up and self.query_rank_norm and self.query_down
            q = self.query_up(self.query_rank_norm(self.query_down(x)))
        q = q.reshape(b, t, -1, plain + self.features)
        q = jnp.concatenate([q[..., :plain], self.rope.rotated(q[..., plain:], own)], -1)
        latent, shared = jnp.split(self.down(x), [self.sizes.rank], -1)
        shared = self.rope.rotated(shared[:, :, None], own)
        shared, latent = cache.extended(shared, self.rank_norm(latent)[:, :, None])
        both = self.up(latent[:, :, 0]).reshape(b, latent.shape[1], q.shape[2], -1)
        k, v = jnp.split(both, [plain], -1)
        shared = jnp.broadcast_to(shared, (*k.shape[:3], self.features))
        k = jnp.concatenate([k, shared], -1)
        y = attention(q, k, v, visible, self.dropout, key, scale=self.scale)
        return self.out(y.reshape(b, t, -1))


_NAMES = {
    "query_down": "q_a_proj",
    "query_up": "q_b_proj",
    "down": "kv_a_proj_with_mqa",
    "up": "kv_b_proj",
}
_NORMS = {"query_rank_norm": "q_a_layernorm", "rank_norm": "kv_a_layernorm"}
LATENT_RULES = tuple(
    KeyRule(f"layers.{{l}}.attention.{a}", f"layers.{{l}}.self_attn.{b}", leaves)
    for names, leaves in ((_NAMES, LINEAR), (_NORMS, NORM))
    for a, b in names.items()
)
"""The key rules of what other attention does not have."""
