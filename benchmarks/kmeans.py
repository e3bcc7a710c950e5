"""Compares the clustering engine with other libraries: seconds and inertia, in one run.

- ``minilm``: rows of all MLPs of all-MiniLM-L6-v2, 1,536 x 769 -> 384. The peers run on layers 2
  and 5.
- ``roberta-base``: as many points as an MLP of RoBERTa-base gives, 3,072 x 1,537 -> 768. They are
  synthetic, with the spectrum and the lengths that the rows of MiniLM's MLPs have on average:
  normal rows, coordinate j times j^-0.42, each row times exp(0.14 z) with z normal.
- ``joined``: the same size, of real weights that do not belong together: rows of MiniLM's layers 2
  and 3, each continued by a row of layers 4 and 5.
- ``heavy-tailed``: the same size without structure: normal rows times exp(0.35 z). Only ours and
  one fit of scikit-learn.
- ``llama``: points of Llama-2-7B's size, 11,008 x 12,288 -> 2,752, heavy-tailed too. Only ours, and
  the time of one matmul X X^T, the Gram matrix.
- ``experts``: 16 MLPs of MiniLM's size by `fusion_jax.compress_mlp` in one call, under vmap, and in
  a call for each.
- ``rounds``: what bounds the time on a GPU, counted on any machine: steps one after another, one by
  one and in rounds; the bytes that a round reads; its kernels, as XLA fuses them for this device;
  and the size of the program, with its matrix products and sorts, for CPUs and for GPUs.
- ``large-rounds``: the steps of llama's points; minutes on a CPU, only with ``--case``.

Each case has a process of its own. Seconds are the median of some runs, without compilation, which
is listed separately. Inertia is the fraction of the total sum of squares; it is computed here in
float64 from the labels for all libraries. scikit-learn's 30 restarts are 30 fits from different
seeds: seconds are their sum, inertia is that of the best fit. ``matmul_share`` is the time that the
Gram matrix would take at the machine's best measured float32 matmul rate, divided by the time of
the clustering. ``load_before`` is the machine's load average in the minute before the case, which
may include the previous case: seconds are valid on an idle machine only.

    python -m benchmarks.kmeans [--quick] [--case NAME] [--json FILE]

``pip install 'fusion-jax[bench]'`` installs the peers; missing ones are left out. With ``--case``,
the rows of other cases in FILE stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fusion_jax as fj
from benchmarks.common import finish, parser, peak_gib
from fusion_jax.cli.demo import find_model
from fusion_jax.clustering import gram as one_by_one
from fusion_jax.clustering import rounds as in_rounds

Row = dict[str, Any]
Clustering = Callable[[np.ndarray, int, int], Any]
"""Maps points, k and a seed to labels."""

RESTARTS = 30
EXPERTS = 16
LAYERS = (2, 5)
"""MiniLM's layers on which the peers run."""
SECONDS = 5
"""The time that a clustering is repeated for, at most `RUNS` times."""
RUNS = 10


def ours(x: np.ndarray, k: int, seed: int, **options: Any) -> jax.Array:
    return fj.kmeans(jnp.asarray(x), k, key=jax.random.key(seed), **options).labels


def sklearn(name: str, x: np.ndarray, k: int, seed: int, **options: Any) -> np.ndarray:
    if name != "AgglomerativeClustering":
        options |= {"n_init": 1, "random_state": seed}
    return getattr(import_module("sklearn.cluster"), name)(k, **options).fit_predict(x)


def faiss(x: np.ndarray, k: int, seed: int, **options: Any) -> np.ndarray:
    kind = import_module("faiss").Kmeans
    peer = kind(x.shape[1], k, seed=seed + 1, min_points_per_centroid=1, **options)
    peer.train(x)
    return peer.assign(x)[1]


@partial(jax.jit, static_argnames=("k", "n_init"))
def ott(x: np.ndarray, k: int, seed: int, n_init: int) -> jax.Array:
    # Under one jit: otherwise every call is traced again.
    result = import_module("ott.tools.k_means").k_means(
        jnp.asarray(x), k, n_init=n_init, rng=jax.random.key(seed)
    )
    return result.assignment.astype(jnp.int32)


OURS = "ours"
LLOYD = "scikit-learn, Lloyd"
BEST = f"scikit-learn, Lloyd, best of {RESTARTS}"
PEERS: dict[str, tuple[str, Clustering]] = {
    "scikit-learn, Elkan": ("sklearn", partial(sklearn, "KMeans", algorithm="elkan")),
    "scikit-learn, MiniBatch": ("sklearn", partial(sklearn, "MiniBatchKMeans")),
    "scikit-learn, Ward": ("sklearn", partial(sklearn, "AgglomerativeClustering")),
    "faiss-cpu": ("faiss", faiss),
    # 1 is faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS.
    "faiss-cpu, k-means++": ("faiss", partial(faiss, init_method=1)),
    "ott-jax": ("ott", partial(ott, n_init=1)),
    "ott-jax, best of 5": ("ott", partial(ott, n_init=5)),
}
"""The module that each peer needs, and the function to call."""


def heavy_tailed(n: int, d: int, seed: int = 0, spread: float = 0.35) -> np.ndarray:
    """Returns normal rows of different lengths, in float32."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d), np.float32)
    x *= np.exp(np.float32(spread) * rng.standard_normal((n, 1), np.float32))
    return x


def quality(x: np.ndarray, labels: Any, k: int) -> Row:
    """Returns the inertia over the total sum of squares, and the number of empty clusters."""
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    total = within = 0.0
    for start in range(0, x.shape[1], 512):
        part = x[order, start : start + 512].astype(np.float64)
        part -= part.mean(0)
        square = np.square(part).sum()
        total += square
        within += square - (np.square(np.add.reduceat(part, starts)).sum(1) / sizes).sum()
    return {"inertia": float(within / total), "empty": k - len(sizes)}


def matmul_rate(quick: bool) -> float:
    """Returns the operations (two a multiply-add) per second of the best of some matmuls."""
    n = 256 if quick else 4096
    x = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(partial(jnp.matmul, precision="highest"))
    return 2 * n**3 / min(timed(lambda: product(x, x))[0] for _ in range(4))


def gram_seconds(shape: tuple[int, int], rate: float) -> float:
    """Returns the seconds of X X^T, for points of a shape, at a matmul rate."""
    n, d = shape
    return 2 * n * n * d / rate


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds of a call, and its computed result."""
    start = time.perf_counter()
    result = jax.block_until_ready(f())
    return time.perf_counter() - start, result


def measured(cluster: Clustering, x: np.ndarray, k: int, compiles: bool) -> Row:
    """Runs a clustering from different seeds, and returns the medians."""
    first = timed(lambda: cluster(x, k, 0))[0] if compiles else None
    runs: list[tuple[float, float, int]] = []
    while len(runs) < RUNS and sum(run[0] for run in runs) < SECONDS:
        seconds, labels = timed(lambda: cluster(x, k, len(runs)))
        found = quality(x, labels, k)
        runs.append((seconds, found["inertia"], found["empty"]))
    seconds, inertia, empty = (float(v) for v in np.median(runs, axis=0))
    row = {"seconds": seconds, "inertia": inertia, "empty": int(empty)}
    return row if first is None else {**row, "compile_seconds": max(0.0, first - seconds)}


def restarts(x: np.ndarray, k: int) -> dict[str, Row]:
    """Returns the median of many fits of scikit-learn, and the best fit."""
    runs = [timed(lambda seed=seed: sklearn("KMeans", x, k, seed)) for seed in range(RESTARTS)]
    times = [seconds for seconds, _ in runs]
    found = [quality(x, labels, k) for _, labels in runs]
    best = min(found, key=lambda one: one["inertia"])
    middle = {name: float(np.median([one[name] for one in found])) for name in best}
    return {
        LLOYD: {"seconds": float(np.median(times)), **middle, "empty": int(middle["empty"])},
        BEST: {"seconds": sum(times), **best},
    }


def against_peers(problem: str, x: np.ndarray, k: int, rate: float, peers: bool) -> list[Row]:
    """Returns the rows of ours and of the installed peers."""
    rows = []

    def add(method: str, row: Row) -> None:
        if method == OURS:
            row["matmul_share"] = gram_seconds(x.shape, rate) / row["seconds"]
        rows.append({"problem": problem, "method": method, **row})
        print(f"{problem}: {method}", row, file=sys.stderr, flush=True)

    add(OURS, measured(ours, x, k, compiles=True))
    if not peers:
        return rows
    same = partial(ours, init="k-means++", refine="lloyd", n_init=RESTARTS)
    add(f"ours, Lloyd, best of {RESTARTS}", measured(same, x, k, compiles=True))
    missing = {"note": "not installed"}
    found = find_spec("sklearn")
    for method, row in (restarts(x, k) if found else {LLOYD: missing, BEST: missing}).items():
        add(method, row)
    for method, (module, cluster) in PEERS.items():
        installed = find_spec(module) is not None
        add(method, measured(cluster, x, k, module == "ott") if installed else missing)
    return rows


def real_rows() -> list[np.ndarray]:
    """Returns the sub-MLPs of all-MiniLM-L6-v2's six MLPs, (1536, 769) each."""
    return [np.asarray(s.mlp.sub_mlps().rows()) for s in fj.sites(fj.load(find_model()))]


def minilm(quick: bool) -> list[Row]:
    rate = matmul_rate(quick)
    rows = []
    for i, x in enumerate(real_rows()):
        rows += against_peers(f"minilm layer {i}", x, len(x) // 4, rate, peers=i in LAYERS)
    return rows


def roberta_base(quick: bool) -> list[Row]:
    n, d = (192, 97) if quick else (3072, 1537)
    points = heavy_tailed(n, d, spread=0.14) * np.arange(1, d + 1, dtype=np.float32) ** -0.42
    return against_peers("roberta-base", points, n // 4, matmul_rate(quick), peers=True)


def joined(quick: bool) -> list[Row]:
    rows = real_rows()
    left, right = np.concatenate(rows[2:4]), np.concatenate(rows[4:6])
    points = np.concatenate([left, right[:, 1:]], axis=1)
    return against_peers("joined", points, 768, matmul_rate(quick), peers=True)


def unstructured(quick: bool) -> list[Row]:
    n, d = (192, 97) if quick else (3072, 1537)
    points, k = heavy_tailed(n, d), n // 4
    rows = against_peers("heavy-tailed", points, k, matmul_rate(quick), peers=False)
    if find_spec("sklearn"):
        fit = measured(partial(sklearn, "KMeans"), points, k, compiles=False)
        rows.append({"problem": "heavy-tailed", "method": LLOYD, **fit})
    return rows


def llama(quick: bool) -> list[Row]:
    n, d = (344, 384) if quick else (11008, 12288)
    points = jax.block_until_ready(jnp.asarray(heavy_tailed(n, d)))
    run = partial(fj.kmeans, points, n // 4, key=jax.random.key(0))
    first, _ = timed(run)
    seconds, result = timed(run)
    peak = peak_gib()
    gram = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))
    # The first call compiles.
    gram_alone = min(timed(lambda: gram(points))[0] for _ in range(2))
    row = {"seconds": seconds, **quality(np.asarray(points), result.labels, n // 4)}
    row |= {
        "compile_seconds": max(0.0, first - seconds),
        "matmul_share": gram_seconds((n, d), matmul_rate(quick)) / seconds,
        "gram_alone_seconds": gram_alone,
        "peak_gib": peak,
    }
    return [{"problem": "llama", "method": OURS, **row}]


def experts(quick: bool) -> list[Row]:
    p, d = (64, 16) if quick else (1536, 384)
    rows = jnp.stack([jnp.asarray(heavy_tailed(p, 2 * d + 1, seed)) for seed in range(EXPERTS)])
    subs = fj.SubMLPs(up=rows[..., :d], up_bias=rows[..., d], down=rows[..., d + 1 :])
    each = [jax.tree.map(lambda x, i=i: x[i], subs) for i in range(EXPERTS)]
    solve = partial(fj.compress_mlp, method=fj.Fusion(width=p // 4), key=jax.random.key(0))
    cluster = jax.jit(jax.vmap(partial(fj.kmeans, k=p // 4, key=jax.random.key(0))))
    methods: dict[str, Callable[[], Any]] = {
        "one call": lambda: solve(subs).parts.labels,
        "a call for each": lambda: jnp.stack([solve(one).parts.labels for one in each]),
        "kmeans under vmap": lambda: cluster(rows).labels,
    }
    first = {name: timed(f)[0] for name, f in methods.items()}
    # In turns, so that other load on the machine affects all alike.
    runs = [{name: timed(f) for name, f in methods.items()} for _ in range(5)]
    made = []
    for name in methods:
        seconds = float(np.median([run[name][0] for run in runs]))
        found = [
            quality(np.asarray(x), labels, p // 4)
            for x, labels in zip(rows, runs[0][name][1], strict=True)
        ]
        made.append(
            {
                "problem": "experts",
                "method": name,
                "seconds": seconds,
                "inertia": float(np.mean([one["inertia"] for one in found])),
                "empty": sum(one["empty"] for one in found),
                "compile_seconds": max(0.0, first[name] - seconds),
            }
        )
    return made


def kernels(f: Callable[..., Any], *args: Any) -> int:
    """Returns the number of kernels in a step of the last loop of a function, about."""
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    body = re.findall(r" while\(.*body=(%[\w.-]+)", text.split("\nENTRY ")[1])[-1]
    step = text.split(f"\n{body} (", 1)[1].split("\n}", 1)[0]
    # XLA for CPUs splits a reduction into two, the first of them a reduce-window.
    free = "parameter|constant|tuple|get-tuple-element|bitcast|iota|reduce-window"
    step = re.sub(r"(?m)^.*%wrapped_reduce-window\S* = .*$", "", step)
    return len(re.findall(rf"(?m)^  (?:ROOT )?%\S+ = .*? (?!(?:{free})\()[a-z-]+\(", step))


def steps(problem: str, points: np.ndarray) -> list[Row]:
    """Returns how many steps the two ways take, and what they give."""
    x = jnp.asarray(points - points.mean(0))
    n, k = len(x), len(x) // 4
    w, limit = jnp.ones(n), jnp.int32(300)
    x /= jnp.abs(x).max()
    gram = jax.block_until_ready(jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))(x))
    del x
    chain = jax.jit(partial(one_by_one.ward_start, k=k))(gram, w)
    merges = jax.jit(partial(in_rounds.ward_merges, k=k))(gram, w)
    labels = jax.jit(partial(one_by_one.cut, k=k))(
        merges.into, jnp.arange(n, dtype=jnp.int32), merges.heights
    )
    same = len(set(zip(chain.tolist(), labels.tolist(), strict=True))) == k
    single = jax.jit(partial(one_by_one.hartigan, k=k))(gram, w, chain, max_rounds=limit)
    moved, rounds = jax.jit(partial(in_rounds.hartigan_rounds, k=k))(
        gram, w, labels, max_rounds=limit
    )
    total = jnp.trace(gram)
    small = jnp.eye(512), jnp.ones(512)
    few = jnp.arange(512, dtype=jnp.int32) % 128
    return [
        {
            "problem": problem,
            "method": "one by one",
            "merge_steps": 3 * n,
            "moves": int(single.steps),
            "inertia": float(single.objective / total),
            "converged": bool(single.converged),
        },
        {
            "problem": problem,
            "method": "in rounds",
            "merge_steps": int(merges.rounds),
            "merge_bytes": 4 * n * n,
            "merge_kernels": kernels(partial(in_rounds.ward_merges, k=128), *small),
            "same_merges": same,
            "moves": int(moved.steps),
            "move_steps": int(rounds),
            "move_bytes": 4 * k * n,
            "move_kernels": kernels(
                partial(in_rounds.hartigan, k=128, max_rounds=limit), *small, few
            ),
            "inertia": float(moved.objective / total),
            "converged": bool(moved.converged),
        },
    ]


def program(quick: bool) -> list[Row]:
    """Returns the sizes of the programs of a clustering, which need no GPU to be made."""
    n, d = (192, 97) if quick else (3072, 1537)
    shapes = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.random.key(0)
    rows = []
    for platform in ("cpu", "cuda"):
        run = jax.jit(lambda x, key: fj.kmeans(x, n // 4, key=key))
        lowered = run.trace(*shapes).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        row = {
            "problem": "rounds, program",
            "method": platform,
            "lines": text.count("\n"),
            "products": text.count("stablehlo.dot_general"),
            "sorts": text.count("stablehlo.sort"),
        }
        if platform == jax.default_backend():
            # Of all threads, which other load on the machine changes less.
            start = time.process_time()
            lowered.compile()
            row["compile_cpu_seconds"] = time.process_time() - start
        rows.append(row)
    return rows


def counts(quick: bool) -> list[Row]:
    n, d = (192, 97) if quick else (3072, 1537)
    points = heavy_tailed(n, d, spread=0.14) * np.arange(1, d + 1, dtype=np.float32) ** -0.42
    return [
        *steps("rounds, roberta-base", points),
        *steps("rounds, heavy-tailed", heavy_tailed(n, d)),
        *program(quick),
    ]


def counts_of_llama(quick: bool) -> list[Row]:
    n, d = (344, 384) if quick else (11008, 12288)
    return steps("large-rounds, llama", heavy_tailed(n, d))


CASES: dict[str, Callable[[bool], list[Row]]] = {
    "minilm": minilm,
    "roberta-base": roberta_base,
    "joined": joined,
    "heavy-tailed": unstructured,
    "llama": llama,
    "experts": experts,
    "rounds": counts,
    "large-rounds": counts_of_llama,
}

LIMITS = {
    "speedup_vs_sklearn_1": (8, None),
    "speedup_vs_sklearn_30": (250, None),
    "inertia_vs_sklearn_30": (None, 0.945),
    "inertia_vs_sklearn_30_minilm": (None, 0.935),
    "experts_batched_speedup": (0.8, None),
    "llama_over_gram": (None, 20),
    "llama_peak_gib": (None, 6),
}
"""The lower and upper limits of the summary's figures on a CPU."""


def summarize(rows: list[Row]) -> dict[str, float]:
    """Returns the figures of the measured cases; for MiniLM, means over its layers."""
    table = {(row["problem"], row["method"]): row for row in rows if "seconds" in row}
    summary: dict[str, float] = {}

    def ratio(field: str, problem: str, above: str, below: str) -> list[float]:
        """Returns the ratio for each problem whose name begins so and that has both rows."""
        return [
            table[name, above][field] / table[name, below][field]
            for name in dict.fromkeys(name for name, _ in table if name.startswith(problem))
            if (name, above) in table and (name, below) in table
        ]

    for problem, suffix in (("roberta-base", ""), ("minilm", "_minilm"), ("joined", "_joined")):
        for name, field, above, below in (
            ("speedup_vs_sklearn_1", "seconds", LLOYD, OURS),
            ("speedup_vs_sklearn_30", "seconds", BEST, OURS),
            ("inertia_vs_sklearn_30", "inertia", OURS, BEST),
        ):
            ratios = ratio(field, problem, above, below)
            if ratios:
                summary[name + suffix] = float(np.mean(ratios))
    for value in ratio("seconds", "experts", "a call for each", "one call"):
        summary["experts_batched_speedup"] = value
    if ("llama", OURS) in table:
        row = table["llama", OURS]
        summary["llama_over_gram"] = row["seconds"] / row["gram_alone_seconds"]
        summary["llama_peak_gib"] = row["peak_gib"]
    return summary


def main() -> int:
    arguments = parser(__doc__, keep=False)
    arguments.add_argument("--case", choices=CASES, help="one case only")
    arguments.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.measure:
        print(json.dumps(CASES[options.case](options.quick)))
        return 0
    rows: list[Row] = []
    if options.case and options.json is not None and options.json.is_file():
        kept = json.loads(options.json.read_text())["rows"]
        rows = [row for row in kept if not row["problem"].startswith(options.case)]
    # The quick run needs no real model.
    left_out = ("minilm", "joined") if options.quick else ("large-rounds",)
    every = [case for case in CASES if case not in left_out]
    for case in [options.case] if options.case else every:
        command = [sys.executable, "-m", "benchmarks.kmeans", "--measure", "--case", case]
        command += ["--quick"] * options.quick
        load = os.getloadavg()[0]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows += [{**row, "load_before": load} for row in json.loads(done.stdout)]
    summary = summarize(rows)
    finish(options, rows, summary, "scikit-learn", "faiss-cpu", "ott-jax")
    # Times of the quick run's sizes have no meaning.
    missed = [
        name
        for name, (lower, upper) in LIMITS.items()
        if name in summary
        and jax.default_backend() == "cpu"
        and (not options.quick or name.startswith("inertia"))
        and not (lower or 0) <= summary[name] <= (upper or np.inf)
    ]
    if missed:
        print(f"beyond its limit: {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
