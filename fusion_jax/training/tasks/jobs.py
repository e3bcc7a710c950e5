"""What the commands can train on: labelled texts, pairs of texts, and plain text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jaxtyping import Array, Key

from fusion_jax import checkpoint
from fusion_jax.errors import InputError
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.tasks import classification as classify
from fusion_jax.training.tasks import generation, tables
from fusion_jax.training.tasks import plain_text as language
from fusion_jax.training.tasks.glue import TaskData, load_task, read_task
from fusion_jax.training.tasks.pairs import (
    TEXT_TASKS,
    Pairs,
    TextData,
    TextTask,
    load_pairs,
    pairs_of,
    read_pairs,
)
from fusion_jax.training.tasks.text_metrics import sacrebleu

PLAIN = "text"
"""The name of the task of plain text."""
CONTEXT = 512
"""Tokens of a window of plain text, if nothing else is said."""
Kind = Literal["labels", "pairs", "text"]


@dataclass(frozen=True, kw_only=True)
class Given:
    """The options that say what a command works on; see `fusion_jax.cli.options`."""

    task: str | None = None
    data: str | None = None
    train_file: Path | None = None
    dev_file: Path | None = None
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    regression: bool = False
    source: str = "source"
    target: str | None = None
    context: int | None = None

    @property
    def kind(self) -> Kind:
        """What the options are about."""
        if self.task == PLAIN:
            return "text"
        own = self.task is None and self.target is not None
        return "pairs" if own or self.task in TEXT_TASKS else "labels"

    def only(self, what: str, *names: str) -> None:
        """Raises `InputError` if another option than these is given, which would change nothing."""
        for option in fields(self):
            if option.name not in names and getattr(self, option.name) != option.default:
                flag = option.name.replace("_", "-")
                raise InputError(f"--{flag} does not apply to {what}; leave it out")

    def job(self) -> Job:
        """What to train on.

        Raises:
            InputError: The options do not fit together, one does not apply, or the data is missing
                or wrong.
        """
        if self.kind == "text":
            if self.data is None or self.train_file is not None:
                raise InputError(f"--task {PLAIN} wants --data FILE.txt (and --dev-file FILE.txt)")
            self.only("plain text", "task", "data", "dev_file", "context")
            return LanguageJob(Path(self.data), self.dev_file, self.context or CONTEXT)
        named = self.task is not None and self.data is not None
        if named and self.train_file is None and self.dev_file is None:
            assert self.task is not None and self.data is not None
            self.only("a published task", "task", "data")
            if self.kind == "pairs":
                return PairsJob(load_pairs(self.task, self.data))
            return LabelsJob(load_task(self.task, self.data))
        if self.train_file is None or self.task is not None or self.data is not None:
            raise InputError("give either --task and --data, or --train-file (and --dev-file)")
        if self.target is not None:
            self.only("sources and targets", "train_file", "dev_file", "source", "target")
            files = self.train_file, self.dev_file
            return PairsJob(read_pairs(*files, source=self.source, target=self.target))
        self.only("labelled texts", "train_file", "dev_file", "text", "label", "regression")
        return LabelsJob(
            read_task(
                self.train_file,
                self.dev_file,
                text=self.text,
                label=self.label,
                regression=self.regression,
            )
        )


class Job(Protocol):
    """Something to train on."""

    def load(self, model: str, key: Key[Array, ""]) -> Any:
        """The model with the head for it."""
        ...

    def fit(self, model: Any, config: TrainConfig, *, key: Key[Array, ""], **options: Any) -> Fit:
        """Fine-tunes."""
        ...

    def texts(self, student: Any, config: TrainConfig, key: Key[Array, ""]) -> Any:
        """What `fusion_jax.tune` takes."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        ...


@dataclass(frozen=True)
class LabelsJob:
    """Labelled texts."""

    data: TaskData

    def load(self, model: str, key: Key[Array, ""]) -> Any:
        """The model with a head of as many classes."""
        labels = self.data.task.num_labels
        return checkpoint.load(model, head="classification", num_labels=labels, key=key)

    def fit(self, model: Any, config: TrainConfig, *, key: Key[Array, ""], **options: Any) -> Fit:
        """Fine-tunes by `fusion_jax.finetune`."""
        return classify.finetune(model, self.data, config, key=key, **options)

    def texts(self, student: Any, config: TrainConfig, key: Key[Array, ""]) -> Any:
        """The training texts."""
        return self.data.train

    def to_json(self) -> dict[str, Any]:
        """The task."""
        return self.data.task.to_json()


@dataclass(frozen=True)
class PairsJob:
    """Pairs of texts."""

    data: TextData

    def load(self, model: str, key: Key[Array, ""]) -> Any:
        """The model with its language-model head."""
        return load_generative(model)

    def fit(self, model: Any, config: TrainConfig, *, key: Key[Array, ""], **options: Any) -> Fit:
        """Fine-tunes by `fusion_jax.finetune_pairs`."""
        return generation.finetune_pairs(model, self.data, config, key=key, **options)

    def texts(self, student: Any, config: TrainConfig, key: Key[Array, ""]) -> Any:
        """The training pairs."""
        return self.data.train

    def to_json(self) -> dict[str, Any]:
        """The task."""
        return {"kind": "pairs", **self.data.task.to_json()}


@dataclass(frozen=True)
class LanguageJob:
    """Plain text.

    Args:
        train: The text to train on.
        dev: Another to measure on, or None.
        context: Tokens of a window.
    """

    train: Path
    dev: Path | None
    context: int

    def load(self, model: str, key: Key[Array, ""]) -> Any:
        """The model with its language-model head."""
        return load_generative(model)

    def fit(self, model: Any, config: TrainConfig, *, key: Key[Array, ""], **options: Any) -> Fit:
        """Fine-tunes by `fusion_jax.finetune_language`."""
        dev = None if self.dev is None else ids_of(model, self.dev)
        ids = ids_of(model, self.train)
        return language.finetune_language(
            model, ids, config, key=key, context=self.context, dev=dev, **options
        )

    def texts(self, student: Any, config: TrainConfig, key: Key[Array, ""]) -> Any:
        """Windows of the text."""
        language.check_context(student, self.context)
        seed = int(jax.random.bits(key))
        ids = ids_of(student, self.train)
        return language.Windows(ids, self.context, config.batch_size, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """The file's name and the size of windows."""
        return {"kind": "text", "name": self.train.name, "context": self.context}


def ids_of(model: Any, path: Path) -> np.ndarray:
    """The tokens of a text file, without special ones.

    Raises:
        InputError: The file is missing or no UTF-8.
    """
    tokenizer = load_tokenizer(model.provenance.folder)
    out = tokenizer(tables.read_text(path), add_special_tokens=False, verbose=False)
    return np.array(out["input_ids"], np.int32)


def load_generative(model: str | os.PathLike[str]) -> Any:
    """A model with its language-model head.

    Raises:
        InputError: Its architecture generates no text.
    """
    head = checkpoint.open_checkpoint(model).family.text_head
    if head is None:
        raise InputError(f"{model} is no model that generates text")
    return checkpoint.load(model, head=head)


def evaluate_pairs(
    model: Any,
    given: Given,
    *,
    file: Path | None,
    split: Literal["dev", "test"],
    out: Path | None,
    **options: Any,
) -> dict[str, float]:
    """The metrics of a model's texts, and how likely the references are.

    Args:
        model: The model.
        given: The task.
        file: A table of one's own in place of the task.
        split: Which part of the task.
        out: A jsonl file to write with every source, its text and its references, or None.
        **options: Those of `generate_texts`.

    Returns:
        The metrics by name.

    Raises:
        InputError: The data is missing or wrong, sacrebleu is missing, or a source is too long.
    """
    sacrebleu()  # better missed now than after the texts are there
    if out is not None and out.exists():
        raise InputError(f"{out} exists; choose another or remove it")
    if file is None:
        if given.task is None or given.data is None:
            raise InputError("give either --task and --data, or --file")
        data = load_pairs(given.task, given.data)
        name, pairs = split, data.dev if split == "dev" else data.test
        task = data.task
        assert pairs is not None
    else:
        name, pairs = file.name, pairs_of(file, given.source, given.target or "target")
        task = TextTask(name=file.stem)
    both = {name: options[name] for name in ("batch_size", "max_length", "truncate")}
    likely = generation.measure_pairs(model, pairs, **both)
    texts = generation.generate_texts(model, pairs, progress=True, **options)
    if out is not None:
        _write(out, pairs, texts)
    results = {f"{name} {key}": value for key, value in likely.items()}
    for group, values in generation.measure_texts(pairs, texts, task.metrics).items():
        prefix = name if pairs.groups is None else f"{name} {group}"
        results |= {f"{prefix} {metric}": value for metric, value in values.items()}
    return results


def _write(out: Path, pairs: Pairs, texts: list[str]) -> None:
    with out.open("w", encoding="utf-8") as lines:
        for source, text, right in zip(pairs.sources, texts, pairs.references, strict=True):
            row = {"source": source, "text": text, "references": right}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def evaluate_language(
    model: Any, given: Given, *, about: Mapping[str, Any], batch_size: int
) -> dict[str, float]:
    """The nats per token of a plain text.

    Args:
        model: The model.
        given: The text, as ``data``.
        about: What ``run.json`` says of the run's task, or nothing.
        batch_size: Windows at a time.

    Returns:
        ``nats`` and ``perplexity``.

    Raises:
        InputError: There is no text, or it is shorter than a window.
    """
    if given.data is None:
        raise InputError(f"--task {PLAIN} wants --data FILE.txt")
    path = Path(given.data)
    context = given.context or about.get("context", CONTEXT)
    nats = language.nats_per_token(model, ids_of(model, path), context, batch_size=batch_size)
    return {f"{path.name} nats": nats, f"{path.name} perplexity": float(np.exp(nats))}
