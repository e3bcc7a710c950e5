"""The configuration of encoders: fields of their ``config.json``, and flags for their parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, config_from_fields
from fusion_jax.models.rope import Rope
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class Disentangled:
    """The relative positions of DeBERTa's attention.

    Args:
        kinds: Which of ``"c2p"`` (contents to positions) and ``"p2c"`` there are.
        span: Half the number of position embeddings; 0 for none.
        most: The distance from which on all distances have the same embedding.
        buckets: The number of ranges of distances in each direction; not above 0 for a range of one
            distance each.
        shared: Whether positions have the projections that contents have.
        normed: Whether the embeddings are normalized.
    """

    kinds: tuple[str, ...]
    span: int
    most: int
    buckets: int
    shared: bool
    normed: bool


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution beside the first layer.

    Args:
        size: The number of positions that it reads.
        groups: The number of groups of features that it keeps apart.
        act: Its activation.
    """

    size: int
    groups: int
    act: str


@dataclass(frozen=True, kw_only=True)
class EncoderBlocks:
    """How the parts of a family of encoders are built; the defaults are BERT's.

    Args:
        norm: The normalization: ``"layer"``; ``"layer-unbiased"``, layer normalization without a
            bias; or ``"rms"``.
        norm_first: Whether attention and MLP have their norms before them, with one more after the
            last layer, instead of after the residual connections.
        first_norm: Whether there is a norm before the first attention, if norms come first.
        positions: Whether there are embeddings of absolute positions.
        embedding_norm: Whether embeddings are normalized.
        embedding_dropout: The dropout rate of the embeddings; None for ``hidden_dropout_prob``.
        mlp_dropout: The dropout rate of the outputs of MLPs; None for ``hidden_dropout_prob``.
        path_dropout: The rate at which training leaves out all that attention or an MLP adds to an
            example, instead of ``hidden_dropout_prob``; None for none of this.
        layer_scale: The initial factors of what attention and MLPs add; None for no factors.
        gated: Whether MLPs are gated.
        attention_bias: Whether the linear layers of attention have biases.
        attention_out_bias: Whether the output projection has one; None for ``attention_bias``.
        mlp_bias: Whether those of the MLPs have them.
        head_dim: The number of features of each head of attention; 0 for ``hidden_size`` divided by
            the number of heads.
        key_heads: The number of heads of keys and values; 0 for as many as of queries.
        ropes: The rotary embedding of each layer; empty for none.
        schedule: The layers in the order in which they are applied, each as often as it is there;
            empty for each once.
        inner: The number of layers that a checkpoint has in each of its groups of layers.
        project: Whether a matrix maps embeddings to ``hidden_size`` even if they have that size.
        project_first: Whether that matrix has no bias and comes before the norm.
        relative: The relative positions of disentangled attention; None for BERT's attention.
        convolution: The convolution beside the first layer; None for none.
        windows: For each layer the largest distance at which a token attends to another, None for
            all; empty for all in each layer.
        head_norm: Whether every head has a linear layer, an activation and a norm before its last
            layer.
        head_input_dropout: The dropout rate before the first of the two layers of a classification
            head; None for the same as between them.
        head_bias: Whether the first linear layer of a head has a bias.
        pooling: What a classification head reads: the first position, or the mean over positions;
            ``"late"`` for the mean of the logits of all positions.
        lm_transform: Whether the masked-language-model head has layers before its output weights.
        lm_bias: Whether it has a bias for each token.
        legacy: Whether this head has the names of BERT's in DeBERTa.
    """

    norm: Literal["layer", "layer-unbiased", "rms"] = "layer"
    norm_first: bool = False
    first_norm: bool = True
    positions: bool = True
    embedding_norm: bool = True
    embedding_dropout: float | None = None
    mlp_dropout: float | None = None
    path_dropout: float | None = None
    layer_scale: float | None = None
    gated: bool = False
    attention_bias: bool = True
    attention_out_bias: bool | None = None
    mlp_bias: bool = True
    head_dim: int = 0
    key_heads: int = 0
    ropes: tuple[Rope, ...] = ()
    windows: tuple[int | None, ...] = ()
    schedule: tuple[int, ...] = ()
    inner: int = 1
    project: bool = False
    project_first: bool = False
    relative: Disentangled | None = None
    convolution: Conv | None = None
    head_norm: bool = False
    head_input_dropout: float | None = None
    head_bias: bool = True
    pooling: Literal["first", "mean", "late"] = "first"
    lm_transform: bool = True
    lm_bias: bool = True
    legacy: bool = True


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The fields that the layers of encoders use, of text or of images."""

    model_type: str
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    num_labels: int = 2
    blocks: EncoderBlocks = EncoderBlocks()

    def check_layers(self, *activations: str) -> None:
        """Raises `InputError` for sizes that do not fit, or an unknown activation."""
        for name in (self.hidden_act, *activations):
            if name:
                activation(name)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """The fields of a BERT ``config.json`` that the model uses, with its defaults.

    Some fields are not in the file, but say what a family of encoders has of its own.
    """

    vocab_size: int = 30522
    classifier_dropout: float | None = None
    sequence_dropout: float | None = None
    """The dropout of the classification head, in DistilBERT; None for ``classifier_dropout``."""
    answer_dropout: float = 0.0
    """The dropout of the question-answering head, which only DistilBERT has."""
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    tie_word_embeddings: bool = True
    label_ids: tuple[int, ...] | None = None
    """The token ids of label words, for a classification head that is a `LabelWordHead`."""
    label_transform: bool = True
    """Whether a head of label words has the layers of the masked-language-model head."""
    embedding_size: int = 0
    """The size of the embeddings, if a matrix maps them to ``hidden_size``; 0 if none does."""
    shifted_positions: bool = False
    """Whether positions count from ``pad_token_id + 1``, without padding, as in RoBERTa."""
    relative_buckets: int = 0
    """The number of ranges of distances that attention has a bias for; 0 for none."""
    pooled: bool = True
    """Whether there is a pooler, or can be."""
    head_act: str = ""
    """The activation of the first of the two layers of a classification head; "" for one layer."""
    lm_act: str = ""
    """The activation of the masked-language-model head; "" for that of the MLPs."""

    @classmethod
    def from_json(cls, config: Fields, **own: Any) -> BertConfig:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant.

        The values in ``own`` are those of the family, which the file does not have.
        """
        if (config.get("position_embedding_type") or "absolute") != "absolute":
            raise InputError("only absolute position embeddings are implemented")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise InputError("only encoders are implemented, not is_decoder or add_cross_attention")
        if config.get("label_ids"):
            config = {**config, "num_labels": len(config["label_ids"])}
        result = config_from_fields(cls, config, **{"blocks": EncoderBlocks(), **own})
        if any(not 0 <= i < result.vocab_size for i in result.label_ids or ()):
            raise InputError(f"label_ids are not all below vocab_size {result.vocab_size}")
        result.check_layers(result.head_act, result.lm_act)
        return result

    @property
    def head_dropout(self) -> float:
        """The dropout of a head on single positions."""
        rate = self.classifier_dropout
        return self.hidden_dropout_prob if rate is None else rate

    @classmethod
    def roberta(cls, **fields: Any) -> BertConfig:
        """Returns the configuration of a RoBERTa with these fields of a ``config.json``."""
        defaults = {"model_type": "roberta", "pad_token_id": 1, "vocab_size": 50265}
        own = {"shifted_positions": True, "head_act": "tanh", "lm_act": "gelu"}
        return cls.from_json({**defaults, **fields}, **own)
