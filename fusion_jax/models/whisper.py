"""Whisper: an encoder of sounds, and a decoder that writes down what is said.

Timestamps, and the settings of a ``generation_config.json`` such as suppressed tokens, are left to
the caller.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.bart import stack_rules
from fusion_jax.models.bart_stacks import BartStack
from fusion_jax.models.base import (
    DecoderOutput,
    Family,
    Head,
    Model,
    check_positions,
    tied_head,
)
from fusion_jax.models.cache import Cache, CacheUpdate, Window, window
from fusion_jax.models.layers import ArrayLike, split_key, token_mask
from fusion_jax.models.rules import EMBED, LINEAR, KeyRule, KeyRules
from fusion_jax.models.t5 import T5, T5Cache
from fusion_jax.models.t5_stacks import EncoderKeysValues
from fusion_jax.models.vision import WHOLE
from fusion_jax.models.whisper_sounds import Sounds, WhisperClassifier, WhisperConfig


class Whisper(T5):
    """A Whisper model that generates text: it continues prompts, given sounds.

    Args:
        lm_head: Whether there is an output layer, if the configuration does not tie it to the
            token embeddings.

    References:
        Whisper (arXiv 2212.04356).

    Example:
        >>> config = WhisperConfig.of({"vocab_size": 50, "d_model": 8, "encoder_layers": 1,
        ...     "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        ...     "num_mel_bins": 3, "max_source_positions": 5})
        >>> model = Whisper(config, head="seq2seq-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 3, 10)), decoder_input_ids=jnp.array([[3, 7]])).logits.shape
        (1, 2, 50)
    """

    stack = BartStack
    takes = "sounds"
    masks = MappingProxyType({"decoder": "decoder_attention_mask"})
    reads_prompts = True

    def __init__(
        self,
        config: WhisperConfig,
        *,
        head: Head | None = None,
        lm_head: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, head=head, lm_head=lm_head, **common)
        self.max_length = config.max_position_embeddings
        self.sounds = Sounds(config, **common)
        init = nnx.initializers.normal(config.init_std)
        count = config.max_position_embeddings
        self.decoder_positions = nnx.Embed(count, config.d_model, embedding_init=init, **common)

    def __call__(  # type: ignore[override]
        self,
        input_features: Shaped[ArrayLike, "*n"] | None = None,
        decoder_input_ids: Int[ArrayLike, "b t"] | None = None,
        decoder_attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> DecoderOutput:
        """Reads sounds, and the texts that go with them.

        Args:
            input_features: (b, mel bins, frames) floats, as the feature extractor returns them.
            decoder_input_ids: (b, t) token ids of the texts, shifted by `shift_right`.
            decoder_attention_mask: (b, t), 0 or False at padding; None without padding.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            The decoder's hidden states and logits, in the dtype of the parameters, and the
            encoder's output.

        Raises:
            InputError: Features or tokens are missing or do not fit the model.
        """
        if decoder_input_ids is None:
            raise InputError("give decoder_input_ids, such as model.shift_right(target_ids)")
        ids = jnp.asarray(decoder_input_ids)
        check_positions(self, ids.shape[1])
        keys = split_key(key, 2)
        encoded, source = self._heard(input_features, output_hidden_states, keys[0])
        seen = window(token_mask(ids, decoder_attention_mask), None)
        pairs = self.keys_values(encoded)
        options = (keys[1], output_hidden_states)
        out = self.decode(ids, seen, CacheUpdate(None), pairs, source, *options)
        logits = self.logits(out.last_hidden_state) if self.has_logits else None
        return out._replace(encoder=encoded, logits=logits)

    def _heard(
        self,
        features: Shaped[ArrayLike, "*n"] | None,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> tuple[DecoderOutput, Bool[Array, "b 1 1 u"]]:
        """Returns the encoder's output, and that all of its positions count."""
        out = self.sounds.encoded(self.encoder, features, output_hidden_states, key)
        return out, jnp.ones(out.last_hidden_state.shape[:2], bool)[:, None, None]

    def decode(
        self,
        ids: Int[Array, "b t"],
        seen: Window,
        cache: CacheUpdate,
        keys_values: tuple[EncoderKeysValues, ...],
        source: Bool[Array, "b 1 1 u"],
        key: Key[Array, ""] | None = None,
        output_hidden_states: bool = False,
    ) -> DecoderOutput:
        """Returns the decoder's output for its tokens ``ids``, beside what the encoder gives."""
        assert self.decoder is not None
        x = self.word(ids) + self.decoder_positions(seen.positions)
        sources = [(pair, source) for pair in keys_values]
        return self.decoder(x, seen, cache, sources, key, output_hidden_states)

    def begin(
        self,
        input_ids: Int[Array, "b t"],
        attention_mask: Shaped[Array, "b t"],
        room: int,
        input_features: Shaped[ArrayLike, "*n"] | None = None,
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Reads sounds and prompts, padded on the left; see `Generative.begin`."""
        encoded, source = self._heard(input_features)
        (b, t), config = input_ids.shape, self.config
        layers, dtype = config.num_decoder_layers, encoded.last_hidden_state.dtype
        own = Cache.empty(b, t + room, layers, config.num_heads, config.d_kv, dtype)
        seen, pairs = window(token_mask(input_ids, attention_mask), own), self.keys_values(encoded)
        out = self.decode(input_ids, seen, CacheUpdate(own), pairs, source)
        cache = T5Cache(out.cache, pairs, source)
        return self.logits(out.last_hidden_state[:, -1]), cache


def _model(
    config: WhisperConfig, *, head: Head | None = None, lm_head: bool = True, **options: Any
) -> Model:
    if head == "classification":
        return WhisperClassifier(config, head=head, **options)
    return Whisper(config, head=head, lm_head=lm_head, **options)


_SOUNDS = (
    KeyRule("sounds.conv1", "encoder.conv1", LINEAR),
    KeyRule("sounds.conv2", "encoder.conv2", LINEAR),
    KeyRule("sounds.positions", "encoder.embed_positions.weight", WHOLE),
)
_HEAD = (
    KeyRule("head.project", "projector", LINEAR, in_base=False),
    KeyRule("head.out", "classifier", LINEAR, in_base=False),
    KeyRule("head.layers", "layer_weights", WHOLE, in_base=False),
)
_TEXT = (
    KeyRule("word", "decoder.embed_tokens", EMBED),
    KeyRule("lm_head", "proj_out", LINEAR, in_base=False),
)


def _rules(config: WhisperConfig, head: Head | None) -> KeyRules:
    rules = [*_SOUNDS, *stack_rules("encoder", True)]
    if head == "classification":
        ignored = (r"(model\.)?decoder\..+", r"proj_out\.weight")
        return KeyRules([*rules, *_HEAD], "model.", write_prefix=False, ignored=ignored)
    rules += [*_TEXT, *stack_rules("decoder", True)]
    generates = head is not None
    twins = tied_head(config, "proj_out.weight", "word.embedding") if generates else {}
    ignored = () if generates and not config.tie_word_embeddings else (r"proj_out\.weight",)
    return KeyRules(rules, "model.", write_prefix=generates, ignored=ignored, twins=twins)


FAMILIES = {
    "whisper": Family(
        config=WhisperConfig.of,
        model=_model,
        rules=_rules,
        architectures={
            None: "WhisperModel",
            "seq2seq-lm": "WhisperForConditionalGeneration",
            "classification": "WhisperForAudioClassification",
        },
        width_field="encoder_ffn_dim",
        width_fields={"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"},
        optional=("lm_head",),
    )
}
