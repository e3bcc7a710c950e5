"""Reads tables of text and labels: tsv as GLUE distributes it, csv, and jsonl."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusion_jax.errors import InputError, nearest

Rows = Iterator[tuple[int, Any]]
"""The rows of a file, each with the line in which it starts."""


class Table(NamedTuple):
    """The cells of a file.

    Args:
        path: The file.
        columns: The cells by name of the column; None where a row is too short.
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
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: broken UTF-8 ({error.reason})") from None


def read(path: Path, header: Sequence[str] | None = None) -> Table:
    """Reads a table.

    Args:
        path: A .tsv (tabs, no quotes), .csv or .jsonl file.
        header: The names of the columns of a tsv file without a header.

    Raises:
        InputError: The file is missing, is not UTF-8, has no rows, or a line cannot be read.
    """
    text = read_text(path)
    readers = {".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _jsonl}
    if path.suffix not in readers:
        raise InputError(f"{path} is not one of the known kinds of file: {', '.join(readers)}")
    rows = readers[path.suffix](path, text)
    if header is None and path.suffix in (".tsv", ".csv"):
        _, header = next(rows, (0, []))
    numbered = list(rows)
    if not numbered:
        raise InputError(f"{path} has no rows")
    lines = [line for line, _ in numbered]
    if header is None:
        names = list(dict.fromkeys(name for _, row in numbered for name in row))
        return Table(path, {n: [row.get(n) for _, row in numbered] for n in names}, lines)
    columns = {
        name: [row[i] if i < len(row) else None for _, row in numbered]
        for i, name in enumerate(header)
    }
    return Table(path, columns, lines)


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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{i + 1}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{i + 1}: not a JSON object")
        yield i + 1, row
