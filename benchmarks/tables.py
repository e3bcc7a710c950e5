"""Writes the tables of the documentation from the result files.

Every block between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in README.md and
docs/results.md is made by the function NAME below. Numbers are rounded from the file's values.
Each table names the command that made its file, and the machine.

    python -m benchmarks.tables [--check]

With ``--check`` nothing is written: the exit status is 1 if a page is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fusion_jax.models.registry import coverage

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
PAGES = (Path("README.md"), Path("docs/results.md"), Path("docs/compress.md"))
METHODS = {
    "dense": "dense",
    "fusion": "**`Fusion(represent='mean')`, calibrated**",
    "fusion, paper": "`Fusion.paper()`",
    "clustering": "`Clustering()`",
    "sketch": "`Sketch()`",
    "mmd": "`MMD()`",
    "svd": "`Svd()`",
    "prune, magnitude": "`Prune()`",
    "prune, activation": '`Prune(score="activation")`',
    "prune, gradient": '`Prune(score="gradient")`',
    "masks, magnitude": "`MaskPrune()`",
    "masks, gradient": '`MaskPrune(score="gradient")`',
    "lottery ticket": "`lottery`, 3 rounds",
    "mpo": "`MPO()`",
    "mpo, lightweight": "`MPO()`, lightweight",
    "mpo, full": "MPO, all bonds",
    "mpo, full, lightweight": "MPO, all bonds, lightweight",
    "mpo, squeezed": "MPO, lightweight, then squeezed",
    "overparam, static": "over-parameterized, static",
    "overparam, dynamic": "over-parameterized, dynamic",
    "static, 80% kept": "static pruning, 80 % kept",
    "static, 50% kept": "static pruning, 50 % kept",
    "static, 10% kept": "static pruning, 10 % kept",
}
"""Rows of benchmarks.methods, in the order of the tables."""
TRAINED_ONLY = ("dense", "lottery ticket", "mpo, squeezed", "overparam", "static")
"""Beginnings of the rows that no single call of a method makes."""
PROMISED = {
    "mpo, full": ["90.6 → 92.2", "53.4 → 55.7"],
    "mpo, full, lightweight": ["90.6 → 93.0", "53.4 → 56.0"],
    "mpo, squeezed": ["90.6 → 90.8", "53.4 → 54.7"],
    "mpo": ["90.6 → 86.6", "53.4 → 15.0"],
    "overparam, static": ["92.5 → 92.6", "52.1 → 56.1"],
    "overparam, dynamic": ["92.5 → 92.5", "52.1 → 60.6"],
    "static, 80% kept": ["92.9 → 92.9", "58.1 → 61.5"],
    "static, 50% kept": ["MNLI 84.5 → 85.7, with a teacher", ""],
    "static, 10% kept": ["MNLI 84.5 → 82.5", ""],
}
"""The papers' scores of plain fine-tuning → the method, on SST-2 and CoLA."""
TABLE = "table-gpu"
PAPER_TABLE = {
    "dense": "dense",
    "paper": "the paper's method",
    "fusion": "`Fusion()`, calibrated",
    "activation-refit": "activation, refitted",
}
"""Rows of the paper's table at its own size."""
PUBLISHED = {
    ("dense", False): "94.6 ± 0.1",
    ("paper", False): "93.2 ± 0.2",
    ("paper", True): "93.8 ± 0.1",
}
"""Table 2 of MLP Fusion (ICML 2023, arXiv 2307.08941): 10 epochs, the mean of three runs."""
NAMES = {"gemma": "Gemma 3 270M", "qwen": "Qwen2.5-Coder-0.5B"}
"""Language models of benchmarks.real and benchmarks.heal whose names there are short."""
ERRORS = ("output", "sgd_kernel", "adam_kernel")
ERROR_HEAD = "output | SGD kernel | Adam kernel"
PAPER, OURS = "the paper's method", "`Fusion()`, calibrated"
MEANS = "`Fusion(represent='mean')`, calibrated"
TUNING = {
    ("paper", False): PAPER,
    ("paper", True): f"{PAPER}, tuned",
    ("means", False): MEANS,
    ("means", True): f"{MEANS}, tuned",
}
"""Rows of benchmarks.finetune and benchmarks.nlg: method, and whether it was tuned."""

Row = dict[str, Any]
Lines = Iterator[str | list[str]]
"""A block: the head of the table with its cells parted by ``|``, the rows, then paragraphs."""
BLOCKS: dict[str, Callable[[], str]] = {}
"""Functions that make blocks, by the names in the markers."""


@cache
def result(name: str) -> Row:
    """Returns the content of a result file."""
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str, **fields: Any) -> list[Row]:
    """Returns the rows of a file that have these values."""
    found = result(name)["rows"]
    return [row for row in found if all(row.get(k) == v for k, v in fields.items())]


def row(name: str, **fields: Any) -> Row:
    """Returns the only row that has these values."""
    (found,) = rows(name, **fields)
    return found


def measured(name: str, command: str, note: str = "") -> str:
    """Returns the line under a table: its command, its machine and its file."""
    env = result(name)["env"]
    machine = f"{env['cores']} cores of an {env['cpu']}"
    if env["device"] != "cpu":
        machine = f"one {env['device']}"
    module = command.split(" --")[0].split()[-1]
    if module not in env["command"]:
        raise ValueError(f"{name} was made by {env['command']!r}, not by {command!r}")
    link = f"[{name}.json](../{RESULTS.as_posix()}/{name}.json)"
    notes = "".join(f" {s[0].upper()}{s[1:]}." for s in (note, env.get("note", "")) if s)
    return f"`{command}` on {machine}, jax {env['versions']['jax']}; {link}.{notes}"


def block(
    *sources: tuple[str, str] | tuple[str, str, str], words: bool = False
) -> Callable[[Any], Any]:
    """Registers a function that makes a block.

    Args:
        *sources: For each result file its name, the command without ``python -m benchmarks.``, and
            perhaps a note.
        words: Whether all columns are words, aligned on the left; otherwise the first one alone.

    Returns:
        A decorator.
    """

    def register(make: Callable[[], Lines]) -> Callable[[], Lines]:
        def text() -> str:
            head, *body = make()
            assert isinstance(head, str)
            cells = head.split(" | ")
            lines = [cells, [":--", *[":--" if words else "--:"] * (len(cells) - 1)]]
            lines += [line for line in body if isinstance(line, list)]
            for line in lines:
                assert len(line) == len(cells), line
            parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines)]
            parts += [
                measured(
                    name,
                    command if "python" in command else f"python -m benchmarks.{command}",
                    *note,
                )
                for name, command, *note in sources
            ]
            return "\n\n".join([*parts, *(line for line in body if isinstance(line, str))])

        BLOCKS[make.__name__.replace("_", "-")] = text
        return make

    return register


def numbers(found: Row, keys: Iterable[str], form: str = ".3f") -> list[str]:
    """Returns the values of a row in one form."""
    return [f"{found[key]:{form}}" for key in keys]


def short(x: float) -> str:
    """Returns a number with three significant digits."""
    return f"{x:#.3g}".rstrip(".")


def mean(found: Iterable[Row], key: str) -> float:
    """Returns the mean of a column."""
    return statistics.fmean(row[key] for row in found)


def spread(found: Iterable[Row], key: str, factor: float = 1) -> str:
    """Returns mean ± standard deviation of a column, with one digit."""
    values = [factor * row[key] for row in found]
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _single(method: str) -> list[str]:
    """The mean errors over the layers of all-MiniLM-L6-v2, each fused alone."""
    found = [r for r in rows("quality-cpu", method=method, width=384) if "output" in r]
    return [f"{mean(found, key):.3f}" for key in ERRORS]


def _similarity(method: str, width: int) -> str:
    found = rows("quality-cpu", method=method, width=width, layers="2-5")
    return f"{found[0]['embedding_agreement']:.3f}" if found else ""


@block()
def readme() -> Lines:
    yield f" | {ERROR_HEAD} | similarities"
    for method, label in (
        ("paper", f"{PAPER}, `Fusion.paper()`"),
        ("raw", "`Fusion()`, no calibration"),
        ("members", OURS),
    ):
        yield [label, *_single(method), _similarity(method, 384)]


@block(("quality-cpu", "quality --data DIR"))
def quality() -> Lines:
    widths = (384, 192, 96)
    yield " | ".join(["", ERROR_HEAD, *(f"similarities at {width}" for width in widths)])
    for method, label in (
        ("paper", f"{PAPER}, `Fusion.paper()`"),
        ("raw", "`Fusion()` without calibration: Ward, single moves"),
        ("function", "+ clustered by function"),
        ("function, refit", "+ refitted output weights"),
        ("function, refit, match", f"+ matched kernel: {MEANS}"),
        ("members", f"whole units, refitted and matched: {OURS}"),
    ):
        yield [label, *_single(method), *(_similarity(method, width) for width in widths)]
    random = [_similarity("members; random tokens", width) for width in widths]
    yield ["the same on random tokens instead of text", "", "", "", *random]


@block(("ntk-models-cpu", "ntk_models --data DIR"))
def ntk_models() -> Lines:
    yield " | Adam, p/4 | Adam, p/2 | SGD, p/4 | SGD, p/2 | the paper's metric, p/4 | p/2"

    def one(method: str, kernel: str, width: float, parameters: str = "all") -> Row:
        fields = {"kernel": kernel, "width": width, "parameters": parameters}
        return row("ntk-models-cpu", method=method, **fields)

    for method, label in (
        ("paper", PAPER),
        ("ours", "`Fusion()` without calibration"),
        ("means, calibrated", f"{MEANS} on other sentences"),
        ("ours, calibrated", f"{OURS} on other sentences"),
    ):
        cells = [
            f"{one(method, k, w)['relative']:.3f}" for k in ("adam", "sgd") for w in (0.25, 0.5)
        ]
        first = [one(method, "adam", width, "first MLP") for width in (0.25, 0.5)]
        yield [label, *cells, *(f"{r['frobenius']:.1f}" for r in first)]
    first = one("paper", "adam", 0.25, "first MLP")
    yield f"The norm of the first MLP's kernel is {first['frobenius'] / first['relative']:.0f}."


@block(("ntk-bound-cpu", "ntk_bound --figure docs/figures/ntk-error-versus-width.svg"))
def ntk_bound() -> Lines:
    found = result("ntk-bound-cpu")["summary"]
    yield "bound over measured change, median | grade `data` | grade `a priori`"
    for label, end in (("all", ""), ("all-MiniLM-L6-v2", "_minilm"), ("random MLPs", "_random")):
        keys = [f"median_looseness_{grade}{end}" for grade in ("data", "a_priori")]
        yield [label, *numbers(found, keys, ".1f")]
    yield (
        f"{found['violations']} of the bounds at {found['pairs']:,} pairs of inputs were violated. "
        f"The identities of kernels hold to {found['identities_max_error']:.0e}."
    )


@block(("whole-model-cpu", "whole_model"))
def whole_model() -> Lines:
    yield "all six MLPs at | change of embeddings | missed by the first order | bound over change"
    for width in (0.75, 0.5, 0.25):
        r = row("whole-model-cpu", width=width)
        missed = f"{100 * r['first_order_missed']:.0f} %"
        yield [f"{width}", f"{r['change']:.2f}", missed, f"{r['bound_over_change']:.0f}"]


@block(("dynamics-cpu", "dynamics --data DIR --figure docs/figures/dynamics.svg"))
def dynamics() -> Lines:
    yield (
        " | kernel error | apart, early | predicted | explained, early | "
        "explained, in all of training"
    )
    for kernel, title in (("sgd", "gradient descent"), ("adam", "sign descent")):
        for method, label in (("paper", PAPER), ("ours", MEANS)):
            r = row("dynamics-cpu", kernel=kernel, method=method)
            cells = numbers(r, ("kernel_error", "apart_early", "apart_predicted_early"))
            yield [
                f"{title}, {label}",
                *cells,
                *numbers(r, ("explained_early", "explained"), ".2f"),
            ]


@block(("kmeans-cpu", "kmeans", "Compilation, once for each shape, is not counted"))
def kmeans() -> Lines:
    yield " | A: seconds | inertia | B: seconds | inertia | C: seconds | inertia"
    labels = {
        "ours": "**`fj.kmeans`**",
        "scikit-learn, Lloyd, best of 30": "scikit-learn, Lloyd, best of 30 (the paper's setting)",
        "ours, Lloyd, best of 30": '`fj.kmeans(init="k-means++", refine="lloyd", n_init=30)`',
    }
    for method in (str(r["method"]) for r in rows("kmeans-cpu", problem="roberta-base")):
        cells: list[str] = []
        for problem in ("roberta-base", "joined", "minilm layer 2"):
            r = row("kmeans-cpu", problem=problem, method=method)
            cells += [short(r["seconds"]), f"{r['inertia']:.4f}"]
        yield [labels.get(method) or method, *cells]
    found = result("kmeans-cpu")["summary"]
    yield "\n".join(
        f"- {problem}: {found[f'speedup_vs_sklearn_30{end}']:.0f} times faster than the best of 30 "
        f"by scikit-learn, with {found[f'inertia_vs_sklearn_30{end}']:.4f} times its inertia."
        for problem, end in (("A", ""), ("B", "_joined"), ("C", "_minilm"))
    )
    ours = row("kmeans-cpu", problem="heavy-tailed", method="ours")
    theirs = row("kmeans-cpu", problem="heavy-tailed", method="scikit-learn, Lloyd")
    yield (
        "On random rows of the same size as A, with heavy tails and without structure, the inertia "
        f"is {ours['inertia'] / theirs['inertia']:.4f} times that of one fit by scikit-learn."
    )


@block(("kmeans-cpu", "kmeans"), ("kmeans-h100", "kmeans"))
def kmeans_large() -> Lines:
    yield " | seconds | Gram matrix alone | compilation | peak GiB"
    for device, name in (("2 CPU cores", "kmeans-cpu"), ("H100", "kmeans-h100")):
        for problem, method, label in (
            ("llama", "ours", "one MLP of Llama-2-7B's size, 11,008 x 12,288 → 2,752"),
            ("experts", "one call", "16 MLPs of MiniLM's size in one call"),
            ("experts", "a call for each", "the same with a call for each"),
        ):
            r = row(name, problem=problem, method=method)
            cells = [short(r["seconds"]), "", short(r["compile_seconds"]), ""]
            if "gram_alone_seconds" in r:
                cells[1] = short(r["gram_alone_seconds"])
            if "peak_gib" in r and device != "H100":  # of a GPU it would be the host's
                cells[3] = f"{r['peak_gib']:.1f}"
            yield [f"{label}, {device}", *cells]


@block(("compress-cpu", "compress"))
def compress() -> Lines:
    yield " | seconds, with compilation | without | peak GiB"
    for case, label in (
        ("minilm", "all-MiniLM-L6-v2, 4 MLPs 1,536 → 384, no calibration"),
        ("minilm, calibrated", "the same, calibrated on random tokens"),
        (
            "roberta-base-sized",
            "encoder of RoBERTa-base's size, 8 MLPs 3,072 → 768, no calibration",
        ),
        ("8 experts, one call", "8 gated experts, 1,408 → 352, calibrated, in one call"),
        ("8 experts, a call for each", "the same with a call for each"),
    ):
        r = row("compress-cpu", case=case)
        seconds = [f"{r['compress_seconds']:.1f}", ""]
        if "first_seconds" in r:
            seconds = [f"{r['first_seconds']:.1f}", seconds[0]]
        yield [label, *seconds, f"{r['peak_gib']:.1f}"]


@block(
    ("large-cpu", "large"),
    ("streaming-cpu", "streaming", "The machine was shared at the time: its memory counts"),
    (
        "streaming-moe-cpu",
        "streaming --case qwen3-moe --layers 1",
        "The machine was shared, too",
    ),
)
def large() -> Lines:
    yield " | seconds | peak GiB | 32 layers at this rate"
    for case, label in (
        ("llama-7b", "Llama-2-7B, one layer, 11,008 → 2,752"),
        ("mixtral", "Mixtral-8x7B, one layer, 8 experts 14,336 → 3,584"),
    ):
        r = row("large-cpu", case=case)
        hours = r["estimate_hours"]
        whole = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        yield [label, short(r["compress_seconds"]), f"{r['peak_gib']:.1f}", whole]
    (r,) = rows("streaming-cpu")
    label = f"Llama-2-7B's shape, {r['layers']} layers, from disk to disk, calibrated"
    yield [label, f"{r['seconds']:,.0f}", f"{r['peak_gib']:.1f}", ""]
    (r,) = rows("streaming-moe-cpu")
    label = "Qwen3-30B-A3B's shape, one layer, 128 experts 768 → 192, from disk to disk, calibrated"
    yield [label, f"{r['seconds']:,.0f}", f"{r['peak_gib']:.1f}", ""]


@block(("loading-cpu", "loading --models DIR"))
def loading() -> Lines:
    yield (
        "model | GiB | seconds | of it the structure | until used | peak, times the size | "
        "transformers: seconds | until used | peak | "
        "bytes alone, into new memory: seconds | into used memory"
    )
    found = {(r["model"], r["library"]): r for r in rows("loading-cpu")}
    for model in dict.fromkeys(model for model, _ in found):
        both = [found[model, library] for library in ("fusion_jax", "transformers")]
        cells = [[short(r["seconds"]), short(r["used_seconds"]), f"{r['peak']:.2f}"] for r in both]
        cells[0].insert(1, short(both[0]["structure_seconds"]))
        bytes_alone = [short(found[model, f"{kind} memory"]["seconds"]) for kind in ("new", "used")]
        yield [model, f"{both[0]['gib']:.2f}", *cells[0], *cells[1], *bytes_alone]


@block(("ntk-cost-cpu", "ntk_cost"))
def ntk_cost() -> Lines:
    yield " | engine | kernel | seconds | peak GiB"
    problems = {
        "mlp-traced": "one MLP, traced over outputs",
        "mlp-full": "one MLP, in full",
        "model": "small encoder",
        "encoder": "encoder of 125 M parameters",
    }
    for r in rows("ntk-cost-cpu"):
        engine = f"`{r['engine']}`"
        if r["engine"] == "closed-form":
            engine = "closed form, `ntk.mlp`"
        if r["implementation"]:
            engine = f"neural-tangents, {r['implementation']}"
        kernel = {"sgd": "SGD", "adam": "Adam"}[r["kind"]]
        if "refused" in r:
            late = r["refused"].startswith("took longer than")
            cells = ["over 60" if late else "does not fit in memory", ""]
        else:
            cells = [short(r["seconds"]), f"{r['peak_gib']:.1f}"]
        yield [problems[r["problem"]], engine, kernel, *cells]


@block(("step-cpu", "step"))
def step() -> Lines:
    yield " | dense, seconds | fused, seconds | dense, GiB | fused, GiB"
    for library, label in (("ours", "fusion_jax"), ("torch", "transformers and PyTorch")):
        cells = [row("step-cpu", case=f"{library}-{kind}") for kind in ("dense", "fused")]
        seconds = [f"{c['seconds']:.2f}" for c in cells]
        yield [label, *seconds, *(f"{c['peak_gib']:.1f}" for c in cells)]
    found = result("step-cpu")["summary"]
    yield (
        f"The fused step does {found['flop_ratio']:.2f} times fewer operations in matrix products "
        f"and is {found['fused_over_dense']:.2f} times faster. PyTorch, "
        f"{result('step-cpu')['env']['versions']['torch']}, needs less memory as it trains the "
        "caller's model in place."
    )


@block(("cold-cpu", "cold"))
def cold() -> Lines:
    yield " | programs | compiling, seconds | in all, seconds"
    names = {
        "k-means": "`fj.kmeans`, 3,072 points in 1,537 dimensions, 768 clusters",
        "compress": "`fj.compress`, four MLPs of all-MiniLM-L6-v2, 1,536 to 384",
        "compress, calibrated": "the same, calibrated on random tokens",
        "first steps": "two steps of fine-tuning it",
        "demo": "`fusion-jax demo`",
        "random encoder": "an encoder of RoBERTa-base's size with random weights",
    }
    for case, name in names.items():
        for again in ("", ", again"):
            for r in rows("cold-cpu", case=case + again):
                seconds = numbers(r, ("compile", "seconds"), ".1f")
                yield [name + again, str(r["programs"]), *seconds]


@block(("memory-cpu", "MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.memory"))
def memory() -> Lines:
    yield "steps | median MiB | smallest | largest"
    for r in rows("memory-cpu"):
        yield [r["steps"], *numbers(r, ("median_mib", "least_mib", "most_mib"), ".0f")]
    growth = 100 * result("memory-cpu")["summary"]["growth"]
    yield f"The median of the last third is {growth:.2f} % above that of the second."


@block(("finetune-cpu", "finetune --data GLUE --steps 400"))
def finetune() -> Lines:
    yield " | SST-2, accuracy: p/4 | p/8 | CoLA, Matthews: p/4 | p/8"
    tasks = {"sst2": "accuracy", "cola": "matthews"}

    def cell(task: str, **fields: Any) -> str:
        return spread(rows("finetune-cpu", task=task, **fields), tasks[task], 100)

    dense = [cell(task, method="dense") for task in tasks]
    yield ["dense", dense[0], "", dense[1], ""]
    for (method, tuned), label in TUNING.items():
        cases = [(task, width) for task in tasks for width in (0.25, 0.125)]
        yield [label, *(cell(t, width=w, method=method, tuned=tuned) for t, w in cases)]


def paper_table() -> Lines:
    """The paper's table at its own size, beside the paper's scores of RoBERTa-base."""
    yield " | the paper, RoBERTa-base: SST-2, accuracy | here: SST-2, accuracy | CoLA, Matthews"
    for method, label in PAPER_TABLE.items():
        for tuned in (False, True) if method != "dense" else (False,):
            cells = [PUBLISHED.get((method, tuned), "")]
            for task, metric in (("sst2", "accuracy"), ("cola", "matthews")):
                found = rows(TABLE, task=task, method=method, tuned=tuned)
                one = [f"{100 * r[metric]:.1f}" for r in found][:1]
                cells.append(spread(found, metric, 100) if found[1:] else "".join(one))
            yield [f"{label}, tuned" if tuned else label, *cells]


if (ROOT / RESULTS / f"{TABLE}.json").is_file():  # it takes an accelerator
    block((TABLE, "finetune --data GLUE --model all-mpnet-base-v2 --last 8 --widths 768"))(
        paper_table
    )


@block(
    ("finetune-time-cpu", "finetune --data GLUE --tasks sst2 --widths 0.25 --seeds 1 --steps 100")
)
def finetune_time() -> Lines:
    yield " | seconds | peak GiB"
    for (method, tuned), label in {("dense", False): "dense", **TUNING}.items():
        r = row("finetune-time-cpu", method=method, tuned=tuned)
        yield [label, f"{r['seconds']:.0f}", f"{r['peak_gib']:.1f}"]


@block(("methods-cpu", "methods --data GLUE --figure docs/figures/methods.svg"))
def methods() -> Lines:
    yield (f" | {ERROR_HEAD} | compress, s | step | GiB | MB | SST-2, accuracy | CoLA, Matthews")
    for method, label in METHODS.items():
        r = row("methods-cpu", method=method, task="")
        errors = numbers(r, ERRORS) if r.get("output") else [""] * 3
        seconds = "" if method.startswith(TRAINED_ONLY) else f"{r['seconds']:.1f}"
        cost = [f"{r['step_seconds'] / r['dense_step_seconds']:.2f}"]
        cost += numbers(r, ("peak_gib", "artefact_mb"), ".1f")
        found = [rows("methods-cpu", method=method, task=task) for task in ("sst2", "cola")]
        yield [label, *errors, seconds, *cost, *(spread(each, "score") for each in found)]
    dense = [r["dense_step_seconds"] for r in rows("methods-cpu", task="")]
    yield (
        f"A step of the dense model took {min(dense):.2f} to {max(dense):.2f} s, as some runs "
        "shared the machine."
    )


@block()
def rank_correlations() -> Lines:
    from benchmarks.methods import agreement

    yield f" | {ERROR_HEAD}"
    for but, label in (("", "all"), ("fusion", "without the two of `Fusion`")):
        for line in agreement(result("methods-cpu")["rows"], but=but):
            if line["task"] == "sst2":
                yield [f"{label}: {line['methods']} methods", *numbers(line, ERRORS, ".2f")]


@block((
    "methods-h100",
    "methods --data GLUE --tasks sst2 cola --steps 2400 --seeds 1 --shapes 2 --workers 10 "
    "--budget 490",
))  # fmt: skip
def methods_long() -> Lines:
    yield " | SST-2, accuracy"
    for r in sorted(rows("methods-h100", task="sst2"), key=lambda r: -r["score"]):
        yield [METHODS[r["method"]], f"{r['score']:.1f}"]
    left = result("methods-h100")["summary"]["runs_left"]
    yield f"The time budget ended before the other {left} runs, among them all of CoLA."


@block()
def promised() -> Lines:
    yield " | papers: SST-2 | CoLA | here: SST-2 | CoLA"
    for method, paper in {"dense": ["", ""], **PROMISED}.items():
        found = [rows("methods-cpu", method=method, task=task) for task in ("sst2", "cola")]
        yield [METHODS[method], *paper, *(f"{mean(each, 'score'):.1f}" for each in found)]


@block((
    "methods-long-cpu",
    "methods --data GLUE --tasks cola --steps 1600 --seeds 1 --only dense "
    '"static, 80% kept" "static, 50% kept" "static, 10% kept"',
))  # fmt: skip
def static_pruning() -> Lines:
    names = ("dense", "static, 80% kept", "static, 50% kept", "static, 10% kept")
    yield " | ".join(["CoLA, Matthews", *(METHODS[name] for name in names)])
    for file, label in (
        ("methods-cpu", "400 steps, three seeds"),
        ("methods-long-cpu", "1,600 steps, one seed"),
    ):
        found = [rows(file, method=name, task="cola") for name in names]
        yield [label, *(f"{mean(each, 'score'):.1f}" for each in found)]


@block(("language-cpu", "language --data DIR"))
def language() -> Lines:
    yield f" | {ERROR_HEAD} | nats per token: fused | tuned | fine-tuned"
    for model, label in (
        ("tinygpt-shakespeare", "tinygpt-shakespeare, 0.8 M parameters"),
        ("stories260K", "stories260K, gated"),
    ):
        dense = row("language-cpu", model=model, method="dense")
        nats = numbers(dense, ("nats", "fine_tuned"))
        yield [f"{label}: dense", "", "", "", nats[0], "", nats[1]]
        for method, title in (("paper", PAPER), ("ours", MEANS)):
            for width, size in ((0.5, "p/2"), (0.25, "p/4"), (0.125, "p/8")):
                r = row("language-cpu", model=model, method=method, width=width)
                keys = [*ERRORS, "nats", "tuned", "fine_tuned"]
                yield [f"{title}, {size}", *numbers(r, keys)]


def _narrowed(method: str) -> str:
    """Returns how a method of benchmarks.real is written in code."""
    if method.startswith("Fusion"):
        code, *more = method.split(", ")
        return ", ".join([f"`{code}`", *more])
    score, *refit = method.split(" + ")
    if score == "flap":
        return '`Prune(score="fluctuation")` and mean outputs: FLAP'
    return f'`Prune(score="{score}"{", refit=True" if refit else ""})`'


REAL = ("real-cpu", "real --models DIR --data DIR")


def _table_of(columns: list[tuple[str, float, str]], form: str = ".3f") -> Lines:
    """Returns the rows of benchmarks.real that have some of these models, widths and measures."""
    from benchmarks.real import methods

    for method in methods():
        cells = []
        for model, width, key in columns:
            found = rows("real-cpu", model=model, width=width, method=method, calibration="text")
            cells.append(format(found[0][key], form) if found and key in found[0] else "")
        if any(cells):
            yield [_narrowed(method), *cells]


@block(REAL)
def real_language() -> Lines:
    columns = [("gemma", 0.75), ("gemma", 0.5), ("qwen", 0.75), ("qwen", 0.5)]
    columns += [("stories260k", 0.75), ("stories260k", 0.5), ("tinygpt", 0.5), ("tinygpt", 0.25)]
    measured_at = [(m, w) for m, w in columns if rows("real-cpu", model=m, width=w)]
    yield " | ".join(["nats per token", *(f"{NAMES.get(m, m)}, {w:g}" for m, w in measured_at)])
    dense = {m: row("real-cpu", model=m, method="dense") for m, _ in measured_at}
    yield ["dense", *(f"{dense[m]['nats']:.3f}" for m, _ in measured_at)]
    yield from _table_of([(m, w, "nats") for m, w in measured_at])


@block(REAL)
def real_more() -> Lines:
    from benchmarks.real import methods

    models = ("gemma", "qwen")
    names = {"text": "8,192 tokens", "more": "32,768 tokens"}
    columns = [(model, width, text) for model in models for width in (0.75, 0.5) for text in names]
    heads = [
        f"{NAMES[model]}, {width:g}: {names[text]}" if text == "text" else names[text]
        for model, width, text in columns
    ]
    yield " | ".join(["nats above dense", *heads])
    dense = {model: row("real-cpu", model=model, method="dense")["nats"] for model in models}
    for method in methods():
        cells = []
        for model, width, text in columns:
            case = {"model": model, "width": width, "method": method, "calibration": text}
            found = rows("real-cpu", **case)
            cells.append("".join(f"+{r['nats'] - dense[model]:.3f}" for r in found))
        if any(cells[1::2]):  # with more text
            yield [_narrowed(method), *cells]


@block(REAL)
def real_encoders() -> Lines:
    measures = {
        "agreement": "similarities",
        "output": "output",
        "sgd_kernel": "SGD kernel",
        "adam_kernel": "Adam kernel",
        "first_step": "first step",
    }
    columns, heads = [], []
    for model, width in (("minilm", 0.25), ("minilm", 0.125), ("mpnet", 0.25)):
        if rows("real-cpu", model=model, width=width):
            columns += [(model, width, key) for key in measures]
            first, *rest = measures.values()
            heads += [f"{model}, {width:g}: {first}", *rest]
    yield " | ".join(["", *heads])
    yield from _table_of(columns)


@block(("heal-cpu", "heal --models DIR --data DIR"))
def heal() -> Lines:
    from benchmarks.heal import METHODS, MODELS, STEPS

    yield " | ".join(["nats per token, after steps", *(f"{n:,}" for n in STEPS)])
    for model, width in MODELS.items():
        if not rows("heal-cpu", model=model, width=width):
            continue
        name = NAMES.get(model, model)
        dense = row("heal-cpu", model=model, method="dense")["nats"]
        yield [f"{name}: dense", f"{dense:.3f}", *([""] * (len(STEPS) - 1))]
        for method in METHODS:
            cells = []
            for n in STEPS:
                found = rows("heal-cpu", model=model, width=width, method=method, steps=n)
                cells.append(f"{found[0]['nats']:.3f}" if found else "")
            if any(cells):
                yield [f"{name}, {width:g}: {_narrowed(method)}", *cells]


@block(("switch-cpu", "switch --data DIR"))
def switch() -> Lines:
    yield " | nats: fused | tuned | fine-tuned | accuracy: fused | tuned | fine-tuned"
    for method, sizes, label in (
        ("dense", "-", "dense"),
        ("paper", "applied", PAPER),
        ("ours", "applied", MEANS),
        (
            "ours, widths by use",
            "applied",
            "the same with `by_use=0.5`: widths by the router's use",
        ),
        ("paper", "not applied", f"{PAPER}, sizes not applied"),
        ("ours", "not applied", "the same, sizes not applied"),
    ):
        r = row("switch-cpu", method=method, sizes=sizes)
        ends = ("", "_tuned", "_fine_tuned")
        cells = numbers(r, (f"nats{end}" for end in ends))
        cells += numbers(r, (f"accuracy{end}" for end in ends), ".1%")
        if method == "dense":  # which is not tuned
            cells[1] = cells[4] = ""
        yield [label, *cells]
    found = result("switch-cpu")["summary"]
    share = 1 - found["fused"] / found["parameters"]
    yield f"Fusing removes {share:.0%} of the model's {found['parameters']:,} parameters."


@block(
    (
        "experts-cpu",
        "experts --data DIR --cache DIR",
        "The machine was shared at the time: seconds, with calibration, are upper bounds",
    )
)
def experts() -> Lines:
    from benchmarks.experts import METHODS, MODELS, SHARES

    names = {"switch": "Switch", "mixtral": "Mixtral"}
    columns = [(model, share) for model in MODELS for share in SHARES]
    heads = [f"{names[m]}, {s:g}" for m, s in columns]
    yield " | ".join(["nats per token, by what is left of the experts", *heads, "s, Mixtral, 0.5"])
    dense = {m: row("experts-cpu", model=m, method="dense")["nats"] for m in MODELS}
    yield ["dense", *(f"{dense[m]:.3f}" for m, _ in columns), ""]
    for method in METHODS:
        found = [row("experts-cpu", model=m, share=s, method=method) for m, s in columns]
        drop = method.removeprefix("drop, ")
        label = _narrowed(method) if drop == method else f'`DropExperts(score="{drop}")`'
        seconds = row("experts-cpu", model="mixtral", share=0.5, method=method)["seconds"]
        yield [label, *(f"{r['nats']:.3f}" for r in found), short(seconds)]


@block(("nlg-cpu", "nlg --data DIR --steps 500"))
def nlg() -> Lines:
    yield " | BLEU | chrF | TER, low is good"
    for (method, tuned), label in {("dense", False): "dense", **TUNING}.items():
        found = rows("nlg-cpu", method=method, tuned=tuned)
        cells = []
        for metric in ("bleu", "chrf", "ter"):
            means = [mean(found, f"{part} {metric}") for part in ("seen", "unseen", "all")]
            cells.append(" / ".join(f"{m:.1f}" for m in means))
        cells[0] += f" ± {statistics.stdev(r['all bleu'] for r in found):.1f}"
        yield [label, *cells]


@block(("mpo-cpu", "mpo", "The machine was shared at the time: ratios count, not times"))
def mpo() -> Lines:
    yield (
        "bonds up to | positions | MFLOP, chosen order | rebuilt | dense | "
        "ms, chosen order | rebuilt | dense"
    )
    for r in rows("mpo-cpu"):
        flops = numbers(r, ("mflop", "mflop_rebuilt", "mflop_dense"), ",.1f")
        times = [short(r[key]) for key in ("ms", "ms_rebuilt", "ms_dense")]
        yield [str(r["bond"]), f"{r['rows']:,}", *flops, *times]


@block(words=True)
def families() -> Lines:
    yield "`model_type` | class in `transformers` | heads | tested on"
    for known in coverage():
        heads = ", ".join(known.heads)
        yield [f"`{known.model_type}`", known.model, heads, known.tested]


def updated(text: str) -> str:
    """Returns a page with every block as its function makes it."""

    def fresh(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in BLOCKS:
            raise SystemExit(f"there is no block {name!r}; there are {', '.join(BLOCKS)}")
        return f"{begin}\n\n{BLOCKS[name]()}\n\n{end}"

    pattern = r"(<!-- begin ([\w-]+) -->).*?(<!-- end \2 -->)"
    return re.sub(pattern, fresh, text, flags=re.DOTALL)


def stale() -> dict[Path, str]:
    """Returns the new texts of the pages that are out of date, by path."""
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    return {page: new for page, text in texts.items() if (new := updated(text)) != text}


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    check = options.parse_args().check
    found = stale()
    for page, text in found.items():
        if check:
            print(f"{page} is out of date; update it by: python -m benchmarks.tables")
        else:
            (ROOT / page).write_text(text, encoding="utf-8")
            print(f"{page} updated")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
