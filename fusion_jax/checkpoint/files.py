"""Folders of model files: finding and downloading them, reading tensors, writing atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fusion_jax.errors import InputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FUSION = "fusion.json"
FORMAT = 1
"""The version of ``fusion.json`` that is written; older ones are read."""
SHARD_BYTES = 5_000_000_000
"""The most bytes in one file of weights, unless one tensor alone has more."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "generation_config.json",
)
"""Files that are copied along, so that the result is used with the tokenizer it came with."""


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder with a model's files: a local one, or one downloaded from the hub.

    Downloads go to `huggingface_hub`'s cache, and its offline mode (``HF_HUB_OFFLINE=1``) is kept.

    Args:
        name: A folder, or a hub id such as ``"google-bert/bert-base-uncased"``.
        revision: Branch, tag or commit on the hub.

    Returns:
        The folder.

    Raises:
        InputError: There is no such folder and the hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(name)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.exists():
        raise InputError(f"no folder {text}")
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, FUSION, INDEX, WEIGHTS, "model-*.safetensors", *TOKENIZER]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client lets many kinds of errors through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{text} is no folder here, and the hub did not give it: {reason}"
        ) from error


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a JSON file and the object in it.

    Args:
        path: The file.

    Returns:
        The text, verbatim, and its fields.

    Raises:
        InputError: The file is missing or holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object")
    return text, fields


class TensorFiles:
    """The tensors of a folder's safetensors file or files, read one at a time.

    Args:
        folder: A folder with ``model.safetensors``, or with its index and shards.

    Raises:
        InputError: There are no weights, a shard is missing, or a file is truncated or corrupt.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        for file in self._files():
            try:
                handle = safetensors.safe_open(folder / file, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(
                    f"{folder / file} is truncated or corrupt ({error}); fetch it again"
                ) from None
            for name in handle.keys():
                view = handle.get_slice(name)
                self._shapes[name] = tuple(view.get_shape())
                self._dtypes[name] = view.get_dtype()
                self._open[name] = handle

    def _files(self) -> list[str]:
        if (self.folder / WEIGHTS).is_file():
            return [WEIGHTS]
        if not (self.folder / INDEX).is_file():
            pickled = any(self.folder.glob("pytorch_model*.bin"))
            hint = "; it has pickled weights, convert them to safetensors" if pickled else ""
            raise InputError(f"{self.folder} has no {WEIGHTS}{hint}")
        _, index = read_json(self.folder / INDEX)
        files = sorted(set(index.get("weight_map", {}).values()))
        missing = [f for f in files if not (self.folder / f).is_file()]
        if missing or not files:
            lost = ", ".join(missing) or f"a weight_map in {INDEX}"
            raise InputError(f"{self.folder} lacks {lost}")
        return files

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors by name."""
        return self._shapes

    def float_dtypes(self, names: Iterator[str]) -> set[str]:
        """Safetensors' names of the floating-point dtypes among some tensors."""
        return {d for name in names if (d := self._dtypes[name]) in ("F64", "F32", "F16", "BF16")}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._open[name].get_tensor(name)


def name_of(path: tuple) -> str:
    """The name of a variable in our files: its path in the model, with dots."""
    return ".".join(map(str, path))


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """The path, if a folder may be written there: it does not exist or is empty.

    Args:
        path: Where to write.

    Returns:
        The path.

    Raises:
        InputError: Something is there already, or the parent cannot be written to.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another or remove it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to {parent}")
    return path


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a folder atomically: it appears whole under its name or not at all.

    Args:
        path: Where the folder shall be; see `check_new_folder`.

    Yields:
        A temporary folder beside it to write into.

    Raises:
        InputError: As `check_new_folder`.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.
    """
    path = check_new_folder(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield temporary
        # Temporary folders and the files that safetensors writes are private to the user.
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)
            _sync(file)
        temporary.chmod(0o777 & ~mask)
        _sync(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        _sync(path.absolute().parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: it holds the old text or the new text, never a part of it.

    Args:
        path: The file; an existing file is replaced.
        text: The new text.
    """
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes ``model.safetensors``, or shards and their index where there is more than one.

    Args:
        folder: Where.
        tensors: Names and arrays; no more than a shard's are held at a time.
    """
    shard: dict[str, np.ndarray] = {}
    sizes, shards = [0], []

    def write() -> None:
        # "format" is what transformers looks for; the layout is the same for all frameworks.
        path = folder / f"{len(shards)}.safetensors"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))
        shard.clear()

    for name, x in tensors:
        if shard and sizes[-1] + x.nbytes > SHARD_BYTES:
            write()
            sizes.append(0)
        shard[name] = np.asarray(x, order="C")  # np.ascontiguousarray would give numbers an axis
        sizes[-1] += x.nbytes
    write()
    if len(shards) == 1:
        shards[0][0].rename(folder / WEIGHTS)
        return
    weight_map = {}
    for i, (path, names) in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files, where there are any."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
