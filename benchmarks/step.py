"""Measures time and peak memory of a training step, beside PyTorch's on the same cores.

An encoder of RoBERTa-base's size with random weights, batches of 8 x 128 tokens, dropout, forward,
backward, clipping and AdamW in float32; dense, and with the last 8 of 12 MLPs fused from 3,072 to
768. Each case runs in its own process, so that peak memory is its own. PyTorch's cases are the
model of transformers in training mode with the fused AdamW; they are left out if torch is not
installed.

    python -m benchmarks.step [--quick] [--json FILE]

vs_torch_* is PyTorch's time divided by ours; fused_over_dense is our dense time divided by our
fused time; flop_ratio is the same ratio for the operations of matrix products, the upper limit of
fused_over_dense if only these cost time.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

from benchmarks.common import finish, parser, peak_gib

LAYERS, D, WIDTH, FUSED, BATCH, TOKENS, VOCAB = 12, 768, 3072, 768, 8, 128, 50265
FUSED_LAYERS = 8
WARMUP = 2


def flops(fused: bool) -> int:
    """Returns the number of operations of the matrix products of one forward pass."""
    widths = [WIDTH] * LAYERS
    if fused:
        widths[-FUSED_LAYERS:] = [FUSED] * FUSED_LAYERS
    return sum(BATCH * TOKENS * (8 * D * D + 4 * TOKENS * D + 4 * D * p) for p in widths)


def ours(fused: bool, steps: int, layers: int) -> dict[str, Any]:
    """Times the training loop of `fit`."""
    import jax
    import numpy as np
    from flax import nnx

    import fusion_jax as fj
    from fusion_jax.models.bert import Bert, BertConfig
    from fusion_jax.report import num_params
    from fusion_jax.training import Batches, Examples, Recipe, fit, losses

    config = BertConfig.roberta(
        vocab_size=VOCAB, max_position_embeddings=514, type_vocab_size=1, num_hidden_layers=layers
    )
    # Not under jit: a GPU took minutes to compile the program of all parameters.
    model = Bert(config, head="classification", rngs=nnx.Rngs(0))
    if fused:
        # Clusters do not change the time: the fused MLPs have constant weights.
        for layer in list(model.layers)[-FUSED_LAYERS:]:
            abstract = layer.mlp.abstract(fj.FusedMlp, FUSED, original_width=WIDTH, scaling="adam")
            tree, variables = nnx.split(abstract)
            zeros = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype) * 0.01, variables)
            layer.mlp = nnx.merge(tree, zeros)
    tokens = np.random.RandomState(0).randint(5, VOCAB, (BATCH, TOKENS)).astype(np.int32)
    examples = Examples(list(tokens), None, np.arange(BATCH, dtype=np.int32) % 2, [""] * BATCH)
    times = [time.perf_counter()]

    def mark(step: int, state: Any) -> None:
        jax.block_until_ready(state)
        times.append(time.perf_counter())

    params = num_params(model)
    train = fj.TrainConfig(max_steps=steps + WARMUP, epochs=10**6, batch_size=BATCH, log_every=100)
    fit(
        model,
        Batches(examples, BATCH, pad_id=1),
        losses.classification,
        train,
        key=jax.random.key(0),
        recipe=Recipe(on_step=mark),
        progress=False,
    )
    return {"parameters": params, "seconds": _median(times), "peak_gib": peak_gib()}


def torch(fused: bool, steps: int, layers: int = LAYERS) -> dict[str, Any]:
    """Times a plain PyTorch loop."""
    import torch  # type: ignore[import-not-found]
    from transformers import RobertaConfig, RobertaForSequenceClassification

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("sizes", torch.ones(FUSED))

        def forward(self, x: Any) -> Any:
            return x * self.sizes

    config = RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=514, type_vocab_size=1, num_hidden_layers=layers
    )
    model: Any = RobertaForSequenceClassification(config).train()
    if fused:
        for layer in model.roberta.encoder.layer[-FUSED_LAYERS:]:
            layer.intermediate.dense = torch.nn.Linear(D, FUSED)
            layer.output.dense = torch.nn.Sequential(Scale(), torch.nn.Linear(FUSED, D))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True
    )
    ids = torch.randint(5, VOCAB, (BATCH, TOKENS))
    mask, labels = torch.ones_like(ids), torch.arange(BATCH) % 2
    times = [time.perf_counter()]
    for _ in range(steps + WARMUP):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    params = sum(p.numel() for p in model.parameters())
    return {"parameters": params, "seconds": _median(times), "peak_gib": peak_gib()}


def _median(times: list[float]) -> float:
    return statistics.median(
        b - a for a, b in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)
    )


CASES = {
    "ours-dense": partial(ours, False),
    "ours-fused": partial(ours, True),
    "torch-dense": partial(torch, False),
    "torch-fused": partial(torch, True),
}


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--case", choices=CASES, help="one case, in this process, as JSON")
    arguments.add_argument("--steps", type=int, default=7, help="steps that are timed")
    arguments = arguments.parse_args()
    steps = 2 if arguments.quick else arguments.steps
    if arguments.case:
        print(json.dumps(CASES[arguments.case](steps, 2 if arguments.quick else LAYERS)))
        return 0
    rows = []
    with_torch = importlib.util.find_spec("torch") is not None and not arguments.quick
    for case in CASES:
        if case.startswith("torch") and not with_torch:
            continue
        command = [sys.executable, "-m", "benchmarks.step", "--case", case, "--steps", str(steps)]
        command += ["--quick"] * arguments.quick
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append({"case": case, **json.loads(done.stdout.splitlines()[-1])})
    by = {row["case"]: row for row in rows}
    dense, fused = by["ours-dense"], by["ours-fused"]
    # Weight, gradient and two moments; what the backward pass keeps of a hidden unit: the
    # pre-activation and the activation.
    less = 16 * (dense["parameters"] - fused["parameters"])
    less += 2 * 4 * BATCH * TOKENS * (WIDTH - FUSED) * FUSED_LAYERS
    summary = {
        "fused_over_dense": dense["seconds"] / fused["seconds"],
        "flop_ratio": flops(False) / flops(True),
        "peak_gib_less": dense["peak_gib"] - fused["peak_gib"],
        "peak_gib_less_predicted": less / 2**30,
    }
    if with_torch:
        for kind in ("dense", "fused"):
            ratio = by[f"torch-{kind}"]["seconds"] / by[f"ours-{kind}"]["seconds"]
            summary[f"vs_torch_{kind}"] = ratio
    finish(arguments, rows, summary, "torch", "transformers", "optax")
    return 0


if __name__ == "__main__":
    sys.exit(main())
