"""The commands finetune and tune."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
from tyro.conf import Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint.files import check_new_folder
from fusion_jax.cli.options import DataOptions, Devices, File, Flat, Hidden, ModelName, Settings
from fusion_jax.cli.run_folders import RESUME, history_table, resumable, run_recorder
from fusion_jax.errors import InputError
from fusion_jax.models.provenance import CLASS_HEADS
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.methods.finetuning import finetune as finetune_model
from fusion_jax.training.methods.layerwise import tune as tune_model
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.classification import Classification, Texts
from fusion_jax.training.tasks.generation import TextPairs
from fusion_jax.training.tasks.glue import texts_of
from fusion_jax.training.tasks.plain_text import PlainText
from fusion_jax.training.tasks.question_answering import QuestionAnswering
from fusion_jax.training.tasks.token_classification import TokenClassification

_Task = Classification | TextPairs | PlainText | TokenClassification | QuestionAnswering
_WITH_HEAD = (Classification, TokenClassification, QuestionAnswering)
"""The tasks whose models get a head of their own."""


@resumable
def finetune(
    model: Positional[ModelName],
    out: Annotated[Path, arg(metavar="RUN")],
    config: Settings = TrainConfig(),  # noqa: B008 - frozen
    new_head: bool = False,
    seed: int = 0,
    data: Flat[DataOptions] = DataOptions(),  # noqa: B008 - frozen
    devices: Flat[Devices] = Devices(),  # noqa: B008 - frozen
) -> None:
    """Fine-tune a model on a task; the same command resumes a run that was stopped.

    There are five kinds of tasks. Labels: --task with a GLUE task, or --train-file with --text and
    --label. Tags of words: --task token-classification --train-file with CoNLL text, or with a
    jsonl file with lists of words (--text words) and tags (--label tags). Answers to questions:
    --task question-answering --train-file, in the form of SQuAD. Targets from sources, for models
    that generate text: --task webnlg or e2e, or --train-file with --source and --target. Plain
    text, for decoder-only models: --task text --data FILE.txt.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Run folder: checkpoints, metrics.jsonl, and the artefacts best and last.
        config: Settings of training.
        new_head: Replace the head of the model, such as one for other classes.
        seed: Seed of the head, the dropout and the order of the examples.
        data: The task and its data.
        devices: How the devices are used.
    """
    devices.join()
    loaded = data.read()
    key = jax.random.key(seed)
    if new_head and not isinstance(loaded, _WITH_HEAD):
        raise InputError("--new-head is for tasks with labels, tags or answers; leave it out")
    head = {"new_head": True} if new_head else {}
    before = loaded.load(model, key=key, **head)
    fields = {"model": model, "seed": seed, "task": loaded.to_json()}
    recipe = Recipe(on_step=run_recorder(out, {**fields, "max_length": config.max_length}))
    with devices.used():
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


@dataclass(frozen=True, kw_only=True)
class UnlabeledData(DataOptions):
    """The options that choose unlabeled texts."""

    train_file: File = None
    """A csv, tsv or jsonl file with a column of texts."""
    dev_file: Hidden[File] = None
    label: Hidden[str] = "label"
    regression: Hidden[bool] = False

    def read(self) -> _Task | Texts:  # type: ignore[override]
        """Returns the task, or the texts of a file that has no other columns."""
        if self.kind != "labels" or self.train_file is None or self.task is not None:
            return super().read()
        self.check_only("a column of texts", "train_file", "text")
        return texts_of(tables.read(self.train_file), self.text, None)


@resumable
def tune(
    student: Positional[Annotated[str, arg(metavar="STUDENT")]],
    teacher: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[Path, arg(metavar="OUT")],
    config: Settings = TrainConfig(epochs=1),  # noqa: B008 - frozen
    seed: int = 0,
    data: Flat[UnlabeledData] = UnlabeledData(),
    devices: Flat[Devices] = Devices(),  # noqa: B008 - frozen
) -> None:
    """Tune compressed MLPs towards the hidden states of the original, on unlabeled texts.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression.
        out: Folder for the tuned artefact; OUT.run keeps the run until it is finished.
        config: Settings of training; train, dropout and the routers' losses do not apply.
        seed: Seed of the order of the texts.
        data: The task whose training texts are used.
        devices: How the devices are used.
    """
    devices.join()
    check_new_folder(out)
    key = jax.random.key(seed)
    small = checkpoint.load(student)
    inputs = data.read()
    folder = out.with_name(f"{out.name}.run")
    big = checkpoint.load(
        teacher,
        head=small.provenance.head,  # type: ignore[arg-type]
        num_labels=small.config.num_labels if small.provenance.head in CLASS_HEADS else None,
        key=key,
    )
    with devices.used():
        result = tune_model(small, big, inputs, config, key=key, folder=folder, progress=True)
    if not result.finished:
        print(f"Stopped after step {result.step}. {RESUME}")
        return
    if jax.process_index() == 0:
        checkpoint.save(result.model, out)
        shutil.rmtree(folder)
    print(f"Saved {out}.")


COMMANDS = {"finetune": finetune, "tune": tune}
