"""The configuration of T5, its versions 1.1, mT5 and UMT5, Switch Transformers, and LongT5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fusion_jax.errors import InputError
from fusion_jax.models.base import Fields, config_from_fields, with_aliases
from fusion_jax.nn.submlps import activation


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of a T5 or Switch ``config.json`` that the model uses, with T5's defaults.

    `from_json` derives some fields: ``act`` and ``gated`` describe the MLPs; ``scaled`` says
    whether hidden states are divided by ``sqrt(d_model)`` before the logits are computed;
    ``every_relative`` whether every layer has a bias for relative positions, and not one for all.
    """

    model_type: str = "t5"
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 0
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    act: str = "relu"
    gated: bool = False
    scaled: bool = True
    every_relative: bool = False
    tie_word_embeddings: bool = True
    own_embeddings: tuple[str, ...] = ()
    """Which of ``"encoder"`` and ``"decoder"`` have token embeddings of their own."""
    pad_token_id: int = 0
    decoder_start_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    num_experts: int = 0
    expert_capacity: int = 64
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    num_labels: int = 2
    classifier_dropout: float = 0.0
    encoder_attention_type: Literal["full", "local", "transient-global"] = "full"
    local_radius: int = 127
    global_block_size: int = 16

    @classmethod
    def from_json(cls, config: Fields) -> T5Config:
        """Reads the fields of a ``config.json``; raises `InputError` for an unknown variant."""
        tied = bool(config.get("tie_word_embeddings", True))
        given: dict[str, Any] = {"num_decoder_layers": config.get("num_decoder_layers")}
        given["num_decoder_layers"] = given["num_decoder_layers"] or config.get("num_layers", 6)
        if config["model_type"] == "switch_transformers":
            config = {**_SWITCH, **config}
            given |= {"act": config.get("dense_act_fn", "relu"), "scaled": tied}
            given["num_decoder_layers"] = config["num_decoder_layers"] or config["num_layers"]
        else:
            multilingual = config["model_type"] in ("mt5", "umt5")
            config = {**(_MT5 if multilingual else {}), **config}
            if multilingual:  # as transformers: tied, whatever the configuration says
                config |= {"tie_word_embeddings": True}
                if config["model_type"] == "mt5":
                    config |= {"scale_decoder_outputs": False}
                given["num_decoder_layers"] = (
                    config.get("num_decoder_layers") or config["num_layers"]
                )
            if config["model_type"] == "longt5":  # tied whatever the configuration says
                config |= {"tie_word_embeddings": True}
            gated, _, act = str(config.get("feed_forward_proj", "relu")).rpartition("-")
            if gated not in ("", "gated"):
                raise InputError(f"feed_forward_proj {gated}-{act} is not implemented")
            # "gated-gelu" means the tanh form.
            act = "gelu_new" if gated and act == "gelu" else act
            given["act"] = config.get("dense_act_fn") or act
            given["gated"] = bool(config.get("is_gated_act", gated))
            given["scaled"] = config.get("scale_decoder_outputs", tied)
        given["encoder_attention_type"] = "full"
        if config["model_type"] == "longt5":
            kind = given["encoder_attention_type"] = config.get("encoder_attention_type", "local")
            if kind not in ("local", "transient-global"):
                raise InputError(
                    f"encoder_attention_type must be local or transient-global; got {kind!r}"
                )
        given["every_relative"] = config["model_type"] == "umt5"
        if config.get("eos_token_id", 1) is None:  # texts have no end, unlike without the field
            given["eos_token_id"] = None
        if config.get("router_dtype", "float32") != "float32":
            raise InputError("a router_dtype other than float32 is not implemented")
        activation(given["act"])
        switch = config["model_type"] == "switch_transformers"
        aliases = _ALIASES | ({} if switch else {"head_dim": "d_kv"})
        result = config_from_fields(cls, with_aliases(config, aliases), **given)
        far, exact = result.relative_attention_max_distance, "relative_attention_num_buckets"
        if far <= getattr(result, exact) // 2:
            raise InputError(
                f"relative_attention_max_distance must be above half of {exact}; got {far}"
            )
        return result

    @property
    def head_std(self) -> float:
        """The standard deviation of the initial weights of heads.

        In transformers it is sqrt(d) times as large for token classification, so that the first
        probabilities of classes are 0 and 1.
        """
        return self.initializer_factor * self.d_model**-0.5

    def sparse(self, decoder: bool) -> list[bool]:
        """Returns which layers of the encoder or decoder have experts."""
        layers = self.num_decoder_layers if decoder else self.num_layers
        if not self.num_experts:
            return [False] * layers
        count = self.num_sparse_decoder_layers if decoder else self.num_sparse_encoder_layers
        # transformers does this even if no layer has experts.
        step = layers // count if count > 0 else layers
        return [step > 0 and (step == 1 or i % step == 1) for i in range(layers)]


_ALIASES = {"hidden_size": "d_model", "num_attention_heads": "num_heads",
            "num_hidden_layers": "num_layers"}  # fmt: skip
_MT5 = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
        "feed_forward_proj": "gated-gelu"}  # fmt: skip
_SWITCH = {"d_model": 768, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12,
           "num_experts": 8}  # fmt: skip
