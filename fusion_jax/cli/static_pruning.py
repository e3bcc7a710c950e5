"""The commands smp and rebase: static pruning, and the base models of mask artefacts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
from tyro.conf import OmitArgPrefixes, Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint import masks
from fusion_jax.cli.options import DataOptions, Devices, File, Flat, Hidden, ModelName, Settings
from fusion_jax.cli.run_folders import (
    RESUME,
    best_model,
    history_table,
    resumable,
    run_recorder,
)
from fusion_jax.errors import InputError
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.methods.static_pruning import (
    LABEL_WORDS,
    SCORE_CONFIG,
    StaticPruning,
    static_prune,
)
from fusion_jax.training.tasks.classification import Classification

Words = Annotated[
    tuple[str, ...],
    arg(
        metavar="WORD",
        help="A label word for each class, in the order of the classes (sorted, for your own "
        "files).",
        help_behavior_hint="(default: those of the GLUE task)",
    ),
]
Teacher = Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: none)")]


@dataclass(frozen=True, kw_only=True)
class LabeledData(DataOptions):
    """The options that choose labeled texts."""

    dev_file: File = None
    """Another file to measure on."""
    regression: Hidden[bool] = False
    source: Hidden[str] = "source"
    target: Hidden[str | None] = None
    context: Hidden[int | None] = None


@resumable
def prune_statically(
    model: Positional[ModelName],
    out: Annotated[Path, arg(metavar="RUN")],
    pruning: OmitArgPrefixes[StaticPruning] = StaticPruning(),  # noqa: B008 - frozen
    config: Settings = SCORE_CONFIG,
    words: Words = (),
    teacher: Teacher = None,
    seed: int = 0,
    data: Flat[LabeledData] = LabeledData(),
    devices: Flat[Devices] = Devices(),  # noqa: B008 - frozen
) -> None:
    """Prune a pre-trained model for a task by learning which of its weights to keep.

    The weights that are kept do not change. The same command resumes a run that was stopped. The
    artefacts best and last hold one bit for each weight; to load them, the model is needed too (see
    rebase).

    Args:
        model: Hub id, Hugging Face folder, or artefact: BERT or RoBERTa, not fine-tuned.
        out: Run folder: checkpoints, metrics.jsonl, and the artefacts best and last.
        pruning: Settings of static pruning.
        config: Settings of training the scores; train does not apply.
        words: Words whose logits in the masked-LM head become the logits of the classes.
        teacher: A model fine-tuned on the task, or its run folder, to learn from as well.
        seed: Seed of the dropout, the order of the examples, and a head that trains.
        data: The task and its data.
        devices: How the devices are used.
    """
    devices.join()
    loaded = data.read() if data.kind == "labels" else None
    if not isinstance(loaded, Classification):
        raise InputError(f"task {data.task!r} has no classes, but static pruning needs classes")
    words = words or (() if pruning.train_head else LABEL_WORDS.get(data.task or "", ()))
    classes = loaded.spec.labels or ("the number",)
    if pruning.train_head == bool(words):
        raise InputError(
            f"{loaded.spec.name} has no label words; give --words, one for each of "
            f"{', '.join(classes)}, or --train-head for a new head"
            if not words
            else "give either --words, whose head does not train, or --train-head"
        )
    key = jax.random.key(seed)
    load = partial(checkpoint.load, model, head="classification")
    if words:
        if len(words) != len(classes):
            raise InputError(f"{len(words)} words for {len(classes)} classes: {', '.join(classes)}")
        pairs = ", ".join(f"{a}: {b}" for a, b in zip(classes, words, strict=True))
        print(f"Label words: {pairs}")
        before = load(label_words=words)
    else:
        before = load(num_labels=loaded.spec.num_labels, key=key)
    taught_by = None
    if teacher is not None:
        run = best_model(Path(teacher).expanduser())
        taught_by = checkpoint.load(run or teacher, head="classification")
    fields = {"model": model, "seed": seed, "task": loaded.to_json(), "words": words}
    fields |= {"teacher": teacher, "max_length": config.max_length}
    recipe = Recipe(on_step=run_recorder(out, fields))
    with devices.used():
        result = static_prune(
            before,
            loaded,
            config,
            pruning,
            key=key,
            teacher=taught_by,
            folder=out,
            recipe=recipe,
            progress=True,
        )
    if not result.finished:
        print(f"Stopped after step {result.step}. {RESUME}")
        return
    names = ["last"]
    if result.history:
        print(history_table(result.history) + "\n")
        names = ["best", "last"]
    print(f"Saved {' and '.join(str(out / name) for name in names)}: masks, for {model}.")


def rebase(
    folder: Positional[Annotated[Path, arg(metavar="MASKS")]],
    base: Positional[Annotated[str, arg(metavar="BASE")]],
) -> None:
    """Update the path of the base model that a mask artefact refers to.

    Args:
        folder: Artefact with masks, such as the best of a run.
        base: Base model: hub id, Hugging Face folder, or artefact.
    """
    masks.rebase(folder, base)
    print(f"{folder} takes its weights from {base} now.")


COMMANDS = {"smp": prune_statically, "rebase": rebase}
