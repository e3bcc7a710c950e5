"""The folder of a run: checkpoints, ``metrics.jsonl``, and the artefacts ``best`` and ``last``."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from fusion_jax.checkpoint.files import read_json, write_text
from fusion_jax.errors import InputError
from fusion_jax.training.engine.config import EXTENDING, TrainConfig, with_current_names
from fusion_jax.training.engine.fingerprints import bit_sums
from fusion_jax.training.engine.locks import FolderLock
from fusion_jax.training.engine.recipe import Save
from fusion_jax.training.engine.step import TrainState

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
BEST = "best"
LAST = "last"
SAME_DATA = "same-data.json"
"""The file in which each run of a method of several runs finds the data of the runs before it."""
DATA_SETTINGS = ("training data", "dev data", "classes", "tokenizer")
"""Settings that say which data a run is trained on."""
_NEW_SETTINGS = (*DATA_SETTINGS, "starting model", "weights of the teacher")
"""Settings that runs of version 0.1.0 did not record."""


class Metrics:
    """Writes lines of numbers to ``metrics.jsonl`` and, on request, to TensorBoard.

    Args:
        folder: Where to write; None writes nothing.
        tensorboard: Whether to write TensorBoard events too.
        after: The steps done; lines of later steps are removed, since the run writes them again.

    Raises:
        InputError: TensorBoard was asked for and is not installed.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, after: int = 0):
        self._file = None
        self._board = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if path.exists():
            kept = [line for line in path.read_text().splitlines(True) if _step_of(line) <= after]
            write_text(path, "".join(kept))
        if tensorboard:
            writer = check_tensorboard()
            self._board = writer(str(folder / "tensorboard"), purge_step=after + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: object) -> None:
        """Writes one line: the steps done, and values by name."""
        if self._file is not None:
            try:
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
            except OSError as error:
                raise OSError(f"could not write {self._file.name}: {error.strerror}") from None
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                with suppress(OSError):  # `write` has raised it
                    file.close()


def check_tensorboard() -> type:
    """Returns TensorBoard's writer; raises `InputError` if it is not installed."""
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "tensorboard needs tensorboardX: pip install 'fusion-jax[tensorboard]'"
        ) from None
    return SummaryWriter


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off when the run was killed


class RunFolder:
    """The folder of a run: what it keeps, and where it resumes.

    Orbax writes checkpoints in the background; each is there as a whole or not at all. Checksums of
    what was written are in the checkpoint: one that is damaged is not used.

    Args:
        folder: The folder; made if it does not exist. None keeps nothing.
        config: The settings of training.
        settings: Settings that must match on resume, as JSON values by name.

    Raises:
        InputError: The folder holds a run with other settings or is in use, TensorBoard is missing,
            or every checkpoint is damaged.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, settings: Mapping[str, object]):
        self.path, self._settings, self._manager = folder, dict(settings), None
        self.done = 0
        """The steps of the checkpoint to resume from."""
        self.history: list[dict[str, int | float]] = []
        """The evaluations: the step, and metrics by name."""
        self.changes: list[object] = []
        """The changes of the model's structure up to the checkpoint."""
        self.metrics = Metrics(None)
        self._config, self._sums, self._damaged = config, None, {}
        self._close = ExitStack()
        if config.tensorboard and folder is not None:
            check_tensorboard()
        if folder is None:
            return
        with ExitStack() as undo:
            folder.mkdir(parents=True, exist_ok=True)
            undo.callback(FolderLock(folder).release)
            undo.enter_context(_quiet_orbax())
            for name in (BEST, LAST):
                tidy_artefact(folder / name)
            if (folder / SAME_DATA).is_file():
                _, before = read_json(folder / SAME_DATA)
                check_same(folder, before, {k: v for k, v in settings.items() if k in before})
            # Orbax takes a second to import.
            import orbax.checkpoint as ocp

            self._args = ocp.args
            self._manager = ocp.CheckpointManager(
                (folder / CHECKPOINTS).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=config.keep_checkpoints, cleanup_tmp_directories=True
                ),
                item_names=("state", "meta"),
            )
            undo.callback(self._close_manager)
            self._read_meta()
            self._close = undo.pop_all()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.metrics.close()
        finally:
            self._close.close()

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        assert manager is not None
        with suppress(Exception):  # what it wrote, it wrote; the first error says what happened
            manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return None if self._manager is None else self._manager.latest_step()

    def _read_meta(self) -> None:
        """Reads the newest record that is not damaged, and compares the settings.

        Raises:
            InputError: There are checkpoints, but all are damaged; or the settings differ.
        """
        assert self._manager is not None and self.path is not None
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step in self._damaged:
                continue
            try:
                meta = self._restore(step, "meta", self._args.JsonRestore())
                if meta.pop("checksum", None) not in (None, _checksum(meta)):
                    raise ValueError("its record does not have the checksum that was written")
                run, self.history = meta["run"], meta["history"]
            except Exception as error:  # each kind of damage raises an error of its own
                self._damaged[step] = _first_line(error)
                continue
            check_same(
                self.path,
                run,
                json.loads(json.dumps(self._settings)),
                may_differ=self._config.resume_with,
            )
            self.done, self.changes = step, meta.get("changes", [])
            self._sums = meta.get("bit sums")
            return
        if self._damaged:
            which = "; ".join(f"{step}: {why}" for step, why in self._damaged.items())
            raise InputError(
                f"every checkpoint in {self.path / CHECKPOINTS} is damaged ({which[:300]}); give "
                "another folder, or remove this one to train from the start"
            )

    def _restore(self, step: int, item: str, how: object) -> PyTree:
        assert self._manager is not None
        return self._manager.restore(step, args=self._args.Composite(**{item: how}))[item]

    def restore(self, start: Callable[[Sequence[object]], TrainState]) -> TrainState:
        """Returns the state of the newest checkpoint that is not damaged; opens ``metrics``.

        Args:
            start: Makes a state to start from: changes of the model's structure -> state, with the
                shapes, dtypes and shardings to restore.

        Returns:
            The state; that of ``start`` if there is no checkpoint.

        Raises:
            InputError: There are checkpoints, but all are damaged.
        """
        state = start(self.changes)
        while self.done:
            try:
                state = self._restored(state)
                break
            except Exception as error:  # each kind of damage raises an error of its own
                self._damaged[self.done] = _first_line(error)
            gc.collect()  # what Orbax was reading goes now, see `_quiet_orbax`
            self._read_meta()
            state = start(self.changes)
        for step, why in self._damaged.items():
            assert self._manager is not None
            if not jax.process_index():
                print(
                    f"The checkpoint of step {step} is damaged ({why[:200]}); it was removed, and "
                    f"the run resumes from step {self.done}.",
                    file=sys.stderr,
                )
            self._manager.delete(step)
        writes = jax.process_index() == 0
        self.metrics = Metrics(
            self.path if writes else None, tensorboard=self._config.tensorboard, after=self.done
        )
        return state

    def _restored(self, state: TrainState) -> TrainState:
        leaves, tree = jax.tree.flatten(state)
        abstract = _named(
            [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        )
        named = self._restore(self.done, "state", self._args.StandardRestore(abstract))
        leaves = [named[name] for name in abstract]
        if self._sums is not None and bit_sums(leaves) != self._sums:
            raise ValueError("its numbers do not have the checksums that were written")
        return jax.tree.unflatten(tree, leaves)

    def write_checkpoint(self, step: int, state: TrainState, changes: Sequence[object]) -> None:
        """Starts to write a checkpoint; it is complete after `wait`.

        Args:
            step: The steps done.
            state: The state.
            changes: The changes of the model's structure.

        Raises:
            OSError: The checkpoint before, or this one, cannot be written.
        """
        if self._manager is None:
            return
        leaves = jax.tree.leaves(state)
        sums = bit_sums(leaves)
        if jax.default_backend() == "cpu":
            # Orbax writes in the background from buffers that the next step would overwrite.
            leaves = [jnp.array(x) for x in leaves]
        # Copies, for the same reason.
        meta = {"run": self._settings, "history": list(self.history), "changes": list(changes)}
        meta = json.loads(json.dumps({**meta, "bit sums": sums}))
        meta["checksum"] = _checksum(meta)
        args = self._args.Composite(
            state=self._args.StandardSave(_named(leaves)), meta=self._args.JsonSave(meta)
        )
        self.wait()
        self._check_space(step, sum(x.nbytes for x in leaves))
        save = self._manager.save
        self._write(step, lambda: save(step, args=args))

    def _check_space(self, step: int, size: int) -> None:
        """Raises `OSError` if the disk is too full, before Orbax writes a part."""
        assert self.path is not None
        if self.latest is not None:  # as it was compressed there
            files = (self.path / CHECKPOINTS / str(self.latest)).rglob("*")
            size = min(size, sum(file.stat().st_size for file in files if file.is_file()))
        free = shutil.disk_usage(self.path).free
        if free < size and jax.process_count() == 1:
            raise OSError(
                f"the disk is full: the checkpoint of step {step} needs {size / 1e6:,.1f} MB, and "
                f"{self.path} has {free / 1e6:,.1f} MB; {self._way_out()}"
            )

    def _write(self, step: int | None, call: Callable[[], object]) -> None:
        """Calls Orbax; turns its errors, of many kinds and lines, into an `OSError` of one line."""
        reason = None
        try:
            call()
        except Exception as error:
            reason = _first_line(error)
        if reason is not None:
            # Not in the handler, so that Orbax's error and all that hangs on it can go now.
            gc.collect()
            which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            raise OSError(
                f"could not write {which} in {self.path}: {reason[:300]}; {self._way_out()}"
            )

    @property
    def last_checkpoint(self) -> str:
        """A clause on the newest checkpoint, for messages."""
        if self.latest is None:
            return "there is no checkpoint yet"
        return f"step {self.latest} is the last checkpoint"

    def _way_out(self) -> str:
        return f"{self.last_checkpoint}; make room, and give the same command again to resume"

    def wait(self) -> None:
        """Waits until all checkpoints are on disk.

        Raises:
            OSError: A checkpoint cannot be written.
        """
        if self._manager is not None:
            self._write(None, self._manager.wait_until_finished)


def _first_line(error: Exception) -> str:
    """Returns what the operating system says of an error, or else the first line of its text."""
    text = str(error).strip()
    code = re.search(r"os_error_code='(\d+)'", text)
    if code is not None:
        return os.strerror(int(code[1]))
    return text.splitlines()[0] if text else type(error).__name__


def _checksum(meta: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax and its threads from printing tracebacks of errors that it also raises."""

    def keep(record: logging.LogRecord) -> bool:
        trace = record.exc_info[2] if record.exc_info else None
        return record.levelno < logging.ERROR or not (
            "orbax" in record.pathname or _is_of_orbax(trace)
        )

    def hook(error: sys.UnraisableHookArgs) -> None:
        # Parts of a checkpoint that were being read or written when another failed end up here.
        code = getattr(error.object, "cr_code", None)
        if not (
            str(error.exc_value) == "Event loop is closed"
            or (code is not None and "orbax" in code.co_filename)
            or _is_of_orbax(error.exc_traceback)
        ):
            before(error)

    loggers, before = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    for logger in loggers:
        logger.addFilter(keep)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _is_of_orbax(trace: TracebackType | None) -> bool:
    return any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))


def _named(leaves: list[T]) -> dict[str, T]:
    return {str(i): leaf for i, leaf in enumerate(leaves)}


def replace_artefact(model: nnx.Module, folder: Path, save: Save) -> None:
    """Writes an artefact in place of an earlier one; only the first process writes."""
    if jax.process_index():
        return
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    save(model, new)
    shutil.rmtree(old, ignore_errors=True)
    # Removing takes a while, renaming does not: there is hardly a moment without an artefact.
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy_artefact(folder: Path) -> None:
    """Removes what a process that was killed in `replace_artefact` left; its folder is locked.

    If it was killed between the two renamings, the earlier artefact is there again.
    """
    if jax.process_index():
        return
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)
    hidden = [path for path in folder.parent.iterdir() if path.name.startswith(f".{new.name}.")]
    for left in (new, old, *hidden):
        shutil.rmtree(left, ignore_errors=True)


def last_is_best(history: Sequence[Mapping[str, Any]], *, lowest: bool, best_from: int) -> bool:
    """Returns whether the last evaluation is the best by its first metric.

    Args:
        history: The evaluations: the step, and metrics by name.
        lowest: Whether the lowest value is the best.
        best_from: Evaluations after fewer steps than this do not count.

    Returns:
        The answer; True for the first evaluation that counts, even if its value is NaN.
    """
    sign = -1 if lowest else 1
    *before, now = history
    if now["step"] < best_from:
        return False
    metric = next(name for name in now if name != "step")
    values = [earlier[metric] for earlier in before if earlier["step"] >= best_from]
    if not values:
        return True
    numbers = [x for x in values if not math.isnan(x)]
    return not math.isnan(now[metric]) and all(sign * now[metric] > sign * x for x in numbers)


def check_same(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, may_differ: Sequence[str] = ()
) -> None:
    """Raises `InputError` if a folder was started with other settings than it is resumed with.

    Args:
        folder: The folder.
        old: The settings in the folder, as JSON values by name; those under ``config`` are compared
            one by one.
        new: The settings of this call.
        may_differ: Names of settings that may differ, see ``TrainConfig.resume_with``.
    """
    before = {**with_current_names(old.get("config", {})), **old}
    now = {**new.get("config", {}), **new}
    different = [
        name
        for name in now
        if name != "config"
        and before.get(name) != now[name]
        and (name in before or name not in _NEW_SETTINGS)
    ]
    allowed = {*may_differ, "steps"} if may_differ else set()
    refused = [name for name in different if name not in allowed]
    if not refused:
        return
    shown = "; ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in refused)
    extends = set(different) <= {*EXTENDING, "steps"}
    names = " ".join(name for name in different if name != "steps")
    hint = f"; to resume with these on purpose: --resume-with {names}" if extends else ""
    raise InputError(
        f"{folder} holds a run with other settings ({shown[:500]}); give those, or another "
        f"folder{hint}"
    )
