"""Finds and downloads folders of model files, reads their tensors, and writes files atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fusion_jax.errors import InputError
from fusion_jax.progress import show_stage

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FUSION = "fusion.json"
GENERATION = "generation_config.json"
CARD = "README.md"
REPORT = "report.json"
FORMAT = 1
"""The version of ``fusion.json`` that is written; older versions are read."""
SHARD_BYTES = 5_000_000_000
"""The largest size of one file of weights; only a single larger tensor exceeds it."""
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied beside the weights, so that a result keeps its tokenizer, and a model of
images what prepares them."""
TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
SENTENCES = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files of a sentence encoder; `MODULES` lists the folders of what follows the model."""


def find_folder(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Returns the folder with a model's files, downloaded from the hub if it is not local.

    Downloads go to the cache of `huggingface_hub`; its offline mode (``HF_HUB_OFFLINE=1``) applies.

    Args:
        name: A folder, or a hub id such as ``"google-bert/bert-base-uncased"``.
        revision: Branch, tag or commit on the hub.

    Returns:
        The folder.

    Raises:
        InputError: The folder does not exist, and the hub does not have the model or cannot be
            reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = os.fspath(name)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or path.exists():
        raise InputError(f"no such folder: {text}")
    from huggingface_hub import snapshot_download

    try:
        # The index first: it says which of the files with weights belong to the model.
        patterns = [CONFIG, FUSION, INDEX, *TOKENIZER, f"{TEMPLATES}/*.jinja", *SENTENCES]
        patterns += [CARD, *LICENSES]
        patterns += [f"[0-9]_*/{file}" for file in (CONFIG, WEIGHTS)]
        folder = Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
        index = folder / INDEX
        shards = sorted(set(shard_names(index).values())) if index.is_file() else [WEIGHTS]
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns + shards))
    except InputError:
        raise
    except Exception as error:  # the hub's client lets many kinds of errors through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no such folder: {text}; as a model of the hub it cannot be downloaded: {reason}"
        ) from error


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        InputError: The text is not valid JSON, an object has the same name twice, or a text holds
            half a surrogate pair, which cannot be written or tokenized.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise InputError(f"not valid JSON ({reason})") from None
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the name {max(names, key=names.count)!r} occurs twice in an object")
    return dict(pairs)


def read_json(path: Path) -> tuple[str, dict[str, Any]]:
    """Reads a JSON file.

    Args:
        path: The file.

    Returns:
        The text, verbatim, and the object in it.

    Raises:
        InputError: The file is missing, or does not hold a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        fields = parse_json(text)
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return text, fields


def shard_names(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, by ``model.safetensors.index.json``.

    Args:
        index: The file.

    Returns:
        The names of files in the same folder, by the names of tensors.

    Raises:
        InputError: The file does not map tensors to files in its folder.
    """
    _, fields = read_json(index)
    places = fields.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index} has no weight_map from tensors to files")
    for name, file in places.items():
        plain = isinstance(file, str) and file == Path(file).name and not set(file) & set("\\\0")
        if not plain or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {str(file)[:100]!r}, the file of {name}, is not the name of a "
                "safetensors file in the same folder"
            )
    return places


def check_new_folder(path: str | os.PathLike[str], *, in_place: bool = False) -> Path:
    """Checks that a new folder can be written.

    Args:
        path: Where to write the folder.
        in_place: Whether files are written into the folder one by one. If not, a finished folder is
            put in the place of the path, which cannot be done with a mount point.

    Returns:
        The path, with ``~`` expanded.

    Raises:
        InputError: The path exists and is not an empty folder, its name is too long, its parent is
            not writable, or it is a mount point.
    """
    path = Path(path).expanduser()
    target = _place_of(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; choose another or remove it")
    if target.exists() and in_place:
        _check_writable(target)
        return path
    if _is_mount(target):
        raise InputError(
            f"{path} is a mount point, whose place a finished folder cannot take; give a folder in "
            f"it, such as {path / 'model'}"
        )
    _check_writable(target.parent)
    return path


def check_new_file(path: str | os.PathLike[str]) -> Path:
    """Checks that a file can be written; it may exist, and is then replaced.

    Args:
        path: The file.

    Returns:
        The path, with ``~`` expanded.

    Raises:
        InputError: The path is a folder or a device, its name is too long, or its parent does not
            exist or is not writable.
    """
    path = Path(path).expanduser()
    target = _place_of(path)
    if target.exists() and not target.is_file():
        raise InputError(f"{path} is not a file; give the name of a file to write")
    if not target.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} for {path.name}; make it first")
    _check_writable(target.parent)
    return path


def _place_of(path: Path) -> Path:
    """Returns the absolute path that links lead to; raises `InputError` if there can be none."""
    try:
        place = path.resolve()
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; links in a circle; a null byte
        raise InputError(f"cannot write {path}: {_reason(error)}") from None
    return place


def _check_writable(folder: Path) -> None:
    """Raises `InputError` if nothing can be made in a folder, or in the parent to make it in."""
    while not folder.exists():
        folder = folder.parent
    try:
        # Asking for permissions is not enough: file systems can be read-only or without room.
        Path(tempfile.mkdtemp(prefix=".", dir=folder)).rmdir()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {_reason(error)}") from None


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # os.path.ismount does not see a folder that is mounted from the same device
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    places = (line.split()[4].encode().decode("unicode_escape") for line in lines)
    return str(path) in places


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a folder atomically: it appears under its name complete, or not at all.

    What a process that was killed left of the same folder is removed first.

    Args:
        path: Where to write the folder, or a link to an empty folder; see `check_new_folder`.

    Yields:
        A temporary folder beside the path; write the files into it.

    Raises:
        InputError: See `check_new_folder`.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.
    """
    path = check_new_folder(path)
    target = _place_of(path)
    temporary, claim = None, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_name(target), dir=target.parent))
        claim = _claim(temporary)
        with show_stage(f"Writing {path}"):
            yield temporary
        # Only the user can read temporary folders and the files that safetensors writes: give them
        # the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        for file in temporary.rglob("*"):
            file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)
            _sync(file)
        temporary.chmod(0o777 & ~mask)
        _sync(temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {_reason(error)}; nothing was left behind"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if claim is not None:
            os.close(claim)


def _remove_leftovers(path: Path) -> None:
    """Removes temporary folders of `new_folder` whose process was killed.

    Args:
        path: The folder that was to be written.
    """
    # Not by glob, for which some characters of the name would have a meaning.
    prefix = _temporary_name(path)
    if not path.parent.is_dir():
        return
    for left in [each for each in path.parent.iterdir() if each.name.startswith(prefix)]:
        claim = _claim(left)  # a process that still writes has it
        if claim is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(claim)


def _temporary_name(path: Path) -> str:
    """Returns how the names of temporary folders and files for a path begin."""
    # Shorter than the longest name of a file, and another for each path in a folder.
    return f".{path.name[:40]}.{zlib.crc32(os.fsencode(path.name)):08x}.new"


def _claim(folder: Path) -> int | None:
    """Locks a folder as long as the returned file descriptor is open; None if it is locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, fields: Mapping[str, object]) -> None:
    """Writes an object as a JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Returns the versions of this library and of those that it computes with."""
    found = {}
    for name in ("fusion-jax", "jax", "flax"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # a copy of the source that was never installed
            found[name.replace("-", "_")] = "not installed"
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: it holds the old text or the new text, never a part of it.

    Args:
        path: The file; an existing file is replaced, or the file that a link leads to.
        text: The new text.

    Raises:
        OSError: Writing failed; the message names the file, which is as it was.
    """
    target = path.resolve()
    new = target.with_name(_temporary_name(target))
    try:
        new.write_text(text, encoding="utf-8")
        _sync(new)
        os.replace(new, target)
    except BaseException as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"could not write {path}: {_reason(error)}") from error
        raise


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int | None = None
) -> None:
    """Writes ``model.safetensors``, or shards and an index if the tensors exceed `SHARD_BYTES`.

    Args:
        folder: Where to write.
        tensors: Names and arrays; only the arrays of one shard are in memory at a time.
        shard_bytes: The largest size of a shard; None for `SHARD_BYTES`.
    """
    most = SHARD_BYTES if shard_bytes is None else shard_bytes
    shard: dict[str, np.ndarray] = {}
    sizes, shards = [0], []

    def write() -> None:
        # transformers requires this "format"; the layout is the same for all frameworks.
        path = folder / f"{len(shards)}.safetensors"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))
        shard.clear()

    for name, x in tensors:
        if shard and sizes[-1] + x.nbytes > most:
            write()
            sizes.append(0)
        shard[name] = np.asarray(x, order="C")  # np.ascontiguousarray would add an axis to a scalar
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


def copy_companions(source: Path, target: Path, *, sentences: bool) -> None:
    """Copies the files that belong to a model besides its weights and configuration.

    Args:
        source: The folder of the model.
        target: The new folder.
        sentences: Whether to copy what makes a sentence encoder of the model, such as pooling.
    """
    names = [*TOKENIZER, *LICENSES, *(SENTENCES if sentences else ())]
    names += [f"{TEMPLATES}/{path.name}" for path in (source / TEMPLATES).glob("*.jinja")]
    if sentences and (source / MODULES).is_file():
        folders = [path.name for path in source.glob("[0-9]_*") if path.is_dir()]
        names += [f"{folder}/{file}" for folder in folders for file in (CONFIG, WEIGHTS)]
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
