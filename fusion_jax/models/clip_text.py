"""The text towers of CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import EncoderOutput, Family, Fields, Head, config_from_fields
from fusion_jax.models.bert import Bert
from fusion_jax.models.bert_config import BertConfig, EncoderBlocks
from fusion_jax.models.bert_layers import LayerFactory, Shared
from fusion_jax.models.clip import LAYERS
from fusion_jax.models.layers import ArrayLike, token_mask
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules


@dataclass(frozen=True, kw_only=True)
class TextConfig(BertConfig):
    """The fields of a text tower."""

    eos_token_id: int = 49407
    projection_size: int = 0
    """The number of outputs of SigLIP's layer on the pooled state."""
    causal: bool = False
    """Whether tokens attend to those before them alone, and the end token is pooled, as in CLIP."""


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """The fields of a ``config.json`` whose names or defaults are CLIP's own."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Siglip(_Clip):
    """The fields whose names or defaults are SigLIP's own."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int = 0


def text_config(fields: Fields, *, siglip: bool) -> TextConfig:
    """Reads the fields of a text tower."""
    own = vars(config_from_fields(_Siglip if siglip else _Clip, fields))
    if not siglip and fields.get("eos_token_id", 0) is None:
        raise InputError("eos_token_id is null, but CLIP reads a text at its end token")
    if not siglip and not fields.get("is_causal", True):
        raise InputError("is_causal false is not implemented")
    size = own.get("projection_size") or own["hidden_size"]
    given = {
        **own,
        "attention_probs_dropout_prob": own["attention_dropout"],
        "projection_size": size if siglip else 0,
        "causal": not siglip,
        # SigLIP has end tokens, but does not look for them.
        **({"eos_token_id": 0} if siglip else {}),
        "hidden_dropout_prob": 0.0,
        "type_vocab_size": 0,
        "embedding_size": 0,
        "pooled": False,
        "head_act": "",
        "lm_act": "",
        "blocks": EncoderBlocks(norm_first=True, embedding_norm=False),
    }
    del given["attention_dropout"]
    config = TextConfig.from_json({**fields, "label_ids": None}, **given)
    assert isinstance(config, TextConfig)
    return config


class TextTower(Bert):
    """The text tower of CLIP or SigLIP.

    The pooled state is that of the first end token in CLIP, and of the last position in SigLIP,
    padding or not, with a linear layer. A text without an end token is read at its first token, as
    in transformers.

    References:
        CLIP (arXiv 2103.00020), section 2.4; SigLIP (arXiv 2303.15343).

    Example:
        >>> config = text_config({"model_type": "clip_text_model", "vocab_size": 50,
        ...     "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...     "intermediate_size": 32, "eos_token_id": 9}, siglip=False)
        >>> TextTower(config, rngs=nnx.Rngs(0))(jnp.array([[3, 7, 9]])).pooler_output.shape
        (1, 8)
    """

    config: TextConfig

    def __init__(
        self,
        config: TextConfig,
        *,
        head: Head | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, head=head, param_dtype=param_dtype, rngs=rngs)
        # The last of the hidden states is that before this norm.
        self.last_norm, self.norm = self.norm, None
        make = LayerFactory(config, param_dtype, rngs)
        size = config.projection_size
        self.projection = make.linear(config.hidden_size, size) if size else None

    def __call__(
        self,
        input_ids: Int[ArrayLike, "b t"],
        attention_mask: Shaped[ArrayLike, "b t"] | None = None,
        position_ids: Int[ArrayLike, "b t"] | None = None,
        *,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> EncoderOutput:
        """Encodes a batch of texts.

        Args:
            input_ids: (b, t) token ids.
            attention_mask: (b, t), 0 or False at padding; None without padding. SigLIP was trained
                on texts that are padded to the largest length, without a mask.
            position_ids: (b, t); None for 0, 1, ...
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Returns:
            Hidden states and pooled states, in the dtype of the parameters.

        Raises:
            InputError: There are more tokens than positions.
        """
        options = {"output_hidden_states": output_hidden_states, "key": key}
        out = super().__call__(input_ids, attention_mask, None, position_ids, **options)
        assert self.last_norm is not None
        x = self.last_norm(out.last_hidden_state)
        ids = jnp.asarray(input_ids)
        pooled = x[:, -1]
        if self.config.causal:
            real = token_mask(ids, attention_mask)
            # What old files call the end token is another one; theirs has the largest id.
            old = self.config.eos_token_id == 2
            ends = jnp.where(real, ids, -1) if old else (ids == self.config.eos_token_id) & real
            pooled = x[jnp.arange(len(x)), ends.argmax(axis=1)]
        if self.projection is not None:
            pooled = self.projection(pooled)
        return out._replace(last_hidden_state=x, pooler_output=pooled)

    def _shared(self, real: Bool[Array, "b t"], positions: Int[Array, "b t"]) -> Shared:
        shared = super()._shared(real, positions)
        if not self.config.causal:
            return shared
        earlier = jnp.tri(real.shape[1], dtype=bool)[None, None]
        return shared._replace(visible={None: shared.visible[None] & earlier})


TEXT = (
    KeyRule("embeddings.word", "embeddings.token_embedding", EMBED),
    KeyRule("embeddings.position", "embeddings.position_embedding", EMBED),
    *LAYERS,
    KeyRule("last_norm", "final_layer_norm", NORM),
    KeyRule("projection", "head", LINEAR),
)
"""The rules of a text tower."""
# A buffer of old files, and what maps pooled texts to where images are.
_IGNORED = (r"(text_model\.)?embeddings\.position_ids", r"text_projection\.weight")


def _rules(config: TextConfig, head: Head | None) -> KeyRules:
    return KeyRules(TEXT, prefix="text_model.", write_prefix=False, ignored=_IGNORED)


def _family(name: str, *, siglip: bool) -> Family:
    return Family(
        config=partial(text_config, siglip=siglip),
        model=TextTower,
        rules=_rules,
        architectures={None: name},
        width_field="intermediate_size",
    )


FAMILIES = {
    "clip_text_model": _family("CLIPTextModel", siglip=False),
    "siglip_text_model": _family("SiglipTextModel", siglip=True),
}
