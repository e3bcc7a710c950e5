"""Reads tables of text and labels: tsv as GLUE distributes it, csv, and jsonl."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fusion_jax.checkpoint.files import parse_json
from fusion_jax.errors import InputError, nearest
from fusion_jax.progress import show_stage

Rows = Iterator[tuple[int, Any]]
"""The rows of a file, each with the line in which it starts."""


class Table(NamedTuple):
    """The cells of a file.

    Args:
        path: The file.
        columns: The cells by name of the column; None where a row of a jsonl file lacks it.
        lines: The line in which each row starts, counted from 1.
    """

    path: Path
    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int]

    def column(self, name: str) -> Sequence[Any]:
        """Returns the cells of a column.

        Raises:
            InputError: The table has no such column.
        """
        if name not in self.columns:
            raise InputError(f"{self.path} has no column {name!r}{nearest(name, self.columns)}")
        return self.columns[name]

    def place(self, row: int) -> str:
        """Returns the place of a row, such as ``"SST-2/train.tsv:12"``."""
        return place(self.path, self.lines[row])


def place(path: Path, line: int | None = None) -> str:
    """Returns the name of a file with its folder and a line, such as ``"SST-2/train.tsv:12"``."""
    name = str(Path(*path.parts[-2:]))
    return name if line is None else f"{name}:{line}"


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Args:
        path: A file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: The file is missing or is not UTF-8; names the line.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    with show_stage(f"Reading {path}"):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: broken UTF-8 ({error.reason})") from None


@contextmanager
def at_line(path: Path, line: int) -> Iterator[None]:
    """Adds the file and the line to the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}:{line}: {error}") from None


def read(path: Path, header: Sequence[str] | None = None, *, skip_broken: bool = False) -> Table:
    """Reads a table.

    Args:
        path: A .tsv (tabs, no quotes), .csv or .jsonl file.
        header: The names of the columns of a tsv file without a header.
        skip_broken: Whether to leave out rows with too many or too few cells instead of raising an
            error.

    Raises:
        InputError: The file is missing, is not UTF-8, has no rows, two columns have the same name,
            or a line cannot be read or has another number of cells than the header; names file and
            line.
    """
    text = read_text(path)
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _jsonl}
    if path.suffix not in readers:
        raise InputError(f"{path} is not one of the known kinds of file: {', '.join(readers)}")
    rows = readers[path.suffix](path, text)
    if header is None and path.suffix in (".tsv", ".csv"):
        line, header = next(rows, (1, []))
        repeated = [name for name, count in Counter(header).items() if count > 1]
        if repeated:
            raise InputError(f"{path}:{line}: two columns have the name {repeated[0]!r}")
    numbered = list(rows)
    if header is not None:
        width = len(header)
        wrong = next(((line, row) for line, row in numbered if len(row) != width), None)
        if skip_broken:
            numbered = [(line, row) for line, row in numbered if len(row) == width]
        elif wrong is not None:
            hint = "; put cells that contain commas in quotes" if path.suffix == ".csv" else ""
            raise InputError(
                f"{path}:{wrong[0]}: cells in the row: {len(wrong[1])}, columns: {width}{hint}"
            )
    if not numbered:
        raise InputError(f"{path} has no rows")
    lines = [line for line, _ in numbered]
    if header is None:
        names = list(dict.fromkeys(name for _, row in numbered for name in row))
        return Table(path, {n: [row.get(n) for _, row in numbered] for n in names}, lines)
    cells = zip(*(row for _, row in numbered), strict=True)
    return Table(path, dict(zip(header, cells, strict=True)), lines)


def _tsv(path: Path, text: str) -> Rows:
    for i, line in enumerate(text.split("\n")):
        if line.strip("\r"):
            yield i + 1, line.rstrip("\r").split("\t")


def _csv(path: Path, text: str) -> Rows:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    before = 0
    try:
        for row in reader:
            if row:
                yield before + 1, row
            before = reader.line_num
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: {error}") from None


def _jsonl(path: Path, text: str) -> Rows:
    for i, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        with at_line(path, i + 1):
            row = parse_json(line)
            if not isinstance(row, dict):
                raise InputError("not a JSON object")
        yield i + 1, row
