"""Records in a run folder, as ``run.json``, what a command trains; finds the model of a run."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import jax

from fusion_jax.checkpoint.files import check_new_folder, read_json, write_text
from fusion_jax.cli.options import ANSWERS, TOKENS, TaskKind
from fusion_jax.errors import InputError
from fusion_jax.training.engine.locks import LOCK
from fusion_jax.training.engine.preemption import Terminated
from fusion_jax.training.engine.run_folder import BEST, CHECKPOINTS, LAST, METRICS
from fusion_jax.training.engine.step import TrainState
from fusion_jax.training.tasks.metrics import METRICS as KNOWN_METRICS
from ntk.tables import table

P = ParamSpec("P")
RUN = "run.json"
RESUME = "To resume, give the same command again."


def resumable(command: Callable[P, None]) -> Callable[P, int]:
    """Returns the command of a run that says how to resume it where a signal stopped it.

    Args:
        command: The command, which saves by itself what it has trained.

    Returns:
        The command with an exit code: 0 after SIGTERM, 130 after Ctrl-C.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            command(*args, **kwargs)
        except Terminated:
            print(f"Stopped. {RESUME}")
        except KeyboardInterrupt as error:
            stopped = str(error) or "interrupted"
            print(f"{stopped[0].upper()}{stopped[1:]}. {RESUME}", file=sys.stderr)
            return 130
        return 0

    return run


class RunRecord(NamedTuple):
    """A run that a command trained.

    Args:
        task: The description of the task as JSON values, as the task's ``to_json`` gave it.
        model: The folder of the run's best model.
        max_length: The longest text in tokens, or None.
    """

    task: Mapping[str, Any]
    model: str
    max_length: int | None

    @property
    def kind(self) -> TaskKind:
        """The kind of the task."""
        return self.task.get("kind", "labels")


def read_run(name: str) -> RunRecord | None:
    """Returns the run in a folder, or None if the name is not that of a run folder.

    Raises:
        InputError: The run has no model yet.
    """
    folder = Path(name).expanduser()
    if not (folder / RUN).is_file():
        return None
    _, fields = read_json(folder / RUN)
    model = best_model(folder)
    if model is None:
        raise InputError(f"{folder} has no model yet; resume the run to its end")
    task, length = fields.get("task"), fields.get("max_length")
    if not isinstance(task, dict) or not isinstance(length, int | None) or not _is_task(task):
        raise InputError(f"{folder / RUN} does not describe a run of this program")
    return RunRecord(task, str(model), length)


def _is_task(task: Mapping[str, object]) -> bool:
    """Returns whether JSON values describe a task, as its ``to_json`` does."""
    kind, labels = task.get("kind", "labels"), task.get("labels")
    if kind == "text":
        return isinstance(task.get("context"), int)
    if kind == ANSWERS:
        fields = {"stride": int | None, "longest": int, "empty": bool}
        return all(isinstance(task.get(name), each) for name, each in fields.items())
    if kind == TOKENS:
        return isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    if kind != "labels":
        return kind == "pairs"
    named = [task.get("name"), *(labels or [])] if isinstance(labels, list | None) else [None]
    metrics = task.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return False
    known = set(map(str, metrics)) <= set(KNOWN_METRICS)
    return known and all(isinstance(name, str) for name in named)


def best_model(folder: Path) -> Path | None:
    """Returns the folder of the best or last model in a run folder, or None."""
    return next((folder / n for n in (BEST, LAST) if (folder / n).is_dir()), None)


def run_recorder(out: Path, fields: dict[str, object]) -> Callable[[int, TrainState], None]:
    """Returns a function for ``Recipe.on_step`` that writes ``run.json`` at the first step.

    Args:
        out: The run folder.
        fields: The settings of the run as JSON values by name; must match those in the folder.

    Raises:
        InputError: The folder has a run with other settings, or other files.
    """
    path = out / RUN
    if path.exists():
        _, old = read_json(path)
        now = json.loads(json.dumps(fields))
        task = old.get("task")
        if isinstance(task, dict) and _only_numbered(task.get("labels")):
            # Runs of 0.1.0 have numbers where GLUE's classes have names now.
            labels = now["task"].get("labels") or []
            same = len(labels) == len(task["labels"]) and {**task, "labels": labels} == now["task"]
            old = {**old, "task": now["task"]} if same else old
        different = [n for n in now if old.get(n) != now[n]]
        if different:
            raise InputError(
                f"{out} holds a run with another {' and '.join(different)}; choose another folder"
            )
    elif jax.process_count() == 1 and not _has_no_step(out):
        check_new_folder(out, in_place=True)

    def write(step: int, state: TrainState) -> None:
        if jax.process_index() == 0 and not path.exists():
            write_text(path, json.dumps(fields, indent=2) + "\n")

    return write


def _only_numbered(labels: object) -> bool:
    return isinstance(labels, list) and labels == [str(i) for i in range(len(labels))]


def _has_no_step(out: Path) -> bool:
    """Returns whether the folder has a run that was stopped before its first step was done."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return (
        bool(names)
        and names <= {CHECKPOINTS, METRICS, LOCK}
        and not any((out / CHECKPOINTS).glob("*"))
    )


def history_table(history: list[dict[str, int | float]]) -> str:
    """Returns the metrics of a run as a table with one row for each evaluation."""
    names = list(history[0])
    rows = [
        [f"{h[n]:.4f}" if isinstance(h[n], float) else str(h[n]) for n in names] for h in history
    ]
    return table([names, *rows])
