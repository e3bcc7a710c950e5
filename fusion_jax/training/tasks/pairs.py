"""Reads pairs of source and target text: WebNLG, E2E, and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fusion_jax.checkpoint.files import parse_json
from fusion_jax.errors import InputError, nearest
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.generation import TextPairs
from fusion_jax.training.tasks.pair_encoding import Pairs


def load_pairs(name: str, data: str | Path) -> TextPairs:
    """Loads a published task of text generation.

    WebNLG's triples become ``subject : property : object | subject : ...``. Its test set has the
    groups ``seen`` and ``unseen``, for categories that the training set has or does not have.

    Args:
        name: ``"webnlg"`` or ``"e2e"``.
        data: The folder with the task's files, or a folder that holds this one under the task's
            name. WebNLG 2017: ``train.json``, ``dev.json`` and ``test.json``, with ``entries`` of
            ``modifiedtripleset``, ``lexicalisations`` and ``category``. E2E: ``train.txt``,
            ``valid.txt`` and ``test.txt``, with ``meaning||text`` lines.

    Returns:
        The task, with training, dev and test pairs.

    Raises:
        InputError: The task is unknown, or a file is missing or wrong; names the first wrong line
            or entry.

    References:
        Gardent et al. (2017), The WebNLG Challenge. Novikova et al. (2017), The E2E Dataset.
        Triples are written as by Li and Liang (2021), Prefix-Tuning, and Hu et al. (2021), LoRA.

    Example:
        >>> data = load_pairs("webnlg", "nlg")  # doctest: +SKIP
    """
    if name not in _READERS:
        raise InputError(f"unknown task {name!r}{nearest(name, _READERS)}")
    folder = Path(data)
    if (folder / name).is_dir():
        folder = folder / name
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give the folder with {name}'s files")
    return _READERS[name](folder)


def read_pairs(
    train: str | Path,
    dev: str | Path | None = None,
    test: str | Path | None = None,
    *,
    source: str = "source",
    target: str = "target",
) -> TextPairs:
    """Reads a task of text generation from your own files.

    Args:
        train: A .csv, .tsv or .jsonl file with one pair per row.
        dev: Another file to measure on while training, or None.
        test: Another file to measure on at the end, or None.
        source: The column with the texts to generate from.
        target: The column with the texts to generate; rows with the same source are several
            references.

    Returns:
        The task.

    Raises:
        InputError: A column is missing or a text is empty; names file and line.

    Example:
        >>> data = read_pairs("train.csv", "dev.csv", target="summary")  # doctest: +SKIP
    """

    def part(file: str | Path | None) -> Pairs | None:
        return None if file is None else pairs_of(Path(file), source, target)

    pairs = pairs_of(Path(train), source, target)
    return TextPairs(Path(train).stem, pairs, part(dev), part(test))


def pairs_of(path: Path, source: str = "source", target: str = "target") -> Pairs:
    """Returns the pairs of a table in a file, checked: one for each different source, in order.

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
    """Returns pairs from (source, reference, name) rows, grouping references of equal sources."""
    found: dict[str, list[tuple[str, str]]] = {}
    for source, reference, name in rows:
        found.setdefault(source, []).append((reference, name))
    references = [tuple(text for text, _ in each) for each in found.values()]
    names = [tuple(name for _, name in each) for each in found.values()]
    return Pairs(list(found), references, None, names)


def _e2e(folder: Path) -> TextPairs:
    parts = [_e2e_part(folder / f"{part}.txt") for part in ("train", "valid", "test")]
    return TextPairs("e2e", *parts)


def _e2e_part(path: Path) -> Pairs:
    def rows() -> Iterable[tuple[str, str, str]]:
        for i, line in enumerate(tables.read_text(path).split("\n")):
            if not line.strip():
                continue
            meaning, bars, text = (part.strip() for part in line.partition("||"))
            if not (meaning and bars and text):
                raise InputError(f"{path}:{i + 1}: not in the form meaning||text")
            yield meaning, text, tables.place(path, i + 1)

    pairs = _grouped(rows())
    if not pairs.sources:
        raise InputError(f"{path} has no lines")
    return pairs


def _webnlg(folder: Path) -> TextPairs:
    parts = {part: _webnlg_part(folder / f"{part}.json") for part in ("train", "dev", "test")}
    known = set(parts["train"].groups or ())
    groups = ["seen" if group in known else "unseen" for group in parts["test"].groups or ()]
    return TextPairs(
        "webnlg",
        parts["train"]._replace(groups=None),
        parts["dev"]._replace(groups=None),
        parts["test"]._replace(groups=groups),
    )


def _webnlg_part(path: Path) -> Pairs:
    """Returns the entries of a file, with their categories as groups."""
    try:
        entries = parse_json(tables.read_text(path))["entries"]
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} has no entries; it is not a file of WebNLG 2017") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has an empty list of entries")
    sources, references, groups, names = [], [], [], []
    for i, entry in enumerate(entries):
        # The whole file may be one line, so errors name the entry.
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
            problem = f"no {error}" if isinstance(error, KeyError) else "not in WebNLG's form"
            raise InputError(f"{path}, {where}: {problem}") from None
        if not triples or not texts or not all(texts):
            raise InputError(f"{path}, {where}: no {'text' if triples else 'triples'}")
        sources.append(" | ".join(triples))
        references.append(texts)
        place = f"{tables.place(path)}, {where}"
        names.append(tuple(f"{place}, text {j + 1}" for j in range(len(texts))))
    return Pairs(sources, references, groups, names)


_READERS: Mapping[str, Callable[[Path], TextPairs]] = MappingProxyType(
    {"e2e": _e2e, "webnlg": _webnlg}
)
PAIR_TASKS: Sequence[str] = tuple(_READERS)
"""The names that `load_pairs` knows."""
