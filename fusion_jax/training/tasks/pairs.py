"""Tasks of generating text: WebNLG, E2E, and any table of sources and targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fusion_jax.errors import InputError, nearest
from fusion_jax.training.tasks import tables


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """What is to be generated.

    Args:
        name: Its name.
        metrics: Names of metrics in `fusion_jax.training.tasks.text_metrics.TEXT_METRICS`.
    """

    name: str
    metrics: tuple[str, ...] = ("bleu", "chrf", "chrf++", "ter")

    def to_json(self) -> dict[str, Any]:
        """The task as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TextTask:
        """The task that `to_json` wrote."""
        return cls(name=fields["name"], metrics=tuple(fields["metrics"]))


class Pairs(NamedTuple):
    """Sources, each with the texts that are right for it.

    Args:
        sources: What to generate from.
        references: One or more texts for each source.
        groups: The group of each source, by which results are reported, too; None if there are no
            groups.
        names: Where each reference comes from, such as ``"e2e/train.txt:12"``.
    """

    sources: Sequence[str]
    references: Sequence[tuple[str, ...]]
    groups: Sequence[str] | None
    names: Sequence[tuple[str, ...]]

    @property
    def size(self) -> int:
        """How many pairs of a source and a reference there are."""
        return sum(map(len, self.references))


class TextData(NamedTuple):
    """A task and its pairs.

    Args:
        task: The task.
        train: To train on; every reference is a target.
        dev: To measure on while training, or None.
        test: To measure on in the end, or None.
    """

    task: TextTask
    train: Pairs
    dev: Pairs | None
    test: Pairs | None


def load_pairs(name: str, data: str | Path) -> TextData:
    """A published task of generating text.

    WebNLG's triples are written as ``subject : property : object | subject : ...``. Its test set
    has the groups ``seen`` and ``unseen``: whether the category is among those of the training set.

    Args:
        name: ``"webnlg"`` or ``"e2e"``.
        data: The folder with the task's files, or one that holds it under the task's name. WebNLG
            2017: ``train.json``, ``dev.json`` and ``test.json``, with ``entries`` of
            ``modifiedtripleset``, ``lexicalisations`` and ``category``. E2E: ``train.txt``,
            ``valid.txt`` and ``test.txt``, with ``meaning||text`` lines.

    Returns:
        The task and its three parts.

    Raises:
        InputError: The task is unknown, or a file is missing or wrong: its first broken line or
            entry is named.

    References:
        Gardent et al. (2017), The WebNLG Challenge. Novikova et al. (2017), The E2E Dataset.
        Triples are written as by Li and Liang (2021), Prefix-Tuning, and Hu et al. (2021), LoRA.
    """
    if name not in _READERS:
        raise InputError(f"unknown task {name!r}{nearest(name, _READERS)}")
    folder = Path(data)
    if (folder / name).is_dir():
        folder = folder / name
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the one with {name}'s files")
    return _READERS[name](folder)


def read_pairs(
    train: str | Path,
    dev: str | Path | None = None,
    test: str | Path | None = None,
    *,
    source: str = "source",
    target: str = "target",
) -> TextData:
    """A task from files of one's own.

    Args:
        train: A .csv, .tsv or .jsonl file with a row per pair.
        dev: Another to measure on while training, or None.
        test: Another to measure on in the end, or None.
        source: The column with what to generate from.
        target: The column with the text to generate; rows with the same source are several
            references.

    Returns:
        The task and its parts.

    Raises:
        InputError: A column is missing or a text is empty; names file and line.
    """

    def part(file: str | Path | None) -> Pairs | None:
        return None if file is None else pairs_of(Path(file), source, target)

    learnt = pairs_of(Path(train), source, target)
    return TextData(TextTask(name=Path(train).stem), learnt, part(dev), part(test))


def pairs_of(path: Path, source: str = "source", target: str = "target") -> Pairs:
    """The pairs of a table, checked.

    Args:
        path: A .csv, .tsv or .jsonl file.
        source: The column with sources.
        target: The column with targets.

    Returns:
        The pairs, one for each different source, in the order of the file.

    Raises:
        InputError: A column is missing or a text is empty; names file and line.
    """
    table = tables.read(path)
    rows = zip(table.column(source), table.column(target), strict=True)

    def checked() -> Iterable[tuple[str, str, str]]:
        for i, row in enumerate(rows):
            for name, cell in zip((source, target), row, strict=True):
                if not isinstance(cell, str) or not cell.strip():
                    raise InputError(f"{path}:{table.lines[i]}: no text in column {name!r}")
            yield *row, table.place(i)

    return _grouped(checked())


def _grouped(rows: Iterable[tuple[str, str, str]]) -> Pairs:
    """Pairs of (source, reference, name) rows, with the references of equal sources together."""
    found: dict[str, list[tuple[str, str]]] = {}
    for source, reference, name in rows:
        found.setdefault(source, []).append((reference, name))
    references = [tuple(text for text, _ in each) for each in found.values()]
    names = [tuple(name for _, name in each) for each in found.values()]
    return Pairs(list(found), references, None, names)


def _e2e(folder: Path) -> TextData:
    parts = [_e2e_part(folder / f"{part}.txt") for part in ("train", "valid", "test")]
    return TextData(TextTask(name="e2e"), *parts)


def _e2e_part(path: Path) -> Pairs:
    def rows() -> Iterable[tuple[str, str, str]]:
        for i, line in enumerate(tables.read_text(path).split("\n")):
            if not line.strip():
                continue
            meaning, bars, text = (part.strip() for part in line.partition("||"))
            if not (meaning and bars and text):
                raise InputError(f"{path}:{i + 1}: not of the form meaning||text")
            yield meaning, text, tables.place(path, i + 1)

    pairs = _grouped(rows())
    if not pairs.sources:
        raise InputError(f"{path} holds no lines")
    return pairs


def _webnlg(folder: Path) -> TextData:
    parts = {part: _webnlg_part(folder / f"{part}.json") for part in ("train", "dev", "test")}
    known = set(parts["train"].groups or ())
    groups = ["seen" if group in known else "unseen" for group in parts["test"].groups or ()]
    return TextData(
        TextTask(name="webnlg"),
        parts["train"]._replace(groups=None),
        parts["dev"]._replace(groups=None),
        parts["test"]._replace(groups=groups),
    )


def _webnlg_part(path: Path) -> Pairs:
    """The entries of a file, with their categories as groups."""
    try:
        entries = json.loads(tables.read_text(path))["entries"]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: no valid JSON ({error})") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} has no entries; it is no file of WebNLG 2017") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} holds no entries")
    sources, references, groups, names = [], [], [], []
    for i, entry in enumerate(entries):
        # The file may well be one line; the place is that of the entry.
        where = f"entry {i + 1}"
        try:
            (fields,) = entry.values()
            triples = [
                " : ".join(triple[part] for part in ("subject", "property", "object"))
                for triple in fields["modifiedtripleset"]
            ]
            texts = tuple(each["lex"].strip() for each in fields["lexicalisations"])
            groups.append(str(fields["category"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else "not of WebNLG's form"
            raise InputError(f"{path}, {where}: {what}") from None
        if not triples or not texts or not all(texts):
            raise InputError(f"{path}, {where}: no {'text' if triples else 'triples'}")
        sources.append(" | ".join(triples))
        references.append(texts)
        place = f"{tables.place(path)}, {where}"
        names.append(tuple(f"{place}, text {j + 1}" for j in range(len(texts))))
    return Pairs(sources, references, groups, names)


_READERS: Mapping[str, Callable[[Path], TextData]] = MappingProxyType(
    {"e2e": _e2e, "webnlg": _webnlg}
)
TEXT_TASKS: Sequence[str] = tuple(_READERS)
"""The names that `load_pairs` knows."""
