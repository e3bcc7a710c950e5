"""The vision towers of CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from fusion_jax.errors import InputError
from fusion_jax.models.base import Family, Fields, Head, config_from_fields
from fusion_jax.models.bert_config import EncoderBlocks
from fusion_jax.models.rules import LINEAR, NORM, KeyRule, KeyRules, Leaf
from fusion_jax.models.vision import PATCHES, WHOLE, VisionConfig, VisionTransformer


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """The fields of a ``config.json`` whose names or defaults are CLIP's own."""

    patch_size: int | tuple[int, ...] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    vision_use_head: bool = False


@dataclass(frozen=True, kw_only=True)
class _Siglip(_Clip):
    """The fields whose names or defaults are SigLIP's own."""

    patch_size: int | tuple[int, ...] = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


def vision_config(fields: Fields, *, siglip: bool) -> VisionConfig:
    """Reads the fields of a vision tower."""
    own = config_from_fields(_Siglip if siglip else _Clip, fields)
    given = {
        "patch_size": own.patch_size,
        "hidden_act": own.hidden_act,
        "layer_norm_eps": own.layer_norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": own.attention_dropout,
        "head_dim": 0,
        "use_mask_token": False,
        "pooling": "first",
        "class_token": not siglip,
        "patch_bias": siglip,
        "input_norm": not siglip,
        "norm_pooled": not siglip,
        "flat": True,
        "blocks": EncoderBlocks(norm_first=True),
    }
    config = config_from_fields(VisionConfig, fields, **given)
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise InputError(f"{name} must be one number, as transformers computes with one")
    if siglip:
        config = replace(config, pooling="attention" if own.vision_use_head else "none")
    return config.check()


_LAYER, _THEIRS = "layers.{l}", "encoder.layers.{l}"
_LINEARS = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
LAYERS = (
    *(KeyRule(f"{_LAYER}.{a}", f"{_THEIRS}.{b}", LINEAR) for a, b in _LINEARS.items()),
    *(KeyRule(f"{_LAYER}.{a}", f"{_THEIRS}.{b}", NORM) for a, b in _NORMS.items()),
)
"""The rules of the layers, which those of the text towers have too."""
_QKV = tuple(f"pooler.attention.{part}" for part in ("query", "key", "value"))
_JOINED = {"kernel": Leaf(("in_proj_weight",), transposed=True), "bias": Leaf(("in_proj_bias",))}
VISION = (
    KeyRule("patches", "embeddings.patch_embedding", PATCHES),
    KeyRule("cls_token", "embeddings.class_embedding", WHOLE),
    KeyRule("position", "embeddings.position_embedding.weight", WHOLE),
    KeyRule("input_norm", "pre_layrnorm", NORM),  # as transformers spells it
    *LAYERS,
    KeyRule("norm", "post_layernorm", NORM),
    KeyRule("pooler.query", "head.probe", WHOLE),
    *(KeyRule(path, "head.attention", _JOINED, joined=_QKV) for path in _QKV),
    KeyRule("pooler.attention.out", "head.attention.out_proj", LINEAR),
    KeyRule("pooler.norm", "head.layernorm", NORM),
    KeyRule("pooler.mlp.up", "head.mlp.fc1", LINEAR),
    KeyRule("pooler.mlp.down", "head.mlp.fc2", LINEAR),
)
"""The rules of a vision tower."""
# A buffer of old files, and what maps pooled images to where texts are.
_IGNORED = (r"(vision_model\.)?embeddings\.position_ids", r"visual_projection\.weight")


def _rules(config: VisionConfig, head: Head | None) -> KeyRules:
    return KeyRules(VISION, prefix="vision_model.", write_prefix=False, ignored=_IGNORED)


def _family(name: str, *, siglip: bool) -> Family:
    return Family(
        config=partial(vision_config, siglip=siglip),
        model=VisionTransformer,
        rules=_rules,
        architectures={None: name},
        width_field="intermediate_size",
    )


FAMILIES = {
    "clip_vision_model": _family("CLIPVisionModel", siglip=False),
    "siglip_vision_model": _family("SiglipVisionModel", siglip=True),
}
