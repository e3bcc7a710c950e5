"""What an architecture is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.rules import KeyRules

Head = Literal["classification", "masked-lm", "causal-lm", "seq2seq-lm"]


class Model(nnx.Module):
    """Base of the architectures' models.

    Args:
        config: Its configuration.
        provenance: Where it was loaded from; a model that was not loaded has none.
    """

    config: Any
    provenance: Provenance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the architecture says what it takes and gives."""
        raise NotImplementedError


class Generative(Model):
    """Base of models that generate text token by token, with what they remember outside of them.

    Args:
        has_logits: Whether the language-model head is there.
        reads_prompts: Whether texts to generate continue the input, unlike in an encoder-decoder.
        max_length: How many positions the model has, or None if it can do with any number.
    """

    has_logits: bool
    reads_prompts: bool = True
    max_length: int | None = None

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], Any]:
        """Reads the input.

        Args:
            input_ids: Prompts, or the source texts of an encoder-decoder; padded on the left or,
                in an encoder-decoder, on either side.
            attention_mask: 0 or False at padding.
            room: How many tokens can be generated.

        Returns:
            The logits of the first token to generate, and a cache: a pytree whose arrays have
            the batch as axis 0 or no axis at all.
        """
        raise NotImplementedError

    def step(self, tokens: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b vocab"], Any]:
        """Reads one more token of each text.

        Args:
            tokens: The tokens.
            cache: From `begin` or the last step.

        Returns:
            The logits of the next token, and the new cache.
        """
        raise NotImplementedError


def positions(model: Model) -> int | None:
    """The most tokens that a model takes; None if it takes any number."""
    if isinstance(model, Generative):
        return model.max_length
    # RoBERTa's positions start after that of padding.
    roberta = getattr(model.config, "is_roberta", False)
    return model.config.max_position_embeddings - (model.config.pad_token_id + 1 if roberta else 0)


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Args:
        last_hidden_state: (b, t, d) hidden states of the last layer.
        hidden_states: Those of the embeddings and of every layer, if asked for.
        pooler_output: (b, d), if the model has a pooler.
        logits: Of the head: (b, labels), or (b, t, vocabulary) for masked-lm.
    """

    last_hidden_state: Float[Array, "b t d"]
    hidden_states: tuple[Float[Array, "b t d"], ...] | None
    pooler_output: Float[Array, "b d"] | None
    logits: Float[Array, "b *t classes"] | None


class DecoderOutput(NamedTuple):
    """What a decoder returns, alone or behind an encoder.

    Args:
        last_hidden_state: (b, t, d) hidden states of the last layer, normalised.
        hidden_states: The input of every layer and the last hidden state, if asked for.
        logits: (b, t, vocabulary), if the model has its head.
        router_logits: (b, t, e) of every layer with experts.
        cache: What later calls need to continue, if one was given.
        encoder: The output of the encoder, if there is one.
    """

    last_hidden_state: Float[Array, "b t d"]
    hidden_states: tuple[Float[Array, "b t d"], ...] | None
    logits: Float[Array, "b t vocab"] | None = None
    router_logits: tuple[Float[Array, "b t e"], ...] = ()
    cache: Any = None
    encoder: Any = None


ConfigT = TypeVar("ConfigT")


def read_fields(cls: type[ConfigT], config: Mapping[str, Any], **given: Any) -> ConfigT:
    """A dataclass made from the fields of a ``config.json``; others and nulls are left out.

    Args:
        cls: The dataclass.
        config: The fields.
        **given: Values that take precedence.

    Returns:
        The configuration.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    read = {name: x for name, x in config.items() if name in known and x is not None}
    # Tuples, so that configurations are hashable.
    read = {name: tuple(x) if isinstance(x, list) else x for name, x in read.items()}
    return cls(**{**read, **given})


@dataclass(frozen=True)
class Family:
    """What loading and exporting need to know of an architecture.

    Args:
        config: Reads the fields of a ``config.json``; raises `InputError` for what the architecture
            cannot do.
        model: ``model(config, head=..., param_dtype=..., rngs=...)``.
        rules: The key rules for a configuration and a head.
        architectures: The names of the Hugging Face classes by head.
        width_field: The field of ``config.json`` with the width of all MLPs.
        optional: Parts that some checkpoints lack, each an argument of ``model`` that says whether
            it is there.
        width_fields: The fields of MLPs that have their own, by the last part of their paths.
    """

    config: Callable[[Mapping[str, Any]], Any]
    model: Callable[..., Model]
    rules: Callable[[Any, Head | None], KeyRules]
    architectures: Mapping[Head | None, str]
    width_field: str
    optional: tuple[str, ...] = ()
    width_fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_head(self) -> Head | None:
        """The head that generates text, or None if there is none."""
        heads: tuple[Head, ...] = ("causal-lm", "seq2seq-lm")
        return next((head for head in heads if head in self.architectures), None)

    def check_head(self, head: str | None) -> None:
        """Raises `InputError` if the architecture has no such head."""
        if head is not None and head not in self.architectures:
            known = ", ".join(repr(h) for h in get_args(Head) if h in self.architectures)
            raise InputError(f"unknown head {head!r}; known: None, {known}")
