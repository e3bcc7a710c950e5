"""The heads of encoders."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from fusion_jax.models.bert_config import BertConfig
from fusion_jax.models.bert_layers import LayerFactory
from fusion_jax.models.layers import Dropout, split_key
from fusion_jax.mpo import AnyEmbed
from fusion_jax.nn.submlps import activation


class ClassificationHead(nnx.Module):
    """Logits of a text: one linear layer after BERT's pooler, otherwise two."""

    def __init__(self, config: BertConfig, make: LayerFactory):
        d, blocks = config.hidden_size, config.blocks
        self.act, self.pooling = config.head_act, blocks.pooling
        self.dense = make.linear(d, d, use_bias=blocks.head_bias) if self.act else None
        self.norm = make.norm(d) if blocks.head_norm else None
        self.out = make.linear(d, config.num_labels)
        rate = config.sequence_dropout
        self.dropout = Dropout(config.head_dropout if rate is None else rate)
        rate = blocks.head_input_dropout
        self.input_dropout = self.dropout if rate is None else Dropout(rate)

    def __call__(
        self, x: Float[Array, "b s d"], real: Bool[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b classes"]:
        """Returns the logits of hidden states, or of pooled states where s is 1.

        ``real`` says where tokens are not padding.
        """
        keys = split_key(key, 2)
        if self.pooling != "late":
            x = x[:, 0] if self.pooling == "first" else _mean(x, real)
        x = self.input_dropout(x, keys[0])
        if self.dense is not None:
            x = activation(self.act)(self.dense(x))
            x = self.dropout(x if self.norm is None else self.norm(x), keys[1])
        x = self.out(x)
        return _mean(x, real) if self.pooling == "late" else x


def _mean(x: Float[Array, "b t d"], real: Bool[Array, "b t"]) -> Float[Array, "b d"]:
    """Returns the mean over the positions that are not padding."""
    weights = real.astype(x.dtype)
    return (x * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)


class TokenHead(nnx.Module):
    """Logits at each position: of classes, or of the start and the end of an answer."""

    def __init__(self, config: BertConfig, make: LayerFactory, *, answers: bool):
        d, blocks = config.hidden_size, config.blocks
        self.act = config.head_act
        self.dense = make.linear(d, d, use_bias=blocks.head_bias) if blocks.head_norm else None
        self.norm = make.norm(d) if blocks.head_norm else None
        self.out = make.linear(d, 2 if answers else config.num_labels)
        plain = answers and not blocks.head_norm
        self.dropout = Dropout(config.answer_dropout if plain else config.head_dropout)

    def __call__(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t classes"]:
        """Returns the logits of hidden states."""
        if self.dense is not None and self.norm is not None:
            x = self.norm(activation(self.act)(self.dense(x)))
        return self.out(self.dropout(x, key))


class MaskedLmHead(nnx.Module):
    """Logits over the vocabulary; the word embeddings are the output weights where tied."""

    def __init__(self, config: BertConfig, make: LayerFactory):
        size, blocks = config.embedding_size or config.hidden_size, config.blocks
        self.act = config.lm_act or config.hidden_act
        has, bias = blocks.lm_transform, blocks.head_bias
        self.dense = make.linear(config.hidden_size, size, use_bias=bias) if has else None
        self.norm = make.norm(size) if has else None
        zeros = jnp.zeros(config.vocab_size, make.param_dtype)
        self.bias = nnx.Param(zeros) if blocks.lm_bias else None
        tied = config.tie_word_embeddings
        self.decoder = None if tied else make.embed(config.vocab_size, size)

    def words(self, word: AnyEmbed) -> AnyEmbed:
        """Returns the output weights: the word embeddings, unless the head has its own."""
        return word if self.decoder is None else self.decoder

    def transformed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n e"]:
        """Returns the vectors that are multiplied with the word embeddings."""
        if self.dense is None or self.norm is None:
            return x
        return self.norm(activation(self.act)(self.dense(x)))

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b t vocab"]:
        """Returns the logits of hidden states."""
        y = self.words(word).attend(self.transformed(x))
        return y if self.bias is None else y + self.bias[...][None, None]


class LabelWordHead(MaskedLmHead):
    """Logits of classes: those of label words in the masked-language-model head, at position 0.

    References:
        The code of Jiang et al. (ACL 2023). In their text the head has no layers and no bias; see
        `BareLabelWordHead`.
    """

    def __init__(self, config: BertConfig, make: LayerFactory):
        super().__init__(config, make)
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """Returns the logits of hidden states."""
        ids = jnp.array(self.ids, jnp.int32)
        y = self.transformed(x[:, 0]) @ self.words(word)(ids).mT
        return y if self.bias is None else y + self.bias[...][ids][None]


class BareLabelWordHead(nnx.Module):
    """Logits of classes: the first hidden state times the embeddings of label words.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning.
    """

    def __init__(self, config: BertConfig, make: LayerFactory):
        assert config.label_ids is not None
        self.ids = config.label_ids

    def __call__(self, x: Float[Array, "b t d"], word: AnyEmbed) -> Float[Array, "b classes"]:
        """Returns the logits of hidden states."""
        return x[:, 0] @ word(jnp.array(self.ids, jnp.int32)).mT
