"""The commands calibrate, latency and plan: one calibration, and widths for any budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import safetensors.numpy
from tyro.conf import Positional, arg

from fusion_jax.calibration.calibrator import calibrate as calibrated
from fusion_jax.calibration.data import Calibration
from fusion_jax.checkpoint.files import read_json, write_json
from fusion_jax.checkpoint.opening import load
from fusion_jax.cli.compressing import HeadName, Layers, parse_layers
from fusion_jax.cli.options import DType, ModelName
from fusion_jax.compression.allocation import score_widths
from fusion_jax.compression.budgets import Budget, Latency, measure_latency
from fusion_jax.compression.width_scores import WidthScores, plan_to_json
from fusion_jax.errors import InputError
from fusion_jax.methods.fusion import Fusion
from ntk.tables import table

NewFile = Annotated[Path, arg(metavar="OUT")]
Limit = Annotated[
    float | None,
    arg(metavar="NUMBER", help_behavior_hint="(up to 1: a fraction of the original)"),
]


def calibrate(
    model: Positional[ModelName],
    text: Annotated[Positional[Path], arg(metavar="FILE")],
    out: Positional[NewFile],
    scores: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    by: Literal["loss", "kernel"] = "loss",
    round_to: int = 1,
    layers: Layers = None,
    head: HeadName = None,
    dtype: DType = None,
    seed: int = 0,
) -> None:
    """Save the inputs of a model's MLPs on text, and what each MLP loses at each width.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        text: Unlabeled text, one sentence per line; or arrays, as for compress --calibration.
        out: File for the inputs, .safetensors; compress takes it as --calibration.
        scores: File for the scores of all widths, .json; the command plan takes it.
        by: What widths cost: loss, the change of the model's loss; or kernel, the change of the
            MLP's neural tangent kernel, which also works for experts.
        round_to: Widths are multiples of this (128 suits most hardware).
        layers: Which MLPs.
        head: Head to load.
        dtype: Type of the parameters.
        seed: Seed of all random choices.
    """
    for file, end in ((out, ".safetensors"), *([] if scores is None else [(scores, ".json")])):
        if file.suffix != end:
            raise InputError(f"{file} must end in {end}")
        _check_new(file)
    method = Fusion(round_to=round_to)
    loaded = load(model, head=head, dtype=dtype)
    upstream = scores is not None and by == "loss"
    chosen, key = parse_layers(layers), jax.random.key(seed)
    seen: dict[str, Any] = calibrated(loaded, text, key=key, layers=chosen, upstream=upstream)
    arrays = {path: x.inputs if isinstance(x, Calibration) else x for path, x in seen.items()}
    safetensors.numpy.save_file({path: np.asarray(x) for path, x in arrays.items()}, out)
    print(f"Saved the inputs of {len(arrays)} MLPs: {out}, for compress --calibration {out}")
    if scores is not None:
        found = score_widths(
            loaded, method, calibration=seen, key=key, by=by, layers=chosen, progress=True
        )
        write_json(scores, found.to_json())
        print(f"Saved scores of widths: {scores}, for fusion-jax plan {scores} PLAN --params 0.7")


def latency(
    model: Positional[ModelName],
    out: Positional[NewFile],
    tokens: int = 512,
    dtype: DType = None,
) -> None:
    """Measure how long the MLPs of a model take on this device, at a few widths.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: File for the times, .json.
        tokens: Tokens that an MLP gets at once: 1 for generating, more for reading.
        dtype: Type of the parameters.
    """
    _check_new(out)
    found = measure_latency(load(model, dtype=dtype), tokens=tokens, progress=True)
    rows = [["MLP", "width", "milliseconds"]]
    for kind, times in found.seconds.items():
        rows += [[kind, str(width), f"{1e3 * seconds:.3f}"] for width, seconds in times]
    write_json(out, found.to_json())
    print(f"{found.device}, {found.tokens} tokens\n\n{table(rows)}\n\nSaved {out}")


def plan(
    scores: Annotated[Positional[Path], arg(metavar="SCORES")],
    out: Positional[NewFile],
    width: Limit = None,
    params: Limit = None,
    megabytes: Limit = None,
    flops: Limit = None,
    latency: Limit = None,
    times: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Find the width of each MLP within a budget, from saved scores; no model is needed.

    Give one limit. A number up to 1 is a fraction of the original.

    Args:
        scores: File of the command calibrate.
        out: File for the plan, .json; compress MODEL OUT plan FILE takes it.
        width: Hidden units of the MLPs together.
        params: Parameters of the whole model.
        megabytes: Megabytes of the whole model.
        flops: Operations of the MLPs for one token.
        latency: Time of the MLPs, a fraction; needs --times.
        times: File of the command latency.
    """
    _check_new(out)
    found = WidthScores.from_json(read_json(scores)[1])
    given = {"width": width, "params": params, "megabytes": megabytes, "flops": flops}
    clock = None if times is None else Latency.from_json(read_json(times)[1])
    budget = Budget(**given, latency=latency, table=clock)
    plan = found.plan(budget)
    rows = [["MLP", "width"]]
    for site in found.sites:
        rows.append([site.path, f"{site.widths[-1]:,} -> {plan[site.path].width:,}"])
    saved = sum(
        site.unit.params * (int(site.widths[-1]) - int(plan[site.path].width))
        for site in found.sites
    )
    before = int(found.totals["params"])
    write_json(out, plan_to_json(plan))
    print(
        f"{table(rows)}\n\nParameters {before:,} -> {before - saved:,} "
        f"({-saved / before:+.1%})\n\nSaved {out}: fusion-jax compress MODEL OUT plan {out}"
    )


def _check_new(file: Path) -> None:
    """Raises `InputError` if a file cannot be written anew."""
    if file.exists():
        raise InputError(f"{file} exists already")
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent}")


COMMANDS = {"calibrate": calibrate, "latency": latency, "plan": plan}
