"""The commands smp and rebase: static pruning, and where the models of masks are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import OmitArgPrefixes, Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint import masks
from fusion_jax.cli.options import Columns, Data, File, MeshText, Name, Settings, TaskName
from fusion_jax.cli.run_folders import described, history_table, mesh_of
from fusion_jax.errors import InputError
from fusion_jax.training.methods.static_pruning import (
    LABEL_WORDS,
    SCORES,
    StaticPruning,
    static_prune,
)
from fusion_jax.training.tasks.jobs import Given, LabelsJob

Words = Annotated[
    tuple[str, ...],
    arg(
        metavar="WORD",
        help="A label word for each class, in the order of the classes: sorted, of your own files.",
        help_behavior_hint="(default: those of the GLUE task)",
    ),
]
Teacher = Annotated[
    str | None,
    arg(
        metavar="MODEL",
        help="A model fine-tuned on the task, or its run, to learn from besides.",
        help_behavior_hint="(default: none)",
    ),
]


def smp(
    model: Positional[Name],
    out: Annotated[Path, arg(metavar="RUN")],
    smp: OmitArgPrefixes[StaticPruning] = StaticPruning(),  # noqa: B008 - frozen
    config: Settings = SCORES,
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    dev_file: File = None,
    text: Columns = ("text",),
    label: str = "label",
    words: Words = (),
    teacher: Teacher = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Prune a pre-trained model for a task by learning which weights count; they stay as they are.

    Run again, the same command goes on where it was stopped. The artefacts best and last hold one
    bit for each weight, and need the model beside them (see rebase).

    Args:
        model: Hub id, Hugging Face folder, or artefact: BERT or RoBERTa, not fine-tuned.
        out: Folder of the run: checkpoints, metrics.jsonl, and the artefacts best and last.
        smp: How weights are chosen.
        config: How scores train; train does not apply.
        task: GLUE task.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file of your own to train on.
        dev_file: Another to measure on.
        text: Columns with text.
        label: Column with labels.
        words: Words whose logits in the masked-LM head are those of the classes.
        teacher: What to learn from.
        seed: Seed of dropout, order, and a head that trains.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    given = Given(
        task=task, data=data, train_file=train_file, dev_file=dev_file, text=text, label=label
    )
    if given.kind != "labels":
        raise InputError(f"task {task!r} has no classes, which static pruning is for")
    job = given.job()
    assert isinstance(job, LabelsJob)
    loaded = job.data
    words = words or (() if smp.train_head else LABEL_WORDS.get(task or "", ()))
    if smp.train_head == bool(words):
        raise InputError(
            f"{loaded.task.name} has no label words; give --words, one for each of "
            f"{', '.join(loaded.task.labels or ('the number',))}, or --train-head for a new head"
            if not words
            else "give either --words, whose head does not train, or --train-head"
        )
    classes = loaded.task.labels or ("the number",)
    if words and len(words) != len(classes):
        raise InputError(f"{len(words)} words for {len(classes)} classes: {', '.join(classes)}")
    if words:
        pairs = ", ".join(f"{a}: {b}" for a, b in zip(classes, words, strict=True))
        print(f"Label words: {pairs}")
    key = jax.random.key(seed)
    more: dict[str, Any] = {"label_words": words} if words else {}
    if not words:
        more = {"num_labels": loaded.task.num_labels, "key": key}
    started = checkpoint.load(model, head="classification", **more)
    learnt = None if teacher is None else _teacher(teacher)
    about = {"model": model, "seed": seed, "task": loaded.task.to_json(), "words": words}
    about |= {"teacher": teacher, "max_length": config.max_length}
    on_step = described(out, about)
    with mesh_of(mesh):
        result = static_prune(
            started,
            loaded,
            config,
            smp,
            key=key,
            teacher=learnt,
            folder=out,
            on_step=on_step,
            progress=True,
        )
    if not result.finished:
        print(f"Stopped after step {result.step}. To go on, give the same command again.")
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
    """Say where the model is now that masks are for, after it was moved.

    Args:
        folder: An artefact with masks, such as a run's best.
        base: The model: hub id, Hugging Face folder, or artefact.
    """
    masks.rebase(folder, base)
    print(f"{folder} takes its weights from {base} now.")


def _teacher(name: str) -> Any:
    run = Path(name).expanduser()
    found = next((run / n for n in ("best", "last") if (run / n).is_dir()), name)
    return checkpoint.load(found, head="classification")


COMMANDS = {"smp": smp, "rebase": rebase}
