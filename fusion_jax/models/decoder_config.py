"""The configuration of decoders: fields of their ``config.json``, and flags for their blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, config_from_fields
from fusion_jax.models.cache import Reach
from fusion_jax.models.causal import HeadConfig
from fusion_jax.models.delta import Delta
from fusion_jax.models.latent_attention import Latent
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
            ``"rms-offset"``, the same with the scale 1 + w; ``"layer"``, layer normalization;
            ``"layer-offset"``, the same with the scale 1 + w; ``"layer-scaled"``, layer
            normalization without a bias; or ``"layer-bare"``, without parameters.
        norms: Where attention and MLP have their norms: before them, after them, both, or
            ``"outside"``, after the residual connection; ``"shared"`` is one norm before both.
        parallel: Whether attention and MLP have the same input, and their outputs are added.
        final_norm: Whether there is a norm after the last layer.
        query_key_norm: Whether queries and keys are normalized: each head, all heads at once, or
            each head with a scale of its own (``"apart"``, see `HeadNorms`).
        normed_last: Whether they are normalized after the rotary embedding.
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
        attention_out_dropout: That of the output of attention, if it is another one.
        joint_dropout: Whether both dropouts have the same mask, as that of the sum has.
        embedding_dropout: The dropout rate of the embeddings.
        logit_bias: Whether the output layer of a language model has a bias.
        residual_normed: Whether residual connections start after the norm, not before it.
        positions: The number of learned positions, which are added to the embeddings.
        first_position: The row of the first of them.
        embedding_size: The number of features of the token embeddings, if it is another one.
        embedding_norm: Whether the embeddings are normalized.
        alibi: Whether scores have a bias by position, see `alibi_bias`: with or without rounding;
            rounded ones count before the scale.
        clip_qkv: The largest absolute value of queries, keys and values; None for no limit.
        unit_norms: Whether queries and keys with positions are divided by their root mean square.
        temperature: For layers without positions the numbers f and a: the query of token i of a
            text is multiplied by 1 + a log(1 + floor((i + 1) / f)). Padding does not count; in
            transformers it does.
        gated_attention: Whether outputs of attention are multiplied by the sigmoid of gates, which
            are features of each query head.
        sinks: Whether each head can attend to nothing, with a score that is a parameter.
        value_normed: Whether values are divided by their root mean square, by head.
        keys_as_values: Whether values are the keys before they are normalized.
        reuses: The layer whose keys and values this one attends to; None for its own.
        keeps: The number of this layer, if later ones reuse its keys and values.
        act: The activation, where ``hidden_act`` does not name it.
    """

    norm: Literal[
        "rms", "rms-wide", "rms-offset", "layer", "layer-offset", "layer-scaled", "layer-bare"
    ] = "rms"
    norms: Literal["before", "after", "both", "shared", "outside"] = "before"
    parallel: bool = False
    final_norm: bool = True
    query_key_norm: Literal["head", "all", "apart"] | None = None
    normed_last: bool = False
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
    attention_out_dropout: float | None = None
    joint_dropout: bool = False
    embedding_dropout: float = 0.0
    logit_bias: bool = False
    residual_normed: bool = False
    positions: int = 0
    first_position: int = 0
    embedding_size: int = 0
    embedding_norm: bool = False
    alibi: Literal["plain", "rounded"] | None = None
    clip_qkv: float | None = None
    unit_norms: bool = False
    temperature: tuple[float, float] | None = None
    gated_attention: bool = False
    sinks: bool = False
    value_normed: bool = False
    keys_as_values: bool = False
    reuses: int | None = None
    keeps: int | None = None
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
        interleaved: bool = False,
        rotary: bool = True,
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
            interleaved: Whether it rotates pairs of neighbors, see `Rope`.
            rotary: Whether it has rotary embeddings, which the fields describe.
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
        rope = None
        if rotary:
            rope = Rope.from_json(fields, partial_rotary=partial_rotary, interleaved=interleaved)
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
        if rope is not None:
            rope.check(result.head_dim)
        if result.num_experts:
            result.router.check(result.num_experts, result.num_experts_per_tok)
        if heads % result.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {result.num_key_value_heads}"
            )
        return result


def renamed_fields(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns fields under our names, given by theirs or by ours, which count where both are."""
    return {**{names[name]: x for name, x in fields.items() if name in names}, **fields}


def count(fields: Fields, name: str, least: int = 0) -> int:
    """Returns a number of rows, columns or layers; 0 if none is given and none is needed.

    Raises:
        InputError: It is not an integer of at least ``least``.
    """
    value = fields.get(name)
    value = 0 if value is None and not least else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise InputError(f"{name} must be an integer of at least {least}; got {str(value)[:100]!r}")
    return value


def rate(fields: Fields, name: str) -> float:
    """Returns the rate of a dropout; 0 if there is none.

    Raises:
        InputError: It is not a number from 0 to 1.
    """
    value = fields.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name} must be a number from 0 to 1; got {str(value)[:100]!r}")
    return float(value)


def window_pattern(fields: Fields) -> int:
    """Returns n where every n-th layer has no window: ``sliding_window_pattern``.

    Raises:
        InputError: It is not an integer above 0.
    """
    pattern = fields["sliding_window_pattern"]
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise InputError(
            f"sliding_window_pattern must be an integer above 0; got {str(pattern)[:100]!r}"
        )
    return pattern


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


def ropes_by_type(
    config: DecoderConfig,
    fields: Fields,
    sliding: Sequence[bool],
    *,
    full_theta: float,
    sliding_theta: float,
) -> DecoderConfig:
    """Returns a configuration with one rotary embedding for layers with windows, one for the rest.

    Args:
        config: The configuration.
        fields: The fields of ``config.json``; ``rope_scaling`` is for layers without windows alone.
        sliding: Which layers have windows.
        full_theta: The base of the wavelengths in layers without windows, if the fields have none.
        sliding_theta: The same in layers with windows.

    Raises:
        InputError: An embedding is not possible.
    """
    given = fields.get("rope_parameters") or {}
    full = {"rope_theta": full_theta, **(given.get(FULL) or {})}
    full |= fields.get("rope_scaling") or {}
    local = {"rope_theta": sliding_theta, **(given.get(SLIDING) or {})}
    length = {"max_position_embeddings": fields["max_position_embeddings"]}
    full, local = (Rope.from_json({"rope_parameters": x, **length}) for x in (full, local))
    for rope in (full, local):
        rope.check(config.head_dim)
    return replace(config, ropes=tuple(local if has else full for has in sliding))


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
