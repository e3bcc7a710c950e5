"""T5Gemma: encoder-decoders of Gemma 2's layers.

The originals also drop out units inside the MLPs; this model does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import DecoderOutput, Family, Head, tied_head
from fusion_jax.models.layers import ArrayLike, Dropout, soft_capped, split_key, token_mask
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.models.t5 import T5
from fusion_jax.models.t5_stacks import EncoderDecoder
from fusion_jax.models.t5gemma_stacks import GemmaStack, T5GemmaConfig


class GemmaPair(EncoderDecoder):
    """The stacks, each with token embeddings of its own."""

    stack = GemmaStack

    @property
    def encoder_features(self) -> int:
        """The number of features of the encoder's positions."""
        return self.config.encoder.hidden_size

    def embed(
        self, ids: Int[Array, "b t"], slots: Int[Array, " t"], *, decoder: bool
    ) -> Float[Array, "b t d"]:
        """Returns the input of the encoder or of the decoder for tokens in these slots."""
        x = super().embed(ids, slots, decoder=decoder)
        return x * jnp.asarray(self.config.side(decoder).blocks.embedding_scale, x.dtype)


class T5Gemma(T5, GemmaPair):
    """A T5Gemma encoder-decoder that generates text.

    References:
        T5Gemma (arXiv 2504.06225).

    Example:
        >>> part = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "head_dim": 4,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        >>> config = T5GemmaConfig.read({"encoder": part, "decoder": part})
        >>> model = T5Gemma(config, head="seq2seq-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]]), decoder_input_ids=jnp.array([[2, 5]])).logits.shape
        (1, 2, 50)
    """

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of the decoder's hidden states."""
        return soft_capped(super().logits(x), self.config.decoder.blocks.logit_cap)


class T5GemmaWithHead(GemmaPair):
    """A T5Gemma that gives classes of texts or of tokens.

    The decoder reads the same text as the encoder after a start token, and the head reads the
    decoder's states; with ``is_encoder_decoder`` false there is no decoder, and it reads the
    encoder's. A token with the id of padding is padding, as in transformers.

    As in transformers, the class of a text is read after its last token if there is padding on the
    right, and otherwise one token before. There padding on the left changes it too; here it does
    not.
    """

    def __init__(
        self, config: T5GemmaConfig, *, head: Head, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        decodes, classes = config.is_encoder_decoder, config.num_labels
        super().__init__(config, decodes=decodes, **common)
        init = nnx.initializers.normal(config.initializer_factor * classes**-0.5)
        size = config.side(decodes).hidden_size, classes
        self.head = nnx.Linear(*size, kernel_init=init, **common)
        self.head_dropout = Dropout(config.classifier_dropout_rate)
        self.per_text = head == "classification"

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
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 0 or False at padding; None without padding.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            The hidden states that the head reads and its logits, in the dtype of the parameters.
        """
        ids, pad = jnp.asarray(input_ids), self.config.pad_token_id
        key, head_key = split_key(key, 2)
        real = token_mask(ids, attention_mask)
        real = real if pad is None else real & (ids != pad)
        if self.decoder is None:
            out, _ = self.encode(ids, attention_mask, output_hidden_states, key)
        else:
            first = real & (jnp.cumsum(real, axis=1) == 1)
            shifted = jnp.where(first, self.config.decoder_start_token_id, self.shift_right(ids))
            mask = first | jnp.pad(real, ((0, 0), (1, 0)))[:, :-1]
            out = self.read(ids, attention_mask, shifted, mask, key, output_hidden_states)
        x = out.last_hidden_state
        if self.per_text:
            last = jnp.where(real, jnp.arange(ids.shape[1])[None], 0).max(axis=1)
            last = last if self.decoder is None else jnp.minimum(last + 1, ids.shape[1] - 1)
            x = x[jnp.arange(len(x)), last]
        return out._replace(logits=self.head(self.head_dropout(x, head_key)))


def _model(
    config: T5GemmaConfig, *, head: Head | None = None, lm_head: bool = True, **options: Any
) -> EncoderDecoder:
    if head in ("classification", "token-classification"):
        return T5GemmaWithHead(config, head=head, **options)
    if head is None and not config.is_encoder_decoder:
        raise InputError("is_encoder_decoder false is not implemented without a head for classes")
    config = replace(config, is_encoder_decoder=True)  # as transformers
    return T5Gemma(config, head=head, lm_head=lm_head, **options)


_NORMS = {"attention": "self_attn", "cross": "cross_attn", "mlp": "feedforward"}
_LINEARS = {
    **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    **{
        f"{ours}.{name}": f"{theirs}.{'o' if name == 'out' else name[0]}_proj"
        for ours, theirs in (("attention", "self_attn"), ("cross", "cross_attn"))
        for name in ("query", "key", "value", "out")
    },
}


def _rules(config: T5GemmaConfig, head: Head | None) -> KeyRules:
    generates, name = head == "seq2seq-lm", "lm_head.out_proj.weight"
    decodes = generates or config.is_encoder_decoder
    rules = [
        KeyRule("encoder_word", "encoder.embed_tokens", EMBED),
        KeyRule("word", f"{'decoder' if decodes else 'encoder'}.embed_tokens", EMBED),
        KeyRule("lm_head", "lm_head.out_proj", LINEAR, in_base=False),
        KeyRule("head", "score.out_proj", LINEAR, in_base=False),
    ]
    for stack in ("encoder", "decoder"):
        layer = f"{stack}.layers.{{l}}"
        rules.append(KeyRule(f"{stack}.norm", f"{stack}.norm", NORM))
        for ours, theirs in _NORMS.items():
            rules.append(KeyRule(f"{layer}.{ours}_norm", f"{layer}.pre_{theirs}_layernorm", NORM))
            post = f"{layer}.post_{theirs}_layernorm"
            rules.append(KeyRule(f"{layer}.{ours}_post_norm", post, NORM))
        for ours, theirs in _LINEARS.items():
            rules.append(KeyRule(f"{layer}.{ours}", f"{layer}.{theirs}", LINEAR))
    ignored = [r"lm_head\.out_proj\.weight", *(() if decodes else (r"(model\.)?decoder\..+",))]
    twins = tied_head(config, name, "word.embedding") if generates else {}
    return KeyRules(rules, "model.", write_prefix=head is not None, ignored=ignored, twins=twins)


FAMILIES = {
    "t5gemma": Family(
        config=T5GemmaConfig.read,
        model=_model,
        rules=_rules,
        architectures={
            None: "T5GemmaModel",
            "seq2seq-lm": "T5GemmaForConditionalGeneration",
            "classification": "T5GemmaForSequenceClassification",
            "token-classification": "T5GemmaForTokenClassification",
        },
        width_field="encoder.intermediate_size",
        width_fields={x: f"{x}.intermediate_size" for x in ("encoder", "decoder")},
        optional=("lm_head",),
    )
}
