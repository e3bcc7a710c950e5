"""The configuration of decoders: fields of their ``config.json``, and flags for their blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, config_from_fields
from fusion_jax.models.causal import HeadConfig
from fusion_jax.models.delta import Delta
from fusion_jax.models.latent_attention import Latent
from fusion_jax.models.layers import Reach
from fusion_jax.models.moe import RouterRule
from fusion_jax.models.rope import Rope
from fusion_jax.nn.submlps import activation

OPTIONAL = {
    "attention_bias", "mlp_bias", "num_experts", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
    "router_jitter_noise", "tie_word_embeddings",
}  # fmt: skip
"""The fields that only some families have; `transformers` ignores them in the others."""

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the layers of an architecture are built; the defaults are Llama's.

    Args:
        norm: The normalization: ``"rms"``; ``"rms-wide"``, whose result is rounded after the scale;
            ``"rms-offset"``, the same with the scale 1 + w; or ``"layer"``, layer normalization.
        norms: Where attention and MLP have their norms: before them, after them, or both.
        query_key_norm: Whether queries and keys are normalized: each head, or all heads at once.
        gated: Whether MLPs are gated.
        joined: Whether a checkpoint has one matrix for query, key and value, and one for gate and
            up.
        score_scale: The factor of the scores of attention; None for 1 / sqrt(head_dim).
        score_cap: The soft cap of the scores: scores s become cap * tanh(s / cap).
        logit_cap: The soft cap of the logits.
        logit_divisor: What the logits are divided by.
        embedding_scale: The factor of the embeddings, rounded to their dtype if
            ``embedding_rounded``.
        embedding_rounded: See ``embedding_scale``.
        residual_scale: The factor of the outputs of attention and of the MLP.
        residual_dropout: The dropout rate of these outputs.
        clip_qkv: The largest absolute value of queries, keys and values; None for no limit.
        unit_norms: Whether queries and keys with positions are divided by their root mean square.
        temperature: For layers without positions the numbers f and a: the query of token i of a
            text is multiplied by 1 + a log(1 + floor((i + 1) / f)). Padding does not count; in
            transformers it does.
        gated_attention: Whether outputs of attention are multiplied by the sigmoid of gates, which
            are features of each query head.
        sinks: Whether each head can attend to nothing, with a score that is a parameter.
        act: The activation, where ``hidden_act`` does not name it.
    """

    norm: Literal["rms", "rms-wide", "rms-offset", "layer"] = "rms"
    norms: Literal["before", "after", "both"] = "before"
    query_key_norm: Literal["head", "all"] | None = None
    gated: bool = True
    joined: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    embedding_scale: float = 1.0
    embedding_rounded: bool = False
    residual_scale: float = 1.0
    residual_dropout: float = 0.0
    clip_qkv: float | None = None
    unit_norms: bool = False
    temperature: tuple[float, float] | None = None
    gated_attention: bool = False
    sinks: bool = False
    act: Callable[[Array], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(HeadConfig):
    """The fields of a ``config.json`` that the model uses, with Llama's defaults.

    Some fields are derived by `read` and by the families: ``ropes`` is the rotary embedding of each
    layer (None for a layer without positions), ``sliding_windows`` says what a token attends to in
    each layer, ``sparse`` says which layers have experts, ``delta_layers`` says which layers have
    the gated delta rule in place of attention, ``further_layers`` is the number of layers after the
    last one that a checkpoint may have and that are left out, and ``qkv_bias`` and ``out_bias`` say
    which projections of attention have biases. Without a shared expert, its size is 0.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_jitter_noise: float = 0.0
    eos_token_id: int | tuple[int, ...] | None = None
    ropes: tuple[Rope | None, ...] = ()
    sliding_windows: tuple[Reach, ...] = ()
    sparse: tuple[bool, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    router: RouterRule = field(default_factory=RouterRule)
    blocks: Blocks = Blocks()
    latent: Latent | None = None
    delta: Delta | None = None
    delta_layers: tuple[bool, ...] = ()
    further_layers: int = 0

    @classmethod
    def read(
        cls,
        fields: Fields,
        *,
        optional: Collection[str] = ("tie_word_embeddings",),
        blocks: Blocks | None = None,
        router: RouterRule | None = None,
        latent: Latent | None = None,
        delta: Delta | None = None,
        partial_rotary: bool = False,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
    ) -> DecoderConfig:
        """Reads the fields of a ``config.json``, to which the family has added its defaults.

        Args:
            fields: The fields; unknown ones are ignored.
            optional: Which of the fields in `OPTIONAL` the family has.
            blocks: How the layers are built; None for Llama's.
            router: How routers choose experts; None for Mixtral's.
            latent: The sizes of latent attention; None for usual attention.
            delta: The sizes of layers with the gated delta rule; None without such layers.
            partial_rotary: Whether the family rotates only a part of the features if asked to.
            qkv_bias: Whether queries, keys and values have biases; None for ``attention_bias``.
            out_bias: Whether the output projection has one; None for ``attention_bias``.

        Raises:
            InputError: A field has a wrong type or a value that is not possible.
        """
        fields = {name: x for name, x in fields.items() if name in optional or name not in OPTIONAL}
        bias = bool(fields.get("attention_bias"))
        result = config_from_fields(
            cls,
            fields,
            qkv_bias=bias if qkv_bias is None else qkv_bias,
            out_bias=bias if out_bias is None else out_bias,
            blocks=blocks or Blocks(),
            router=router or RouterRule(),
            latent=latent,
            delta=delta,
            **dict.fromkeys(("ropes", "sliding_windows", "sparse", "delta_layers"), ()),
        )
        activation(result.hidden_act)
        heads, layers = result.num_attention_heads, result.num_hidden_layers
        rope = Rope.from_json(fields, partial_rotary=partial_rotary)
        result = replace(
            result,
            num_key_value_heads=result.num_key_value_heads or heads,
            head_dim=result.head_dim or result.hidden_size // heads,
            moe_intermediate_size=result.moe_intermediate_size or result.intermediate_size,
            ropes=(rope,) * layers,
            sliding_windows=(None,) * layers,
            sparse=(result.num_experts > 0,) * layers,
            delta_layers=(False,) * layers,
        )
        if result.head_dim < 1:
            raise InputError(f"head_dim must be above 0; got {result.head_dim}")
        rope.check(result.head_dim)
        if result.num_experts:
            result.router.check(result.num_experts, result.num_experts_per_tok)
        if heads % result.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {result.num_key_value_heads}"
            )
        return result


def sliding_layers(
    config: DecoderConfig, fields: Fields, usual: Callable[[int], bool]
) -> tuple[bool, ...]:
    """Returns which layers have windows: what ``layer_types`` states, or else what is usual.

    Raises:
        InputError: The types are not those of the layers.
    """
    layers, types = config.num_hidden_layers, fields.get("layer_types")
    if not types:
        return tuple(usual(layer) for layer in range(layers))
    if len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise InputError(f"layer_types must be {SLIDING} or {FULL} for each of the {layers} layers")
    return tuple(kind == SLIDING for kind in types)


def layer_windows(
    config: DecoderConfig, fields: Fields, usual: Callable[[int], bool]
) -> DecoderConfig:
    """Returns a configuration with the windows that ``sliding_window`` and ``layer_types`` state.

    Args:
        config: The configuration.
        fields: The fields of ``config.json``; without a ``sliding_window`` there are no windows.
        usual: Which layers have windows if there are no ``layer_types``.

    Raises:
        InputError: The types are not those of the layers, or the window is not a number.
    """
    size = fields.get("sliding_window")
    if not size:
        return config
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"sliding_window must be an integer above 0; got {str(size)[:100]!r}")
    sliding = sliding_layers(config, fields, usual)
    return replace(config, sliding_windows=tuple(size if has else None for has in sliding))
