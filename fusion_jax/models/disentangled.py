"""Disentangled attention, and the convolution beside a first layer, as in DeBERTa."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.models.bert_config import BertConfig, Disentangled
from fusion_jax.models.bert_layers import LayerFactory, SelfAttention, Shared
from fusion_jax.models.layers import Dropout, attention, split_key
from fusion_jax.nn.submlps import activation


def distance_rows(relative: Disentangled, length: int) -> np.ndarray:
    """Returns the row of the position embeddings for each pair of positions, (length, length).

    Rows are those of signed distances; with buckets, distances above half of the number of buckets
    share rows, in ranges that grow. Rounded in float32, as the models were trained.

    References:
        DeBERTa (arXiv 2006.03654), section 3.1; the buckets are those of its code since version 2.
    """
    places = np.arange(length)
    distance = places[:, None] - places[None]
    if relative.buckets > 0:
        middle, one = relative.buckets // 2, np.float32(1)
        far = np.maximum(np.abs(distance), middle).astype(np.float32)
        most = np.full(1, (relative.most - 1) / middle, np.float32)
        logs = np.log(far / np.float32(middle)) / np.log(most) * np.float32(middle - one)
        large = (np.ceil(logs) + middle).astype(int) * np.sign(distance)
        distance = np.where(np.abs(distance) <= middle, distance, large)
    return np.clip(distance + relative.span, 0, 2 * relative.span - 1)


class DisentangledAttention(SelfAttention):
    """Attention between contents, and between contents and relative positions.

    References:
        DeBERTa (arXiv 2006.03654), equation 4.
    """

    def __init__(self, config: BertConfig, index: int, make: LayerFactory):
        super().__init__(config, index, make)
        relative = config.blocks.relative
        assert relative is not None
        d, own = config.hidden_size, relative.span > 0 and not relative.shared
        self.relative = relative
        self.position_key = make.linear(d, d) if own and "c2p" in relative.kinds else None
        self.position_query = make.linear(d, d) if own and "p2c" in relative.kinds else None
        self.position_dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self, x: Float[Array, "b t d"], shared: Shared, key: Key[Array, ""] | None
    ) -> Float[Array, "b t d"]:
        """Attends from every position to the visible ones."""
        q, k, v = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        keys = split_key(key, 2)
        kinds = self.relative.kinds
        scale = 1 / math.sqrt(self.features * (1 + len(kinds)))
        bias = None
        if shared.relative is not None and kinds:
            table = self.position_dropout(shared.relative, keys[0])[None]
            rows = jnp.asarray(distance_rows(self.relative, x.shape[1]))
            parts = []
            if "c2p" in kinds:
                # Of each content at position i with the key of the distance i - j.
                places = self._heads((self.position_key or self.key)(table))[0]
                every = jnp.einsum("bthf,phf->bhtp", q, places)
                parts.append(jnp.take_along_axis(every, rows[None, None], axis=-1))
            if "p2c" in kinds:
                # Of each content at position j with the query of the distance i - j.
                places = self._heads((self.position_query or self.query)(table))[0]
                every = jnp.einsum("bshf,phf->bhsp", k, places)
                parts.append(jnp.take_along_axis(every, rows.T[None, None], axis=-1).mT)
            bias = scale * sum(parts[1:], start=parts[0])
        visible = shared.visible[None]
        y = attention(q, k, v, visible, self.dropout, keys[1], scale=scale, bias=bias)
        return self.out(y.reshape(*x.shape[:2], -1))


class Convolution(nnx.Module):
    """A convolution of the embeddings that is added to the output of the first layer."""

    def __init__(self, config: BertConfig, make: LayerFactory):
        convolution = config.blocks.convolution
        assert convolution is not None
        d = config.hidden_size
        self.act = convolution.act
        self.conv = make.conv(
            d, d, (convolution.size,), feature_group_count=convolution.groups, padding="SAME"
        )
        self.norm = make.norm(d)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        y: Float[Array, "b t d"],
        real: Bool[Array, "b t"],
        key: Key[Array, ""] | None,
    ) -> Float[Array, "b t d"]:
        """Returns the sum of the convolution of x and of y, normalized, and zeros at padding."""
        own = None if key is None else jax.random.fold_in(key, 1)
        here = real.astype(x.dtype)[..., None]
        z = activation(self.act)(self.dropout(self.conv(x) * here, own))
        return self.norm(y + z) * here
