"""Measures compressing a model that is larger than memory, from disk to disk, layer by layer.

A checkpoint of the shape of Llama-2-7B (32 layers, MLP 4,096 x 11,008), or of another case of
`benchmarks.large`, with random weights in bfloat16 is compressed by `fusion_jax.compress_files` in
a process of its own, which reports its time and its peak memory. Twice the size of the checkpoint
must be free on the disk.

    python -m benchmarks.streaming [--quick] [--case NAME] [--layers N] [--method NAME]
                                   [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parser, peak_gib
from benchmarks.large import CASES, config, write

METHODS = ("fusion", "prune")


def measure(method: str, folder: Path, calibrated: bool) -> dict[str, Any]:
    """Compresses the checkpoint in this process, and returns the row of the results."""
    import jax
    import numpy as np

    import fusion_jax as fj

    chosen = fj.Fusion(width=0.25) if method == "fusion" else fj.Prune(width=0.25)
    batches = None
    if calibrated:
        ids = np.random.default_rng(0).integers(0, 256, (4, 4, 128))
        batches = [{"input_ids": x.astype(np.int32)} for x in ids]
    before, start = peak_gib(), time.perf_counter()
    report = fj.compress_files(
        folder / "model", folder / "out", chosen, key=jax.random.key(0), head="causal-lm",
        calibration=batches,
    )  # fmt: skip
    fields = json.loads((folder / "model/config.json").read_text())
    return {
        "case": next(n for n, c in CASES.items() if c["model_type"] == fields["model_type"]),
        "method": method,
        "calibrated": calibrated,
        "layers": len(report.rows),
        "gib_of_weights": report.before.bytes / 2**30,
        "gib_after": report.after.bytes / 2**30,
        "seconds": time.perf_counter() - start,
        "peak_gib_before": before,
        "peak_gib": peak_gib(),
    }


def main() -> int:
    arguments = parser(__doc__, keep=False)
    arguments.add_argument("--case", choices=CASES, default="llama-7b", help="the shape")
    arguments.add_argument("--layers", type=int, help="layers of the checkpoint, instead of 32")
    arguments.add_argument("--method", choices=METHODS, default="fusion", help="the method")
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.method, arguments.measure, True)))
        return 0
    fields = config(arguments.case, arguments.quick, None)
    fields["num_hidden_layers"] = arguments.layers or (2 if arguments.quick else 32)
    if arguments.case == "llama-7b":
        fields["num_key_value_heads"] = 32
    fields["vocab_size"] = 256 if arguments.quick else 32000
    with tempfile.TemporaryDirectory() as folder:
        write(fields, Path(folder) / "model")
        command = [sys.executable, "-m", "benchmarks.streaming", "--method", arguments.method]
        done = subprocess.run([*command, "--measure", folder], check=True, stdout=subprocess.PIPE)
    row = json.loads(done.stdout)
    finish(arguments, [row], {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
