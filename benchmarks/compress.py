"""Measures time and peak memory of compressing whole models.

The models are all-MiniLM-L6-v2, 4 layers 1,536 -> 384, without calibration and calibrated on random
tokens, and an encoder of RoBERTa-base's size with random weights, 8 layers 3,072 -> 768. Each runs
in a process of its own, so that peak memory is its own and the time includes compilation. Then come
the experts of one layer of Qwen1.5-MoE's shape (8 of its 60, 1,408 to 352, random weights and
calibration inputs). They are compressed in one call, as `compress` does, which solves them one
after another on a CPU and as a batch elsewhere; in a call for each; and, not on CPUs, as a batch.

    python -m benchmarks.compress [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks.common import finish, parser, peak_gib

LIMITS = {
    "minilm": (15.0, 4.0),
    "minilm, calibrated": (30.0, 4.0),
    "roberta-base-sized": (120.0, 4.0),
}
"""The limits of each case, in seconds and GiB."""


def measure(case: str) -> dict[str, Any]:
    """Compresses one model in this process, and returns the row of the results."""
    from flax import nnx

    import fusion_jax as fj
    from fusion_jax.cli.demo import find_model
    from fusion_jax.models.bert import Bert, BertConfig

    start = time.perf_counter()
    if case.startswith("minilm"):
        model, method, layers = fj.load(find_model()), fj.Fusion(width=384), slice(-4, None)
    else:
        config = BertConfig.roberta(vocab_size=50265, max_position_embeddings=514)
        # Not under jit: a GPU took minutes to compile the program of all parameters.
        model = Bert(config, rngs=nnx.Rngs(0))
        method, layers = fj.Fusion(width=768), slice(-8, None)
    jax.block_until_ready(nnx.state(model))
    load = time.perf_counter() - start
    before = peak_gib()
    start = time.perf_counter()
    calibration = "random" if case.endswith("calibrated") else None
    _, report = fj.compress(
        model, method, key=jax.random.key(0), layers=layers, calibration=calibration
    )
    return {
        "case": case,
        "parameters": report.before.params,
        "sites": len(report.rows),
        "load_seconds": load,
        "compress_seconds": time.perf_counter() - start,
        "peak_gib_loaded": before,
        "peak_gib": peak_gib(),
        "mean_inertia": sum(row.facts["inertia"] for row in report.rows) / len(report.rows),
    }


EXPERTS = ("one call", "a call for each", "a batch")
"""Ways of compressing the experts of a layer."""


def measure_experts(way: str, quick: bool) -> dict[str, Any]:
    """Compresses the experts of one layer in this process, three times; the first compiles."""
    import jax.numpy as jnp

    import fusion_jax as fj

    count, p, d, t = (3, 32, 8, 64) if quick else (8, 1408, 2048, 1024)
    keys = jax.random.split(jax.random.key(0), 5)
    up, gate, down = (0.02 * jax.random.normal(key, (count, p, d)) for key in keys[:3])
    subs = fj.SubMLPs(up=up, down=down, gate=gate)
    seen = fj.Calibration(jax.random.normal(keys[3], (count, t, d)))
    method = fj.Fusion(width=p // 4)

    def call(subs: Any, seen: Any) -> Any:
        return fj.compress_mlp(subs, method, key=keys[4], act="silu", calibration=seen)

    def solve(subs: Any, seen: Any) -> Any:
        return method.solve(subs, key=keys[4], act="silu", calibration=seen)

    batch = jax.jit(jax.vmap(solve))
    problem = subs, seen

    def run() -> Any:
        if way == "a call for each":
            return [call(*jax.tree.map(lambda x, i=i: x[i], problem)) for i in range(count)]
        return call(*problem) if way == "one call" else batch(*problem)

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        made = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    inertia = jnp.stack([x.facts.inertia for x in (made if isinstance(made, list) else [made])])
    return {
        "case": f"{count} experts, {way}",
        "compress_seconds": min(seconds[1:]),
        "first_seconds": seconds[0],
        "peak_gib": peak_gib(),
        "mean_inertia": inertia.mean().item(),
    }


def main() -> int:
    arguments = parser(__doc__, keep=False)
    cases = (*LIMITS, *EXPERTS)
    arguments.add_argument("--case", choices=cases, help="one case, in this process, as JSON")
    arguments = arguments.parse_args()
    if arguments.case in EXPERTS:
        print(json.dumps(measure_experts(arguments.case, arguments.quick)))
        return 0
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return 0
    rows = []
    # At full size, the batch hangs in XLA's CPU backend (jax 0.10.2); `compress` makes none there.
    ways = EXPERTS if arguments.quick or jax.default_backend() != "cpu" else EXPERTS[:2]
    for case in (*list(LIMITS)[: 1 if arguments.quick else None], *ways):
        command = [sys.executable, "-m", "benchmarks.compress", "--case", case]
        command += ["--quick"] if arguments.quick else []
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    kept = all(
        row["compress_seconds"] <= LIMITS[row["case"]][0]
        and row["peak_gib"] <= LIMITS[row["case"]][1]
        for row in rows
        if row["case"] in LIMITS
    )
    finish(arguments, rows, {"limits_kept": kept})
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
