"""The commands finetune, tune, heal and store-logits."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
from jaxtyping import Array
from tyro.conf import OmitArgPrefixes, Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint.files import check_new_folder
from fusion_jax.checkpoint.opening import stated_head
from fusion_jax.cli.options import (
    DataOptions,
    Devices,
    File,
    Flat,
    Hidden,
    Length,
    ModelName,
    Settings,
)
from fusion_jax.cli.run_folders import RESUME, history_table, resumable, run_recorder
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import CLASS_HEADS, Head
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.methods.finetuning import finetune as finetune_model
from fusion_jax.training.methods.healing import SETTINGS, Healing, heal_config
from fusion_jax.training.methods.healing import heal as heal_model
from fusion_jax.training.methods.layerwise import tune as tune_model
from fusion_jax.training.methods.stored_logits import LOGITS, TOP_K
from fusion_jax.training.methods.stored_logits import store_logits as store
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.classification import Classification, Texts
from fusion_jax.training.tasks.generation import TextPairs
from fusion_jax.training.tasks.glue import texts_of
from fusion_jax.training.tasks.plain_text import PlainText
from fusion_jax.training.tasks.question_answering import QuestionAnswering
from fusion_jax.training.tasks.token_classification import TokenClassification
from fusion_jax.training.tasks.unlabeled import read_files

_Task = Classification | TextPairs | PlainText | TokenClassification | QuestionAnswering
_WITH_HEAD = (Classification, TokenClassification, QuestionAnswering)
"""The tasks whose models get a head of their own."""


StatedHead = Annotated[
    Head | None, arg(metavar="HEAD", help_behavior_hint="(default: as the model's files state)")
]


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
    big = _teacher_of(small, teacher, key)
    with devices.used():
        result = tune_model(small, big, inputs, config, key=key, folder=folder, progress=True)
    _finish(result, out, folder)


def _teacher_of(student: Model, name: str, key: Array) -> Model:
    """Loads a teacher with the head of its student."""
    head = student.provenance.head
    return checkpoint.load(
        name,
        head=head,
        num_labels=student.config.num_labels if head in CLASS_HEADS else None,
        key=key,
    )


def _finish(result: Fit, out: Path, folder: Path) -> None:
    """Saves the model of a finished run in place of its run folder."""
    if not result.finished:
        print(f"Stopped after step {result.step}. {RESUME}")
        return
    if jax.process_index() == 0:
        checkpoint.save(result.model, out)
        shutil.rmtree(folder)
    print(f"Saved {out}.")


@dataclass(frozen=True, kw_only=True)
class TextData(UnlabeledData):
    """The options that choose texts: text files, or the texts of a task."""

    files: Positional[tuple[Path, ...]] = ()
    """Text files: one text after the other for a decoder-only language model, otherwise a text on
    each line. Or leave them out, and choose a task."""

    def inputs(self) -> Callable[[Model], _Task | Texts]:
        """Returns a function that gives the texts for a model.

        Raises:
            InputError: There are no texts, a file is missing, or the options do not fit together.
        """
        if self.files:
            self.check_only("text files", "files", "context")
            for file in self.files:
                if not file.is_file():
                    raise InputError(f"there is no file {file}")
            return lambda model: read_files(model, self.files, self.context)
        if self == TextData():
            raise InputError(
                "there is no text; give text files, --task and --data, or --train-file"
            )
        read = self.read()
        return lambda model: read


@dataclass(frozen=True, kw_only=True)
class HealSettings(TrainConfig):
    """The settings of training that have the same default for all models."""

    learning_rate: Hidden[float] = SETTINGS.learning_rate


@resumable
def heal(
    student: Positional[Annotated[str, arg(metavar="STUDENT")]],
    teacher: Positional[Annotated[str, arg(metavar="MODEL|LOGITS")]],
    out: Annotated[Path, arg(metavar="OUT", aliases=["-o"])],
    config: OmitArgPrefixes[HealSettings] = HealSettings(**dataclasses.asdict(SETTINGS)),  # noqa: B008 - frozen
    steps: Annotated[
        int | None, arg(metavar="N", help_behavior_hint=f"(default: {SETTINGS.max_steps})")
    ] = None,
    learning_rate: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: 0.064 / features of hidden states)"),
    ] = None,
    healing: Flat[Healing] = Healing(),  # noqa: B008 - frozen
    seed: int = 0,
    data: Flat[TextData] = TextData(),
    devices: Flat[Devices] = Devices(),  # noqa: B008 - frozen
) -> None:
    """Train a compressed model to give what the original gives, on unlabeled texts.

    The same command resumes a run that was stopped.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression, or the folder of its logits from
            fusion-jax store-logits.
        out: Folder for the healed artefact; OUT.run keeps the run until it is finished.
        config: Settings of training; dropout and the routers' losses do not apply. With --train
            compressed only MLPs train that differ from the original's in shape or kind.
        steps: Number of steps, over as many epochs as needed; as --max-steps.
        learning_rate: Highest learning rate.
        healing: What is minimized.
        seed: Seed of the order of the texts.
        data: The texts.
        devices: How the devices are used.
    """
    devices.join()
    check_new_folder(out)
    if student == teacher:
        raise InputError(
            "student and teacher are the same model; give first the artefact of the compressed "
            "model"
        )
    inputs = data.inputs()
    key = jax.random.key(seed)
    folder = out.with_name(f"{out.name}.run")
    small = checkpoint.load(student, head=stated_head(student))
    rate = heal_config(small).learning_rate if learning_rate is None else learning_rate
    config = dataclasses.replace(config, learning_rate=rate)
    stored = (Path(teacher).expanduser() / LOGITS).is_file()
    big = teacher if stored else _teacher_of(small, teacher, key)
    with devices.used():
        result = heal_model(
            small,
            big,
            inputs(small),
            config,
            key=key,
            steps=steps,
            healing=healing,
            folder=folder,
            progress=True,
        )
    _finish(result, out, folder)


def store_logits(
    model: Positional[ModelName],
    out: Annotated[Path, arg(metavar="OUT", aliases=["-o"])],
    head: StatedHead = None,
    top_k: int = TOP_K,
    batch_size: int = 8,
    max_length: Length = None,
    truncate: bool = False,
    data: Flat[TextData] = TextData(),
) -> None:
    """Store the most probable classes that a model gives, for heal without the model in memory.

    Args:
        model: Hub id or folder of the model before compression.
        out: New folder for the logits.
        head: Head of the model: classification, token-classification, question-answering,
            masked-lm, causal-lm or seq2seq-lm.
        top_k: Number of classes to store for each token or text; the others are stored as one.
        batch_size: Texts that are computed at once.
        max_length: Longest text in tokens, as in heal.
        truncate: Cut longer texts off instead of refusing them, as in heal.
        data: The texts, as in heal.
    """
    check_new_folder(out)
    inputs = data.inputs()
    config = TrainConfig(batch_size=batch_size, max_length=max_length, truncate=truncate)
    teacher = checkpoint.load(model, head=head or stated_head(model))
    store(teacher, inputs(teacher), out, config, top_k=top_k, progress=True)
    print(f"Saved {out}.")


COMMANDS = {"finetune": finetune, "tune": tune, "heal": heal, "store-logits": store_logits}
