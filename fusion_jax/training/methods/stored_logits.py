"""Stores the most probable classes that a teacher gives, so that it need not be in memory later."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array

from fusion_jax.checkpoint.files import (
    check_new_folder,
    new_folder,
    read_json,
    versions,
    write_json,
)
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.progress import show_progress, show_stage
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.divergence import (
    LEAST,
    Compared,
    Output,
    Top,
    compared,
    output_of,
    top_classes,
    with_teacher,
)
from fusion_jax.training.engine.fingerprints import (
    fingerprint_of_all_bits,
    fingerprint_of_tokenizer,
)
from fusion_jax.training.engine.partition import in_compute_dtype
from fusion_jax.training.engine.sharding import Placement
from fusion_jax.training.tasks.unlabeled import Inputs, unlabeled

LOGITS = "logits.json"
"""The file that describes a folder of stored logits."""
TOP_K = 64
"""The number of classes that are stored, and compared one by one, by default."""
_CONFIG = TrainConfig(batch_size=8)
_FORMAT = 1
_PART_BYTES = 1 << 26


@on_auto_axes
def store_logits(
    teacher: Model,
    data: Inputs,
    folder: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    top_k: int = TOP_K,
    progress: bool | None = None,
) -> Path:
    """Writes the most probable classes that a model gives for each text of some data.

    `heal` takes the folder in place of the teacher, with the same data, in any order, in batches of
    any size. Only one batch is in memory at a time. The folder is there complete, or not at all.

    For each distribution (a token of a language model, a text for classes) the folder has the
    ``top_k`` most probable classes as int32, the logarithms of their probabilities as float16, and
    that of the probability of all others as float32: 6 bytes for each class, 4 for the others.

    Args:
        teacher: The model before compression; it needs logits of classes.
        data: As in `heal`.
        folder: The new folder.
        config: ``batch_size``, ``shapes``, ``max_length``, ``truncate`` and ``compute_dtype``
            apply; None for batches of 8.
        top_k: The number of classes; all, if there are fewer.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The folder.

    Raises:
        InputError: The model has no logits of classes, does not fit the data, or the folder exists.

    Example:
        >>> store_logits(teacher, fj.PlainText("book.txt"), "logits")  # doctest: +SKIP
        >>> fit = heal(student, "logits", fj.PlainText("book.txt"), key=key)  # doctest: +SKIP
    """
    config = _CONFIG if config is None else config
    check_at_least(1, top_k=top_k)
    check_new_folder(folder)
    if jax.process_count() > 1:
        raise InputError("logits are stored by one process; run it on its own")
    source = unlabeled(teacher, data, config, jax.random.key(0))
    Placement().check_batch(len(source(0)["weights"]))
    output = output_of(teacher, source(0))
    if output.kind in ("states", "number"):
        what = "no head" if output.kind == "states" else "a head for a number"
        raise InputError(
            f"the model has {what}, and no logits to store; give heal the model itself"
        )
    provenance = getattr(teacher, "provenance", None)
    labels = getattr(provenance, "labels", None)
    facts = {
        "format": _FORMAT,
        "kind": output.kind,
        "classes": output.classes,
        "labels": None if labels is None else list(labels),
        "top_k": top_k,
        "teacher": fingerprint_of_all_bits(teacher),
        "teacher's name": getattr(provenance, "name", None),
        "tokenizer": fingerprint_of_tokenizer(teacher),
        "versions": versions(),
    }
    with new_folder(folder) as new:
        parts = 0
        for part in _parts(in_compute_dtype(teacher, config), source, output, top_k, progress):
            safetensors.numpy.save_file(part, new / _part_name(parts))
            parts += 1
        write_json(new / LOGITS, {**facts, "parts": parts})
    return Path(folder).expanduser()


def _part_name(i: int) -> str:
    return f"part-{i:05}.safetensors"


@partial(jax.jit, static_argnames=("kind", "top_k"))
def _top_of(model: Model, batch: losses.Batch, kind: Compared, top_k: int) -> dict[str, Array]:
    logits = compared(kind, model, batch, losses.run(model, batch).logits)[0]
    top = top_classes(logits, top_k)
    return top._replace(log_probs=top.log_probs.astype(jnp.float16))._asdict()


def _parts(
    model: Model, source: BatchSource, output: Output, top_k: int, progress: bool | None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the contents of files, each of about `_PART_BYTES`."""
    placement, known = Placement(), set()
    rows: list[tuple[bytes, Top]] = []
    size, count = 0, len(source)
    width = top_k if output.classes is None else min(top_k, output.classes)
    with (
        placement.active(),
        show_progress("Storing", count, progress, first="compiling") as advance,
    ):
        for step in range(count):
            batch = source(step)
            found = _top_of(model, placement.batch(batch), output.kind, top_k)
            top = Top(**{n: np.asarray(x) for n, x in placement.gathered(found).items()})
            for row, name in enumerate(row_names(batch, output.kind)):
                if name is None or name in known:
                    continue
                known.add(name)
                each = _row_of(top, row, distributions(batch, row, output.kind), width)
                rows.append((name, each))
                size += sum(x.nbytes for x in each)
            if size >= _PART_BYTES:
                yield _joined(rows)
                rows, size = [], 0
            advance("batches")
    if not known:
        raise InputError("there is no text in the data")
    if rows:
        yield _joined(rows)


def _row_of(top: Top, row: int, n: int, width: int) -> Top:
    """Returns the distributions of one row of a batch; where there are fewer classes, padded."""
    pad = ((0, 0), (0, width - top.indices.shape[-1]))
    indices = np.pad(top.indices[row, :n], pad)
    return Top(
        indices, np.pad(top.log_probs[row, :n], pad, constant_values=LEAST), top.others[row, :n]
    )


def _joined(rows: list[tuple[bytes, Top]]) -> dict[str, np.ndarray]:
    names = np.frombuffer(b"".join(name for name, _ in rows), np.uint8).reshape(-1, 16)
    counts = np.array([len(top.others) for _, top in rows], np.int64)
    arrays = {
        field: np.concatenate([getattr(top, field) for _, top in rows]) for field in Top._fields
    }
    return {"texts": names.copy(), "counts": counts, **arrays}


def row_names(batch: Mapping[str, np.ndarray], kind: Compared) -> list[bytes | None]:
    """Returns 16 bytes made from what a model reads of each row; None for padded rows.

    They do not depend on the other rows, nor on the length that a batch is padded to.
    """
    skipped = {"weights"} if kind == "targets" else {"weights", "labels"}
    arrays = {
        name: np.asarray(x).astype(np.int32) if np.asarray(x).dtype.kind in "biu" else np.asarray(x)
        for name, x in sorted(batch.items())
        if name not in skipped
    }
    padded = arrays["attention_mask"].shape[1]
    found: list[bytes | None] = []
    for row, weight in enumerate(batch["weights"]):
        if not weight:
            found.append(None)
            continue
        digest = hashlib.blake2b(digest_size=16)
        length = _last(arrays["attention_mask"][row])
        for name, x in arrays.items():
            if name == "labels":
                value = x[row, : _last(x[row] != -100)]
            elif x.ndim > 1 and x.shape[1] == padded and not name.startswith("decoder_"):
                value = x[row, :length]
            else:
                value = x[row]
            digest.update(f"{name} {value.shape} {value.dtype} ".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        found.append(digest.digest())
    return found


def _last(counts: np.ndarray) -> int:
    """Returns the position after the last that counts."""
    places = np.flatnonzero(counts)
    return int(places[-1]) + 1 if len(places) else 0


def distributions(batch: Mapping[str, np.ndarray], row: int, kind: Compared) -> int:
    """Returns the number of distributions of a row, without padding."""
    if kind in ("class", "answer"):
        return 1 if kind == "class" else 2
    if kind == "tokens":
        return _last(np.asarray(batch["attention_mask"][row]))
    if "labels" in batch:
        return _last(np.asarray(batch["labels"][row]) != -100)
    return np.shape(batch["decoder_input_ids"])[1]


class StoredLogits:
    """A folder that `store_logits` wrote.

    Args:
        folder: The folder.

    Raises:
        InputError: The folder does not hold stored logits, or a file in it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser()
        if not (self.folder / LOGITS).is_file():
            raise InputError(
                f"{self.folder} does not hold stored logits; write them with store_logits, or give "
                "the teacher"
            )
        _, fields = read_json(self.folder / LOGITS)
        self.facts: dict[str, Any] = fields
        """What the folder says of the teacher, its data and its settings."""
        if fields.get("format") != _FORMAT:
            raise InputError(f"{self.folder / LOGITS} has a format that this version does not read")
        self._files: list[safetensors.safe_open] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        try:
            for name in ("kind", "classes", "labels", "top_k", "teacher", "tokenizer"):
                fields[name]
            for i in range(fields["parts"]):
                self._open(i)
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError, OSError) as error:
            raise InputError(
                f"the stored logits in {self.folder} are damaged ({error}); store them again"
            ) from None

    def _open(self, i: int) -> None:
        file = safetensors.safe_open(self.folder / _part_name(i), framework="np")
        counts = file.get_tensor("counts")
        ends = np.cumsum(counts)
        texts = file.get_tensor("texts")
        if len(texts) != len(counts):
            raise ValueError(f"{_part_name(i)} contradicts itself")
        self._files.append(file)
        for name, end, count in zip(texts, ends.tolist(), counts.tolist(), strict=True):
            self._places[name.tobytes()] = (i, end - count, end)

    def check(self, student: Model, source: BatchSource, steps: int) -> None:
        """Raises `InputError` if a student does not fit, or if texts of its data were not stored.

        Args:
            student: The student.
            source: Its data.
            steps: The number of batches that it trains on.
        """
        batch, facts = source(0), self.facts
        output = output_of(student, batch)
        classes, kind = facts["classes"], facts["kind"]
        if (output.kind, output.classes) != (kind, classes):
            raise InputError(
                f"{self.folder} has logits of {_described(kind, classes)}, and the student's are "
                f"of {_described(output.kind, output.classes)}; store those of its teacher"
            )
        missing = total = 0
        with show_stage(f"Comparing the data with {self.folder}"):
            for step in range(min(steps, len(source))):
                names = [name for name in row_names(source(step), output.kind) if name is not None]
                total += len(names)
                missing += sum(name not in self._places for name in names)
        if missing:
            ours = fingerprint_of_tokenizer(student)
            theirs = facts.get("tokenizer")
            why = "of other data, or of windows of another length"
            if None not in (ours, theirs) and ours != theirs:
                why = "with another tokenizer than the student's"
            raise InputError(
                f"{self.folder} lacks {missing:,} of {total:,} texts of the data: its logits were "
                f"stored {why}; store them for this data"
            )

    def top(self, batch: Mapping[str, np.ndarray]) -> Top:
        """Returns the teacher's most probable classes for a batch.

        Raises:
            InputError: A text was not stored.
        """
        kind = self.facts["kind"]
        names = row_names(batch, kind)
        places = [None if name is None else self._places.get(name) for name in names]
        if any(p is None and n is not None for p, n in zip(places, names, strict=True)):
            raise InputError(f"{self.folder} lacks a text of the data; store logits for this data")
        width = self._files[0].get_slice("indices").get_shape()[1]
        shape = (len(names), self._padded(batch, kind))
        top = Top(
            np.zeros((*shape, width), np.int32),
            np.full((*shape, width), LEAST, np.float16),
            np.full(shape, LEAST, np.float32),
        )
        for row, place in enumerate(places):
            if place is not None:
                i, start, end = place
                for field in Top._fields:
                    values = self._files[i].get_slice(field)[start:end]
                    getattr(top, field)[row, : end - start] = values
        return top

    @staticmethod
    def _padded(batch: Mapping[str, np.ndarray], kind: Compared) -> int:
        if kind in ("class", "answer"):
            return 1 if kind == "class" else 2
        if kind == "tokens":
            return np.shape(batch["attention_mask"])[1]
        return np.shape(batch["labels" if "labels" in batch else "decoder_input_ids"])[1]


def _described(kind: Compared, classes: int | None) -> str:
    """Returns what logits are of, for messages."""
    if kind == "answer":
        return "answers' places"
    if kind == "states":
        return "nothing (it has no head)"
    return f"{classes:,} {'classes of texts' if kind == 'class' else 'tokens or classes'}"


class WithLogits:
    """Batches with the stored logits of a teacher.

    Args:
        source: The batches.
        stored: The logits.
    """

    def __init__(self, source: BatchSource, stored: StoredLogits):
        self._source, self._stored = source, stored

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step."""
        batch = self._source(step)
        return with_teacher(batch, self._stored.top(batch))  # type: ignore[return-value]

    def names(self, step: int) -> list[str]:
        """Returns where the examples of a batch come from."""
        return self._source.names(step)
