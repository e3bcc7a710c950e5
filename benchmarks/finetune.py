"""What a compressed model does after fine-tuning: methods x tasks x seeds.

all-MiniLM-L6-v2 with its last 4 of 6 MLPs at a quarter and an eighth of their width, with and
without layer-wise tuning, on tasks of GLUE; the official dev sets, measured after the last step,
and never used to choose anything. Ours is calibrated on the first texts of the training set.

    python -m benchmarks.finetune --data GLUE [--runs DIR] [--tasks sst2 cola] [--seeds 3]
        [--epochs 10] [--steps N] [--budget SECONDS] [--quick] [--json FILE]

Runs are added to FILE as soon as they end; those that it holds already, made by the same settings,
are not repeated, so that the same command given again does the rest. One that was interrupted goes
on from its last checkpoint under DIR. --budget stops in good order after so many seconds.

The learning rate is 8e-5, the largest of the paper's grid: MiniLM is small.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

import fusion_jax as fj
from benchmarks.common import finish, parser, peak_gib
from fusion_jax.demo import find_model
from fusion_jax.finetune import GLUE, TaskData

LAYERS = slice(-4, None)
OUT_OF_TIME = 3
"""Exit status of a run's process when the budget is spent."""
CALIBRATION = 1024
"""Training texts that ours is calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a method at a width with or without tuning, on a task, with a seed."""

    task: str
    method: str
    width: float
    tuned: bool
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        tuned = "-tuned" if self.tuned else ""
        return f"{self.task}-{self.method}-{self.width:g}{tuned}-{self.seed}"


def method(name: str, width: float) -> Any:
    """The method of a cell; None leaves the model dense."""
    made = {
        "dense": lambda: None,
        "paper": lambda: fj.Fusion.paper(width=width),
        "fusion": lambda: fj.Fusion(width=width),
        "clustering": lambda: fj.METHODS["clustering"](width=width),  # type: ignore[call-arg]
    }
    return made[name]()


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """All runs, seeds outermost, so that a table with few seeds is complete first."""
    found = []
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            found.append(Cell(task=task, method="dense", width=1.0, tuned=False, seed=seed))
            found += [
                Cell(task=task, method=name, width=width, tuned=tuned, seed=seed)
                for width in arguments.widths
                for name in arguments.methods
                for tuned in (False, True)
            ]
    return found


class OutOfTimeError(Exception):
    """The budget is spent."""


def measure(cell: Cell, data: TaskData, config: fj.TrainConfig, folder: Path, end: float) -> dict:
    """Runs a cell, or goes on with it."""

    def watch(step: int, state: Any) -> None:
        if time.perf_counter() > end:
            raise OutOfTimeError

    key = jax.random.key(cell.seed)
    labels = data.task.num_labels
    model = fj.load(find_model(), head="classification", num_labels=labels, key=key)
    start = time.perf_counter()
    how = method(cell.method, cell.width)
    if how is not None:
        teacher = model
        seen = (
            [text for text, *_ in data.train.texts[:CALIBRATION]]
            if cell.method == "fusion"
            else None
        )
        model, _ = fj.compress(
            teacher, how, layers=LAYERS, key=key, calibration=seen, progress=False
        )
        if cell.tuned:
            once = replace(config, epochs=1, max_steps=config.max_steps)
            fit = fj.tune(
                model, teacher, data.train, once, key=key, folder=folder / "tune", progress=False
            )
            if not fit.finished:
                raise KeyboardInterrupt
            model = fit.model
    fit = fj.finetune(
        model, data, config, key=key, folder=folder / "run", on_step=watch, progress=False
    )
    if not fit.finished:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - start
    last = {name: value for name, value in fit.history[-1].items() if name != "step"}
    return {
        **asdict(cell),
        **last,
        "steps": fit.step,
        "seconds": seconds,
        "peak_gib": peak_gib(),
    }


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one row per method and task."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["task"], r["method"], r["width"], r["tuned"]), []).append(r)
    rows = []
    for (task, name, width, tuned), runs in sorted(groups.items()):
        metric = GLUE[task].metrics[0]
        values = [100 * run[next(n for n in run if n.endswith(metric))] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        rows.append(
            {
                "task": task,
                "method": name,
                "width": width,
                "tuned": tuned,
                metric: f"{statistics.mean(values):.2f}",
                "spread": f"{spread:.2f}",
                "seeds": len(values),
                "steps": runs[0]["steps"],
                "seconds": statistics.mean(run["seconds"] for run in runs),
                "peak_gib": max(run["peak_gib"] for run in runs),
            }
        )
    return rows


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with GLUE's folders of tsv files")
    arguments.add_argument("--runs", type=Path, help="folder of the runs")
    arguments.add_argument("--tasks", nargs="+", choices=sorted(GLUE), default=["sst2", "cola"])
    arguments.add_argument(
        "--methods",
        nargs="+",
        choices=["paper", "fusion", "clustering"],
        default=["paper", "fusion"],
    )
    arguments.add_argument("--widths", nargs="+", type=float, default=[0.25, 0.125])
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--steps", type=int, help="at most so many steps per run")
    arguments.add_argument("--learning-rate", type=float, default=8e-5)
    arguments.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    arguments.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.data is None:
        print("give --data, a folder with GLUE's folders; nothing was measured")
        return 0 if arguments.quick else 2
    scratch = None
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.widths = 1, 5, [0.25]
        arguments.tasks = arguments.tasks[-1:]
    if arguments.runs is None:
        scratch = arguments.runs = Path(tempfile.mkdtemp())
    config = fj.TrainConfig(
        epochs=arguments.epochs,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        max_length=128,
        truncate=True,
    )
    end = time.perf_counter() + arguments.budget
    if arguments.cell is not None:
        cell = Cell(**json.loads(arguments.cell))
        data = fj.load_task(cell.task, arguments.data)
        try:
            print(json.dumps(measure(cell, data, config, arguments.runs / cell.name, end)))
        except OutOfTimeError:
            return OUT_OF_TIME
        return 0
    settings = {name: value for name, value in config.to_json().items() if value is not None}
    results: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.is_file():
        kept = json.loads(arguments.json.read_text())["rows"]
        results = [row for row in kept if row["config"] == settings]
    wanted = cells(arguments)
    done = {row["name"] for row in results}
    left = [cell for cell in wanted if cell.name not in done]

    def report() -> None:
        summary = {"runs": len(results), "runs_left": len(left)}
        finish(arguments, results, summary, "optax", shown=table(results))

    while left and time.perf_counter() < end:
        # In a process of its own, whose peak memory is the run's.
        command = [sys.executable, "-m", "benchmarks.finetune", *sys.argv[1:]]
        command += ["--runs", str(arguments.runs), "--cell", json.dumps(asdict(left[0]))]
        command += ["--budget", str(end - time.perf_counter())]
        child = subprocess.run(command, stdout=subprocess.PIPE)
        if child.returncode == OUT_OF_TIME:
            break
        child.check_returncode()
        result = json.loads(child.stdout.splitlines()[-1])
        cell = left.pop(0)
        results.append({"name": cell.name, **result, "config": settings})
        shutil.rmtree(arguments.runs / cell.name, ignore_errors=True)
        print(f"{cell.name}: {result['seconds']:.0f} s", file=sys.stderr, flush=True)
        report()
    if not done and not results:
        report()
    if scratch is not None:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
