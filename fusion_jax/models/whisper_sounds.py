"""The configuration of Whisper, what reads its sounds, and the model that gives their classes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.bart_stacks import BartConfig, BartStack
from fusion_jax.models.base import DecoderOutput, Fields, Head, Model
from fusion_jax.models.cache import CacheUpdate, window
from fusion_jax.models.layers import ArrayLike
from fusion_jax.models.t5_stacks import Stack
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class WhisperConfig(BartConfig):
    """The fields of a ``config.json`` that the models use."""

    vocab_size: int = 51865
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256

    @classmethod
    def of(cls, fields: Fields) -> WhisperConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        if fields.get("apply_spec_augment"):
            raise InputError(
                "apply_spec_augment true is not implemented; set it to false, which changes "
                "training alone"
            )
        if not fields.get("is_encoder_decoder", True):
            raise InputError("is_encoder_decoder false is not implemented")
        given = {name: x for name, x in fields.items() if x is not None or "token_id" in name}
        # transformers does not scale embeddings, whatever `scale_embedding` says.
        own = {"max_position_embeddings": given.get("max_target_positions", 448)}
        own |= {"scale_embedding": False, "norm_first": True, "embedding_norm": False}
        config = cls.read({**_DEFAULTS, **given, **own}, key_bias=False)
        assert isinstance(config, WhisperConfig)
        if config.d_model % 2:
            raise InputError(f"d_model must be even, for sines and cosines; got {config.d_model}")
        return config


_DEFAULTS = {"encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
             "decoder_layers": 4, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536,
             "d_model": 384, "dropout": 0.0, "decoder_start_token_id": 50257,
             "pad_token_id": 50256, "bos_token_id": 50256, "eos_token_id": 50256}  # fmt: skip


def sound_positions(count: int, d: int) -> np.ndarray:
    """Returns the embeddings of positions in sounds, (count, d): sines, then cosines."""
    steps = np.arange(d // 2) / max(1, d // 2 - 1)
    angles = np.arange(count)[:, None] * 10000.0 ** -steps[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Sounds(nnx.Module):
    """Two convolutions over log-mel features, the second of which halves their number."""

    def __init__(self, config: WhisperConfig, param_dtype: Any, rngs: nnx.Rngs):
        d, bins = config.d_model, config.num_mel_bins
        init = nnx.initializers.normal(config.init_std)
        common = {"kernel_init": init, "param_dtype": param_dtype, "rngs": rngs}
        conv = partial(nnx.Conv, kernel_size=(3,), padding=1, **common)
        self.conv1, self.conv2 = conv(bins, d), conv(d, d, strides=2)
        positions = sound_positions(config.max_source_positions, d)
        self.positions = Frozen(jnp.asarray(positions, param_dtype))
        self.shape = bins, 2 * config.max_source_positions

    def __call__(self, features: Shaped[ArrayLike, "*n"] | None) -> Float[Array, "b u d"]:
        """Returns the input of the encoder.

        Raises:
            InputError: There are no features, or not of the model's size.
        """
        x = None if features is None else jnp.asarray(features)
        if x is None or x.ndim != 3 or x.shape[1:] != self.shape:
            got = "none" if x is None else x.shape
            raise InputError(
                f"input_features must be (sounds, {self.shape[0]}, {self.shape[1]}): mel bins and "
                f"frames, as the feature extractor returns them; got {got}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(f"input_features must be floats; got {x.dtype}")
        gelu = activation("gelu")
        x = x.astype(self.positions[...].dtype).swapaxes(1, 2)
        return gelu(self.conv2(gelu(self.conv1(x)))) + self.positions[...][None]

    def encoded(
        self,
        encoder: Stack,
        features: Shaped[ArrayLike, "*n"] | None,
        output_hidden_states: bool,
        key: Key[Array, ""] | None,
    ) -> DecoderOutput:
        """Returns the output of an encoder for sounds, all of whose positions count."""
        x = self(features)
        real = jnp.ones(x.shape[:2], bool)
        seen = window(real, None)._replace(visible=real[:, None, None])
        nothing = [None] * len(encoder.layers)
        return encoder(x, seen, CacheUpdate(None), nothing, key, output_hidden_states)


class SoundHead(nnx.Module):
    """Logits of the classes of sounds, from the mean over positions."""

    def __init__(self, config: WhisperConfig, param_dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        self.project = linear(config.d_model, config.classifier_proj_size)
        self.out = linear(config.classifier_proj_size, config.num_labels)
        count = config.encoder_layers + 1
        weights = jnp.full(count, 1 / count, param_dtype)
        self.layers = nnx.Param(weights) if config.use_weighted_layer_sum else None

    def __call__(self, states: tuple[Float[Array, "b u d"], ...]) -> Float[Array, "b classes"]:
        """Returns the logits of the hidden states of all layers, or of the last one."""
        x = states[-1]
        if self.layers is not None:
            weights = jax.nn.softmax(self.layers[...])
            x = jnp.einsum("l,lbud->bud", weights, jnp.stack(states))
        return self.out(self.project(x).mean(1))


class WhisperClassifier(Model):
    """The encoder of Whisper, with the classes of sounds.

    Example:
        >>> config = WhisperConfig.of({"d_model": 8, "encoder_layers": 1, "num_mel_bins": 3,
        ...     "encoder_attention_heads": 2, "max_source_positions": 5, "num_labels": 4,
        ...     "decoder_attention_heads": 2})
        >>> model = WhisperClassifier(config, head="classification", rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 3, 10))).logits.shape
        (2, 4)
    """

    takes = "sounds"

    def __init__(
        self,
        config: WhisperConfig,
        *,
        head: Head,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.sounds = Sounds(config, **common)
        self.encoder = BartStack(config, False, **common)
        self.head = SoundHead(config, **common)
        # What artefacts with another head have besides.
        self.word = self.decoder = self.decoder_positions = self.lm_head = None

    def __call__(
        self,
        input_features: Shaped[ArrayLike, "*n"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> DecoderOutput:
        """Reads a batch of sounds.

        Args:
            input_features: (b, mel bins, frames) floats, as the feature extractor returns them.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            The hidden states of the encoder, and the logits.
        """
        out = self.sounds.encoded(self.encoder, input_features, True, key)
        assert out.hidden_states is not None
        logits = self.head(out.hidden_states)
        states = out.hidden_states if output_hidden_states else None
        return out._replace(hidden_states=states, logits=logits)
