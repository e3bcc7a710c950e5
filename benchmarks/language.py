"""Measures what fusing does to small real language models: errors, kernels and nats per token.

tinygpt-shakespeare is evaluated on the last tenth of its text and calibrated on the rest.
stories260K is evaluated on stories sampled from the dense model itself, whose nats are then its
entropy, and calibrated on other such stories. Every MLP is fused to a half, a quarter and an eighth
of its width by the paper's method, by ours without calibration, and by ours. Relative Frobenius
errors of outputs and of the SGD and Adam kernels, as in ``benchmarks.quality``, are means over
MLPs, at the inputs of each MLP in the dense model on the evaluation text. Then the paper's and our
models are tuned layer by layer towards the dense model, and fine-tuned, on the calibration text;
the dense model is fine-tuned for the same number of steps. The last evaluation counts.

    python -m benchmarks.language --data DIR [--models NAME ...] [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import fusion_jax as fj
from benchmarks.common import finish, parser
from benchmarks.quality import POSITIONS, errors
from benchmarks.small_models import hf_folder, shakespeare_ids
from fusion_jax.models.decoding import Sampling, generate
from fusion_jax.training import Windows, nats_per_token

CONTEXT = 128
WINDOWS = 128
STORIES = 16
"""The training text has this many times the windows of the evaluation text."""
BATCH = 16
TUNING = 150
"""Steps of layer-wise tuning."""
TRAINING = 200
"""Steps of fine-tuning."""


def stories(model: Any, seeds: Iterable[int]) -> Int[Array, " n"]:
    """Returns the tokens of stories sampled from the model: `WINDOWS` windows for each seed."""
    starts = np.ones((WINDOWS, 1), np.int32)
    told = [
        generate(
            model,
            starts,
            max_new_tokens=CONTEXT - 2,
            sampling=Sampling(),
            eos=(),
            key=jax.random.key(seed),
        )
        for seed in seeds
    ]
    rows = [jnp.concatenate([jnp.asarray(starts), each], axis=1) for each in told]
    return jnp.concatenate(rows).reshape(-1)


def texts(name: str, model: Any, data: Path) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """Returns the text to calibrate on, and the text to evaluate on."""
    if name == "stories260K":
        return stories(model, range(1, 1 + STORIES)), stories(model, [0])
    whole, last = shakespeare_ids(data, 1.0), shakespeare_ids(data)
    return whole[: len(whole) - len(last)], last


def trained(model: Any, teacher: Any, ids: Any, quick: bool) -> dict[str, Any]:
    """Returns the model after tuning, if there is a teacher, and after fine-tuning."""
    config = fj.TrainConfig(
        epochs=1000,
        max_steps=4 if quick else TRAINING,
        batch_size=BATCH,
        learning_rate=5e-4,
    )
    tuned = None
    if teacher is not None:
        windows = Windows(ids, CONTEXT, BATCH, seed=1)
        steps = replace(config, max_steps=4 if quick else TUNING)
        fit = fj.tune(model, teacher, windows, steps, key=jax.random.key(1), progress=False)
        tuned = model = fit.model
    data = fj.PlainText(ids, context=CONTEXT)
    fit = fj.finetune(model, data, config, key=jax.random.key(2), progress=False)
    return {"tuned": tuned, "fine_tuned": fit.model}


def measure(name: str, data: Path, shares: list[float], quick: bool) -> list[dict[str, Any]]:
    """Returns the rows of one model."""
    with tempfile.TemporaryDirectory() as folder:
        model = fj.load(hf_folder(data, name, Path(folder) / name), head="causal-lm")
    text, held_out = texts(name, model, data)
    windows = text[: len(text) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    chosen = np.random.default_rng(0).permutation(len(windows))[:WINDOWS]
    calibration = [{"input_ids": windows[np.sort(chosen)]}]
    unseen = held_out[: WINDOWS * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    inputs = fj.calibrate(
        model, [{"input_ids": unseen}], key=jax.random.key(1), max_positions=POSITIONS
    )
    rows = []

    def add(
        method: str,
        width: float,
        made: Any,
        teacher: Any = None,
        train: bool = True,
        **more: float,
    ) -> None:
        row = {"model": name, "method": method, "width": width, **more}
        row["nats"] = nats_per_token(made, held_out, CONTEXT)
        if train:
            for stage, after in trained(made, teacher, text, quick).items():
                if after is not None:
                    row[stage] = nats_per_token(after, held_out, CONTEXT)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    add("dense", 1.0, model)
    for share in shares:
        for label, method, seen in (
            ("paper", fj.Fusion.paper(width=share), None),
            ("ours, no text", fj.Fusion(width=share), None),
            ("ours", fj.Fusion(width=share, represent="mean"), calibration),
        ):
            sgd, smaller = (
                fj.compress(
                    model,
                    replace(method, scaling=scaling),
                    key=jax.random.key(0),
                    calibration=seen,
                    progress=False,
                )[0]
                for scaling in ("sgd", "adam")
            )
            triples = zip(*map(fj.sites, (model, sgd, smaller)), strict=True)
            found = [
                errors(old, a.mlp, b.mlp, jnp.asarray(inputs[old.path])) for old, a, b in triples
            ]
            means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
            add(label, share, smaller, model, train=label != "ours, no text", **means)
    return rows


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="folder with models/ and lm/")
    both = ["tinygpt-shakespeare", "stories260K"]
    arguments.add_argument("--models", nargs="+", choices=both, default=both)
    arguments = arguments.parse_args()
    names = ["stories260K"] if arguments.quick else arguments.models
    shares = [0.25] if arguments.quick else [0.5, 0.25, 0.125]
    rows = [row for name in names for row in measure(name, arguments.data, shares, arguments.quick)]
    finish(arguments, rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
