"""Measures time and peak memory of compressing layers of large models, from disk to disk.

A checkpoint with one layer of the shape of Llama-2-7B's (MLP 4,096 x 11,008), of Mixtral-8x7B's
(eight experts 4,096 x 14,336) or of Qwen3-30B-A3B's (128 experts 2,048 x 768), with random weights
in bfloat16, is loaded, fused to a quarter of its width and exported, each case in a process of its
own. The estimate for the whole model is the time of one layer, compilation included, times 32
layers (Qwen3-30B-A3B: 48).

    python -m benchmarks.large [--quick] [--case NAME] [--experts N] [--json FILE]
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

CASES = {
    "llama-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008},
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
}
LAYERS = {"qwen3-moe": 48}
"""The layers of the whole models, where they are not 32."""


def config(case: str, quick: bool, experts: int | None) -> dict[str, Any]:
    """Returns the ``config.json`` of a case, sixteen times narrower in the quick run."""
    result = {
        **CASES[case],
        "vocab_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 4 if case == "qwen3-moe" else 8,
        "head_dim": 8 if quick else 128,
    }
    if quick:
        for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
            if name in result:
                result[name] //= 16
    for name in ("num_local_experts", "num_experts"):
        if experts is not None and name in result:
            result[name] = experts
    return result


def write(fields: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint of random weights, tensor by tensor."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from fusion_jax.checkpoint import files
    from fusion_jax.models.registry import FAMILIES
    from fusion_jax.nn.surgery import path_name

    family = FAMILIES[fields["model_type"]]
    parsed = family.config(fields)
    model = nnx.eval_shape(
        lambda: family.model(parsed, head="causal-lm", param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    rules, rng = family.rules(parsed, "causal-lm"), np.random.default_rng(0)

    def tensors():
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            shape = variable.get_value().shape
            location = rules.locate(path_name(path))
            for name in location.tensors(location.names[0], shape):
                one = shape[1:] if location.stacked else shape
                one = one[::-1] if location.transposed else one
                values = rng.standard_normal(one, np.float32) * np.float32(0.02)
                yield name, values.astype(jnp.bfloat16)

    folder.mkdir()
    files.write_tensors(folder, tensors())
    (folder / files.CONFIG).write_text(json.dumps(fields))
    jax.clear_caches()


def measure(case: str, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Loads, compresses and exports in this process, and returns the row of the results."""
    import jax
    from flax import nnx

    import fusion_jax as fj

    start = time.perf_counter()
    model = fj.load(folder / "model", head="causal-lm")
    jax.block_until_ready(nnx.state(model))
    load, loaded = time.perf_counter() - start, peak_gib()
    start = time.perf_counter()
    smaller, report = fj.compress(model, fj.Fusion(width=0.25), key=jax.random.key(0))
    compress = time.perf_counter() - start
    start = time.perf_counter()
    fj.export_hf(smaller, folder / "hf")
    return {
        "case": case,
        "experts": fields.get("num_local_experts", fields.get("num_experts", 1)),
        "width": fields.get("moe_intermediate_size", fields["intermediate_size"]),
        "gib_of_weights": report.before.bytes / 2**30,
        "load_seconds": load,
        "compress_seconds": compress,
        "export_seconds": time.perf_counter() - start,
        "peak_gib_loaded": loaded,
        "peak_gib": peak_gib(),
        "inertia": report.rows[0].facts["inertia"],
        "estimate_hours": LAYERS.get(case, 32) * compress / 3600,
    }


def main() -> int:
    arguments = parser(__doc__, keep=False)
    arguments.add_argument("--case", choices=CASES, help="one case only")
    arguments.add_argument("--experts", type=int, help="experts of the mixtures")
    arguments.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.measure:
        fields = json.loads((arguments.measure / "model/config.json").read_text())
        print(json.dumps(measure(arguments.case, fields, arguments.measure)))
        return 0
    rows = []
    for case in [arguments.case] if arguments.case else list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            write(config(case, arguments.quick, arguments.experts), Path(folder) / "model")
            command = [sys.executable, "-m", "benchmarks.large", "--case", case]
            command += ["--measure", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            rows.append(json.loads(done.stdout))
    finish(arguments, rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
