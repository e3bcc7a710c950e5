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
    Context,
    Data,
    DataOptions,
    File,
    MeshText,
    Name,
    Settings,
    SourceColumn,
    TargetColumn,
    TaskName,
    TextColumns,
    use_mesh,
)
from fusion_jax.cli.run_folders import RESUME, history_table, resumable, run_recorder
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.methods.finetuning import finetune as finetune_model
from fusion_jax.training.methods.layerwise import tune as tune_model
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.glue import texts_of


@resumable
def finetune(
    model: Positional[Name],
    out: Annotated[Path, arg(metavar="RUN")],
    config: Settings = TrainConfig(),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    dev_file: File = None,
    text: TextColumns = ("text",),
    label: str = "label",
    regression: bool = False,
    source: SourceColumn = "source",
    target: TargetColumn = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Fine-tune a model on a task; the same command resumes a run that was stopped.

    There are three kinds of tasks. Labels, for encoders: --task with a GLUE task, or --train-file
    with --text and --label. Targets from sources, for models that generate text: --task webnlg or
    e2e, or --train-file with --source and --target. Plain text, for decoder-only models: --task
    text --data FILE.txt.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Run folder: checkpoints, metrics.jsonl, and the artefacts best and last.
        config: Settings of training.
        task: The task.
        data: The task's files.
        train_file: A csv, tsv or jsonl file of your own to train on.
        dev_file: Another file to measure on; with --task text, a text file.
        text: TextColumns with text.
        label: Column with labels.
        regression: Labels are numbers to predict.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the head, the dropout and the order of the examples.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    loaded = DataOptions(
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
    ).read()
    key = jax.random.key(seed)
    before = loaded.load(model, key=key)
    fields = {"model": model, "seed": seed, "task": loaded.to_json()}
    recipe = Recipe(on_step=run_recorder(out, {**fields, "max_length": config.max_length}))
    with use_mesh(mesh):
        result = finetune_model(
            before, loaded, config, key=key, folder=out, recipe=recipe, progress=True
        )
    if not result.finished:
        print(f"Stopped after step {result.step}. {RESUME}")
        return
    if result.history:
        print(history_table(result.history))
        print(f"\nSaved {out / 'best'} (best by the first metric) and {out / 'last'}.")
    else:
        print(f"Saved {out / 'last'}.")


@resumable
def tune(
    student: Positional[Annotated[str, arg(metavar="STUDENT")]],
    teacher: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[Path, arg(metavar="OUT")],
    config: Settings = TrainConfig(epochs=1),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    text: TextColumns = ("text",),
    source: SourceColumn = "source",
    target: TargetColumn = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Tune compressed MLPs towards the hidden states of the original, on unlabeled texts.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression.
        out: Folder for the tuned artefact; OUT.run keeps the run until it is finished.
        config: Settings of training; train, dropout and the routers' losses do not apply.
        task: Task whose training texts are used.
        data: The task's files.
        train_file: A csv, tsv or jsonl file with a column of texts.
        text: TextColumns with text.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the order of the texts.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    check_new_folder(out)
    options = DataOptions(
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
    if options.kind == "labels" and train_file is not None and task is None:
        options.check_only("a column of texts", "train_file", "text")
        inputs: Any = texts_of(tables.read(train_file), text, None)
    else:
        inputs = options.read()
    folder = out.with_name(f"{out.name}.run")
    big = checkpoint.load(
        teacher,
        head=small.provenance.head,  # type: ignore[arg-type]
        num_labels=small.config.num_labels if small.provenance.head == "classification" else None,
        key=key,
    )
    with use_mesh(mesh):
        result = tune_model(small, big, inputs, config, key=key, folder=folder, progress=True)
    if not result.finished:
        print(f"Stopped after step {result.step}. {RESUME}")
        return
    if jax.process_index() == 0:
        checkpoint.save(result.model, out)
        shutil.rmtree(folder)
    print(f"Saved {out}.")


COMMANDS = {"finetune": finetune, "tune": tune}
