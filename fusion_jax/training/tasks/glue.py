"""Reads classification tasks: those of GLUE, and tables with text and labels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fusion_jax.errors import InputError, nearest
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.classes import TaskSpec
from fusion_jax.training.tasks.classification import Classification, Texts


@dataclass(frozen=True, kw_only=True)
class _Glue:
    """The format of a GLUE task: as a folder of tsv files, and on the hub."""

    folder: str
    texts: tuple[str, ...]
    hub_texts: tuple[str, ...] = ()
    """The columns on the hub, if they have other names there."""
    label: str = "label"
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    dev: tuple[tuple[str, str], ...] = (("dev", "dev.tsv"),)
    skip_broken: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_GLUE: Mapping[str, _Glue] = MappingProxyType(
    {
        "sst2": _Glue(folder="SST-2", labels=("negative", "positive"), texts=("sentence",)),
        "cola": _Glue(
            folder="CoLA",
            labels=("unacceptable", "acceptable"),
            texts=("sentence",),
            metrics=("matthews",),
            header=("source", "label", "mark", "sentence"),
        ),
        "mrpc": _Glue(
            folder="MRPC",
            labels=("not_equivalent", "equivalent"),
            texts=("#1 String", "#2 String"),
            hub_texts=_PAIR,
            label="Quality",
            metrics=("accuracy", "f1"),
        ),
        "stsb": _Glue(
            folder="STS-B",
            texts=_PAIR,
            label="score",
            labels=None,
            metrics=("pearson", "spearman"),
        ),
        "qqp": _Glue(
            folder="QQP",
            labels=("not_duplicate", "duplicate"),
            texts=("question1", "question2"),
            label="is_duplicate",
            metrics=("accuracy", "f1"),
            skip_broken=True,  # the distributed files hold some rows without a label
        ),
        "mnli": _Glue(
            folder="MNLI",
            texts=_PAIR,
            hub_texts=("premise", "hypothesis"),
            label="gold_label",
            labels=("entailment", "neutral", "contradiction"),
            dev=(("matched", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv")),
        ),
        "qnli": _Glue(
            folder="QNLI",
            texts=("question", "sentence"),
            labels=_ENTAILMENT,
        ),
        "rte": _Glue(folder="RTE", texts=_PAIR, labels=_ENTAILMENT),
        "wnli": _Glue(folder="WNLI", labels=("not_entailment", "entailment"), texts=_PAIR),
    }
)
GLUE: Mapping[str, TaskSpec] = MappingProxyType(
    {name: TaskSpec(name=name, labels=g.labels, metrics=g.metrics) for name, g in _GLUE.items()}
)
"""The labels and metrics of the tasks of GLUE, by name.

References:
    Wang et al. (2019), GLUE: A Multi-Task Benchmark and Analysis Platform.
"""


def load_task(name: str, data: str | Path) -> Classification:
    """Loads a task of GLUE.

    Args:
        name: A key of `GLUE`, such as ``"sst2"``.
        data: The folder of the task's tsv files as distributed, a folder that holds this one under
            GLUE's name (``SST-2``), or ``"hub"`` for the Hugging Face hub through `datasets`.

    Returns:
        The task, with its training and dev texts.

    Raises:
        InputError: The task is unknown, or the data is missing or wrong; names the first wrong line
            of a file.

    Example:
        >>> data = load_task("sst2", "glue/SST-2")  # doctest: +SKIP
    """
    if name not in _GLUE:
        raise InputError(f"unknown task {name!r}{nearest(name, _GLUE)}")
    if data == "hub":
        return _from_hub(name)
    glue, spec = _GLUE[name], GLUE[name]
    folder = Path(data)
    if (folder / glue.folder).is_dir():
        folder = folder / glue.folder
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the folder of GLUE, or hub")

    def split(file: str) -> Texts:
        table = tables.read(folder / file, glue.header, skip_broken=glue.skip_broken)
        return texts_of(
            table,
            glue.texts,
            glue.label,
            labels=spec.labels,
            numbered=True,
            skip_broken=glue.skip_broken,
        )

    return Classification(spec, split("train.tsv"), {n: split(file) for n, file in glue.dev})


def _from_hub(name: str) -> Classification:
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "data from the hub needs datasets: pip install 'fusion-jax[hub]'"
        ) from None
    glue, spec = _GLUE[name], GLUE[name]
    loaded = datasets.load_dataset("nyu-mll/glue", name)

    def split(part: str) -> Texts:
        rows = loaded[part]
        texts = list(zip(*(rows[column] for column in glue.hub_texts or glue.texts), strict=True))
        dtype = np.float32 if spec.labels is None else np.int32
        names = [f"{name} {part}[{i}]" for i in range(len(texts))]
        return Texts(texts, np.asarray(rows["label"], dtype), names)

    parts = {n: "validation" if n == "dev" else f"validation_{n}" for n, _ in glue.dev}
    return Classification(spec, split("train"), {n: split(part) for n, part in parts.items()})


def read_task(
    train: str | Path,
    dev: str | Path | None = None,
    *,
    text: Sequence[str] = ("text",),
    label: str = "label",
    regression: bool = False,
) -> Classification:
    """Reads a task from your own files.

    Args:
        train: A .csv, .tsv or .jsonl file with one example per row.
        dev: Another file to measure on, or None.
        text: The column with the text, or two columns with a pair of texts.
        label: The column with the label: any words or numbers.
        regression: Whether labels are numbers to predict, not classes.

    Returns:
        The task; its classes are the labels in the training file, sorted.

    Raises:
        InputError: A column is missing, a text is empty, or a label is missing or does not occur in
            the training file; names file and line.

    Example:
        >>> data = read_task("train.csv", "dev.csv", text=("title", "body"))  # doctest: +SKIP
    """
    table = tables.read(Path(train))
    labels = None
    if not regression:
        values = set()
        for line, cell in zip(table.lines, table.column(label), strict=True):
            with tables.at_line(table.path, line):
                values.add(_class_name(cell))
        numeric = all(re.fullmatch(r"-?[0-9]{1,18}", v) for v in values)
        labels = tuple(sorted(values, key=int if numeric else None))
        if len(labels) < 2:
            raise InputError(f"{train}: column {label!r} holds fewer than two classes")
    metrics = ("pearson", "spearman") if regression else ("accuracy", "matthews")
    if labels == ("0", "1"):
        metrics = ("accuracy", "f1", "matthews")
    spec = TaskSpec(name=Path(train).stem, labels=labels, metrics=metrics)
    devs = (
        {} if dev is None else {"dev": texts_of(tables.read(Path(dev)), text, label, labels=labels)}
    )
    return Classification(spec, texts_of(table, text, label, labels=labels), devs)


def texts_of(
    table: tables.Table,
    text: Sequence[str],
    label: str | None,
    *,
    labels: Sequence[str] | None = None,
    numbered: bool = False,
    skip_broken: bool = False,
) -> Texts:
    """Returns the texts of a table, checked, with labels unless ``label`` is None.

    Args:
        table: The table.
        text: One or two columns with text.
        label: The column with labels, or None for texts without labels.
        labels: The names of the classes; None for regression.
        numbered: Whether labels may also be the numbers of the classes, counted from 0.
        skip_broken: Whether to leave out rows without text or label instead of raising an error.

    Raises:
        InputError: A column is missing, a text is empty, or a label is not one of ``labels``.
    """
    if not 1 <= len(text) <= 2:
        raise InputError(f"text must be one or two columns; got {', '.join(text)}")
    columns = [table.column(name) for name in text]
    given = None if label is None else table.column(label)
    numbers = {str(i): i for i in range(len(labels or ()) if numbered else 0)}
    numbers |= {_class_name(name): i for i, name in enumerate(labels or ())}
    texts, values, names = [], [], []
    for i, row in enumerate(zip(*columns, strict=True)):
        try:
            with tables.at_line(table.path, table.lines[i]):
                for name, cell in zip(text, row, strict=True):
                    if not isinstance(cell, str) or not cell.strip():
                        raise InputError(f"no text in column {name!r}")
                if given is not None:
                    values.append(_label(given[i], None if labels is None else numbers))
        except InputError:
            if skip_broken:
                continue
            raise
        texts.append(row)
        names.append(table.place(i))
    dtype = np.float32 if labels is None else np.int32
    return Texts(texts, None if given is None else np.array(values, dtype), names)


def _label(cell: object, numbers: Mapping[str, int] | None) -> int | float:
    name = _class_name(cell)
    if numbers is not None:
        if name not in numbers:
            known = ", ".join(list(numbers)[:20])
            raise InputError(f"label {name[:100]!r} is not one of {known}")
        return numbers[name]
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise InputError(f"label {name[:100]!r} is not a number of float32")
    return number


def _class_name(cell: object) -> str:
    """Returns the name of a class; 1, 1.0, "1" and " 1.0 " are the same one."""
    if isinstance(cell, bool) or cell is None or not isinstance(cell, str | int | float):
        what = "no label" if cell is None else f"label {str(cell)[:100]} is not a word or a number"
        raise InputError(what)
    name = str(cell).strip()
    if name.lower() in ("", "nan"):
        raise InputError("no label")
    if name.startswith(("[", "{")):
        raise InputError(f"label {name[:100]!r} is not a word or a number")
    whole = re.fullmatch(r"(-?[0-9]+)\.0+", name)
    return name if whole is None else whole[1]
