"""Compares all methods at one parameter budget: errors, kernels, cost, and fine-tuning.

all-MiniLM-L6-v2 keeps a quarter of the parameters of its last 4 of 6 MLPs, by every method. Matrix
product operators at full size, over-parameterized fine-tuning and static pruning have sizes of
their own. The first part measures what compressing changes: outputs of single MLPs and the kernel
of the whole model at held-out sentences, the time of compressing, the artefact, and the time of a
training step. The second part measures dev scores after fine-tuning. All methods have the same
number of steps, except that lottery tickets and static over-parameterization train for the same
number once more before, that squeezing trains in short rounds after, and that static pruning has
its own loss and settings.

    python -m benchmarks.methods --data GLUE [--runs DIR] [--only NAME ...] [--seeds 3]
        [--tasks facts sst2 cola] [--steps N] [--budget SECONDS] [--workers N] [--quick]
        [--json FILE] [--figure FILE]

Each run has its own process and is added to FILE when it ends; the same command resumes. With
several workers, times are those of a shared machine. On an accelerator, the seeds of methods that
only fine-tune train in one program (--no-together: one after another, as on a CPU).

Kernels are with respect to each model's own parameters in these MLPs. For chains and products of
two matrices these are the factors: training factors is not the same as training the matrix, so that
their kernels do not measure the method. Masked weights do not count as parameters, here and in the
artefact, since a mask and the remaining weights are enough. For methods that fine-tune in their own
way, only the cost is measured.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusion_jax as fj
import ntk
from benchmarks.common import parser, peak_gib, pyplot, show
from benchmarks.quality import relative
from benchmarks.runs import OutOfTimeError, add_options, run_all, run_folder, run_here
from fusion_jax.checkpoint.masks import save_masks
from fusion_jax.cli.demo import find_model
from fusion_jax.compression.matrices import select_matrices
from fusion_jax.models.tokens import batches, load_tokenizer
from fusion_jax.nn.linear_forms import Masked, find_forms
from fusion_jax.report import num_params
from fusion_jax.training import (
    GLUE,
    Chains,
    Classification,
    Recipe,
    Texts,
    fit_many,
    importance_by_removal,
    lightweight,
    lottery,
    mean_gradients,
    mean_loss,
    overparameterize,
    squeeze,
    top_of_each_type,
)
from fusion_jax.training.methods.squeezing import cheapest_cut, cut
from fusion_jax.training.methods.static_pruning import SCORE_CONFIG, StaticPruning, static_prune
from fusion_jax.verification.checks import Probability

LAYERS = slice(-4, None)
BUDGET = 0.25
CALIBRATION = 1024
"""The number of training texts for methods with calibration."""
STEPS = {"": 150, "sst2": 150, "cola": 400}
"""Steps of fine-tuning; before about 300 steps, the scores of all methods on CoLA are 0."""
KERNEL_TEXTS = 48
"""The number of dev sentences on which kernels are compared."""
CUTS = 5
"""The largest number of cuts of squeezing."""
LINEARS = r"layers\..*"
MATRICES = r"layers\.[2-5]\.mlp\..*"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run; without a task, it measures what compressing changes."""

    method: str
    task: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.task or 'facts'}-{self.method}-{self.seed}"


class Run:
    """The dense model, the data and the settings of a run.

    Args:
        model: The dense model.
        data: The task.
        config: The settings of fine-tuning.
        key: Random key.
        end: The time at which the budget ends.
    """

    def __init__(
        self, model: Any, data: Classification, config: fj.TrainConfig, key: Any, end: float
    ):
        self.model, self.data, self.config, self.key = model, data, config, key
        self.end = end

    @property
    def texts(self) -> list[str]:
        """The texts to calibrate on."""
        return [text for text, *_ in self.data.train.texts[:CALIBRATION]]

    def source(self, model: Any) -> Any:
        """Returns the training batches and the loss."""
        return self.data.prepare(model, self.config, key=self.key)[:2]

    def watch(self, step: int, state: Any) -> None:
        """Stops the run when the budget ends; for ``on_step``."""
        if time.perf_counter() > self.end:
            raise OutOfTimeError

    def train(self, model: Any, *, steps: int | None = None, growth: Any = None) -> Any:
        """Returns the result of fine-tuning, with the metrics after the last step."""
        config = self.config if steps is None else replace(self.config, max_steps=steps)
        # Only the last step is evaluated.
        config = replace(config, eval_every=10**9)
        recipe = Recipe(on_step=self.watch, growth=growth)
        return fj.finetune(model, self.data, config, key=self.key, recipe=recipe, progress=False)


class Timed(Run):
    """A run of a few timed steps on batches of one shape."""

    def __init__(self, run: Run):
        config = replace(run.config, max_steps=8, shapes=1, max_length=64, dropout=False)
        super().__init__(run.model, replace(run.data, dev={}), config, run.key, math.inf)
        self.times: list[float] = []

    def watch(self, step: int, state: Any) -> None:
        """Records the time; for ``on_step``."""
        jax.block_until_ready(state.params)
        self.times.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        """The median time of a training step, without compilation."""
        return statistics.median(np.diff(self.times[2:]).tolist())


def _compressed(method: Any, *, calibrated: bool = False, graded: bool = False) -> Callable:
    def make(run: Run) -> Any:
        gradients = None
        if graded:
            source, loss = run.source(run.model)
            gradients = mean_gradients(run.model, source, loss, batches=50)
        seen = run.texts if calibrated else None
        return fj.compress(
            run.model,
            method,
            layers=LAYERS,
            key=run.key,
            budget=BUDGET,
            calibration=seen,
            gradients=gradients,
            progress=False,
        )[0]

    return make


def _method(name: str, **options: Any) -> Any:
    return fj.METHODS[name](**options)


COMPRESSED: dict[str, Callable[[Run], Any]] = {
    "fusion": _compressed(fj.Fusion(represent="mean"), calibrated=True),
    "fusion, paper": _compressed(fj.Fusion.paper()),
    "clustering": _compressed(_method("clustering")),
    "sketch": _compressed(_method("sketch")),
    "mmd": _compressed(_method("mmd")),
    "svd": _compressed(_method("svd")),
    "prune, magnitude": _compressed(_method("prune")),
    "prune, activation": _compressed(_method("prune", score="activation"), calibrated=True),
    "prune, gradient": _compressed(_method("prune", score="gradient"), graded=True),
    "masks, magnitude": _compressed(_method("mask-prune")),
    "masks, gradient": _compressed(_method("mask-prune", score="gradient"), graded=True),
    "mpo": _compressed(_method("mpo")),
}
"""Methods that compress in one shot, by name."""
BY_SGD: dict[str, Callable[[Run], Any]] = {
    "fusion": _compressed(fj.Fusion(represent="mean", scaling="sgd"), calibrated=True),
    "fusion, paper": _compressed(fj.Fusion.paper(scaling="sgd")),
}
"""The same methods for training by SGD, whose SGD kernels are compared instead."""


def _fit(make: Callable[[Run], Any]) -> Callable[[Run], tuple[Any, Any]]:
    def run_it(run: Run) -> tuple[Any, Any]:
        model = make(run)
        fit = run.train(model)
        return fit.model, fit.history[-1]

    return run_it


def _chains(run: Run) -> Any:
    return fj.compress_matrices(run.model, fj.MPO(bond=None), matrices=MATRICES, progress=False)[0]


def _lottery(run: Run) -> Any:
    steps = max(1, (run.config.max_steps or 150) // 3)

    def train(model: Any, folder: Path | None) -> Any:
        return run.train(model, steps=steps)

    return lottery(run.model, train, keep=BUDGET, rounds=3, layers=LAYERS, progress=False).model


def _squeezed(run: Run) -> tuple[Any, Any]:
    fit = run.train(lightweight(_chains(run)))
    source, loss = run.source(run.model)
    steps = max(1, (run.config.max_steps or 150) // 15)

    def train(model: Any, folder: Path | None) -> Any:
        return run.train(model, steps=steps)

    def measure(model: Any) -> float:
        return mean_loss(model, source, loss, batches=20)

    found = squeeze(fit.model, train, measure, rounds=CUTS, step=64, progress=False)
    last = run.train(found.model, steps=steps)
    return last.model, {**last.history[-1], "cuts": len(found.cuts)}


def _overparameterized(run: Run, dynamic: bool) -> tuple[Any, Any]:
    cores, count = 4, 2
    if dynamic:
        source, loss = run.source(run.model)
        every = max(1, (run.config.max_steps or 150) // 4)
        growth = Chains(
            source=source, loss=loss, every=every, per_round=1, total=count, cores=cores
        )
        fit = run.train(run.model, growth=growth)
    else:
        trained = run.train(run.model).model
        source, loss = run.source(trained)
        scores = importance_by_removal(trained, source, loss, matrices=LINEARS, batches=8)
        chosen = top_of_each_type(scores, count)
        fit = run.train(overparameterize(run.model, chosen, cores=cores))
    return fj.plain(fit.model), fit.history[-1]


def _masks(run: Run, keep: float) -> Any:
    """Prunes all layers statically, and trains a plain head at the other methods' learning rate.

    MiniLM has no head for label words.
    """
    head = run.config.learning_rate / SCORE_CONFIG.learning_rate
    config = replace(
        SCORE_CONFIG,
        max_steps=run.config.max_steps,
        batch_size=run.config.batch_size,
        max_length=run.config.max_length,
        truncate=True,
        shapes=run.config.shapes,
        dropout=run.config.dropout,
        eval_every=10**9,
        multipliers=((r"(head|pooler)\..*", head),),
    )
    how = StaticPruning(keep=keep, temperature=4.0 if keep >= 0.7 else 1.0, train_head=True)
    recipe = Recipe(on_step=run.watch)
    return static_prune(
        run.model, run.data, config, how, key=run.key, recipe=recipe, progress=False
    )


def _static(run: Run, keep: float) -> tuple[Any, Any]:
    fit = _masks(run, keep)
    return fit.model, fit.history[-1]


def _cut(run: Run) -> Any:
    """Returns chains with as many cuts as squeezing makes, without training between the cuts."""
    model = lightweight(_chains(run))
    for _ in range(CUTS):
        chosen = cheapest_cut(model, step=64)
        assert chosen is not None
        model = cut(model, chosen)
    return model


def _widened(run: Run) -> Any:
    """Returns the model with two matrices of each type as chains; any choice costs the same."""
    found = {path: float(k) for k, path in enumerate(select_matrices(run.model, LINEARS))}
    return overparameterize(run.model, top_of_each_type(found, 2), cores=4)


KEPT = {f"static, {keep:.0%} kept": keep for keep in (0.8, 0.5, 0.1)}
"""The shares of weights that static pruning keeps, by name."""
BEGUN: dict[str, Callable[[Run], Any]] = {
    "dense": lambda run: run.model,
    **COMPRESSED,
    "lottery ticket": COMPRESSED["masks, magnitude"],
    "mpo, full": _chains,
    "mpo, full, lightweight": lambda run: lightweight(_chains(run)),
    "mpo, lightweight": lambda run: lightweight(COMPRESSED["mpo"](run)),
    "mpo, squeezed": _cut,
    "overparam, static": _widened,
    "overparam, dynamic": _widened,
    **dict.fromkeys(KEPT, lambda run: run.model),
}
"""Models whose training steps are timed, by method: those that fine-tuning starts with, or, if they
change in training, models of the final shapes."""


PLAIN: dict[str, Callable[[Run], Any]] = {
    "dense": lambda run: run.model,
    **COMPRESSED,
    "lottery ticket": _lottery,
    "mpo, full": _chains,
    "mpo, full, lightweight": lambda run: lightweight(_chains(run)),
    "mpo, lightweight": lambda run: lightweight(COMPRESSED["mpo"](run)),
}
"""Models that are then fine-tuned and nothing else, by method."""
TRAINED: dict[str, Callable[[Run], tuple[Any, Any]]] = {
    **{name: _fit(make) for name, make in PLAIN.items()},
    "mpo, squeezed": _squeezed,
    "overparam, static": partial(_overparameterized, dynamic=False),
    "overparam, dynamic": partial(_overparameterized, dynamic=True),
    **{name: partial(_static, keep=keep) for name, keep in KEPT.items()},
}
"""Fine-tunes and returns the model and its last metrics, by name."""


def counted(model: Any) -> tuple[int, int]:
    """Returns the numbers of unmasked parameters: those of the MLPs, and all that train."""
    chosen = fj.sites(model)[LAYERS]
    lost = {
        path: int((~np.asarray(form.mask[...])).sum())
        for path, form in find_forms(model).items()
        if isinstance(form, Masked)
    }
    inside = sum(n for path, n in lost.items() if path.startswith(tuple(s.path for s in chosen)))
    mlps = sum(num_params(site.mlp) for site in chosen)
    frozen = sum(
        variable.get_value().size
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if "cores" in path and not isinstance(variable, nnx.Param)
    )
    return mlps + frozen - inside, num_params(model) - sum(lost.values())


def facts(cell: Cell, run: Run) -> dict[str, Any]:
    """Measures what compressing changes, and the cost of training after it."""
    start = time.perf_counter()
    made = BEGUN[cell.method](run)
    jax.block_until_ready(nnx.state(made))
    row: dict[str, Any] = {"seconds": time.perf_counter() - start}
    # In the same process, since the speed of a machine changes over time.
    plain = Timed(run)
    plain.train(run.model)
    row["dense_step_seconds"] = plain.step_seconds
    timed, kept, save = Timed(run), made, fj.save
    if cell.method in KEPT:
        kept, save = _masks(timed, keep=KEPT[cell.method]).model, save_masks
    else:
        timed.train(made)
        row["trains"] = counted(made)[1]
        if cell.method.startswith("overparam"):
            kept = fj.plain(made)
    row |= {"step_seconds": timed.step_seconds, "peak_gib": peak_gib()}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(save(kept, Path(folder) / "artefact"))
        row["artefact_mb"] = sum(file.stat().st_size for file in saved.iterdir()) / 1e6
    row["mlp_params"] = counted(kept)[0]
    if cell.method == "dense" or cell.method in COMPRESSED:
        row |= errors(cell, run, made)
    return row


def errors(cell: Cell, run: Run, made: Any) -> dict[str, float]:
    """Returns relative errors of outputs and kernels."""
    tokenizer = load_tokenizer(run.model.provenance.folder)
    text = [text for text, *_ in next(iter(run.data.dev.values())).texts]
    inputs = fj.calibrate(
        run.model, batches(tokenizer, text[:300]), key=jax.random.key(1), max_positions=300
    )
    outputs = []
    for old, new in zip(fj.sites(run.model)[LAYERS], fj.sites(made)[LAYERS], strict=True):
        x = jnp.asarray(inputs[old.path])
        bias = old.mlp.out_bias()
        assert bias is not None
        outputs.append(relative(old.mlp(x) - bias[None], new.mlp(x) - bias[None]))
    row = {"output": statistics.mean(outputs)}
    (batch,) = batches(tokenizer, text[:KERNEL_TEXTS], max_length=32)
    head = jax.random.normal(jax.random.key(3), (run.model.config.hidden_size, 2))
    for kind in ("sgd", "adam"):
        kernels = []
        for_sgd = kind == "sgd" and cell.method in BY_SGD
        for model in (run.model, BY_SGD[cell.method](run) if for_sgd else made):
            wrt = r"model\.layers\.[2-5]\.mlp\..*"
            f, params = ntk.functional(Probability(model, head), wrt=wrt)
            kernels.append(np.asarray(ntk.kernel(f, params, tuple(batch), kind=kind)))
        row[f"{kind}_kernel"] = relative(*kernels)
    return row


def measure(
    cells: list[Cell], data: Classification, config: fj.TrainConfig, _: Path, end: float
) -> list[dict[str, Any]]:
    """Runs a cell, or the seeds of a method in one program."""
    runs, labels = [], data.spec.num_labels
    for cell in cells:
        key = jax.random.key(cell.seed)
        model = fj.load(find_model(), head="classification", num_labels=labels, key=key)
        runs.append(Run(model, data, config, key, end))
    if not cells[0].task:
        return [{**asdict(cells[0]), **facts(cells[0], runs[0])}]
    start = time.perf_counter()
    if len(cells) == 1:
        found = [TRAINED[cells[0].method](runs[0])]
    else:
        fits = fit_many(
            [PLAIN[cells[0].method](run) for run in runs],
            data,
            replace(config, eval_every=10**9),
            keys=[run.key for run in runs],
            recipe=Recipe(on_step=runs[0].watch),
            progress=False,
        )
        found = [(fit.model, fit.history[-1]) for fit in fits]
    seconds = (time.perf_counter() - start) / len(cells)
    return [
        {**scored(cell, run, *each), "seconds": seconds}
        for cell, run, each in zip(cells, runs, found, strict=True)
    ]


def scored(cell: Cell, run: Run, made: Any, last: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a run with a task, but for its seconds."""
    metric = run.data.spec.metrics[0]
    score = next(value for name, value in last.items() if name.endswith(metric))
    return {
        **asdict(cell),
        "score": 100 * score,
        "steps": run.config.max_steps,
        "mlp_params": counted(made)[0],
        # Shows whether squeezing kept any cut.
        **({"cuts": last["cuts"]} if "cuts" in last else {}),
        "peak_gib": peak_gib(),
    }


def few(texts: Texts, count: int) -> Texts:
    """Returns the first texts."""
    return Texts(*(None if x is None else x[:count] for x in texts))  # type: ignore[arg-type]


def cells(options: Any) -> list[Cell]:
    """Returns all runs: first those without a task, then the others with seeds outermost."""
    names = options.only or list(TRAINED)
    found = [Cell(method=name) for name in BEGUN if name in names and "facts" in options.tasks]
    tasks = [task for task in options.tasks if task != "facts"]
    for seed in range(options.seeds):
        found += [Cell(method=m, task=t, seed=seed) for t in tasks for m in names]
    return found


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each method."""
    shown = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        what = next((row for row in own if not row["task"]), {})
        line: dict[str, Any] = {"method": name}
        for key in ("output", "sgd_kernel", "adam_kernel", "seconds", "step_seconds", "peak_gib"):
            line[key] = what.get(key, math.nan)
        line["artefact_mb"] = what.get("artefact_mb", math.nan)
        line["mlp_params"] = own[-1].get("mlp_params", math.nan)
        for task in dict.fromkeys(row["task"] for row in rows if row["task"]):
            scores = [row["score"] for row in own if row["task"] == task]
            if scores:
                spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
                line[task] = f"{statistics.mean(scores):.1f}{spread} ({len(scores)})"
        shown.append(line)
    return shown


def agreement(rows: list[dict[str, Any]], *, but: str = "") -> list[dict[str, Any]]:
    """Returns rank correlations of mean dev scores with errors, over methods at the budget.

    Args:
        rows: All rows.
        but: Leaves out methods whose names start with this; empty for none.

    Returns:
        A row for each task on which all methods have scores.
    """
    errors = {r["method"]: r for r in rows if not r["task"] and r["method"] in COMPRESSED}
    found = []
    for task in dict.fromkeys(row["task"] for row in rows if row["task"]):
        scores = {
            name: [r["score"] for r in rows if (r["task"], r["method"]) == (task, name)]
            for name in errors
            if not (but and name.startswith(but))
        }
        if len(scores) < 3 or not all(scores.values()):
            continue
        line: dict[str, Any] = {"task": task, "methods": len(scores)}
        for kind in ("output", "sgd_kernel", "adam_kernel"):
            pairs = [(statistics.mean(own), errors[n][kind]) for n, own in scores.items()]
            ranks = [np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True)]
            line[kind] = float(np.corrcoef(*ranks)[0, 1])  # type: ignore[call-overload]
        found.append(line)
    return found


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws dev scores against the time of a training step relative to the dense model."""
    plt = pyplot()
    timed = {row["method"] for row in rows if "step_seconds" in row}
    tasks = list(
        dict.fromkeys(row["task"] for row in rows if row["task"] and row["method"] in timed)
    )
    if not tasks:
        print("nothing to draw: that needs facts and a task of the same methods")
        return
    figure, every = plt.subplots(1, len(tasks), figsize=(9, 4.6), layout="constrained")
    steps = {
        row["method"]: row["step_seconds"] / row["dense_step_seconds"]
        for row in rows
        if "step_seconds" in row
    }
    names = [name for name in TRAINED if name in steps]
    kinds = list(dict.fromkeys(name.partition(",")[0] for name in names))
    tab = plt.colormaps["tab10"].colors  # without its grey
    colors = ["0.2", *tab[:7], *tab[8:], "navy", "gold"]
    for axes, task in zip(np.atleast_1d(every), tasks, strict=True):
        scores = {
            name: [r["score"] for r in rows if (r["task"], r["method"]) == (task, name)]
            for name in names
        }
        means = {name: statistics.mean(own) for name, own in scores.items() if own}
        low, high = np.quantile(list(means.values()), (0.25, 0.75))
        shown = [name for name in means if means[name] >= low - 3 * (high - low)]
        least = min(means[name] for name in shown) - (high - low)
        seen: list[str] = []
        for name in names:
            kind = name.partition(",")[0]
            marker = "os^Dv"[seen.count(kind)]
            seen.append(kind)
            if name in means:
                axes.errorbar(
                    steps[name],
                    means[name] if name in shown else least,
                    statistics.stdev(scores[name]) if name in shown and scores[name][1:] else 0,
                    fmt=marker,
                    color=colors[kinds.index(kind)],
                    markersize=5,
                    linewidth=0.8,
                    label=name,
                )
            if name in means and name not in shown:  # far below: at the edge, with its score
                axes.annotate(
                    f"↓ {means[name]:.0f}",
                    (steps[name], least),
                    (-6, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=8,
                )
        axes.set_xscale("log")
        axes.set_xticks([0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("time of a training step, dense = 1")
        axes.set_title(f"{task}: {GLUE[task].metrics[0]}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = np.atleast_1d(every)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def main() -> int:
    arguments = parser(__doc__, keep=False)
    add_options(arguments)
    tasks = ["facts", "sst2", "cola"]
    arguments.add_argument("--tasks", nargs="+", choices=tasks, default=tasks, help="facts: errors")
    arguments.add_argument("--shapes", type=int, default=4, help="lengths that batches have")
    names = ", ".join(f'"{name}"' for name in TRAINED).replace("%", "%%")
    arguments.add_argument(
        "--only", nargs="+", choices=list(TRAINED), metavar="NAME", help=f"of {names}"
    )
    arguments.add_argument("--figure", type=Path, help="draw score against cost here")
    options = arguments.parse_args()
    if options.data is None:
        print("give --data, a folder with GLUE's folders; nothing was measured")
        return 0 if options.quick else 2
    if options.quick:
        options.seeds, options.steps, options.tasks = 1, 4, options.tasks[-1:]
    config = fj.TrainConfig(
        max_steps=options.steps,
        learning_rate=8e-5,
        max_length=128,
        truncate=True,
        shapes=options.shapes,
    )
    if options.steps is not None:
        config = replace(config, epochs=100)
    if options.cell is not None:
        together = [Cell(**fields) for fields in json.loads(options.cell)]
        cell = together[0]
        config = replace(config, max_steps=options.steps or STEPS[cell.task])
        data = fj.load_task(cell.task or "sst2", options.data)
        if options.quick:
            dev = {name: few(texts, 48) for name, texts in data.dev.items()}
            data = replace(data, train=few(data.train, 256), dev=dev)
        return run_here(together, partial(measure, together, data, config), options)
    settings = {name: value for name, value in config.to_json().items() if value is not None}
    with run_folder(options):
        rows = run_all(
            cells(options),
            settings,
            table,
            options,
            group=lambda cell: (
                (cell.method, cell.task) if cell.task and cell.method in PLAIN else None
            ),
        )
    for title, but in (("", ""), (" without fusion", "fusion")):
        if lines := agreement(rows, but=but):
            print(f"\nRank correlation of scores and errors{title}")
            show(lines, {})
    if options.figure is not None:
        draw(rows, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
