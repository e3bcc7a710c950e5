"""Whether memory stays flat over many steps of fine-tuning, evaluations and checkpoints included.

all-MiniLM-L6-v2, its MLPs fused to a sixteenth, in small batches of two lengths. Resident memory is
read after every step, when nothing is in flight. The allocator takes and returns pages as it likes,
so that what counts is growth: the median of the last quarter over that of the quarter after the
first, which warms up.

    python -m benchmarks.memory [--quick] [--json FILE]
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
from fusion_jax.demo import find_model
from fusion_jax.finetune import fit, losses
from fusion_jax.finetune.data import Batches, Examples

STEPS = 3000
MOST = 0.01
"""How much memory may grow."""


def resident_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> int:
    arguments = parser(__doc__).parse_args()
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
            eval_every=steps // 20,
            checkpoint_every=steps // 5,
        )
        fit(
            model,
            batches,
            losses.classification,
            config,
            key=key,
            folder=Path(folder),
            evaluate=evaluate,
            on_step=look,
        )
    quarter = steps // 4
    before, after = (float(np.median(memory[i : i + quarter])) for i in (quarter, 3 * quarter))
    rows = [
        {"steps": f"{i + 1}-{i + quarter}", "median_mib": float(np.median(part)),
         "least_mib": min(part), "most_mib": max(part)}
        for i, part in ((i, memory[i : i + quarter]) for i in range(0, 4 * quarter, quarter))
    ]  # fmt: skip
    growth = after / before - 1
    finish(arguments, rows, {"growth": growth})
    if growth > MOST and not arguments.quick:
        print(f"memory grew by {growth:.1%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
