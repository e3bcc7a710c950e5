"""Measures compressed models after fine-tuning: methods x tasks x seeds.

all-MiniLM-L6-v2 with its last 4 of 6 MLPs, or all, at a quarter and an eighth of their width, with
and without layer-wise tuning, on tasks of GLUE. The official dev sets are measured after the last
step and never used to choose anything. Methods that use text are calibrated on the first training
texts.

    python -m benchmarks.finetune --data GLUE [--runs DIR] [--tasks sst2 cola] [--seeds 3]
        [--epochs 10] [--steps N] [--all-layers] [--untuned] [--budget SECONDS] [--quick]
        [--json FILE]

Runs are added to FILE when they end. The same command resumes: it skips the runs in FILE, and an
interrupted run starts from its last checkpoint under DIR. --budget stops after this many seconds.

The learning rate is 8e-5, the largest of the paper's grid: MiniLM is small.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

import fusion_jax as fj
from benchmarks.common import parser, peak_gib
from benchmarks.runs import OutOfTimeError, add_options, run_all, run_folder, run_one
from fusion_jax.cli.demo import find_model
from fusion_jax.training import GLUE, Classification, Recipe

LAYERS = slice(-4, None)
CALIBRATION = 1024
"""The number of training texts that methods are calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run: a method at a width, with or without tuning, on a task, with a seed."""

    task: str
    method: str
    width: float
    tuned: bool
    seed: int
    all_layers: bool = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        parts = [self.task, self.method, f"{self.width:g}"]
        parts += ["tuned"] * self.tuned + ["all"] * self.all_layers
        return "-".join([*parts, str(self.seed)])


def method(name: str, width: float) -> Any:
    """Returns the method of a cell; None leaves the model dense."""
    made = {
        "dense": lambda: None,
        "paper": lambda: fj.Fusion.paper(width=width),
        "fusion": lambda: fj.Fusion(width=width),
        "means": lambda: fj.Fusion(width=width, represent="mean"),
        "activation": lambda: fj.Prune(width=width, score="activation"),
        "activation-refit": lambda: fj.Prune(width=width, score="activation", refit=True),
        "clustering": lambda: fj.METHODS["clustering"](width=width),  # type: ignore[call-arg]
    }
    return made[name]()


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """Returns all runs, with seeds outermost, so that all methods have the same number of seeds."""
    found = []
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            dense = Cell(
                task=task,
                method="dense",
                width=1.0,
                tuned=False,
                seed=seed,
                all_layers=arguments.all_layers,
            )
            found.append(dense)
            found += [
                replace(dense, method=name, width=width, tuned=tuned)
                for width in arguments.widths
                for name in arguments.methods
                for tuned in ((False,) if arguments.untuned else (False, True))
            ]
    return found


def measure(
    cell: Cell, data: Classification, config: fj.TrainConfig, folder: Path, end: float
) -> dict[str, Any]:
    """Runs or resumes a cell."""

    def watch(step: int, state: Any) -> None:
        if time.perf_counter() > end:
            raise OutOfTimeError

    key = jax.random.key(cell.seed)
    labels = data.spec.num_labels
    model = fj.load(find_model(), head="classification", num_labels=labels, key=key)
    start = time.perf_counter()
    how = method(cell.method, cell.width)
    if how is not None:
        teacher = model
        seen = [text for text, *_ in data.train.texts[:CALIBRATION]]
        model, _ = fj.compress(
            teacher,
            how,
            layers=None if cell.all_layers else LAYERS,
            key=key,
            calibration=None if cell.method in ("paper", "clustering") else seen,
            progress=False,
        )
        if cell.tuned:
            once = replace(config, epochs=1, max_steps=config.max_steps)
            fit = fj.tune(
                model, teacher, data.train, once, key=key, folder=folder / "tune", progress=False
            )
            if not fit.finished:
                raise KeyboardInterrupt
            model = fit.model
    recipe = Recipe(on_step=watch)
    fit = fj.finetune(
        model, data, config, key=key, folder=folder / "run", recipe=recipe, progress=False
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


def mean_seconds(runs: list[dict[str, Any]], name: str) -> float:
    """Returns the mean time of runs; runs beside other work have no time."""
    times = [run[name] for run in runs if name in run]
    return statistics.mean(times) if times else float("nan")


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over seeds, with one row per method and task."""
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
                "seconds": mean_seconds(runs, "seconds"),
                "peak_gib": max(run["peak_gib"] for run in runs),
            }
        )
    return rows


def main() -> int:
    arguments = parser(__doc__)
    add_options(arguments)
    arguments.add_argument("--tasks", nargs="+", choices=sorted(GLUE), default=["sst2", "cola"])
    arguments.add_argument(
        "--methods",
        nargs="+",
        choices=["paper", "fusion", "means", "activation", "activation-refit", "clustering"],
        default=["paper", "means"],
    )
    arguments.add_argument("--widths", nargs="+", type=float, default=[0.25, 0.125])
    arguments.add_argument("--all-layers", action="store_true", help="all MLPs, not the last 4")
    arguments.add_argument("--untuned", action="store_true", help="without layer-wise tuning")
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--learning-rate", type=float, default=8e-5)
    arguments = arguments.parse_args()
    if arguments.data is None:
        print("give --data, a folder with GLUE's folders; nothing was measured")
        return 0 if arguments.quick else 2
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.widths = 1, 5, [0.25]
        arguments.tasks = arguments.tasks[-1:]
    config = fj.TrainConfig(
        epochs=arguments.epochs,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        max_length=128,
        truncate=True,
    )
    if arguments.cell is not None:
        cell = Cell(**json.loads(arguments.cell))
        data = fj.load_task(cell.task, arguments.data)
        return run_one(cell, partial(measure, cell, data, config), arguments)
    settings = {name: value for name, value in config.to_json().items() if value is not None}
    with run_folder(arguments):
        run_all(cells(arguments), settings, table, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
