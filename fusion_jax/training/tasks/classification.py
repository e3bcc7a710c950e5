"""Classification and regression of texts: fine-tuning, predicting and measuring."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from fusion_jax import checkpoint
from fusion_jax.checkpoint.opening import open_checkpoint
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Generative, Model, max_positions
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.tokens import check_finite, check_takes_text, check_tokens, tokenizer_of
from fusion_jax.progress import show_progress, show_stage
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.arrays import ArrayBatches, Arrays
from fusion_jax.training.engine.batches import Batches, Examples
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.sharding import Placement
from fusion_jax.training.tasks.base import Prepared
from fusion_jax.training.tasks.classes import (
    Columns,
    TaskSpec,
    check_head,
    classes_of,
    in_columns,
    measure,
)

_log = logging.getLogger("fusion_jax")


class Texts(NamedTuple):
    """Texts with labels.

    Args:
        texts: One or two texts for each example.
        labels: (n,) classes as int32, numbers as float32, or None.
        names: Where each example comes from, such as ``"SST-2/train.tsv:12"``.
    """

    texts: Sequence[tuple[str, ...]]
    labels: Shaped[np.ndarray, " n"] | None
    names: Sequence[str]


@dataclass(frozen=True, eq=False)
class Classification:
    """A classification or regression task with its texts, for `fusion_jax.finetune`.

    Args:
        spec: The labels and metrics.
        train: The training texts.
        dev: The texts to measure on, by name; may be empty.
    """

    spec: TaskSpec
    train: Texts
    dev: Mapping[str, Texts]

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        columns = check_head(model, self.spec, trains=True)
        encoder = TextEncoder(model, config.max_length, config.truncate)
        order, _ = jax.random.split(key)
        train = self._tokenized("", encoder, self.train)
        batches = encoder.shuffled(_with_columns(train, columns), config, order)
        loss = losses.regression if self.spec.labels is None else losses.classification
        loss = losses.with_routers(loss, model, config)
        dev = {name: self._tokenized(name, encoder, texts) for name, texts in self.dev.items()}

        def evaluate(model: Model) -> dict[str, float]:
            results = {}
            for name, examples in dev.items():
                rows = logits_of(model, encoder, examples, config.batch_size, config.shapes)
                logits = np.stack(rows)[:, columns]
                prefix = "" if len(dev) == 1 else f"{name} "
                measured = measure(self.spec, logits, examples)
                results |= {f"{prefix}{metric}": value for metric, value in measured.items()}
            return results

        return Prepared(
            batches, loss, evaluate if dev else None, classes=classes_of(model, self.spec, columns)
        )

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Batches:
        """Returns the training texts in batches, without labels."""
        encoder = TextEncoder(model, config.max_length, config.truncate)
        examples = self._tokenized("", encoder, self.train)
        return encoder.shuffled(examples._replace(labels=None), config, key)

    @cached_property
    def _examples(self) -> dict[Hashable, Examples]:
        return {}

    def _tokenized(self, name: str, encoder: TextEncoder, texts: Texts) -> Examples:
        """Returns tokenized texts; tokenizes them once for all models with one tokenizer."""
        known = name, id(texts.texts), len(texts.texts), *encoder.settings
        if known not in self._examples:
            self._examples[known] = encoder(texts)
        return self._examples[known]._replace(labels=texts.labels, names=texts.names)

    def load(self, name: str, *, key: Key[Array, ""], new_head: bool = False) -> Model:
        """Loads a model with a head for the task, see `fusion_jax.load`."""
        head = {"head": "classification", "num_labels": self.spec.num_labels}
        # Before the classes are compared, which are not what is wrong then.
        check_takes_text(open_checkpoint(name).family.model)
        return checkpoint.load(name, **head, key=key, new_head=new_head)

    def to_json(self) -> dict[str, object]:
        """Returns a description of the task as JSON values by name."""
        return self.spec.to_json()


def _with_columns(examples: Examples, columns: Columns) -> Examples:
    """Returns examples whose labels are columns of a model's logits instead of classes."""
    return examples._replace(labels=in_columns(examples.labels, columns))


class TextEncoder:
    """Tokenizes texts for a model.

    Args:
        model: A model from `fusion_jax.load`.
        max_length: The largest number of tokens; None for the number of the model's positions.
        truncate: Whether longer texts are cut off.

    Raises:
        InputError: The model has fewer positions than ``max_length``, or no tokenizer.
    """

    def __init__(self, model: Model, max_length: int | None = None, truncate: bool = False):
        if isinstance(model, Generative) and not model.reads_prompts:
            raise InputError(
                "texts alone are not enough for an encoder-decoder that writes text; give pairs of "
                "texts, or load it with another head, such as head='classification'"
            )
        most = max_positions(model) or 1 << 20  # rotary positions are not limited
        if max_length is not None and max_length > most:
            raise InputError(f"max_length {max_length} is above the model's {most} positions")
        self.max_length = most if max_length is None else max_length
        self.truncate = truncate
        if not isinstance(getattr(model, "provenance", None), Provenance):
            raise InputError("the model has no tokenizer, as it did not come from fusion_jax.load")
        self.model, self.tokenizer = model, tokenizer_of(model)
        # Language models may have no padding token; the mask hides what is there instead.
        self.pad_id = max(0, getattr(model.config, "pad_token_id", None) or 0)  # Llama has -1

    def __call__(self, texts: Texts) -> Examples:
        """Tokenizes texts.

        Returns:
            The examples.

        Raises:
            InputError: A text is longer and ``truncate`` is False; names file and line.
        """
        first = [each[0] for each in texts.texts]
        pairs = texts.texts and len(texts.texts[0]) > 1
        second = [each[1] for each in texts.texts] if pairs else None
        with show_stage(f"Tokenizing {len(first):,} texts"):
            out = self.tokenizer(
                first,
                second,
                truncation=self.truncate,
                max_length=self.max_length if self.truncate else None,
                verbose=False,
            )
        return self.examples(out, texts.labels, texts.names)

    def examples(
        self, out: Mapping[str, Any], labels: Shaped[np.ndarray, " n"] | None, names: Sequence[str]
    ) -> Examples:
        """Returns what the tokenizer made of texts as examples.

        Args:
            out: What the tokenizer returned.
            labels: The labels, or None.
            names: Where each text comes from.

        Raises:
            InputError: A text is too long, or has a token that the model does not have.
        """
        tokens = [np.asarray(ids, np.int32) for ids in out["input_ids"]]
        for ids, name in zip(tokens, names, strict=True):
            if len(ids) > self.max_length:
                raise InputError(
                    f"{name}: {len(ids)} tokens, above {self.max_length}; allow more with "
                    "max_length if the model has positions for them, or cut texts off with "
                    "truncate"
                )
        types = None
        if "token_type_ids" in out and hasattr(self.model.config, "type_vocab_size"):
            types = [np.asarray(ids, np.int32) for ids in out["token_type_ids"]]
        check_tokens(self.model, tokens, types, names=names, tokenizer=self.tokenizer)
        return Examples(tokens, types, labels, names)

    def check_offsets(self) -> None:
        """Raises `InputError` if the tokenizer does not say where in a text its tokens are."""
        if not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise InputError(
                f"the tokenizer {kind} does not say where in a text its tokens are; give the model "
                "a tokenizer.json"
            )

    def batches(
        self, examples: Examples, batch_size: int, *, shapes: int = 4, seed: int | None = None
    ) -> Batches:
        """Returns batches padded for the model, see `Batches`."""
        return Batches(examples, batch_size, pad_id=self.pad_id, shapes=shapes, seed=seed)

    @property
    def settings(self) -> tuple[Hashable, ...]:
        """All that the tokens of a text depend on, and the checks of them."""
        fields = (getattr(self.model.config, n, None) for n in ("vocab_size", "type_vocab_size"))
        return (self.model.provenance.folder, self.max_length, self.truncate, *fields)

    def shuffled(self, examples: Examples, config: TrainConfig, key: Key[Array, ""]) -> Batches:
        """Returns examples in batches, in an order that depends on the key."""
        seed = int(jax.random.bits(key))
        return self.batches(examples, config.batch_size, shapes=config.shapes, seed=seed)


def unlabeled_batches(
    texts: Texts, model: Model, config: TrainConfig, *, key: Key[Array, ""]
) -> Batches:
    """Returns texts in batches, without labels, in an order that depends on the key."""
    encoder = TextEncoder(model, config.max_length, config.truncate)
    return encoder.shuffled(encoder(texts._replace(labels=None)), config, key)


@jax.jit
def _forward(model: Model, batch: losses.Batch) -> Array:
    return losses.run(model, batch).logits


def logits_of(
    model: Model, encoder: TextEncoder, examples: Examples, batch_size: int, shapes: int = 4
) -> list[Float[np.ndarray, "... _"]]:
    """Returns the logits of each example or of each of its tokens, in order, as float32.

    Args:
        model: The model.
        encoder: The encoder of its texts.
        examples: The examples; their labels are not used.
        batch_size: The number of rows per batch.
        shapes: The largest number of padded lengths.

    Raises:
        FloatingPointError: Logits are NaN or infinite; names the example.
    """
    batches = encoder.batches(examples._replace(labels=None), batch_size, shapes=shapes)
    rows = logits_by_row(model, batches)
    # Those of tokens have padding.
    lengths = [len(tokens) for tokens in examples.tokens]
    logits = [
        row[:length] if row.ndim > 1 else row for row, length in zip(rows, lengths, strict=True)
    ]
    for name, row in zip(examples.names, logits, strict=True):
        check_finite(row, f"{name}: the logits")
    return logits


def logits_by_row(
    model: Model, batches: Batches | ArrayBatches
) -> list[Float[np.ndarray, "... _"]]:
    """Returns the logits of each example in one epoch of batches, in order, as float32."""
    placement = Placement()
    placement.check_batch(batches.batch_size)
    found: dict[int, np.ndarray] = {}
    outs: list[Array] = []
    count = len(batches)
    with placement.active(), show_progress("Evaluating", count, first="compiling") as advance:
        for step in range(count):
            out = _forward(model, placement.batch(batches(step)))
            outs.append(placement.gathered({"logits": out})["logits"])
            advance("batches")
    # Only now, so that the device does not wait for the host between batches.
    for step, out in enumerate(jax.device_get(outs)):
        for i, row in zip(batches.rows(step).tolist(), out, strict=False):
            found[i] = row.astype(np.float32)
    return [found[i] for i in range(len(found))]


@on_auto_axes
def predict(
    model: Model,
    texts: Texts | Arrays,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    truncate: bool = False,
) -> Float[np.ndarray, "n classes"]:
    """Returns the logits of texts, or of arrays such as images.

    Args:
        model: A model with a classification head.
        texts: The texts, or the arrays; their labels are not used.
        max_length: The largest number of tokens of a text; None for the number of the model's
            positions.
        batch_size: The number of rows per batch.
        truncate: Whether longer texts are cut off.

    Returns:
        (n, classes) float32, in the order of the texts.

    Raises:
        InputError: A text is too long.
    """
    if isinstance(texts, Arrays):
        inputs = Arrays(texts.inputs).checked("the data", None)
        rows = logits_by_row(model, ArrayBatches(inputs, batch_size))
        for i, row in enumerate(rows):
            check_finite(row, f"example {i}: the logits")
        return np.stack(rows)
    encoder = TextEncoder(model, max_length, truncate)
    if not texts.texts:
        return np.zeros((0, model.config.num_labels), np.float32)
    return np.stack(logits_of(model, encoder, encoder(texts), batch_size))
