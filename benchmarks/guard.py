"""Fails when the quality of compressed models falls below what is committed.

All-MiniLM-L6-v2, its last four MLPs at a quarter of their width, calibrated on the everyday
sentences of the package and judged on those from old books; one clustering of raw weights; and with
``--data`` the nats per token of two small language models at half of their widths. Each value is
compared with `results/guard.json`: it may be worse by the tolerance there, which leaves room for
other machines' rounding.

    python -m benchmarks.guard [--data DIR] [--write] [--without-refit]

``--write`` replaces the committed values. ``--without-refit`` leaves the refit of output weights
out, to see that the check notices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fusion_jax as fj
from benchmarks.common import parser
from benchmarks.quality import errors
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.cli.demo import find_model, measure_change
from fusion_jax.models.tokens import everyday_sentences, load_tokenizer, sentences, tokenize
from ntk.tables import table

FILE = Path(__file__).parent / "results" / "guard.json"
HIGHER_IS_BETTER = ("embedding_cosine", "lowest_embedding_cosine")
KEY = jax.random.key(0)


def of_encoder(method: fj.Fusion) -> dict[str, float]:
    """Returns how far MiniLM is from itself, compressed."""
    model = fj.load(find_model())
    judged = tokenize(load_tokenizer(model.provenance.folder), sentences())
    last = slice(-4, None)
    seen = fj.calibrate(model, everyday_sentences(), key=KEY, layers=last)
    smaller, _ = fj.compress(model, method, key=KEY, layers=last, calibration=seen, progress=False)
    _, output, cosine = measure_change(model, smaller, judged)
    site = fj.sites(model)[-2]
    at_sgd, _ = fj.compress(
        site.mlp,
        replace(method, scaling="sgd"),
        key=KEY,
        calibration={"": seen[site.path]},
        progress=False,
    )
    adam = next(s.mlp for s in fj.sites(smaller) if s.path == site.path)
    x = mlp_inputs(model, *judged)[site.path]
    x = x[np.asarray(judged.attention_mask, bool)][:256]
    found = errors(site, at_sgd, adam, jnp.asarray(x))
    rows = site.mlp.sub_mlps().rows()
    return {
        "embedding_cosine": float(cosine.mean()),
        "lowest_embedding_cosine": float(cosine.min()),
        "output": float(np.mean([value for value in output.values() if value > 0])),
        "sgd_kernel": found["sgd_kernel"],
        "adam_kernel": found["adam_kernel"],
        "inertia": float(fj.kmeans(rows, 384, key=KEY).inertia_fraction),
    }


def of_language_models(method: fj.Fusion, data: Path) -> dict[str, float]:
    """Returns the nats per token of the small language models at half of their widths."""
    from benchmarks.real import Subject

    found = {}
    for name in ("tinygpt", "stories260k"):
        subject = Subject(name, None, data, tokens=0)
        smaller, _ = fj.compress(
            subject.model,
            replace(method, width=0.5),
            key=KEY,
            calibration=subject.batches("text"),
            progress=False,
        )
        found[f"{name}_nats"] = subject.judge(smaller)["nats"]
    return found


def worse(values: Mapping[str, float], committed: Mapping[str, float], share: float) -> list[str]:
    """Returns the names of values that are worse than committed by more than a share.

    Example:
        >>> worse({"output": 1.03, "embedding_cosine": 0.97}, {"output": 1.0}, 0.02)
        ['output']
    """
    found = []
    for name in values.keys() & committed.keys():
        value, before = values[name], committed[name]
        if name in HIGHER_IS_BETTER:  # how far from 1 counts
            value, before = 1 - value, 1 - before
        if not value <= before * (1 + share):
            found.append(name)
    return sorted(found)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with lm/ and models/")
    arguments.add_argument("--write", action="store_true", help="replace the committed values")
    arguments.add_argument("--without-refit", action="store_true", help="plant a regression")
    options = arguments.parse_args()
    method = fj.Fusion(width=384, refit=not options.without_refit)
    values = of_encoder(method)
    if options.data is not None:
        values |= of_language_models(method, options.data)
    kept: dict[str, Any] = json.loads(FILE.read_text())
    if options.write:
        kept["values"] |= values
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
    bad = worse(values, kept["values"], kept["tolerance"])
    rows = [["", "committed", "now", ""]]
    for name, value in values.items():
        mark = "WORSE" if name in bad else ""
        rows.append([name, f"{kept['values'].get(name, float('nan')):.4f}", f"{value:.4f}", mark])
    print(table(rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
