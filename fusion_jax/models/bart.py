"""BART, mBART, Marian and Pegasus: encoder-decoders with absolute positions.

The originals also drop out units inside the MLPs; this model does not. The settings of a
``generation_config.json``, such as forced tokens, are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.bart_stacks import BartConfig, BartStack, computed, positions
from fusion_jax.models.base import Family, Fields, Head, check_positions, tied_head
from fusion_jax.models.layers import ArrayLike
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules, Leaf
from fusion_jax.models.t5 import T5, T5Cache
from fusion_jax.models.t5_heads import HEAD_RULES, T5WithHead
from fusion_jax.models.t5_stacks import EncoderDecoder
from fusion_jax.nn.linear_forms import Frozen


class BartParts(EncoderDecoder):
    """The embeddings and stacks of BART and its relatives."""

    stack = BartStack

    def add_positions(self, stored: bool, param_dtype: Any, rngs: nnx.Rngs) -> None:
        """Adds the embeddings of positions; ``stored`` says whether the files have sinusoids."""
        config, d = self.config, self.config.d_model
        self.max_length = config.max_position_embeddings
        self.positions: Any = None
        self.decoder_positions: Any = None
        if config.learned_positions:
            self.positions = nnx.data(positions(config, param_dtype, rngs))
            self.decoder_positions = nnx.data(positions(config, param_dtype, rngs))
        elif stored:
            shape = (self.max_length, d)
            self.positions = nnx.data(Frozen(jnp.zeros(shape, param_dtype)))
            self.decoder_positions = nnx.data(Frozen(jnp.zeros(shape, param_dtype)))

    def embed(
        self, ids: Int[Array, "b t"], slots: Int[Array, " t"], *, decoder: bool
    ) -> Float[Array, "b t d"]:
        """Returns the input of the encoder or of the decoder for tokens in these slots."""
        check_positions(self, ids.shape[1])
        config = self.config
        x = super().embed(ids, slots, decoder=decoder)
        x = x * jnp.asarray(config.d_model**0.5 if config.scale_embedding else 1.0, x.dtype)
        own = self.decoder_positions if decoder else self.positions
        if config.learned_positions:
            places = own(slots + 2)
        else:
            places = (computed(config, x.dtype) if own is None else own[...])[slots]
        stack: Any = self.decoder if decoder else self.encoder
        return stack.begin(x + places[None])

    def shift_right(self, ids: Int[ArrayLike, "b t"]) -> Int[Array, "b t"]:
        """Returns the decoder's input for target texts."""
        if not self.config.wraps:
            return super().shift_right(ids)
        pad = self.config.pad_token_id
        ids = jnp.asarray(ids)
        ids = jnp.where(ids < 0, pad, ids)
        last = (ids != pad).sum(axis=1) - 1
        start = ids[jnp.arange(len(ids)), last]
        return jnp.concatenate([start[:, None], ids[:, :-1]], axis=1)


class Bart(T5, BartParts):
    """A BART encoder-decoder that generates text.

    Args:
        lm_head: Whether there is an output layer, if the configuration does not tie it to the
            token embeddings.
        final_bias: Whether there is a bias of the logits, which does not train.
        positions: Whether positions that are sinusoids are in the files; otherwise they are
            computed.

    References:
        BART (arXiv 1910.13461); mBART (arXiv 2001.08210); Marian (arXiv 1804.00344); Pegasus (arXiv
        1912.08777).

    Example:
        >>> config = BartConfig.read({"vocab_size": 50, "d_model": 8, "encoder_layers": 1,
        ...     "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        ...     "encoder_attention_heads": 2, "decoder_attention_heads": 2})
        >>> model = Bart(config, head="seq2seq-lm", rngs=nnx.Rngs(0))
        >>> model(jnp.array([[3, 7, 9]]), decoder_input_ids=jnp.array([[2, 5]])).logits.shape
        (1, 2, 50)
    """

    def __init__(
        self,
        config: BartConfig,
        *,
        head: Head | None = None,
        lm_head: bool = True,
        final_bias: bool = True,
        positions: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, head=head, lm_head=lm_head, **common)
        self.add_positions(positions, **common)
        biased = head is not None and final_bias
        zeros = jnp.zeros((1, config.vocab_size), param_dtype)
        self.final_bias = Frozen(zeros) if biased else None

    def logits(self, x: Float[Array, "*n d"]) -> Float[Array, "*n vocab"]:
        """Returns the logits of the decoder's hidden states."""
        y = super().logits(x)
        if self.final_bias is None:
            return y
        return y + self.final_bias[...].reshape((1,) * (y.ndim - 1) + (-1,))

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], T5Cache]:
        """Encodes source texts and reads the start token; see `Generative.begin`."""
        if room > self.config.max_position_embeddings:
            raise InputError(
                f"the model has {self.config.max_position_embeddings} positions, which is fewer "
                f"than the {room} tokens to generate"
            )
        return super().begin(input_ids, attention_mask, room)


class BartWithHead(T5WithHead, BartParts):
    """A BART that gives classes or answers, see `T5WithHead`."""

    def __init__(
        self,
        config: BartConfig,
        *,
        head: Head,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common = {"param_dtype": param_dtype, "rngs": rngs}
        super().__init__(config, head=head, **common)
        self.add_positions(False, **common)


def _model(
    config: BartConfig,
    *,
    head: Head | None = None,
    lm_head: bool = True,
    final_bias: bool = True,
    positions: bool = False,
    **options: Any,
) -> EncoderDecoder:
    if head is not None and head in HEAD_RULES:
        return BartWithHead(config, head=head, **options)
    parts = {"lm_head": lm_head, "final_bias": final_bias, "positions": positions}
    return Bart(config, head=head, **parts, **options)


_VARIABLE = {"": Leaf(("",))}
_PREFIX = "model."
_NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
}


def stack_rules(stack: str, learned: bool) -> list[KeyRule]:
    """Returns the rules of an encoder or decoder, whose positions are learned or sinusoids."""
    layer = f"{stack}.layers.{{l}}"
    ours = "positions" if stack == "encoder" else "decoder_positions"
    theirs = f"{stack}.embed_positions" + ("" if learned else ".weight")
    rules = [
        KeyRule(ours, theirs, EMBED if learned else _VARIABLE),
        KeyRule(f"{stack}.embedding_norm", f"{stack}.layernorm_embedding", NORM),
        KeyRule(f"{stack}.norm", f"{stack}.layer_norm", NORM),
        KeyRule(f"{layer}.mlp.up", f"{layer}.fc1", LINEAR),
        KeyRule(f"{layer}.mlp.down", f"{layer}.fc2", LINEAR),
        KeyRule(f"{layer}.mlp_norm", f"{layer}.final_layer_norm", NORM),
    ]
    for part, other in (("attention", "self_attn"), ("cross", "encoder_attn")):
        rules.append(KeyRule(f"{layer}.{part}_norm", f"{layer}.{other}_layer_norm", NORM))
        for a, b in _NAMES.items():
            rules.append(KeyRule(f"{layer}.{part}.{a}", f"{layer}.{other}.{b}", LINEAR))
    return rules


def _rules(config: BartConfig, head: Head | None) -> KeyRules:
    rules = [
        KeyRule("word", "shared", EMBED),
        KeyRule("lm_head", "lm_head", LINEAR, in_base=False),
        KeyRule("final_bias", "final_logits_bias", _VARIABLE, in_base=False),
        *HEAD_RULES.get(head, ()),
    ]
    generates = head == "seq2seq-lm"
    twins = tied_head(config, "lm_head.weight", "word.embedding") if generates else {}
    for stack in ("encoder", "decoder"):
        rules += stack_rules(stack, config.learned_positions)
        name = f"{stack}.embed_tokens"
        rules.append(KeyRule(f"{stack}_word", name, EMBED))
        if stack not in config.own_embeddings:
            twins |= dict.fromkeys((f"{name}.weight", f"{_PREFIX}{name}.weight"), "word.embedding")
    ignored = (
        r"(model\.)?(encoder|decoder)\.(embed_tokens\.weight|version)",
        r"lm_head\.weight",
        *(() if generates else (r"final_logits_bias",)),
    )
    return KeyRules(rules, _PREFIX, write_prefix=head is not None, ignored=ignored, twins=twins)


def _untied(config: BartConfig, names: Sequence[str]) -> BartConfig:
    plain = [name.removeprefix(_PREFIX) for name in names]
    own = tuple(s for s in ("encoder", "decoder") if f"{s}.embed_tokens.weight" in plain)
    tied = config.tie_word_embeddings and "lm_head.weight" not in plain
    return replace(config, tie_word_embeddings=tied, own_embeddings=own)


def _family(
    name: str,
    defaults: Fields,
    *,
    generates: str = "ForConditionalGeneration",
    heads: bool = False,
    **own: bool,
) -> Family:
    def config(fields: Fields) -> BartConfig:
        return BartConfig.read({**defaults, **fields}, **own)

    names: dict[Head | None, str] = {None: f"{name}Model", "seq2seq-lm": f"{name}{generates}"}
    if heads:
        names["classification"] = f"{name}ForSequenceClassification"
        names["question-answering"] = f"{name}ForQuestionAnswering"
    return Family(
        config=config,
        model=_model,
        rules=_rules,
        architectures=names,
        width_field="encoder_ffn_dim",
        width_fields={"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"},
        optional=("lm_head", "final_bias", "positions"),
        untied=_untied,
    )


_BART = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
_MARIAN = {"vocab_size": 58101, "decoder_start_token_id": 58100, "pad_token_id": 58100,
           "eos_token_id": 0}  # fmt: skip
_PEGASUS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
FAMILIES = {
    "bart": _family("Bart", {**_BART, "num_labels": 3}, heads=True),
    "mbart": _family(
        "MBart",
        {**_BART, "decoder_start_token_id": None},
        heads=True,
        norm_first=True,
        wraps=True,
    ),
    "marian": _family(
        "Marian", _MARIAN, generates="MTModel", embedding_norm=False, learned_positions=False
    ),
    "pegasus": _family(
        "Pegasus", _PEGASUS, norm_first=True, embedding_norm=False, learned_positions=False
    ),
}
