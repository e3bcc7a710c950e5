"""Families of decoders: where their tensors are in a checkpoint, by Llama's names or their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from fusion_jax.models.base import Family, Fields, Head, tied_head
from fusion_jax.models.causal import ALL_HEADS, decoder_architectures, with_head
from fusion_jax.models.decoder import Decoder
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules

_LAYER = "layers.{l}"
_BASE = (KeyRule("word", "embed_tokens", EMBED), KeyRule("norm", "norm", NORM))
_HEAD = (KeyRule("lm_head", "lm_head", LINEAR, in_base=False),)
_NORMS = {
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
_NORMS["shared"] = {"attention_norm": "input_layernorm"}
_NORMS["both"] = {
    **_NORMS["after"],
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
}
_ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
}
_QUERY_KEY_NORMS = {
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
}


def linear_rules(ours: str, theirs: str, names: Mapping[str, str]) -> tuple[KeyRule, ...]:
    """Returns the rules of linear layers inside one module of every layer, by our names."""
    return tuple(
        KeyRule(f"{_LAYER}.{ours}.{a}", f"{_LAYER}.{theirs}.{b}", LINEAR) for a, b in names.items()
    )


def joined_rules(
    ours: str, theirs: str, parts: Collection[str], *, layer: str = _LAYER, groups: int = 1
) -> tuple[KeyRule, ...]:
    """Returns the rules of linear layers that are one in a checkpoint, one after the other.

    Args:
        ours: The path of the module that has them, in a layer.
        theirs: The name of the one in the checkpoint, in a layer.
        parts: Their names in our module.
        layer: The name of a layer in the checkpoint.
        groups: See `KeyRule`.
    """
    paths = tuple(f"{_LAYER}.{ours}.{part}" for part in parts)
    theirs = f"{layer}.{theirs}"
    return tuple(KeyRule(p, theirs, LINEAR, joined=paths, groups=groups) for p in paths)


def _unused_output(config: DecoderConfig, name: str) -> str:
    """Returns the names of an output layer that is tied, or was not asked for."""
    return rf"{name}\.(weight|bias)" if config.blocks.logit_bias else rf"{name}\.weight"


QUERY_KEY_VALUE = ("query", "key", "value")


def renamed_rules(
    config: DecoderConfig,
    head: Head | None,
    names: Mapping[str, str],
    *,
    prefix: str,
    layer: str,
    own: tuple[KeyRule, ...] = (),
    ignored: Collection[str] = (),
    output: str = "lm_head",
) -> KeyRules:
    """Returns the key rules of a decoder none of whose tensors have the names that Llama's have.

    Args:
        config: The configuration.
        head: The head.
        names: The names of the layers by our paths; those in a layer of the model without its name.
        prefix: See `KeyRules`.
        layer: The name of a layer of the model.
        own: Further rules.
        ignored: See `KeyRules`.
        output: The name of the output layer of a language model.
    """
    rules = [*own]
    for ours, theirs in names.items():
        leaves = NORM if ours.endswith("norm") else LINEAR
        if ours in ("word", "position"):
            rules.append(KeyRule(ours, theirs, EMBED))
        elif ours.startswith(("norm", "embedding_norm", "project")):
            rules.append(KeyRule(ours, theirs, leaves))
        else:
            rules.append(KeyRule(f"{_LAYER}.{ours}", f"{layer}.{theirs}", leaves))
    outputs = dict.fromkeys((output, "lm_head"))
    rules += [KeyRule("lm_head", name, LINEAR, in_base=False) for name in outputs]
    twins: dict[str, str] = {}
    for name in outputs:
        twins |= tied_head(config, f"{name}.weight", "word.embedding")
    return KeyRules(
        rules,
        prefix,
        write_prefix=head is not None,
        ignored=(*ignored, *(_unused_output(config, name) for name in outputs)),
        twins=twins,
    )


def norm_rules(names: Mapping[str, str]) -> tuple[KeyRule, ...]:
    """Returns the rules of norms inside every layer, by our names."""
    return tuple(KeyRule(f"{_LAYER}.{a}", f"{_LAYER}.{b}", NORM) for a, b in names.items())


MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# Frequencies, a buffer in old checkpoints.
_IGNORED = (r"((model|transformer)\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def decoder_rules(
    config: DecoderConfig, head: Head | None, own: tuple[KeyRule, ...] = ()
) -> KeyRules:
    """Returns the key rules of a decoder, whose tensors have the names that Llama's have.

    Args:
        config: The configuration.
        head: The head.
        own: The rules of the layers whose names are not Llama's.
    """
    norms = _NORMS[config.blocks.norms]
    rules = [
        *own,
        *_BASE,
        *norm_rules(norms),
        *norm_rules(_QUERY_KEY_NORMS),
    ]
    if config.blocks.joined:
        rules += joined_rules("attention", "self_attn.qkv_proj", QUERY_KEY_VALUE)
        rules += joined_rules("mlp", "mlp.gate_up_proj", ("gate", "up"))
    rules += linear_rules("attention", "self_attn", _ATTENTION)
    rules += linear_rules("mlp", "mlp", MLP_NAMES)
    twins = tied_head(config, "lm_head.weight", "word.embedding")
    return KeyRules(
        (*rules, *_HEAD),
        "model.",
        write_prefix=head is not None,
        ignored=(*_IGNORED, _unused_output(config, "lm_head")),
        twins=twins,
    )


def decoder_family(
    name: str,
    config: Callable[[Fields], DecoderConfig],
    *,
    heads: Collection[Head] = ALL_HEADS,
    rules: Callable[[DecoderConfig, Head | None], KeyRules] = decoder_rules,
    answers: str | None = None,
    tokens: str = "score",
    width_field: str | None = "intermediate_size",
    width_fields: Mapping[str, str] | None = None,
    experts_field: str = "num_experts",
    **other: str,
) -> Family:
    """Returns the family of a decoder.

    Args:
        name: What the names of its classes in `transformers` begin with.
        config: Reads the fields of a ``config.json``.
        heads: The heads that the family has in `transformers`.
        rules: The key rules without those of heads, if they are not Llama's.
        answers: See `with_head`.
        tokens: See `with_head`.
        width_field: See `Family`.
        width_fields: See `Family`.
        experts_field: See `Family`.
        **other: See `decoder_architectures`.
    """

    def all_rules(config: DecoderConfig, head: Head | None) -> KeyRules:
        return with_head(rules(config, head), head, tokens=tokens, answers=answers)

    return Family(
        config=config,
        model=Decoder,
        rules=all_rules,
        architectures=decoder_architectures(name, heads, **other),
        width_field=width_field,
        width_fields=width_fields or {},
        experts_field=experts_field,
    )
