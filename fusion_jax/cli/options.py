"""Options that several commands share."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import jax
from tyro.conf import Fixed, OmitArgPrefixes, Suppress, arg

from fusion_jax.errors import InputError
from fusion_jax.meshes import auto_mesh
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks.classification import Classification
from fusion_jax.training.tasks.generation import TextPairs
from fusion_jax.training.tasks.glue import load_task, read_task
from fusion_jax.training.tasks.pairs import PAIR_TASKS, load_pairs, read_pairs
from fusion_jax.training.tasks.plain_text import CONTEXT, PlainText
from fusion_jax.training.tasks.question_answering import QuestionAnswering, read_questions
from fusion_jax.training.tasks.token_classification import TokenClassification, read_tagged_words

TaskKind = Literal["labels", "pairs", "text", "token-classification", "question-answering"]
PLAIN = "text"
"""The name of the task of plain text."""
TOKENS: Literal["token-classification"] = "token-classification"
ANSWERS: Literal["question-answering"] = "question-answering"
"""The names of the tasks with a head of that name."""

T = TypeVar("T")
Flat = Annotated[T, arg(name="")]
"""Fields of a dataclass that are options of a command, listed with its other options."""
Hidden = Suppress[Fixed[T]]
"""A field that is not an option of the command."""
ModelName = Annotated[str, arg(metavar="MODEL")]
Artefact = Annotated[str, arg(metavar="ARTEFACT")]
NewFolder = Annotated[Path, arg(metavar="OUT")]
TextFile = Annotated[
    Path | None,
    arg(
        metavar="FILE", help_behavior_hint="(default: English sentences that come with fusion-jax)"
    ),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(
        metavar="DTYPE",
        help="Type of the parameters: float32, bfloat16 or float16.",
        help_behavior_hint="(default: that of the files)",
    ),
]
TaskName = Annotated[
    str | None,
    arg(
        metavar="TASK",
        help="A GLUE task (sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli); webnlg or e2e to "
        "generate text; text to model plain text; or, for a file of your own, token-classification "
        "or question-answering.",
        help_behavior_hint="(or give a file of your own)",
    ),
]
Data = Annotated[
    str | None,
    arg(
        metavar="DIR|FILE|hub",
        help="Folder with the task's files; hub for GLUE from the Hugging Face hub; for text, a "
        "text file.",
        help_behavior_hint="(with --task)",
    ),
]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
SourceColumn = Annotated[
    str,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate from.",
        help_behavior_hint="(default: source)",
    ),
]
TargetColumn = Annotated[
    str | None,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate; give it if the file has sources and targets "
        "instead of labels. Rows with the same source are several references.",
        help_behavior_hint="(such as target)",
    ),
]
Context = Annotated[
    int | None,
    arg(
        metavar="N",
        help="With --task text: number of tokens that the model sees at a time.",
        help_behavior_hint="(default: 512, or as in the run's training)",
    ),
]
TextColumns = Annotated[
    tuple[str, ...],
    arg(
        metavar="COLUMN",
        help="Column with the text, or two columns if labels are for pairs of texts.",
        help_behavior_hint="(default: text)",
    ),
]
Length = Annotated[
    int | None,
    arg(
        metavar="N",
        help="Longest text in tokens; for a pair, together with its target.",
        help_behavior_hint="(default: as in the run's training)",
    ),
]
Settings = OmitArgPrefixes[TrainConfig]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options that choose the data of a command."""

    task: TaskName = None
    data: Data = None
    train_file: File = None
    """A csv, tsv or jsonl file of your own to train on; for tags, also CoNLL text."""
    dev_file: File = None
    """Another file to measure on; with --task text, a text file."""
    text: TextColumns = ("text",)
    label: str = "label"
    """Column with labels."""
    regression: bool = False
    """Labels are numbers to predict."""
    source: SourceColumn = "source"
    target: TargetColumn = None
    context: Context = None

    @property
    def kind(self) -> TaskKind:
        """The kind of task that the options choose."""
        if self.task == PLAIN:
            return "text"
        if self.task == TOKENS or self.task == ANSWERS:
            return self.task
        own_pairs = self.task is None and self.target is not None
        return "pairs" if own_pairs or self.task in PAIR_TASKS else "labels"

    def check_only(self, data: str, *names: str) -> None:
        """Raises `InputError` if another option than these is set, which would have no effect."""
        for option in fields(self):
            if option.name not in names and getattr(self, option.name) != option.default:
                flag = option.name.replace("_", "-")
                raise InputError(f"--{flag} does not apply to {data}; leave it out")

    @property
    def word_fields(self) -> dict[str, str]:
        """The fields of the words and of the tags in a jsonl file.

        Raises:
            InputError: There is more than one field of words.
        """
        if len(self.text) != 1:
            raise InputError("words are in one field; give one to --text")
        own = DataOptions()
        words = "words" if self.text == own.text else self.text[0]
        return {"words": words, "tags": "tags" if self.label == own.label else self.label}

    def read(
        self,
    ) -> Classification | TextPairs | PlainText | TokenClassification | QuestionAnswering:
        """Returns the task with its data.

        Raises:
            InputError: The options do not fit together, an option does not apply, or the data is
                missing or wrong.
        """
        if self.kind == "text":
            if self.data is None or self.train_file is not None:
                raise InputError(f"--task {PLAIN} needs --data FILE.txt (and --dev-file FILE.txt)")
            self.check_only("plain text", "task", "data", "dev_file", "context")
            return PlainText(Path(self.data), self.dev_file, self.context or CONTEXT)
        if self.kind == TOKENS or self.kind == ANSWERS:
            if self.train_file is None:
                raise InputError(f"--task {self.task} needs --train-file (and --dev-file)")
            files = self.train_file, self.dev_file
            if self.kind == ANSWERS:
                self.check_only("questions", "task", "train_file", "dev_file")
                return read_questions(*files)
            self.check_only("tags of words", "task", "train_file", "dev_file", "text", "label")
            return read_tagged_words(*files, **self.word_fields)
        own = self.train_file or self.dev_file
        if self.task is not None and self.data is not None and not own:
            self.check_only("a published task", "task", "data")
            load = load_pairs if self.kind == "pairs" else load_task
            return load(self.task, self.data)
        if self.train_file is None or self.task is not None or self.data is not None:
            raise InputError("give either --task and --data, or --train-file (and --dev-file)")
        if self.target is not None:
            self.check_only("sources and targets", "train_file", "dev_file", "source", "target")
            files = self.train_file, self.dev_file
            return read_pairs(*files, source=self.source, target=self.target)
        self.check_only("labeled texts", "train_file", "dev_file", "text", "label", "regression")
        return read_task(
            self.train_file,
            self.dev_file,
            text=self.text,
            label=self.label,
            regression=self.regression,
        )


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The options that choose the devices of a command."""

    mesh: Annotated[
        str | None,
        arg(
            metavar="MESH",
            help="How devices are used, such as data=4,model=2: data splits batches, fsdp splits "
            "batches and parameters, model splits the widths of MLPs.",
            help_behavior_hint="(default: all on data)",
        ),
    ] = None
    distributed: bool = False
    """Join the other processes of this job (jax.distributed)."""

    def join(self) -> None:
        """Joins the other processes, before anything else uses the devices."""
        if self.distributed:
            jax.distributed.initialize()

    def used(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context with the mesh, or without one on a single device.

        Raises:
            InputError: The text of the mesh is not in its form, or not for the number of devices.
        """
        text = self.mesh
        if text is None:
            if jax.device_count() == 1:
                return contextlib.nullcontext()
            text = f"data={jax.device_count()}"
        axes = {name: size for name, _, size in (part.partition("=") for part in text.split(","))}
        if not all(size.isdigit() and int(size) for size in axes.values()):
            raise InputError(f"mesh {text!r} is not in the form data=4,model=2")
        sizes = tuple(int(size) for size in axes.values())
        if math.prod(sizes) != jax.device_count():
            raise InputError(f"mesh {text!r} is not for the {jax.device_count()} devices here")
        return jax.set_mesh(auto_mesh(jax.make_mesh(sizes, tuple(axes))))
