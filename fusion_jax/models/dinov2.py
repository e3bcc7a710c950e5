"""DINOv2: a vision transformer with learned factors of what its layers add."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusion_jax.errors import InputError
from fusion_jax.models.base import Family, Fields, Head, config_from_fields
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.models.vision import BASE, CLASSIFIER, WHOLE, VisionConfig, VisionTransformer


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` that ViT does not have, or with another default."""

    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    patch_size: int | tuple[int, ...] = 14
    use_mask_token: bool = True
    mlp_ratio: int = 4
    layerscale_value: float = 1.0
    drop_path_rate: float = 0.0
    use_swiglu_ffn: bool = False


def _config(fields: Fields) -> VisionConfig:
    own = config_from_fields(_Own, fields)
    config = config_from_fields(
        VisionConfig,
        fields,
        layer_norm_eps=own.layer_norm_eps,
        patch_size=own.patch_size,
        use_mask_token=own.use_mask_token,
        pooling="mean",
        blocks=EncoderBlocks(),
    )
    if config.image[0] != config.image[1]:
        raise InputError(
            f"image_size must be one number; for {config.image} transformers interpolates "
            "positions, which is not implemented"
        )
    width, gated = config.hidden_size * own.mlp_ratio, own.use_swiglu_ffn
    if gated:
        # Two thirds, rounded up to a multiple of 8; the activation is not that of config.json.
        width = (int(width * 2 / 3) + 7) // 8 * 8
    blocks = EncoderBlocks(
        norm_first=True,
        path_dropout=own.drop_path_rate,
        layer_scale=own.layerscale_value,
        gated=gated,
        attention_bias=config.qkv_bias,
        attention_out_bias=True,
        head_dim=config.head_dim,
    )
    act = "silu" if gated else own.hidden_act
    return replace(config, intermediate_size=width, hidden_act=act, blocks=blocks).check()


def _width_field(config: VisionConfig) -> str | None:
    """Returns the field with the width; that of gated MLPs is rounded, so that it stays."""
    return None if config.blocks.gated else "mlp_ratio"


_LAYER, _THEIRS = "layers.{l}", "encoder.layer.{l}"
_GATED = (f"{_LAYER}.mlp.gate", f"{_LAYER}.mlp.up")
_BASE = (
    *BASE,
    KeyRule("mask_token", "embeddings.mask_token", WHOLE),
    KeyRule(f"{_LAYER}.attention_norm", f"{_THEIRS}.norm1", NORM),
    KeyRule(f"{_LAYER}.attention_scale", f"{_THEIRS}.layer_scale1.lambda1", WHOLE),
    KeyRule(f"{_LAYER}.mlp_norm", f"{_THEIRS}.norm2", NORM),
    KeyRule(f"{_LAYER}.mlp_scale", f"{_THEIRS}.layer_scale2.lambda1", WHOLE),
)
_PLAIN = (
    KeyRule(f"{_LAYER}.mlp.up", f"{_THEIRS}.mlp.fc1", LINEAR),
    KeyRule(f"{_LAYER}.mlp.down", f"{_THEIRS}.mlp.fc2", LINEAR),
)
_SWIGLU = (
    *(KeyRule(path, f"{_THEIRS}.mlp.weights_in", LINEAR, joined=_GATED) for path in _GATED),
    KeyRule(f"{_LAYER}.mlp.down", f"{_THEIRS}.mlp.weights_out", LINEAR),
)


def _rules(config: VisionConfig, head: Head | None) -> KeyRules:
    rules = (*_BASE, *(_SWIGLU if config.blocks.gated else _PLAIN))
    rules = rules if head is None else (*rules, CLASSIFIER)
    ignored = (r"(dinov2\.)?embeddings\.mask_token",)
    return KeyRules(rules, prefix="dinov2.", write_prefix=head is not None, ignored=ignored)


FAMILIES = {
    "dinov2": Family(
        config=_config,
        model=VisionTransformer,
        rules=_rules,
        architectures={None: "Dinov2Model", "classification": "Dinov2ForImageClassification"},
        width_field=_width_field,
        width_factor=lambda config, path: config.hidden_size if _width_field(config) else 1,
        optional=("mask_token",),
    )
}
