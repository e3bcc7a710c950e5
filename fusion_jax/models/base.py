"""The base classes of models, their outputs, and what describes an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from types import MappingProxyType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Fields as Fields
from fusion_jax.models.provenance import Head as Head
from fusion_jax.models.provenance import Provenance, class_names
from fusion_jax.models.rules import KeyRules

TAKES = {
    "images": "{'pixel_values': images}",
    "sounds": "{'input_features': features, 'decoder_input_ids': ids}",
    "images and text": "{'pixel_values': images, 'input_ids': ids, 'attention_mask': mask}",
}
"""What models take, other than text alone, with an example of a batch."""


class Model(nnx.Module):
    """Base of all models.

    They are made from a configuration, with the arguments ``head`` (None for no head),
    ``param_dtype`` (the dtype of the parameters, in which the model also computes), and ``rngs``
    (random keys of the initial parameters).

    Args:
        config: The configuration.
        provenance: Where the model was loaded from; only loaded models have this attribute.
        needed_tokens: The ids of tokens of which each text must have one; empty if none is needed.
        takes: What the model takes: one of `TAKES`, or "text" for tokens.
        masks: The argument that says which positions are not padding, by the first part of the
            paths of MLPs that have such a mask, in a model that takes more than text.
    """

    config: Any
    provenance: Provenance
    needed_tokens: tuple[int, ...] = ()
    takes: str = "text"
    masks: Mapping[str, str] = MappingProxyType({})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the arguments and the output depend on the architecture."""
        raise NotImplementedError


class Generative(Model):
    """Base of models that generate text token by token; the caller holds their cache.

    Args:
        has_logits: Whether the model has a language-model head.
        reads_prompts: Whether generated texts continue the input; False for an encoder-decoder.
        max_length: The largest number of positions, or None if there is no limit.
    """

    has_logits: bool
    reads_prompts: bool = True
    max_length: int | None = None

    def begin(
        self, input_ids: Int[Array, "b t"], attention_mask: Shaped[Array, "b t"], room: int
    ) -> tuple[Float[Array, "b vocab"], Any]:
        """Reads the input.

        Args:
            input_ids: (b, t) prompts, padded on the left; or the source texts of an
                encoder-decoder, padded on either side.
            attention_mask: (b, t), 0 or False at padding.
            room: The largest number of tokens to generate; the size of the cache depends on it.

        Returns:
            The logits of the first token to generate, and a cache: a pytree of scalars and of
            arrays whose axis 0 is the batch.
        """
        raise NotImplementedError

    def step(self, tokens: Int[Array, " b"], cache: Any) -> tuple[Float[Array, "b vocab"], Any]:
        """Reads one more token of each text.

        Args:
            tokens: (b,) the tokens.
            cache: The cache from `begin` or from the previous step.

        Returns:
            The logits of the next token, and the new cache.
        """
        raise NotImplementedError


def max_positions(model: Model) -> int | None:
    """Returns the largest number of tokens that a model takes; None if there is no limit."""
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(model, Generative) or most is None:  # T5's positions are relative
        return getattr(model, "max_length", None)
    # RoBERTa's position ids start after the id of padding.
    roberta = getattr(model.config, "shifted_positions", False)
    return most - (model.config.pad_token_id + 1 if roberta else 0)


def check_positions(model: Model, length: int) -> None:
    """Raises `InputError` if a model has fewer positions than a text has tokens."""
    most = max_positions(model)
    if most is not None and length > most:
        raise InputError(f"a text has {length} tokens, but the model has {most} positions")


def check_needed_tokens(model: Model, input_ids: ArrayLike, name: str = "") -> None:
    """Raises `InputError` if a text lacks a token that the model needs.

    Args:
        model: The model.
        input_ids: (t,) the token ids of a text, or (b, t) those of several.
        name: Where the text comes from, for the error.
    """
    needed = getattr(model, "needed_tokens", ())
    ids = np.asarray(input_ids) if needed else np.zeros((0, 0))
    missing = ~np.isin(ids, needed).any(axis=-1)
    if missing.any():
        row = f"text {missing.argmax()}: " if ids.ndim > 1 and not name else ""
        raise InputError(
            f"{name}{row}there is no end token ({' or '.join(map(str, needed))}); the head reads a "
            "text at its last end token, so end each text with it"
        )


class EncoderOutput(NamedTuple):
    """The output of an encoder.

    Args:
        last_hidden_state: (b, t, d) hidden states after the last layer.
        hidden_states: (b, t, d) after the embeddings and after each layer, if asked for.
        pooler_output: (b, d), if the model has a pooler.
        logits: The output of the head, if there is one: (b, classes), or (b, t, vocabulary) for
            a masked-language-model head, or (b, t, classes) for a token-classification head. The
            two classes of a question-answering head are the start and the end of the answer.
    """

    last_hidden_state: Float[Array, "b t d"]
    hidden_states: tuple[Float[Array, "b t d"], ...] | None
    pooler_output: Float[Array, "b d"] | None
    logits: Float[Array, "b *t classes"] | None


class DecoderOutput(NamedTuple):
    """The output of a decoder, or of an encoder-decoder.

    Args:
        last_hidden_state: (b, t, d) hidden states after the last layer, normalized.
        hidden_states: (b, t, d) the input of each layer and ``last_hidden_state``, if asked for.
        logits: The output of the head, if there is one: (b, t, vocabulary) for a language model,
            otherwise as in `EncoderOutput`.
        router_logits: (b, t, e) of each layer with experts.
        cache: The cache for the tokens that follow, if the call was given a cache.
        encoder: The output of the encoder, if there is one.
    """

    last_hidden_state: Float[Array, "b t d"]
    hidden_states: tuple[Float[Array, "b t d"], ...] | None
    logits: Float[Array, "b *t classes"] | None = None
    router_logits: tuple[Float[Array, "b t e"], ...] = ()
    cache: Any = None
    encoder: Any = None


def with_aliases(fields: Fields, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Returns fields where those with a second name have the value that it states, if any.

    So `transformers` reads them, whatever else the fields state.

    Args:
        fields: The fields of a ``config.json``.
        aliases: The names of fields, by their second names.
    """
    given = {name: fields.get(alias) for alias, name in aliases.items()}
    return {**fields, **{name: x for name, x in given.items() if x is not None}}


ConfigT = TypeVar("ConfigT")


MOST_LAYERS = 10_000


def config_from_fields(cls: type[ConfigT], config: Fields, **given: Any) -> ConfigT:
    """Makes a dataclass from the fields of a ``config.json``; unknown fields and nulls are ignored.

    Values in ``given`` take precedence; numbers among them may be of any size. Numbers of fields
    whose default is positive must be positive. The field ``num_labels`` may be given by the names
    of the classes, ``id2label``.

    Raises:
        InputError: A field has a wrong type or is out of its range.
    """
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if "num_labels" in known and config.get("id2label") not in (None, {}):
        class_names(config)  # raises if it is not a JSON object
        if config.get("num_labels") is None:
            config = {**config, "num_labels": len(config["id2label"])}
    read = {n: x for n, x in config.items() if n in known and n not in given and x is not None}
    # Tuples, so that configurations are hashable.
    read = {name: tuple(x) if isinstance(x, list) else x for name, x in read.items()}
    hints = _hints(cls)
    read |= {name: x for name, x in given.items() if hints[name] in (int, float)}
    for name, value in read.items():
        if not _fits(value, hints[name]):
            kind = getattr(hints[name], "__name__", str(hints[name]))
            raise InputError(f"{name} must be of type {kind}; got {str(value)[:100]!r}")
        if hints[name] is int and isinstance(value, int) and name not in given:
            default = known[name].default
            sparse = name.startswith("num_sparse")  # none of the layers may have experts
            least = int(isinstance(default, int) and default > 0 and not sparse)
            most = MOST_LAYERS if name.endswith(("layer", "layers")) else 2**31 - 1
            if not least <= value <= most:
                raise InputError(f"{name} must be from {least} to {most}; got {str(value)[:100]}")
        if isinstance(value, int) and float in (hints[name], *get_args(hints[name])):
            read[name] = float(value)
    return cls(**{**given, **read})


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a JSON value is of the type of a field."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in arguments
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and abs(value) < 2.0**127
    return isinstance(value, hint)


def tied_head(config: Any, name: str, path: str) -> dict[str, str]:
    """Returns the `KeyRules.twins` of an output layer that is tied to the token embeddings.

    Args:
        config: The configuration, which says whether they are tied.
        name: The name of the output layer's tensor.
        path: The path of the token embeddings.
    """
    return {name: path} if config.tie_word_embeddings else {}


def untied_head(config: Any, names: Sequence[str]) -> Any:
    """Returns a configuration whose output layer is not tied to the token embeddings."""
    return replace(config, tie_word_embeddings=False)


def _nothing(head: Head | None) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """Describes an architecture to loading and exporting.

    Args:
        config: Makes a configuration from the fields of a ``config.json``; raises `InputError` for
            variants that are not implemented.
        model: Makes a model: ``model(config, head=..., param_dtype=..., rngs=...)``.
        rules: Returns the key rules for a configuration and a head.
        architectures: The name of the Hugging Face class for each head.
        width_field: The field of ``config.json`` with the width of the MLPs; None if the width
            cannot be stated, so that exports have the original one; or a function of the
            configuration that returns either. A dot separates it from the field that it is in.
        optional: Parts that some checkpoints lack. Each is an argument of ``model`` that says
            whether the part is there.
        width_fields: The fields for MLPs with a width of their own, by the last or first part of
            their path.
        width_factor: Returns how many times its field the width of an MLP is, from the
            configuration and the path.
        experts_field: The field with the number of experts of each mixture.
        untied: Returns the configuration of a model whose tensors with the given names are not
            copies of the token embeddings.
        export: Returns further fields that an export with a head states. A dot in the name of this
            or of another field is before a field of a nested configuration.
    """

    config: Callable[[Fields], Any]
    model: Callable[..., Model]
    rules: Callable[[Any, Head | None], KeyRules]
    architectures: Mapping[Head | None, str]
    width_field: str | Callable[[Any], str | None] | None
    optional: tuple[str, ...] = ()
    width_fields: Mapping[str, str] = field(default_factory=dict)
    width_factor: Callable[[Any, str], int] = lambda config, path: 1
    experts_field: str = "num_experts"
    untied: Callable[[Any, Sequence[str]], Any] = untied_head
    export: Callable[[Head | None], Mapping[str, Any]] = _nothing

    @property
    def text_head(self) -> Head | None:
        """The head that generates text, or None if the architecture does not have one."""
        heads: tuple[Head, ...] = ("causal-lm", "seq2seq-lm")
        return next((head for head in heads if head in self.architectures), None)

    def stated_head(self, config: Mapping[str, Any]) -> Head | None:
        """Returns the head that a ``config.json`` states by ``architectures``, or None."""
        given = config.get("architectures")
        first = given[0] if isinstance(given, list) and given else None
        return next((head for head, name in self.architectures.items() if name == first), None)

    def check_head(self, head: str | None) -> None:
        """Raises `InputError` if the architecture does not have the head."""
        if head is not None and head not in self.architectures:
            known = [None, *(h for h in get_args(Head) if h in self.architectures)]
            raise InputError(f"unknown head {head!r}; known: {', '.join(map(repr, known))}")
