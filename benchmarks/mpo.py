"""Measures products with matrix product operators: the order that is chosen, and its cost.

A 768 x 3,072 matrix in five tensors, with bonds cut at several sizes, is multiplied with few and
many rows. The table shows operations and times of the chosen order, of computing the matrix first,
and of the dense matrix. The benchmark fails if the compiled program does other operations than the
plan says, or if its result is not that of the matrix. It lists the cases in which the cheapest
order is not the fastest, but does not fail.

    python -m benchmarks.mpo [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import finish, parser
from fusion_jax import mpo

ROWS, COLUMNS, CORES = 768, 3072, 5


def seconds(f: Callable[..., Any], *arguments: Any) -> float:
    """Returns the median time of a call."""
    jax.block_until_ready(f(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(f(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    arguments = parser(__doc__)
    options = arguments.parse_args()
    key = jax.random.key(0)
    full = mpo.layout_of(ROWS, COLUMNS, CORES)
    matrix = jax.random.normal(key, (ROWS, COLUMNS))
    chosen = jax.jit(partial(mpo.product, columns=COLUMNS))
    rebuilt = jax.jit(lambda x, cores: x @ mpo.contract(cores, (ROWS, COLUMNS)))
    dense = jax.jit(lambda x, w: x @ w)
    rows = []
    for bond in (16,) if options.quick else (4, 16, 64, max(full.bonds)):
        layout = full.capped(bond)
        keys = jax.random.split(key, CORES)
        cores = [jax.random.normal(k, s) for k, s in zip(keys, layout.shapes, strict=True)]
        for n in (1, 64) if options.quick else (1, 64, 4096):
            plan, x = mpo.plan(n, layout), jax.random.normal(key, (n, ROWS))
            compiled: Any = chosen.lower(x, cores).compile()
            y, expected = compiled(x, cores), rebuilt(x, cores)
            rows.append({
                "bond": bond, "params": layout.params / matrix.size, "rows": n,
                "rebuilds": plan.rebuilds, "mflop": plan.flops / 1e6,
                "mflop_compiled": compiled.cost_analysis()["flops"] / 1e6,
                "mflop_rebuilt": plan.rebuild_flops / 1e6,
                "mflop_dense": 2 * n * matrix.size / 1e6,
                "ms": 1e3 * seconds(chosen, x, cores),
                "ms_rebuilt": 1e3 * seconds(rebuilt, x, cores),
                "ms_dense": 1e3 * seconds(dense, x, matrix),
                "difference": float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)),
            })  # fmt: skip
    slower = [f"{r['bond']} x {r['rows']}" for r in rows if r["ms"] > 1.1 * r["ms_rebuilt"]]
    finish(options, rows, {"slower than rebuilding (bond x rows)": ", ".join(slower) or "none"})
    wrong = [
        row
        for row in rows
        if abs(row["mflop_compiled"] / row["mflop"] - 1) > 0.02 or row["difference"] > 1e-5
    ]
    if wrong:
        print(f"a product differs from its plan: {wrong}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
