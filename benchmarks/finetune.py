"""Measures compressed models after fine-tuning: methods x tasks x seeds.

all-MiniLM-L6-v2 with its last 4 of 6 MLPs, or all, at a quarter and an eighth of their width, with
and without layer-wise tuning, on tasks of GLUE. The official dev sets are measured after the last
step and never used to choose anything. Methods that use text are calibrated on the first training
texts.

    python -m benchmarks.finetune --data GLUE [--runs DIR] [--tasks sst2 cola] [--seeds 3]
        [--epochs 10] [--steps N] [--all-layers] [--untuned] [--budget SECONDS] [--quick]
        [--json FILE]

The paper's table at its own size, on an accelerator (all-mpnet-base-v2 has RoBERTa-base's size):

    python -m benchmarks.finetune --data GLUE --model all-mpnet-base-v2 --last 8 --widths 768
        --methods paper fusion activation-refit --tasks sst2 cola --epochs 1 5
        --learning-rate 4e-5 --dtype bfloat16 --shapes 2 --json FILE

Runs are added to FILE when they end. The same command resumes: it skips the runs in FILE, and an
interrupted run starts from its last checkpoint under DIR. --budget stops after this many seconds.
On an accelerator, the seeds of a method train in one program, without checkpoints; more --seeds
later add runs (--no-together: one after another, as on a CPU).

The learning rate is 8e-5, the largest of the paper's grid: MiniLM is small. --quick without --data
takes a tiny random model and tiny tasks.
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
from benchmarks import tiny
from benchmarks.common import parser, peak_gib
from benchmarks.runs import OutOfTimeError, add_options, run_all, run_folder, run_here
from fusion_jax.cli.demo import find_model
from fusion_jax.training import GLUE, Classification, Recipe, fit_many, tune_many

METHODS = ["paper", "fusion", "means", "activation", "activation-refit", "clustering"]
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
    """Returns the method of a cell; None leaves the model dense.

    A width above 1 is a number of units.
    """
    width = round(width) if width > 1 else width
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
    tuning = (False,) if getattr(arguments, "untuned", False) else (False, True)
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            dense = Cell(
                task=task,
                method="dense",
                width=1.0,
                tuned=False,
                seed=seed,
                all_layers=getattr(arguments, "all_layers", False),
            )
            found.append(dense)
            found += [
                replace(dense, method=name, width=width, tuned=tuned)
                for width in arguments.widths
                for name in arguments.methods
                for tuned in tuning
            ]
    return found


def measure(
    cells: list[Cell],
    data: Classification,
    config: fj.TrainConfig,
    arguments: argparse.Namespace,
    folder: Path,
    end: float,
) -> list[dict[str, Any]]:
    """Runs or resumes a cell, or runs the seeds of a method in one program."""

    def watch(step: int, state: Any) -> None:
        if time.perf_counter() > end:
            raise OutOfTimeError

    start = time.perf_counter()
    keys = [jax.random.key(cell.seed) for cell in cells]
    first, labels = cells[0], data.spec.num_labels
    dense = [
        fj.load(arguments.model, head="classification", num_labels=labels, key=k) for k in keys
    ]
    how = method(first.method, first.width)
    models = dense if how is None else compressed(dense, how, keys, first, data, arguments)
    once, recipe = replace(config, epochs=1), Recipe(on_step=watch)
    if len(cells) > 1:
        if first.tuned:
            fits = tune_many(models, dense[0], data, once, keys=keys, progress=False)
            models = [fit.model for fit in fits]
        watch(0, None)
        fits = fit_many(models, data, config, keys=keys, recipe=recipe, progress=False)
    else:
        (model,), (teacher,), (key,) = models, dense, keys
        # Where runs train together, none has checkpoints.
        tuning, run = (None, None) if arguments.together else (folder / "tune", folder / "run")
        if first.tuned:
            made = fj.tune(model, teacher, data, once, key=key, folder=tuning, progress=False)
            if not made.finished:
                raise KeyboardInterrupt
            model = made.model
        fits = [
            fj.finetune(model, data, config, key=key, folder=run, recipe=recipe, progress=False)
        ]
    if not all(fit.finished for fit in fits):
        raise KeyboardInterrupt
    seconds = (time.perf_counter() - start) / len(cells)
    return [
        {
            **asdict(cell),
            **{name: value for name, value in fit.history[-1].items() if name != "step"},
            "steps": fit.step,
            "seconds": seconds,
            "peak_gib": peak_gib(),
        }
        for cell, fit in zip(cells, fits, strict=True)
    ]


def compressed(
    models: list[Any],
    how: Any,
    keys: list[Any],
    cell: Cell,
    data: Classification,
    arguments: argparse.Namespace,
) -> list[Any]:
    """Returns the compressed models."""
    seen = [text for text, *_ in data.train.texts[:CALIBRATION]]
    return [
        fj.compress(
            model,
            how,
            layers=None if cell.all_layers else slice(-arguments.last, None),
            key=key,
            calibration=None if cell.method in ("paper", "clustering") else seen,
            progress=False,
        )[0]
        for model, key in zip(models, keys, strict=True)
    ]


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
    arguments.add_argument("--model", help="a folder or hub id; all-MiniLM-L6-v2 if left out")
    arguments.add_argument("--tasks", nargs="+", choices=sorted(GLUE), default=["sst2", "cola"])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=["paper", "means"])
    arguments.add_argument(
        "--widths", nargs="+", type=float, default=[0.25, 0.125], help="shares, or numbers of units"
    )
    arguments.add_argument("--last", type=int, default=4, help="MLPs to compress, the last ones")
    arguments.add_argument("--all-layers", action="store_true", help="compress all MLPs")
    arguments.add_argument("--untuned", action="store_true", help="without layer-wise tuning")
    arguments.add_argument(
        "--epochs", nargs="+", type=int, default=[10], help="of all tasks, or of each"
    )
    arguments.add_argument("--learning-rate", type=float, default=8e-5)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], help="to compute in")
    arguments.add_argument("--shapes", type=int, default=4, help="lengths that batches have")
    arguments = arguments.parse_args()
    if len(arguments.epochs) not in (1, len(arguments.tasks)):
        raise SystemExit("--epochs takes one number, or one for each of --tasks")
    with run_folder(arguments):
        if arguments.quick:
            arguments.seeds, arguments.steps, arguments.widths = 1, 5, [0.25]
            arguments.tasks, arguments.epochs = arguments.tasks[-1:], arguments.epochs[-1:]
            arguments.shapes = 1
            if arguments.data is None:
                arguments.seeds, arguments.last = 2, 1
                if not (arguments.runs / "tasks").is_dir():
                    tiny.tasks(arguments.runs / "tasks")
                    tiny.encoder(arguments.runs / "encoder")
                arguments.data = arguments.runs / "tasks"
                arguments.model = str(arguments.runs / "encoder")
        if arguments.data is None:
            print("give --data, a folder with GLUE's folders; nothing was measured")
            return 2
        return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """Runs one group of cells in this process, or all cells."""
    epochs = dict(zip(arguments.tasks, arguments.epochs * len(arguments.tasks), strict=False))
    config = fj.TrainConfig(
        epochs=arguments.epochs[0],
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        compute_dtype=arguments.dtype,
        max_length=16 if arguments.quick else 128,
        truncate=True,
        shapes=arguments.shapes,
    )
    settings = {name: value for name, value in config.to_json().items() if value is not None}
    if len(arguments.epochs) > 1:
        settings["epochs"] = epochs
    if arguments.model is not None:
        settings |= {"model": Path(arguments.model).name, "last": arguments.last}
    arguments.model = arguments.model or find_model()
    if arguments.cell is not None:
        group = [Cell(**fields) for fields in json.loads(arguments.cell)]
        task = group[0].task
        config = replace(config, epochs=epochs[task])
        data = fj.load_task(task, arguments.data)
        return run_here(group, partial(measure, group, data, config, arguments), arguments)
    run_all(
        cells(arguments),
        settings,
        table,
        arguments,
        group=lambda cell: (cell.task, cell.method, cell.width, cell.tuned),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
