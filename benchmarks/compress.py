"""Time and peak memory of compressing whole models.

all-MiniLM-L6-v2, 4 layers 1,536 -> 384, and an encoder of RoBERTa-base's size with random weights,
8 layers 3,072 -> 768; each in a process of its own, so that peak memory is its own and compilation
is part of the time.

    python -m benchmarks.compress [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.common import finish, parser, peak_gib

LIMITS = {"minilm": (15.0, 4.0), "roberta-base-sized": (120.0, 4.0)}
"""Seconds and GiB that each case must keep."""


def measure(case: str) -> dict[str, Any]:
    """Compresses one model in this process."""
    import jax
    from flax import nnx

    import fusion_jax as fj
    from fusion_jax.demo import find_model
    from fusion_jax.models.bert import Bert, BertConfig

    start = time.perf_counter()
    if case == "minilm":
        model, method, layers = fj.load(find_model()), fj.Fusion(width=384), slice(-4, None)
    else:
        config = BertConfig(model_type="roberta", vocab_size=50265, max_position_embeddings=514)
        graph, state = jax.jit(lambda: nnx.split(Bert(config, rngs=nnx.Rngs(0))))()
        model = nnx.merge(graph, state)
        method, layers = fj.Fusion(width=768), slice(-8, None)
    jax.block_until_ready(nnx.state(model))
    load = time.perf_counter() - start
    before = peak_gib()
    start = time.perf_counter()
    _, report = fj.compress(model, method, key=jax.random.key(0), layers=layers)
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


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--case", choices=LIMITS, help="one case, in this process, as JSON")
    arguments = arguments.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case)))
        return 0
    rows = []
    for case in list(LIMITS)[: 1 if arguments.quick else None]:
        command = [sys.executable, "-m", "benchmarks.compress", "--case", case]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    kept = all(
        row["compress_seconds"] <= LIMITS[row["case"]][0]
        and row["peak_gib"] <= LIMITS[row["case"]][1]
        for row in rows
    )
    finish(arguments, rows, {"limits_kept": kept})
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
