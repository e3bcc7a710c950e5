"""CLIP and SigLIP with both towers, and image classification with the vision tower alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.base import (
    EncoderOutput,
    Family,
    Fields,
    Head,
    Model,
    config_from_fields,
)
from fusion_jax.models.clip import VISION, vision_config
from fusion_jax.models.clip_text import TEXT, TextConfig, TextTower, text_config
from fusion_jax.models.layers import ArrayLike, split_key
from fusion_jax.models.rules import LINEAR, KeyRule, KeyRules
from fusion_jax.models.vision import CLASSIFIER, WHOLE, VisionConfig, VisionTransformer
from fusion_jax.nn.dtypes import wide


@dataclass(frozen=True, kw_only=True)
class TwoTowersConfig:
    """The fields of a ``config.json`` with both towers."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    num_labels: int = 2

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.text.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """The number of positions of texts."""
        return self.text.max_position_embeddings

    @property
    def siglip(self) -> bool:
        """Whether it is SigLIP, without projections, and with a bias of the logits."""
        return self.model_type == "siglip"


class TwoTowersOutput(NamedTuple):
    """The output of two towers; what needs images or texts that were not given is None.

    Args:
        logits_per_image: (images, texts) how well each text fits each image.
        logits_per_text: (texts, images) the same.
        image_embeds: (images, d) of length 1.
        text_embeds: (texts, d) of length 1.
        vision: The output of the vision tower.
        text: The output of the text tower.
    """

    logits_per_image: Float[Array, "images texts"] | None
    logits_per_text: Float[Array, "texts images"] | None
    image_embeds: Float[Array, "images d"] | None
    text_embeds: Float[Array, "texts d"] | None
    vision: EncoderOutput | None
    text: EncoderOutput | None


class TwoTowers(Model):
    """CLIP or SigLIP: a tower for texts and one for images, which map to the same space.

    References:
        CLIP (arXiv 2103.00020); SigLIP (arXiv 2303.15343).

    Example:
        >>> tower = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        ...          "intermediate_size": 32}
        >>> config = FAMILIES["clip"].config({"model_type": "clip",
        ...     "text_config": {**tower, "vocab_size": 50, "eos_token_id": 9},
        ...     "vision_config": {**tower, "image_size": 8, "patch_size": 4}})
        >>> model = TwoTowers(config, rngs=nnx.Rngs(0))
        >>> out = model(jnp.array([[3, 7, 9]]), pixel_values=jnp.zeros((2, 3, 8, 8)))
        >>> out.logits_per_image.shape
        (2, 1)
    """

    takes = "images and text"
    masks = MappingProxyType({"text": "attention_mask"})

    def __init__(self, config: TwoTowersConfig, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        text, vision = config.text.projection_size, config.vision.hidden_size
        if config.siglip and text != vision:
            raise InputError(f"texts have projection_size {text}, but images hidden_size {vision}")
        if config.vision.pooling == "none":
            raise InputError("vision_use_head false is for image classification alone")
        self.config = config
        self.text = TextTower(config.text, **common)
        self.vision = VisionTransformer(config.vision, **common)
        linear = partial(nnx.Linear, out_features=config.projection_dim, use_bias=False, **common)
        own = not config.siglip
        self.text_projection = linear(config.text.hidden_size) if own else None
        self.vision_projection = linear(config.vision.hidden_size) if own else None
        shape = (1,) if config.siglip else ()
        scale = jnp.full(shape, config.logit_scale_init_value, param_dtype)
        self.logit_scale = nnx.Param(scale)
        self.logit_bias = nnx.Param(jnp.zeros(shape, param_dtype)) if config.siglip else None

    def __call__(
        self,
        input_ids: Int[ArrayLike, "texts t"] | None = None,
        attention_mask: Shaped[ArrayLike, "texts t"] | None = None,
        position_ids: Int[ArrayLike, "texts t"] | None = None,
        *,
        pixel_values: Shaped[ArrayLike, "*n"] | None = None,
        output_hidden_states: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> TwoTowersOutput:
        """Compares texts and images.

        Args:
            input_ids: (texts, t) token ids; None for no texts.
            attention_mask: (texts, t), 0 or False at padding; None without padding.
            position_ids: (texts, t); None for 0, 1, ...
            pixel_values: (images, channels, height, width) floats; None for no images.
            output_hidden_states: Whether to return the hidden states of all layers.
            key: Random key of dropout; None for no dropout.

        Raises:
            InputError: There are neither texts nor images, or they do not fit the towers.
        """
        if input_ids is None and pixel_values is None:
            raise InputError(f"{self.config.model_type} takes input_ids, pixel_values, or both")
        keys = split_key(key, 2)
        text = vision = texts = images = logits = None
        if input_ids is not None:
            options = {"output_hidden_states": output_hidden_states, "key": keys[0]}
            text = self.text(input_ids, attention_mask, position_ids, **options)
            texts = _normal(text.pooler_output, self.text_projection)
        if pixel_values is not None:
            options = {"output_hidden_states": output_hidden_states, "key": keys[1]}
            vision = self.vision(pixel_values, **options)
            images = _normal(vision.pooler_output, self.vision_projection)
        if texts is not None and images is not None:
            logits = texts @ images.T * jnp.exp(self.logit_scale[...]).reshape(1, 1)
            if self.logit_bias is not None:
                logits = logits + self.logit_bias[...].reshape(1, 1)
        other = None if logits is None else logits.T
        return TwoTowersOutput(other, logits, images, texts, vision, text)


def _normal(x: Float[Array, "n d"] | None, project: nnx.Linear | None) -> Float[Array, "n e"]:
    """Returns the embeddings of pooled states, of length 1."""
    assert x is not None
    y = wide(x if project is None else project(x))
    return (y / jnp.linalg.norm(y, axis=-1, keepdims=True)).astype(x.dtype)


def _config(fields: Fields, *, siglip: bool) -> TwoTowersConfig:
    text, vision = (_tower(fields, f"{name}_config") for name in ("text", "vision"))
    towers = {
        "text": text_config({"model_type": "text", **text}, siglip=siglip),
        "vision": vision_config({"model_type": "vision", **vision}, siglip=siglip),
    }
    return config_from_fields(TwoTowersConfig, fields, **towers)


def _tower(fields: Fields, name: str) -> Mapping[str, Any]:
    """Returns the fields of a tower; those of an old ``text_config_dict`` replace all others."""
    given = fields.get(f"{name}_dict")
    given = fields.get(name) if given is None else given
    if not isinstance(given, Mapping | None):
        raise InputError(f"{name} must be a JSON object; got {str(given)[:100]!r}")
    return given or {}


def _model(config: TwoTowersConfig, *, head: Head | None = None, **options: Any) -> Model:
    if head is None:
        return TwoTowers(config, **options)
    own = {"model_type": config.model_type, "num_labels": config.num_labels}
    return VisionTransformer(replace(config.vision, **own), head=head, **options)


def _inside(rules: tuple[KeyRule, ...], ours: str, theirs: str) -> list[KeyRule]:
    """Returns the rules of a model that is part of another."""
    joined = ([f"{ours}{path}" for path in rule.joined] for rule in rules)
    return [
        replace(rule, ours=ours + rule.ours, theirs=theirs + rule.theirs, joined=tuple(paths))
        for rule, paths in zip(rules, joined, strict=True)
    ]


_BOTH = (
    *_inside(TEXT, "text.", "text_model."),
    *_inside(VISION, "vision.", "vision_model."),
    KeyRule("text_projection", "text_projection", LINEAR),
    KeyRule("vision_projection", "visual_projection", LINEAR),
    KeyRule("logit_scale", "logit_scale", WHOLE),
    KeyRule("logit_bias", "logit_bias", WHOLE),
)
_BUFFERS = r"(text|vision)_model\.embeddings\.position_ids"
# What classification of images leaves out; the pooler is that of SigLIP.
_OTHERS = r"(text_model\.|vision_model\.head\.|(text|visual)_projection\.|logit_(scale|bias)).*"


def _rules(config: Any, head: Head | None) -> KeyRules:
    if head is None:
        return KeyRules(_BOTH, prefix="", write_prefix=False, ignored=(_BUFFERS,))
    rules, ignored = (*VISION, CLASSIFIER), (_BUFFERS, _OTHERS)
    return KeyRules(rules, prefix="vision_model.", write_prefix=True, ignored=ignored)


def _export(head: Head | None, *, siglip: bool) -> Mapping[str, Any]:
    """Returns what an export states: image classification has no pooler, which it would not use."""
    return {"vision_config.vision_use_head": False} if siglip and head else {}


def _family(name: str, *, siglip: bool) -> Family:
    return Family(
        config=partial(_config, siglip=siglip),
        model=_model,
        rules=_rules,
        architectures={
            None: f"{name}Model",
            "classification": f"{name}ForImageClassification",
        },
        width_field="vision_config.intermediate_size",
        width_fields={"text": "text_config.intermediate_size"},
        export=partial(_export, siglip=siglip),
    )


FAMILIES = {"clip": _family("CLIP", siglip=False), "siglip": _family("Siglip", siglip=True)}
