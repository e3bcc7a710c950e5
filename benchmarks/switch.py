"""Measures what fusing does to the experts of a Switch Transformer trained from scratch.

A small Switch (4 + 4 layers of 128, every other layer with 8 experts of width 512) learns E2E, from
meanings to sentences, with words as tokens: cross-entropy plus the routers' load-balancing and z
losses. Then its experts are fused to a quarter of their width: by the paper's method, by ours with
calibration on training pairs, and by ours with widths that follow the router's use. Each model is
tuned layer by layer towards the dense model and fine-tuned; the dense model is trained further for
the same number of steps. Measured on held-out meanings: nats per target token, and the share of
target tokens that have the highest score.

"not applied" is what the published code does to Switch: there, the multiplication by cluster sizes
is commented out, so that the fused experts are bare centroids, whose outputs are several times too
small. (Tuning has no effect in that code, since the teacher is copied after fusing; here it has.)

    python -m benchmarks.switch --data DIR [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusion_jax as fj
from benchmarks.common import finish, parser
from fusion_jax.models.t5 import T5, T5Config
from fusion_jax.training import fit, losses

PAD, END, UNKNOWN = 0, 1, 2
LENGTH = 44
"""Longest source and target in tokens, the end included; the few longer pairs are left out."""
BATCH = 32
LOSS = jax.tree_util.Partial(losses.sequence_to_sequence, balance=0.01, router_z=0.001)


@dataclass(frozen=True)
class Scale:
    """The sizes of the model and of the runs."""

    d_model: int = 128
    d_ff: int = 512
    layers: int = 4
    experts: int = 8
    steps: int = 1600
    tuning: int = 100
    training: int = 250
    calibration: int = 256
    held_out: int = 1024


QUICK = Scale(32, 32, 2, 4, steps=8, tuning=3, training=3, calibration=64, held_out=64)


class Pairs:
    """Batches of sources and targets for `fit`; each depends only on its step."""

    def __init__(self, ids: tuple[np.ndarray, np.ndarray], seed: int | None = None):
        self._sources, self._targets = ids
        self._seed = seed

    def __len__(self) -> int:
        return -(-len(self._sources) // BATCH)

    def _rows(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, len(self))
        order = np.arange(len(self._sources))
        if self._seed is not None:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        return order[i * BATCH : (i + 1) * BATCH]

    def names(self, step: int) -> list[str]:
        """Returns where the pairs of a batch come from."""
        return [f"pair {row}" for row in self._rows(step)]

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step; the last of an epoch is padded with pairs of weight 0."""
        rows = self._rows(step)
        weights = np.zeros(BATCH, np.float32)
        weights[: len(rows)] = 1
        rows = np.resize(rows, BATCH)
        sources, targets = self._sources[rows], self._targets[rows]
        labels = np.where(targets == PAD, -100, targets)
        mask = sources != PAD
        return {"input_ids": sources, "attention_mask": mask, "labels": labels, "weights": weights}


def read(data: Path, name: str) -> list[list[list[str]]]:
    """Returns the words of E2E's pairs."""
    lines = (data / "nlg/e2e" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [[text.split() for text in line.split("||")] for line in lines]


def numbered(
    pairs: Sequence[list[list[str]]], words: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of sources and targets, padded."""
    pairs = [pair for pair in pairs if max(map(len, pair)) < LENGTH]
    both = np.zeros((2, len(pairs), LENGTH), np.int32)
    for i, pair in enumerate(pairs):
        for side, text in zip(both, pair, strict=True):
            side[i, : len(text) + 1] = [*(words.get(word, UNKNOWN) for word in text), END]
    return both[0], both[1]


@dataclass(frozen=True)
class Texts:
    """The tokens of E2E.

    Args:
        ids: Sources and targets to train on.
        held_out: The pairs to judge by.
        seen: The rows of ``ids`` to calibrate on.
        vocabulary: The number of tokens that there are.
    """

    ids: tuple[np.ndarray, np.ndarray]
    held_out: Pairs
    seen: np.ndarray
    vocabulary: int

    def calibration(self, model: Any) -> list[dict[str, np.ndarray]]:
        """Returns the batches to calibrate on."""
        found = []
        for part in np.array_split(self.seen, max(1, len(self.seen) // BATCH)):
            sources, targets = self.ids[0][part], self.ids[1][part]
            found.append(
                {
                    "input_ids": sources,
                    "attention_mask": sources != PAD,
                    "decoder_input_ids": np.asarray(model.shift_right(targets)),
                    "decoder_attention_mask": targets != PAD,
                }
            )
        return found


def prepared(data: Path, scale: Scale) -> Texts:
    """Reads and numbers E2E, with the words that are there three times or more."""
    texts, others = read(data, "train"), read(data, "valid")
    counts = Counter(word for pair in texts for text in pair for word in text)
    words = {word: i + 3 for i, word in enumerate(sorted(w for w, n in counts.items() if n >= 3))}
    ids, held_out = numbered(texts, words), numbered(others, words)
    random = np.random.default_rng(0)
    chosen = random.permutation(len(held_out[0]))[: scale.held_out]
    seen = random.permutation(len(ids[0]))[: scale.calibration]
    pairs = Pairs((held_out[0][chosen], held_out[1][chosen]))
    return Texts(ids, pairs, seen, len(words) + 3)


def untrained(vocabulary: int, scale: Scale) -> Any:
    """Returns the model with random weights."""
    config = T5Config.from_json(
        {
            "model_type": "switch_transformers",
            "vocab_size": vocabulary,
            "d_model": scale.d_model,
            "d_kv": scale.d_model // 4,
            "d_ff": scale.d_ff,
            "num_layers": scale.layers,
            "num_decoder_layers": scale.layers,
            "num_heads": 4,
            "num_experts": scale.experts,
            # Three times the tokens of each expert if all get the same number.
            "expert_capacity": 3 * LENGTH // scale.experts,
            "num_sparse_encoder_layers": scale.layers // 2,
            "num_sparse_decoder_layers": scale.layers // 2,
        }
    )
    make = jax.jit(lambda: nnx.split(T5(config, head="seq2seq-lm", rngs=nnx.Rngs(0))))
    return nnx.merge(*make())


@jax.jit
def scores(model: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the nats and target tokens of a batch, and the number of tokens scored highest."""
    total = losses.sequence_to_sequence(model, batch, None)
    labels = batch["labels"]
    before = model.shift_right(jnp.maximum(labels, 0))
    out = model(batch["input_ids"], batch["attention_mask"], before)
    hit = (out.logits.argmax(-1) == labels) & (batch["weights"][:, None] > 0)
    return total, hit.sum()


def measured(model: Any, pairs: Pairs) -> tuple[float, float]:
    """Returns nats per target token, and accuracy."""
    found = jax.device_get([scores(model, pairs(i)) for i in range(len(pairs))])
    nats, count = np.asarray([total for total, _ in found], np.float64).sum(0)
    return float(nats / count), float(sum(int(hit) for _, hit in found) / count)


def without_sizes(model: Any) -> Any:
    """Returns the model with its fused experts as bare centroids."""
    bare = nnx.clone(model)
    for site in fj.sites(bare):
        if isinstance(site.mlp, fj.FusedMlp):
            site.mlp.outer.set_value(jnp.ones_like(site.mlp.outer[...]))
    return bare


def trained(model: Any, pairs: Pairs, steps: int, rate: float, seed: int) -> Any:
    """Returns the model after some steps on pairs."""
    config = fj.TrainConfig(
        epochs=1000, max_steps=steps, batch_size=BATCH, learning_rate=rate, weight_decay=0.01
    )
    return fit(model, pairs, LOSS, config, key=jax.random.key(seed), progress=None).model


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="folder with nlg/e2e/")
    arguments = arguments.parse_args()
    scale = QUICK if arguments.quick else Scale()
    start = time.perf_counter()
    # A self-check compiles most of the time.
    jax.config.update("jax_disable_most_optimizations", arguments.quick)

    texts = prepared(arguments.data, scale)
    ids, held_out = texts.ids, texts.held_out
    model = trained(untrained(texts.vocabulary, scale), Pairs(ids, seed=0), scale.steps, 2e-3, 0)
    calibration = texts.calibration(model)

    rows: list[dict[str, Any]] = []

    def add(method: str, sizes: str, made: Any) -> None:
        row: dict[str, Any] = {"method": method, "sizes": sizes}
        stages = {"": made, "_tuned": made, "_fine_tuned": made}
        if sizes != "-":
            tuning = fj.TrainConfig(
                epochs=1000, max_steps=scale.tuning, batch_size=BATCH, learning_rate=5e-4
            )
            pairs = Pairs(ids, seed=1)
            result = fj.tune(made, model, pairs, tuning, key=jax.random.key(1), progress=None)
            stages["_tuned"] = result.model
        stages["_fine_tuned"] = trained(
            stages["_tuned"], Pairs(ids, seed=2), scale.training, 5e-4, seed=2
        )
        found = {name: measured(stage, held_out) for name, stage in stages.items()}
        for i, kind in enumerate(("nats", "accuracy")):
            row |= {f"{kind}{name}": both[i] for name, both in found.items()}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)

    add("dense", "-", model)
    compress = partial(fj.compress, layers=".*experts", key=jax.random.key(0), progress=False)
    paper, report = compress(model, fj.Fusion.paper(width=0.25))
    add("paper", "applied", paper)
    uneven = fj.Fusion(width=0.25, by_use=0.5, represent="mean")
    uneven, calibrated = compress(model, uneven, calibration=calibration)
    add("ours, widths by use", "applied", uneven)
    if not arguments.quick:
        ours, _ = compress(model, fj.Fusion(width=0.25, represent="mean"), calibration=calibration)
        add("ours", "applied", ours)
        add("paper", "not applied", without_sizes(paper))
        add("ours", "not applied", without_sizes(ours))
    use = [share for row in calibrated.rows for share in row.use or []]
    summary = {
        "parameters": report.before.params,
        "fused": report.after.params,
        "vocabulary": texts.vocabulary,
        "least used expert": min(use),
        "most used expert": max(use),
        "seconds": time.perf_counter() - start,
    }
    finish(arguments, rows, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
