"""DeBERTa versions 2 and 3: BERT's layers with disentangled attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, Head, config_from_fields
from fusion_jax.models.bert import BertConfig, encoder_family
from fusion_jax.models.bert_config import Conv, Disentangled, EncoderBlocks
from fusion_jax.models.bert_rules import BIAS, ENCODER_RULES, encoder_rules, head_rule
from fusion_jax.models.rules import EMBED, LINEAR, NORM, KeyRule, KeyRules
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The fields of a ``config.json`` that BERT does not have, or with another default."""

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-7
    hidden_dropout_prob: float = 0.1
    type_vocab_size: int = 0
    embedding_size: int = 0
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_buckets: int = -1
    norm_rel_ebd: str = "none"
    share_att_key: bool = False
    position_biased_input: bool = True
    pos_att_type: str | tuple[str, ...] = ()
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None
    legacy: bool = True
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"

    def relative(self) -> Disentangled:
        """Returns what `DisentangledAttention` needs."""
        types = self.pos_att_type
        types = types.lower().split("|") if isinstance(types, str) else types
        kinds = [kind.strip() for kind in types]
        most, buckets = self.max_relative_positions, self.position_buckets
        most = most if most > 0 else self.max_position_embeddings
        if self.relative_attention and buckets > 0 and not 1 < buckets // 2 < most - 1:
            raise InputError(
                "half of position_buckets must be from 2 to max_relative_positions - 2, "
                f"{most - 2}; got {buckets} position_buckets"
            )
        return Disentangled(
            kinds=tuple(kind for kind in ("c2p", "p2c") if kind in kinds),
            span=(buckets if buckets > 0 else most) if self.relative_attention else 0,
            most=most,
            buckets=buckets,
            shared=self.share_att_key,
            normed="layer_norm" in [x.strip() for x in self.norm_rel_ebd.lower().split("|")],
        )

    def convolution(self) -> Conv | None:
        """Returns the convolution beside the first layer, if there is one."""
        size, groups = self.conv_kernel_size, self.conv_groups
        if not size:
            return None
        activation(self.conv_act)
        if size % 2 == 0 or self.hidden_size % groups:
            raise InputError(
                "conv_kernel_size must be odd, and hidden_size a multiple of conv_groups; got "
                f"{size} and {groups}"
            )
        return Conv(size=size, groups=groups, act=self.conv_act)


def _config(fields: Fields) -> BertConfig:
    # Published files state -1 for what is not limited.
    unlimited = ("max_relative_positions", "position_buckets")
    fields = {n: x for n, x in fields.items() if not (n in unlimited and x == -1)}
    own = config_from_fields(_Own, fields)
    for name, only in (
        ("pooler_hidden_size", own.hidden_size),
        ("attention_head_size", own.hidden_size // own.num_attention_heads),
    ):
        if fields.get(name) not in (None, only):
            raise InputError(f"{name} must be {only}; got {str(fields[name])[:100]}")
    named = {
        "type_vocab_size": own.type_vocab_size,
        "classifier_dropout": None,
        "sequence_dropout": own.cls_dropout,
        "pooled": False,
        "head_act": own.pooler_hidden_act,
    }
    if not own.legacy:
        named["tie_word_embeddings"] = True  # whatever the file says
    relative = own.relative()
    blocks = EncoderBlocks(
        positions=own.position_biased_input,
        head_input_dropout=own.pooler_dropout,
        project_first=True,
        relative=relative,
        convolution=own.convolution(),
        legacy=own.legacy,
    )
    return replace(BertConfig.from_json({**fields, **asdict(own)}, **named), blocks=blocks)


_ATTENTION = "layers.{l}.attention"
_SELF = "encoder.layer.{l}.attention.self"
_CONV = "encoder.conv"
_LINEARS = {
    "query": "query_proj",
    "key": "key_proj",
    "value": "value_proj",
    "position_key": "pos_key_proj",
    "position_query": "pos_query_proj",
}
_LAYERS = (
    KeyRule("embeddings.project", "embeddings.embed_proj", LINEAR),
    *(KeyRule(f"{_ATTENTION}.{a}", f"{_SELF}.{b}", LINEAR) for a, b in _LINEARS.items()),
    KeyRule("relative", "encoder.rel_embeddings", EMBED),
    KeyRule("relative_norm", "encoder.LayerNorm", NORM),
    KeyRule("convolution.conv", f"{_CONV}.conv", LINEAR),
    KeyRule("convolution.norm", f"{_CONV}.LayerNorm", NORM),
    *ENCODER_RULES,
)
_LEGACY, _LM = "cls.predictions", "lm_predictions.lm_head"


def _rules(config: BertConfig, head: Head | None) -> KeyRules:
    legacy = config.blocks.legacy
    transform = f"{_LEGACY}.transform" if legacy else _LM
    return encoder_rules(
        config,
        head,
        prefix="deberta.",
        layers=_LAYERS,
        classification=(
            head_rule("head.dense", "pooler.dense", LINEAR),
            head_rule("head.out", "classifier", LINEAR),
        ),
        masked_lm=(
            head_rule("head.dense", f"{transform}.dense", LINEAR),
            head_rule("head.norm", f"{transform}.LayerNorm", NORM),
            head_rule("head.bias", f"{_LEGACY if legacy else _LM}.bias", BIAS),
        ),
        decoder=f"{_LEGACY}.decoder",
        decoder_bias=legacy,
        ignored=(
            r"(lm|mask)_predictions\..+",
            r"cls\.predictions\..+",
            r"(.+\.)?embeddings\.position_embeddings\.weight",
        ),
    )


FAMILIES = {"deberta-v2": encoder_family("DebertaV2", _config, _rules, pooler=False)}
