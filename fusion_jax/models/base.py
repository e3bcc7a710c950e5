"""What an architecture is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.errors import InputError
from fusion_jax.models.rules import KeyRules
from fusion_jax.origin import Origin

Head = Literal["classification", "masked-lm"]


class Model(nnx.Module):
    """Base of the architectures' models.

    Args:
        config: Its configuration.
        origin: Where it was loaded from; a model that was not loaded has none.
    """

    config: Any
    origin: Origin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; the architecture says what it takes and gives."""
        raise NotImplementedError


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


@dataclass(frozen=True)
class Family:
    """What loading and exporting need to know of an architecture.

    Args:
        config: Reads the fields of a ``config.json``; raises `InputError` for what the architecture
            cannot do.
        model: ``model(config, head=..., pooler=..., param_dtype=..., rngs=...)``.
        rules: The key rules for a head.
        architectures: The names of the Hugging Face classes by head.
        width_field: The field of ``config.json`` with the width of all MLPs.
    """

    config: Callable[[Mapping[str, Any]], Any]
    model: Callable[..., Model]
    rules: Callable[[Head | None], KeyRules]
    architectures: Mapping[Head | None, str]
    width_field: str

    def check_head(self, head: str | None) -> None:
        """Raises `InputError` if the architecture has no such head."""
        if head is not None and head not in self.architectures:
            known = ", ".join(repr(h) for h in get_args(Head) if h in self.architectures)
            raise InputError(f"unknown head {head!r}; known: None, {known}")
