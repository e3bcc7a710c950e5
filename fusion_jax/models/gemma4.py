"""The text model of Gemma 4, dense and with experts, by its configuration and its names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusion_jax.errors import InputError
from fusion_jax.models.base import Family, Fields, Head
from fusion_jax.models.causal import decoder_architectures
from fusion_jax.models.decoder_config import FULL, SLIDING, Blocks, count, sliding_layers
from fusion_jax.models.decoder_families import decoder_rules
from fusion_jax.models.gemma import positive_number
from fusion_jax.models.gemma4_layers import Gemma4, Gemma4Config
from fusion_jax.models.packed_experts import packed_rules
from fusion_jax.models.rope import Rope
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules, Leaf

_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "enable_moe_block": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_SIZES = ("head_dim", "num_key_value_heads")


def _config(fields: Fields) -> Gemma4Config:
    fields = {**_DEFAULTS, **fields}
    if fields.get("use_bidirectional_attention") not in (None, "vision"):  # of images, not of text
        raise InputError("use_bidirectional_attention is not implemented")
    for name in ("rope_theta", "rope_scaling"):  # which transformers does not read either
        fields.pop(name, None)
    sizes = ("num_experts", "top_k_experts", "moe_intermediate_size")
    experts = {name: count(fields, name, 1) for name in sizes if fields["enable_moe_block"]}
    fields |= {
        **(experts or dict.fromkeys(sizes)),
        "num_experts_per_tok": experts.get("top_k_experts"),
        "norm_topk_prob": True,
        "hidden_act": fields["hidden_activation"],
    }
    size = count(fields, "hidden_size", 1)
    blocks = Blocks(
        norm="rms-wide",
        norms="both",
        query_key_norm="head",
        value_normed=True,
        score_scale=1.0,
        logit_cap=positive_number(fields, "final_logit_softcapping"),
        embedding_scale=math.sqrt(size),
        embedding_rounded=True,
    )
    optional = ("tie_word_embeddings", "attention_bias", *_EXPERTS)
    read = {name: x for name, x in fields.items() if name != "rope_parameters"}
    config = Gemma4Config.read(read, optional=optional, blocks=blocks)
    assert isinstance(config, Gemma4Config)
    layers = config.num_hidden_layers
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input < config.vocab_size:
        raise InputError("a vocab_size_per_layer_input below vocab_size is not implemented")
    types = fields.get("layer_types")
    if isinstance(types, list) and types:  # transformers does this too
        fields["layer_types"] = [*types[:-1], FULL]
    sliding = sliding_layers(config, fields, lambda i: i < layers - 1 and (i + 1) % 6 > 0)
    window = count(fields, "sliding_window", 1)
    sizes = {kind: _heads(fields, config, [s == kind for s in sliding]) for kind in set(sliding)}
    ropes = {kind: _rope(fields, SLIDING if kind else FULL, sizes[kind][0]) for kind in sizes}
    config = replace(
        config,
        sliding=sliding,
        heads=tuple(sizes[kind] for kind in sliding),
        ropes=tuple(ropes[kind] for kind in sliding),
        sliding_windows=tuple(window if has else None for has in sliding),
        sparse=(False,) * layers,
    )
    own = set(sliding[: layers - config.num_kv_shared_layers])
    if config.num_kv_shared_layers >= layers or own != set(sliding):
        raise InputError(
            "num_kv_shared_layers must leave a layer of each of the layer_types before them"
        )
    return config


def _heads(fields: Fields, config: Gemma4Config, mine: list[bool]) -> tuple[int, int]:
    """Returns the features of a head and the number of key-value heads of layers of one type."""
    given = fields.get("per_layer_config")
    found = {"head_dim": config.head_dim, "num_key_value_heads": config.num_key_value_heads}
    if given is None:
        if mine[-1]:  # the last layer has no window
            found["head_dim"] = count(fields, "global_head_dim", 1)
            groups = fields.get("num_global_key_value_heads")
            if config.attention_k_eq_v and groups is not None:
                found["num_key_value_heads"] = count(fields, "num_global_key_value_heads", 1)
    else:
        layers = _per_layer(given, len(mine))
        each = [{**found, **layers.get(i, {})} for i, own in enumerate(mine) if own]
        if any(one != each[0] for one in each):
            raise InputError("per_layer_config must be the same for all layers of a type")
        found = {name: count(each[0], name, 1) for name in _SIZES}
    if config.num_attention_heads % found["num_key_value_heads"]:
        raise InputError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of the "
            f"number of key-value heads {found['num_key_value_heads']} of some layers"
        )
    return found["head_dim"], found["num_key_value_heads"]


def _per_layer(given: Any, layers: int) -> dict[int, dict[str, Any]]:
    """Returns ``per_layer_config`` by the number of the layer."""
    known = {str(i): i for i in range(layers)}
    try:
        found = {known[str(int(name))]: dict(own) for name, own in given.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise InputError("per_layer_config must have fields by the number of a layer") from error
    for own in found.values():
        for name in own:
            if name not in _SIZES:
                raise InputError(f"{name} in per_layer_config is not implemented")
    return found


def _rope(fields: Fields, kind: str, features: int) -> Rope:
    """Returns the rotary embedding of layers of one type."""
    given = _ROPES if fields.get("rope_parameters") is None else fields["rope_parameters"]
    given = given.get(kind) if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping):
        raise InputError(f"rope_parameters must have fields for {kind}")
    given, turned = dict(given), 1.0
    if given.get("rope_type") == "proportional":
        turned = given.pop("partial_rotary_factor", 1.0)
        if isinstance(turned, bool) or not isinstance(turned, int | float) or not 0 <= turned <= 1:
            raise InputError(f"partial_rotary_factor must be from 0 to 1; got {turned!r}")
        given["rope_type"] = "default" if given.get("factor") is None else "linear"
    length = {"max_position_embeddings": fields["max_position_embeddings"]}
    # The number of features makes embeddings differ that do not in other respects.
    rope = replace(Rope.from_json({"rope_parameters": given, **length}), rotary_dim=features)
    rope.check(features)
    return replace(rope, turned=float(turned))


_LAYER = "layers.{l}"
_VARIABLE = {"": Leaf(("",))}
_NAMES = {
    "layer_word": ("embed_tokens_per_layer", EMBED),
    "layer_project": ("per_layer_model_projection", LINEAR),
    "layer_norm": ("per_layer_projection_norm", NORM),
    f"{_LAYER}.gate": (f"{_LAYER}.per_layer_input_gate", LINEAR),
    f"{_LAYER}.project": (f"{_LAYER}.per_layer_projection", LINEAR),
    f"{_LAYER}.project_norm": (f"{_LAYER}.post_per_layer_input_norm", NORM),
    f"{_LAYER}.scalar": (f"{_LAYER}.layer_scalar", _VARIABLE),
    f"{_LAYER}.moe.router": (f"{_LAYER}.router.proj", LINEAR),
    f"{_LAYER}.moe.router_scale": (f"{_LAYER}.router.scale", _VARIABLE),
    f"{_LAYER}.moe.expert_scale": (f"{_LAYER}.router.per_expert_scale", _VARIABLE),
    f"{_LAYER}.moe.norm": (f"{_LAYER}.pre_feedforward_layernorm_2", NORM),
    f"{_LAYER}.moe_post_norm": (f"{_LAYER}.post_feedforward_layernorm_2", NORM),
    f"{_LAYER}.mlp_own_norm": (f"{_LAYER}.post_feedforward_layernorm_1", NORM),
}


def _rules(config: Gemma4Config, head: Head | None) -> KeyRules:
    own = [KeyRule(ours, theirs, leaves) for ours, (theirs, leaves) in _NAMES.items()]
    experts = packed_rules(
        "experts", ours="moe.experts", interleaved=False, biases=False, transposed=True
    )
    rules = decoder_rules(config, head, (*own, *experts))
    shared = "|".join(
        str(i) for i in range(config.num_hidden_layers) if config.source(i) is not None
    )
    ignored = (
        *rules.ignored,
        r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..+",
        rf"(model\.(language_model\.)?)?layers\.({shared})\.self_attn\.[kv]_(proj|norm)\..+",
    )
    return replace(rules, other_prefixes=("model.language_model.",), ignored=ignored)


def _width_factor(config: Gemma4Config, path: str) -> int:
    _, index, rest = path.split(".", 2)
    return config.width_factor(int(index)) if rest == "mlp" else 1


FAMILIES = {
    "gemma4_text": Family(
        config=_config,
        model=Gemma4,
        rules=_rules,
        architectures=decoder_architectures("Gemma4", ("causal-lm",), base="TextModel"),
        width_field="intermediate_size",
        width_fields={"experts": "moe_intermediate_size"},
        width_factor=_width_factor,
    )
}
