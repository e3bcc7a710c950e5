"""Encoder-decoders such as T5 with the heads that give classes and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Head, check_needed_tokens
from fusion_jax.models.layers import ArrayLike, Dropout, split_key
from fusion_jax.models.rules import LINEAR, KeyRule
from fusion_jax.models.t5_stacks import EncoderDecoder

HEAD_RULES: Mapping[Head | None, Sequence[KeyRule]] = {
    "classification": (
        KeyRule("head.dense", "classification_head.dense", LINEAR, in_base=False),
        KeyRule("head.out", "classification_head.out_proj", LINEAR, in_base=False),
    ),
    "token-classification": (KeyRule("head.out", "classifier", LINEAR, in_base=False),),
    "question-answering": (KeyRule("head.out", "qa_outputs", LINEAR, in_base=False),),
}
"""The key rules of each head."""


class T5Head(nnx.Module):
    """Logits of hidden states: by one linear layer, or by two with tanh between them."""

    def __init__(self, config: Any, head: Head, param_dtype: Any, rngs: nnx.Rngs):
        d, answers = config.d_model, head == "question-answering"
        options = {
            "kernel_init": nnx.initializers.normal(config.head_std),
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.dense = nnx.Linear(d, d, **options) if head == "classification" else None
        self.out = nnx.Linear(d, 2 if answers else config.num_labels, **options)
        self.dropout = Dropout(0.0 if answers else config.classifier_dropout)

    def __call__(
        self, x: Float[Array, "*n d"], key: Key[Array, ""] | None
    ) -> Float[Array, "*n classes"]:
        """Returns the logits of hidden states."""
        keys = split_key(key, 2)
        x = self.dropout(x, keys[0])
        if self.dense is not None:
            x = self.dropout(jnp.tanh(self.dense(x)), keys[1])
        return self.out(x)


class T5WithHead(EncoderDecoder):
    """A T5 that gives classes or answers.

    The decoder reads the same text as the encoder, shifted by one token, and the head reads the
    decoder's states: that of the last end token for the class of a text, and all of them for the
    start and the end of an answer. For the classes of tokens, the head reads the encoder's states,
    and there is no decoder.

    Args:
        config: The configuration, a `T5Config` or what has the same properties.
        head: ``"classification"``, ``"token-classification"`` or ``"question-answering"``.

    Raises:
        InputError: The configuration does not say what the end token is, and the head is for
            classification.

    References:
        ``T5ForSequenceClassification``, ``T5ForTokenClassification`` and
        ``T5ForQuestionAnswering`` of transformers 5.

    Example:
        >>> from fusion_jax.models.t5_config import T5Config
        >>> config = T5Config.from_json({"model_type": "t5", "vocab_size": 50, "d_model": 8,
        ...     "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "num_labels": 3})
        >>> model = T5WithHead(config, head="classification", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9, 1]])).logits.shape
        (1, 3)
    """

    def __init__(self, config: Any, *, head: Head, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, decodes=head != "token-classification", **common)
        self.head = T5Head(config, head, **common)
        ends = config.eos_token_id
        if head == "classification" and ends is None:
            raise InputError(
                "the configuration has no eos_token_id; the classification head reads a text at "
                "its last end token"
            )
        if head == "classification" and ends is not None:
            self.needed_tokens = (ends,) if isinstance(ends, int) else ends

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> DecoderOutput:
        """Reads a batch of texts.

        Args:
            input_ids: (b, t) token ids. As in transformers, the decoder reads padding on the left
                too: pad on the right.
            attention_mask: (b, t), 0 or False at padding; None without padding.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            The hidden states that the head reads and its logits, in the dtype of the parameters.

        Raises:
            InputError: A text has no end token, and the head is for classification. Inside of
                compiled functions, which cannot raise, the first state of such a text is read.
        """
        if not isinstance(input_ids, Tracer):
            check_needed_tokens(self, input_ids)
        ids = jnp.asarray(input_ids)
        key, head_key = split_key(key, 2)
        if self.decoder is None:
            out, _ = self.encode(ids, attention_mask, output_hidden_states, key)
        else:
            shifted = self.shift_right(ids)
            out = self.read(ids, attention_mask, shifted, None, key, output_hidden_states)
        x = out.last_hidden_state
        if self.needed_tokens:
            ends = jnp.isin(ids, jnp.array(self.needed_tokens, ids.dtype))
            last = jnp.where(ends, jnp.arange(ids.shape[1])[None], 0).argmax(axis=1)
            x = x[jnp.arange(len(x)), last]
        return out._replace(logits=self.head(x, head_key))
