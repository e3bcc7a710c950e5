"""What fusing does to small real language models: nats per token, before any fine-tuning.

tinygpt-shakespeare on the last tenth of its text, calibrated on the rest; stories260K on stories
that it tells itself (sampled from the dense model, whose entropy is then its own nats), calibrated
on others of these. Every MLP is fused to a half, a quarter and an eighth of its width: the paper's
method, ours without calibration, and ours.

    python -m benchmarks.language --data DIR [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import fusion_jax as fj
from benchmarks.common import finish, parser
from benchmarks.small_models import hf_folder, nats_per_token, shakespeare_ids
from fusion_jax.generate import Sampling, generate

CONTEXT = 129
WINDOWS = 128


def stories(model: Any, seed: int) -> Int[Array, " n"]:
    """Stories that the model tells, one after the other."""
    starts = np.ones((WINDOWS, 1), np.int32)
    told = generate(
        model,
        starts,
        max_new_tokens=CONTEXT - 2,
        sampling=Sampling(),
        eos=(),
        key=jax.random.key(seed),
    )
    return jnp.concatenate([jnp.asarray(starts), told], axis=1).reshape(-1)


def texts(name: str, model: Any, data: Path) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Text to calibrate on, and to evaluate on."""
    if name == "stories260K":
        return stories(model, 0), stories(model, 1)
    whole, last = shakespeare_ids(data, 1.0), shakespeare_ids(data)
    return whole[: len(whole) - len(last)], last


def measure(name: str, data: Path, shares: list[float]) -> list[dict[str, Any]]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory() as folder:
        model = fj.load(hf_folder(data, name, Path(folder) / name), head="causal-lm")
    fit, held_out = texts(name, model, data)
    windows = fit[: len(fit) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    chosen = np.random.default_rng(0).permutation(len(windows))[:WINDOWS]
    calibration = [{"input_ids": windows[np.sort(chosen)]}]
    dense = nats_per_token(model, held_out, CONTEXT)
    rows = [{"model": name, "method": "dense", "width": 1.0, "nats": dense, "more": 0.0}]
    for share in shares:
        for label, method, text in (
            ("paper", fj.Fusion.paper(width=share), None),
            ("ours, no text", fj.Fusion(width=share), None),
            ("ours", fj.Fusion(width=share), calibration),
        ):
            key = jax.random.key(0)
            smaller, _ = fj.compress(model, method, key=key, calibration=text)
            nats = nats_per_token(smaller, held_out, CONTEXT)
            row = {"model": name, "method": label, "width": share}
            rows.append({**row, "nats": nats, "more": nats - dense})
    return rows


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="folder with models/ and lm/")
    arguments = arguments.parse_args()
    names = ["stories260K"] if arguments.quick else ["tinygpt-shakespeare", "stories260K"]
    shares = [0.25] if arguments.quick else [0.5, 0.25, 0.125]
    finish(arguments, [row for name in names for row in measure(name, arguments.data, shares)], {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
