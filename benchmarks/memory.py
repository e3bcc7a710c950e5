"""Measures whether memory stays constant over many steps of fine-tuning.

all-MiniLM-L6-v2, with its MLPs fused to a sixteenth, is trained in small batches of two lengths,
with an evaluation and a checkpoint every 25 steps. Resident memory is read after every step, when
no step is running. The first third is a warm-up: the buffers for writing checkpoints stop growing
after about a dozen of them. Later the allocator still takes and returns pages, so that growth is
the median of the last third relative to that of the second. By default, glibc puts ever larger
buffers on its heap, where freed ones leave holes; a fixed threshold shows the memory that the
library itself keeps.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.memory [--quick] [--json FILE]
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fusion_jax as fj
from benchmarks.common import finish, parser
from fusion_jax.cli.demo import find_model
from fusion_jax.training import Recipe, fit
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples

STEPS = 1500
EVERY = 25
MAX_GROWTH = 0.01
"""The allowed relative growth of memory."""


def resident_mib() -> float:
    """Returns the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> int:
    arguments = parser(__doc__, keep=False).parse_args()
    steps = 80 if arguments.quick else STEPS
    key = jax.random.key(0)
    model = fj.load(find_model(), head="classification", num_labels=2, key=key)
    model, _ = fj.compress(model, fj.Fusion(width=1 / 16), key=key, progress=False)
    draw = np.random.default_rng(0)
    tokens = [draw.integers(5, 30000, draw.integers(4, 16)).astype(np.int32) for _ in range(256)]
    examples = Examples(tokens, None, np.arange(256, dtype=np.int32) % 2, [""] * 256)
    batches = Batches(examples, 4, pad_id=0, shapes=2, seed=0)
    forward = jax.jit(lambda model, ids, mask: model(ids, mask).logits.sum())
    memory = []

    def evaluate(model: Any) -> dict[str, float]:
        batch = batches(0)
        value = forward(model, batch["input_ids"], batch["attention_mask"])
        return {"sum": float(value)}

    def look(step: int, state: Any) -> None:
        jax.block_until_ready(state)
        memory.append(resident_mib())

    with tempfile.TemporaryDirectory() as folder:
        config = fj.TrainConfig(
            max_steps=steps,
            epochs=10**6,
            batch_size=4,
            eval_every=EVERY,
            checkpoint_every=EVERY,
        )
        fit(
            model,
            batches,
            losses.classification,
            config,
            key=key,
            folder=Path(folder),
            evaluate=evaluate,
            recipe=Recipe(on_step=look),
        )
    third = steps // 3
    rows = [
        {
            "steps": f"{i + 1}-{i + third}",
            "median_mib": float(np.median(memory[i : i + third])),
            "least_mib": min(memory[i : i + third]),
            "most_mib": max(memory[i : i + third]),
        }
        for i in (0, third, 2 * third)
    ]
    growth = rows[2]["median_mib"] / rows[1]["median_mib"] - 1
    finish(arguments, rows, {"growth": growth})
    if growth > MAX_GROWTH and not arguments.quick:
        print(f"memory grew by {growth:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
