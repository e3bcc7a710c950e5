"""Benchmarks of many runs: each runs in its own process, and is added to a file when it ends.

On an accelerator, the seeds of a method train in one program, in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import finish
from fusion_jax.training.engine.config import with_current_names

OUT_OF_TIME = 3
"""Exit status of the process of a run when the budget is spent."""


class OutOfTimeError(Exception):
    """The budget is spent."""


def add_options(arguments: argparse.ArgumentParser) -> None:
    """Adds the options of benchmarks of many runs."""
    arguments.add_argument("--data", type=Path, help="folder with GLUE's folders of tsv files")
    arguments.add_argument("--runs", type=Path, help="folder of the runs")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--steps", type=int, help="at most so many steps per run")
    arguments.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    arguments.add_argument("--workers", type=int, default=1, help="runs side by side")
    arguments.add_argument(
        "--together",
        action=argparse.BooleanOptionalAction,
        help="train the seeds of a method in one program; on by default on an accelerator",
    )
    arguments.add_argument("--cell", help=argparse.SUPPRESS)


@contextlib.contextmanager
def run_folder(options: Any) -> Iterator[None]:
    """Makes a folder that is removed at the end if ``--runs`` is not given."""
    with contextlib.ExitStack() as stack:
        if options.runs is None:
            options.runs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield


def run_here(
    cells: Sequence[Any], measure: Callable[[Path, float], list[dict[str, Any]]], options: Any
) -> int:
    """Runs cells in this process and prints their rows.

    Args:
        cells: One run, or runs that train in one program: dataclasses with names.
        measure: Returns their rows: (run folder of the first, time at which the budget ends) ->
            rows.
        options: The options of the command.

    Returns:
        Exit status.
    """
    end = time.perf_counter() + options.budget
    try:
        print(json.dumps(measure(options.runs / cells[0].name, end)))
    except OutOfTimeError:
        return OUT_OF_TIME
    return 0


def run_all(
    cells: Sequence[Any],
    settings: dict[str, Any],
    shown: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    options: Any,
    *,
    group: Callable[[Any], Hashable] = lambda cell: None,
) -> list[dict[str, Any]]:
    """Runs all cells that are not in the JSON file yet.

    Args:
        cells: All runs.
        settings: The settings of all runs; a file with other settings is refused.
        shown: Makes the table to show from the rows.
        options: The options of the command.
        group: Returns the same for cells that can train in one program, and None for cells that
            cannot; used if the runs are to train together.

    Returns:
        All rows.

    Raises:
        SystemExit: An option is wrong, or the file has runs with other settings.
    """
    if options.workers < 1:
        raise SystemExit(f"--workers must be at least 1; got {options.workers}")
    if options.data is not None and not options.data.is_dir():
        raise SystemExit(f"--data: there is no folder {options.data}")
    end = time.perf_counter() + options.budget
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.is_file():
        rows = json.loads(options.json.read_text())["rows"]
        for row in rows:
            row["config"] = with_current_names(row["config"])
            if row["config"] != settings:
                every = row["config"].keys() | settings.keys()
                other = {k: row["config"].get(k) for k in sorted(every)}
                other = {k: v for k, v in other.items() if settings.get(k) != v}
                raise SystemExit(
                    f"{options.json} has runs with other settings ({other}); give those, or "
                    "another file"
                )
    done = {row["name"] for row in rows}
    left = [cell for cell in cells if cell.name not in done]
    asked = len(left)
    # This process uses an accelerator only to name it: its memory is for the runs.
    theirs = dict(os.environ)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.together is None:
        options.together = jax.default_backend() != "cpu"
    groups: dict[Hashable, list[Any]] = {}
    for cell in left:
        which = group(cell) if options.together else None
        groups.setdefault(("alone", cell.name) if which is None else which, []).append(cell)

    def report() -> None:
        summary = {"runs": len(rows), "runs_left": len(left)}
        finish(options, rows, summary, "optax", shown=shown(rows))

    def started(cells: Sequence[Any]) -> subprocess.CompletedProcess[bytes] | None:
        # In its own process, so that peak memory is that of the run.
        seconds = end - time.perf_counter()
        if seconds <= 0:
            return None
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        command += ["--runs", str(options.runs), "--budget", str(seconds)]
        command += ["--cell", json.dumps([asdict(cell) for cell in cells])]
        command += ["--together" if options.together else "--no-together"]
        return subprocess.run(command, stdout=subprocess.PIPE, env=theirs)

    with ThreadPoolExecutor(options.workers) as workers:
        running = {workers.submit(started, cells): cells for cells in groups.values()}
        try:
            for future in as_completed(running):
                cells, child = running[future], future.result()
                if child is None or child.returncode == OUT_OF_TIME:
                    continue
                child.check_returncode()
                results = json.loads(child.stdout.splitlines()[-1])
                for cell, found in zip(cells, results, strict=True):
                    left.remove(cell)
                    rows.append({"name": cell.name, **found, "config": settings})
                    shutil.rmtree(options.runs / cell.name, ignore_errors=True)
                    print(f"{cell.name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)
                report()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    if len(left) == asked:  # nothing has been shown yet
        report()
    return rows
