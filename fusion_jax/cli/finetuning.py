"""The commands finetune and tune."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint.files import check_new_folder
from fusion_jax.cli.options import (
    Columns,
    Context,
    Data,
    File,
    MeshText,
    Name,
    Settings,
    Source,
    Target,
    TaskName,
)
from fusion_jax.cli.run_folders import described, history_table, mesh_of
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.methods.layerwise import tune as tune_layers
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.glue import texts_of
from fusion_jax.training.tasks.jobs import Given


def finetune(
    model: Positional[Name],
    out: Annotated[Path, arg(metavar="RUN")],
    config: Settings = TrainConfig(),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    dev_file: File = None,
    text: Columns = ("text",),
    label: str = "label",
    regression: bool = False,
    source: Source = "source",
    target: Target = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Fine-tune a model on a task; run again, the same command goes on where it was stopped.

    Three kinds of task. Labels, for encoders: GLUE's by --task, or --train-file with --text and
    --label. Targets from sources, for models that generate text: --task webnlg or e2e, or
    --train-file with --source and --target. Plain text, for decoder-only models: --task text --data
    FILE.txt.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Folder of the run: checkpoints, metrics.jsonl, and the artefacts best and last.
        config: How to train.
        task: The task.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file of your own to train on.
        dev_file: Another to measure on; with --task text, a text file.
        text: Columns with text.
        label: Column with labels.
        regression: Labels are numbers to predict.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the head, dropout and order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    job = Given(
        task=task,
        data=data,
        train_file=train_file,
        dev_file=dev_file,
        text=text,
        label=label,
        regression=regression,
        source=source,
        target=target,
        context=context,
    ).job()
    key = jax.random.key(seed)
    started = job.load(model, key)
    about = {"model": model, "seed": seed, "task": job.to_json(), "max_length": config.max_length}
    on_step = described(out, about)
    with mesh_of(mesh):
        result = job.fit(started, config, key=key, folder=out, on_step=on_step, progress=True)
    if not result.finished:
        print(f"Stopped after step {result.step}. To go on, give the same command again.")
        return
    if result.history:
        print(history_table(result.history))
        print(f"\nSaved {out / 'best'} (best by the first metric) and {out / 'last'}.")
    else:
        print(f"Saved {out / 'last'}.")


def tune(
    student: Positional[Annotated[str, arg(metavar="STUDENT")]],
    teacher: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[Path, arg(metavar="OUT")],
    config: Settings = TrainConfig(epochs=1),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    text: Columns = ("text",),
    source: Source = "source",
    target: Target = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Tune compressed MLPs towards the hidden states of the original, on unlabelled texts.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression.
        out: Folder for the tuned artefact; its run is kept beside it until it is done.
        config: How to train; train, dropout and the routers' losses do not apply.
        task: Task whose training texts are taken.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file with a column of texts.
        text: Columns with text.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    check_new_folder(out)
    given = Given(
        task=task,
        data=data,
        train_file=train_file,
        text=text,
        source=source,
        target=target,
        context=context,
    )
    key = jax.random.key(seed)
    small = checkpoint.load(student)
    if given.kind == "labels" and train_file is not None and task is None:
        given.only("a column of texts", "train_file", "text")
        texts: Any = texts_of(tables.read(train_file), text, None)
    else:
        texts = given.job().texts(small, config, key)
    folder = out.with_name(f"{out.name}.run")
    big = checkpoint.load(
        teacher,
        head=small.provenance.head,  # type: ignore[arg-type]
        num_labels=small.config.num_labels if small.provenance.head == "classification" else None,
        key=key,
    )
    with mesh_of(mesh):
        result = tune_layers(small, big, texts, config, key=key, folder=folder, progress=True)
    if not result.finished:
        print(f"Stopped after step {result.step}. To go on, give the same command again.")
        return
    if jax.process_index() == 0:
        checkpoint.save(result.model, out)
        shutil.rmtree(folder)
    print(f"Saved {out}.")


COMMANDS = {"finetune": finetune, "tune": tune}
