"""Compares kernels of a whole model before and after fusing, also by the paper's metric.

The model's output is the softmax probability of class 0 with a random head, at real sentences.
Every MLP of all-MiniLM-L6-v2 is fused, and the kernels of all parameters are compared. The paper's
metric is the Frobenius norm of the change of Adam's kernel of the parameters of the first MLP, if
only this MLP is fused.

    python -m benchmarks.ntk_models [--quick] [--model PATH] [--data DIR] [--json FILE]

With ``--data`` the sentences are from SST-2: 64 from its development set, and 1,024 from its
training set for calibration. Without it, the sentences are the package's, and random tokens serve
for calibration.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fusion_jax as fj
import ntk
from benchmarks.common import finish, parser
from benchmarks.ntk_bound import texts
from fusion_jax.cli.demo import find_model
from fusion_jax.models.tokens import load_tokenizer, tokenize


def calibration(data: Path | None) -> Any:
    """Returns unlabeled text other than the sentences that kernels are compared on."""
    if data is None:
        return "random"
    lines = (data / "glue" / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines[1:1025]]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", help="folder of the model (default: MiniLM, as the demo)")
    options.add_argument("--data", type=Path, help="folder with glue/SST-2")
    arguments = options.parse_args()
    path = arguments.model or find_model()
    network = fj.load(path, head="classification", num_labels=2, key=jax.random.key(0))
    text = texts(arguments.data)[: 4 if arguments.quick else 64]
    batch = tokenize(load_tokenizer(network.provenance.folder), text, max_length=32)._asdict()
    source = calibration(arguments.data)

    def kernel(model: Any, kind: ntk.KernelKind, wrt: str | None) -> np.ndarray:
        f, params = ntk.functional(model, wrt=wrt, outputs=ntk.probability(0))
        return np.asarray(ntk.kernel(f, params, batch, kind=kind), np.float64)

    rows = []
    cases: list[Any] = [("first MLP", slice(1), r".*layers\.0\.mlp\..*", "adam")]
    cases += [] if arguments.quick else [("all", None, None, kind) for kind in ("adam", "sgd")]
    for parameters, layers, wrt, kind in cases:
        before = kernel(network, kind, wrt)
        for width in (0.25,) if arguments.quick else (0.25, 0.5):
            ours = fj.Fusion(width=width, scaling=kind)
            for name, method in (
                ("paper", fj.Fusion.paper(width=width, scaling=kind)),
                ("ours", ours),
                ("means, calibrated", replace(ours, represent="mean")),
                ("ours, calibrated", ours),
            ):
                seen = source if name.endswith("calibrated") else None
                smaller, _ = fj.compress(
                    network, method, key=jax.random.key(0), layers=layers, calibration=seen
                )
                after = kernel(smaller, kind, wrt)
                found = ntk.compare(before, after)
                rows.append({
                    "parameters": parameters, "kernel": kind, "width": width, "method": name,
                    "sentences": len(text), "frobenius": float(np.linalg.norm(before - after)),
                    "relative": found.frobenius, "alignment": found.alignment,
                })  # fmt: skip
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    names = ("parameters", "kernel", "width", "method")
    summary = {
        " ".join(["relative", *(str(row[n]) for n in names)]): row["relative"] for row in rows
    }
    finish(arguments, rows, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
