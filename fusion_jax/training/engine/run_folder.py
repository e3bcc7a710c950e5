"""The folder of a run: checkpoints, ``metrics.jsonl``, and the artefacts ``best`` and ``last``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from fusion_jax.checkpoint.files import write_text
from fusion_jax.errors import InputError
from fusion_jax.training.engine.config import TrainConfig, with_current_names
from fusion_jax.training.engine.recipe import Save
from fusion_jax.training.engine.step import TrainState

T = TypeVar("T")
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
BEST = "best"
LAST = "last"


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
            try:
                from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
            except ImportError:
                raise InputError(
                    "tensorboard needs tensorboardX: pip install 'fusion-jax[tensorboard]'"
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Writes one line: the steps done, and values by name."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def _step_of(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off when the run was killed


class RunFolder:
    """The folder of a run: what it keeps, and where it resumes.

    Orbax writes checkpoints in the background; each is there as a whole or not at all.

    Args:
        folder: The folder; made if it does not exist. None keeps nothing.
        config: The settings of training.
        settings: Settings that must match on resume, as JSON values by name.

    Raises:
        InputError: The folder holds a run with other settings, or TensorBoard is missing.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, settings: Mapping[str, Any]):
        self.path, self._settings, self._manager = folder, dict(settings), None
        self.done = 0
        """The steps of the checkpoint to resume from."""
        self.history: list[dict[str, Any]] = []
        """The evaluations: the step, and metrics by name."""
        self.changes: list[Any] = []
        """The changes of the model's structure up to the checkpoint."""
        if folder is not None:
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
            if self.latest is not None:
                meta = self._restore("meta", self._args.JsonRestore())
                check_same(folder, meta["run"], json.loads(json.dumps(self._settings)))
                self.done, self.history = self.latest, meta["history"]
                self.changes = meta.get("changes", [])
        writes = jax.process_index() == 0
        self.metrics = Metrics(
            folder if writes else None, tensorboard=config.tensorboard, after=self.done
        )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        if self._manager is not None:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return None if self._manager is None else self._manager.latest_step()

    def _restore(self, item: str, how: Any) -> Any:
        assert self._manager is not None
        return self._manager.restore(self.latest, args=self._args.Composite(**{item: how}))[item]

    def restore(self, state: TrainState) -> TrainState:
        """Returns the state of the newest checkpoint, or the given state if there is none.

        Args:
            state: A state of the same structure, with the shapes, dtypes and shardings to restore.

        Returns:
            The state.
        """
        if not self.done:
            return state
        leaves, tree = jax.tree.flatten(state)
        abstract = _named(
            [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        )
        named = self._restore("state", self._args.StandardRestore(abstract))
        return jax.tree.unflatten(tree, [named[name] for name in abstract])

    def write_checkpoint(self, step: int, state: TrainState, changes: Sequence[Any]) -> None:
        """Starts to write a checkpoint; it is complete after `wait`.

        Args:
            step: The steps done.
            state: The state.
            changes: The changes of the model's structure.
        """
        if self._manager is None:
            return
        leaves = jax.tree.leaves(state)
        if jax.default_backend() == "cpu":
            # Orbax writes in the background from buffers that the next step would overwrite.
            leaves = [jnp.array(x) for x in leaves]
        # Copies, for the same reason.
        meta = {"run": self._settings, "history": list(self.history), "changes": list(changes)}
        args = self._args.Composite(
            state=self._args.StandardSave(_named(leaves)), meta=self._args.JsonSave(meta)
        )
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()


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


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises `InputError` if a folder was started with other settings than it is resumed with.

    Args:
        folder: The folder.
        old: The settings in the folder, as JSON values by name; those under ``config`` are compared
            one by one.
        new: The settings of this call.
    """
    before = {**with_current_names(old.get("config", {})), **old}
    now = {**new.get("config", {}), **new}
    different = [
        f"{name} {before.get(name)!r}, now {now[name]!r}"
        for name in now
        if name != "config" and before.get(name) != now[name]
    ]
    if different:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(different)[:500]}); give those, "
            "or another folder"
        )
