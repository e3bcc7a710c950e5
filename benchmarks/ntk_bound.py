"""Compares certified bounds on kernels with the changes that fusing really makes.

It fuses the MLPs of all-MiniLM-L6-v2, on real text, and random MLPs: layers x widths x scalings x
activations, plain and gated. It also fuses them with fitted factors and output weights, which are
not those of clusters. For every pair of inputs it measures the traced kernels of SGD and Adam in
float64 and compares them with the bounds. The looseness is the bound divided by the measured
change, for the kernel that the scaling keeps. MLPs and the directions of the data grade are fitted
to other inputs than those of the bounds.

    python -m benchmarks.ntk_bound [--quick] [--model PATH] [--data DIR] [--json FILE]
                                   [--figure FILE] [--directions K]

Exits with 1 if any bound is violated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import fusion_jax as fj
from benchmarks.common import finish, parser, pyplot
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.cli.demo import find_model
from fusion_jax.models.tokens import load_tokenizer, sentences, tokenize
from fusion_jax.nn.fused import factors, stored_rows
from ntk import KernelKind
from ntk.bounds import (
    Pair,
    fit_sketch,
    kernel_change,
    output_change,
    uniform_bound,
    weight_norms,
)
from ntk.mlp import MlpWeights, mlp_weights, traced_kernel, upstream_kernel

KINDS: tuple[KernelKind, ...] = ("sgd", "adam")
SCALINGS = ("sgd", "adam", "folded")
FRACTIONS = {"p/16": 16, "p/8": 8, "p/4": 4, "p/2": 2, "p": 1}
ACTS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")


@dataclass(frozen=True, kw_only=True)
class MlpCase:
    """An MLP with inputs to fit to, and inputs at which the change is bounded."""

    source: str
    name: str
    weights: MlpWeights
    fit: jax.Array
    x: jax.Array


def double(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


def texts(data: Path | None) -> list[str]:
    """Returns real sentences: those of the package, or of SST-2's development set."""
    if data is None:
        return sentences()
    lines = (data / "glue" / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines[1:129]]


def minilm(network: Any, text: list[str], layers: list[int], inputs: int) -> Iterator[MlpCase]:
    """Yields MiniLM's MLPs in float64, with token positions of sentences as inputs."""
    batch = tokenize(load_tokenizer(network.provenance.folder), text)
    seen = mlp_inputs(network, *batch)
    real = np.asarray(batch.attention_mask)
    chosen = np.random.default_rng(0).permutation(real.sum())
    for site in fj.sites(network):
        if site.index in layers:
            x = double(np.asarray(seen[site.path])[real][chosen])
            weights = double(mlp_weights(site.mlp))
            name = f"layer {site.index}"
            yield MlpCase(source="minilm", name=name, weights=weights, fit=x[inputs:], x=x[:inputs])


def drawn(act: str, gated: bool, p: int, d: int, o: int, inputs: int, seed: int) -> MlpCase:
    """Returns a random MLP with variances that keep the size of signals, and normal inputs."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    weights = MlpWeights(
        up=normal(p, d) / np.sqrt(d),
        down=normal(p, o) / np.sqrt(p),
        up_bias=0.1 * normal(p),
        gate=normal(p, d) / np.sqrt(d) if gated else None,
        gate_bias=0.1 * normal(p) if gated else None,
        act=act,
    )
    x = normal(256 + inputs, d)
    name = f"{'gated ' if gated else ''}{p}x{d}"
    return MlpCase(source="random", name=name, weights=weights, fit=x[inputs:], x=x[:inputs])


def sub_mlps(weights: MlpWeights) -> fj.SubMLPs:
    return fj.SubMLPs(**{name: getattr(weights, name) for name in fj.SubMLPs._fields})


def clusters(weights: MlpWeights, width: int) -> np.ndarray:
    """Returns labels by k-means on the rows, as fusing does."""
    if width == weights.width:
        return np.arange(width)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), sub_mlps(weights))
    solution = fj.compress_mlp(single, fj.Fusion(width=width), key=jax.random.key(0))
    return np.asarray(solution.parts.labels)


def fused(weights: MlpWeights, labels: np.ndarray, scaling: str) -> Pair:
    """Returns an MLP and its fused version, with centroids that are means in float64."""
    counts = np.bincount(labels)
    sizes = jnp.asarray(counts, jnp.float64)

    def mean(rows: jax.Array) -> jax.Array:
        sums = np.zeros((len(counts), *rows.shape[1:]))
        np.add.at(sums, labels, np.asarray(rows))
        return jnp.asarray((sums.T / counts).T)

    around = factors(sizes, cast(Any, scaling))
    centroids = jax.tree.map(mean, sub_mlps(weights))
    effective = centroids._replace(down=centroids.down * sizes[:, None])
    rows = stored_rows(effective, around)
    fixed = around._asdict() if weights.gate is not None else around._replace(middle=None)._asdict()
    return Pair(weights, replace(weights, **rows._asdict(), **fixed), jnp.asarray(labels))


def fitted(mlp: MlpCase, method: fj.Fusion) -> Pair:
    """Returns an MLP and its version fitted by calibration, stored in float32 as usual."""
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (sub_mlps(mlp.weights), mlp.fit))
    solution = fj.compress_mlp(
        single[0], method, key=jax.random.key(0), act=mlp.weights.act, calibration=single[1]
    )
    parts = solution.parts
    fixed = parts.factors._asdict()
    if mlp.weights.gate is None:
        fixed["middle"] = None
    stored = replace(mlp.weights, **double({**parts.rows._asdict(), **fixed}))
    return Pair(mlp.weights, stored, parts.labels)


def wide_copy(pair: Pair) -> MlpWeights:
    """Returns the MLP of the original's width in which its centroid replaces each row."""
    plain = fused(pair.original, np.asarray(pair.labels), "adam").fused
    plain = replace(plain, outer=None, inner=None, middle=None)
    return jax.tree.map(lambda a: a[pair.labels], plain)


def measure(
    mlp: MlpCase, pair: Pair, kind: KernelKind, directions: int, extras: bool
) -> dict[str, Any]:
    """Returns bounds and changes of one fused MLP's kernel."""
    x, norms = mlp.x, weight_norms(pair)
    change = partial(kernel_change, pair, x, kind=kind)
    sketch = fit_sketch(pair, mlp.fit, kind=kind, directions=directions)
    bounds = {
        "data": change(sketch=sketch),
        "a_priori": change(grade="a priori"),
    }
    found = change(grade="measured")
    measured, radius = np.abs(np.asarray(found.mid)), np.asarray(found.radius)
    # Bounds are on exact changes; measured changes have rounding errors.
    least = measured - radius
    upper = np.triu_indices(len(x)) if kind == "sgd" else np.indices(measured.shape).reshape(2, -1)
    uniform = uniform_bound(norms, float(jnp.linalg.norm(x, axis=1).max()), kind=kind)
    violations = int((least > uniform).sum())
    row: dict[str, Any] = {}
    size = float(np.linalg.norm(np.asarray(traced_kernel(pair.original, x, kind=kind))))
    row["changed"] = float(np.linalg.norm(measured)) / size
    # Entries that changed by no more than rounding say nothing about a bound.
    moved = measured[tuple(upper)] > 10 * radius[tuple(upper)]
    ratios = {}
    for grade, bound in bounds.items():
        b = np.asarray(bound.bound)
        violations += int((least > b).sum())
        row[f"at_most_{grade}"] = bound.frobenius / size
        ratios[grade] = (b[tuple(upper)] / np.maximum(measured[tuple(upper)], 1e-300))[moved]
        row[f"looseness_{grade}"] = float(np.median(ratios[grade])) if moved.any() else None
    row["uniform_over_largest"] = uniform / float(measured.max()) if moved.any() else None
    row["pairs"] = 3 * measured.size
    if extras:
        found_violations, pairs = other_bounds(mlp, pair, kind, directions)
        violations += found_violations
        row["pairs"] += pairs
    return {**row, "violations": violations, "ratios": ratios}


def other_bounds(mlp: MlpCase, pair: Pair, kind: KernelKind, directions: int) -> tuple[int, int]:
    """Counts violations of bounds with upstream vectors and on outputs, and the pairs."""
    x = mlp.x
    o = pair.original.down.shape[1]
    g = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), o)))
    change = partial(kernel_change, pair, x, gx=g, kind=kind)
    measured = np.abs(np.asarray(change(grade="measured").mid))
    bounds = [change(grade="a priori"), change(directions=directions)]
    violations = sum(int((measured > np.asarray(b.bound)).sum()) for b in bounds)
    pairs = 2 * measured.size
    outputs = [
        np.asarray(output_change(pair, x, grade=grade))
        for grade in ("measured", "data", "a priori")
    ]
    for bound in outputs[1:]:
        violations += int((outputs[0] > bound).sum())
        pairs += bound.size
    return violations, pairs


def identity_error(pair: Pair, kind: KernelKind, x: jax.Array) -> float:
    """Returns the relative distance of the matching scaling's kernels from the wide copy's."""
    copy = wide_copy(pair)
    g = jnp.asarray(np.random.default_rng(2).normal(size=(len(x), pair.original.down.shape[1])))
    errors = []
    for kernel in (partial(traced_kernel, x=x), partial(upstream_kernel, x=x, gx=g)):
        a, b = kernel(pair.fused, kind=kind), kernel(copy, kind=kind)
        errors.append(float(jnp.abs(a - b).max() / jnp.abs(b).max()))
    return max(errors)


def worst_in_ball(mlp: MlpCase, pair: Pair, steps: int = 100) -> float:
    """Returns the largest change of the traced SGD kernel that gradient ascent finds.

    |x| is that of the largest input. No bound that uses only norms of inputs can be smaller.
    """
    radius = jnp.linalg.norm(mlp.x, axis=1).max()

    def change(x: jax.Array) -> jax.Array:
        x = x[None] / jnp.linalg.norm(x) * radius
        a, b = (traced_kernel(m, x)[0, 0] for m in (pair.original, pair.fused))
        return jnp.abs(a - b)

    ascend = jax.jit(jax.value_and_grad(change))
    rows = jnp.linalg.svd(pair.original.up, full_matrices=False)[2]
    worst = 0.0
    for x in (*mlp.x[:2], rows[0], -rows[0]):
        x = x / jnp.linalg.norm(x) * radius
        for step in range(steps):
            value, gradient = ascend(x)
            worst = max(worst, float(value))
            x = x + 0.5 * 0.97**step * radius * gradient / jnp.linalg.norm(gradient)
            x = x / jnp.linalg.norm(x) * radius
    return worst


def cases(
    arguments: Any, network: Any, inputs: int
) -> Iterator[tuple[MlpCase, Pair, dict[str, str]]]:
    """Yields MLPs and fused versions, with their labels."""
    quick = arguments.quick
    widths = ["p/4"] if quick else list(FRACTIONS)

    def of(mlp: MlpCase, widths: Sequence[str], scalings: Sequence[str]) -> Any:
        for width in widths:
            labels = clusters(mlp.weights, mlp.weights.width // FRACTIONS[width])
            for scaling in scalings:
                yield mlp, fused(mlp.weights, labels, scaling), {"width": width, "scaling": scaling}

    for mlp in minilm(network, texts(arguments.data), [0, 5], inputs):
        yield from of(mlp, widths, KINDS)
        if quick:
            continue
        yield from of(mlp, ["p/4"], SCALINGS[2:])
        for refit in (False, True):
            for scaling in KINDS:
                method = fj.Fusion(
                    width=0.25, scaling=cast(Any, scaling), refit=refit, represent="mean"
                )
                name = f"{scaling}, {'refitted' if refit else 'matched'}"
                yield mlp, fitted(mlp, method), {"width": "p/4", "scaling": name}
        if mlp.name == "layer 5":
            for act in ACTS[1:]:
                other = replace(mlp, name=f"layer 5, {act}", weights=replace(mlp.weights, act=act))
                yield from of(other, ["p/4"], KINDS)
    for seed, act in enumerate(ACTS[:1] if quick else ACTS):
        for gated in (False, True) if act == "gelu" and not quick else (True,):
            mlp = drawn(act, gated, *((128, 32, 16) if quick else (256, 64, 32)), inputs, seed)
            some = ["p/8", "p/4", "p/2"] if act == "gelu" and not quick else ["p/4"]
            yield from of(mlp, some, KINDS)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws change and bounds by width, for GELU and the kernel that each scaling keeps."""
    plt = pyplot()

    def points(title: str, kind: KernelKind, key: str) -> dict[float, float]:
        found: dict[float, list[float]] = {}
        for row in rows:
            gated = ", gated" if row["mlp"].startswith("gated") else ""
            if (
                title == row["source"] + gated
                and row["act"] == "gelu"
                and kind == row["kernel"] == row["scaling"]
                and row["width"] != "p"  # where nothing changes
            ):
                found.setdefault(1 / FRACTIONS[row["width"]], []).append(row[key])
        return {x: float(np.median(found[x])) for x in sorted(found)}

    titles = ("minilm", "random", "random, gated")
    picture, grid = plt.subplots(2, 3, figsize=(12, 7), sharex=True, sharey="row")
    for kind, axes in zip(KINDS, grid, strict=True):
        for title, ax in zip(titles, axes, strict=True):
            for key, label, style in (
                ("at_most_a_priori", "at most, a priori", "^:"),
                ("at_most_data", "at most, from data", "s--"),
                ("changed", "measured", "o-"),
            ):
                found = points(title, kind, key)
                ax.plot(list(found), list(found.values()), style, label=label)
            ax.set(xscale="log", yscale="log")
            ax.minorticks_off()
            ticks = [n for n in FRACTIONS.values() if n > 1]
            ax.set_xticks([1 / n for n in ticks], [f"p/{n}" for n in ticks])
            values = [0.1, 0.3, 1, 3, 10, 30]
            ax.set_yticks(values, [f"{v:g}" for v in values])
            ax.grid(alpha=0.3)
            ax.set_title(f"{title}: {'SGD' if kind == 'sgd' else 'Adam'} kernel")
        axes[0].set_ylabel("relative change, Frobenius norm")
    for ax in grid[1]:
        ax.set_xlabel("width")
    grid[0][0].legend()
    picture.tight_layout()
    picture.savefig(path, metadata={"Date": None})


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", help="folder of the model (default: MiniLM, as the demo)")
    options.add_argument(
        "--data", type=Path, help="folder with glue/SST-2 (default: the package's)"
    )
    options.add_argument("--figure", type=Path, help="write error against width here (matplotlib)")
    options.add_argument(
        "--directions", type=int, default=128, help="size of the data grade's sketches"
    )
    arguments = options.parse_args()
    jax.config.update("jax_enable_x64", True)
    # Compilation is most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    start = time.perf_counter()
    rows, pooled, identities = [], [], []
    inputs = 48 if arguments.quick else 96
    path = arguments.model or find_model()
    network = fj.load(path, head="classification", num_labels=2, key=jax.random.key(0))
    for mlp, pair, how in cases(arguments, network, inputs):
        kept: Any = how["scaling"].split(",")[0]
        exact = kept == how["scaling"] and kept in KINDS
        quarter = how["width"] == "p/4"
        if exact and quarter and (mlp.source == "random" or not arguments.quick):
            identities.append(identity_error(pair, kept, mlp.x))
        # Outputs and upstream vectors, for one real and two random MLPs.
        one = mlp.name == "layer 5" or (mlp.source == "random" and mlp.weights.act == "gelu")
        extras = one and quarter and not arguments.quick
        # At one width also the kernel that the scaling does not keep.
        for kind in KINDS if quarter and not arguments.quick else (kept,):
            label = {"source": mlp.source, "mlp": mlp.name, "act": mlp.weights.act, **how}
            label["kernel"] = kind
            found = measure(mlp, pair, kind, arguments.directions, extras)
            pooled.append((label, found.pop("ratios")))
            if exact and extras and kept == kind == "sgd" and mlp.source == "minilm":
                found["worst_in_ball"] = worst_in_ball(mlp, pair)
            rows.append({**label, **found})
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    def looseness(grade: str, source: str | None = None, kind: KernelKind = "sgd") -> float:
        some = [
            ratios[grade]
            for label, ratios in pooled
            if label["scaling"] == label["kernel"] == kind and source in (None, label["source"])
        ]
        return float(np.median(np.concatenate(some)))

    summary = {
        "violations": sum(row["violations"] for row in rows),
        "pairs": sum(row["pairs"] for row in rows),
        "median_looseness_data": looseness("data"),
        "median_looseness_a_priori": looseness("a_priori"),
        **{
            f"median_looseness_{grade}_{source}": looseness(grade, source)
            for grade in ("data", "a_priori")
            for source in ("minilm", "random")
        },
        **{f"median_looseness_{g}_adam": looseness(g, kind="adam") for g in ("data", "a_priori")},
        "identities_max_error": max(identities),
        "seconds": time.perf_counter() - start,
    }
    finish(arguments, rows, summary)
    if arguments.figure is not None:
        figure(rows, arguments.figure)
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
