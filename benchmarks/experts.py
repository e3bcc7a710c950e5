"""Asks what to do with the experts of a mixture at equal memory: drop whole ones, or narrow all.

Two mixtures are trained from scratch, once, and kept in the folder of ``--cache``. "switch" is that
of ``benchmarks.switch``: an encoder and a decoder of 4 layers each, of which every other one has 8
experts of width 512, one for each token, on E2E. "mixtral" is a decoder of 4 layers of 128, each
with 8 gated experts of width 256, two for each token, on the bytes of tinyshakespeare. Then the
experts shrink to a share of their memory, without any training, and the model is judged by its nats
per token on text that was not used otherwise: pairs of E2E's development set, or 32 KiB of the end
of the plays. Every method is calibrated on the same part of the training text.

Results are written after every case, and a case that is already in the file is not run again.

    python -m benchmarks.experts --data DIR --cache DIR --json FILE [--only PATTERN] [--quick]

``--only`` is a regular expression for "model share method".
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import fusion_jax as fj
from benchmarks import switch
from benchmarks.common import parser, show
from benchmarks.real import Table
from fusion_jax.methods.base import Method
from fusion_jax.models.decoder import Decoder
from fusion_jax.models.llama import FAMILIES
from fusion_jax.report import num_params
from fusion_jax.training import nats_per_token

MODELS = ("switch", "mixtral")
SHARES = (0.75, 0.5, 0.25)
METHODS: dict[str, Callable[[float], Method]] = {
    "drop, reap": lambda share: fj.DropExperts(keep=share, score="reap"),
    "drop, total": lambda share: fj.DropExperts(keep=share, score="total"),
    "drop, frequency": lambda share: fj.DropExperts(keep=share, score="frequency"),
    "drop, magnitude": lambda share: fj.DropExperts(keep=share, score="magnitude"),
    "Fusion()": lambda share: fj.Fusion(width=share),
    "Fusion(represent='mean')": lambda share: fj.Fusion(width=share, represent="mean"),
    "activation + refit": lambda share: fj.Prune(width=share, score="activation", refit=True),
    "Fusion.paper()": lambda share: fj.Fusion.paper(width=share),
}
HELD_OUT = 32768
"""The number of bytes to judge by."""
QUICK = ("dense", "drop, reap", "activation + refit")


class Switch:
    """The Switch of ``benchmarks.switch``, on meanings and sentences."""

    def __init__(self, data: Path, quick: bool):
        self.scale = switch.QUICK if quick else switch.Scale()
        self.texts = switch.prepared(data, self.scale)

    def untrained(self) -> Any:
        """Returns the model with random weights."""
        return switch.untrained(self.texts.vocabulary, self.scale)

    def trained(self, model: Any) -> Any:
        """Returns the model after training."""
        pairs = switch.Pairs(self.texts.ids, seed=0)
        return switch.trained(model, pairs, self.scale.steps, 2e-3, seed=0)

    def calibration(self, model: Any) -> list[Any]:
        """Returns the batches to calibrate on."""
        return self.texts.calibration(model)

    def judge(self, model: Any) -> float:
        """Returns nats per target token of held-out pairs."""
        return switch.measured(model, self.texts.held_out)[0]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the decoder and of its training."""

    hidden: int = 128
    layers: int = 4
    experts: int = 8
    width: int = 256
    steps: int = 700
    batch: int = 8
    context: int = 128
    calibration: int = 64
    """The number of windows to calibrate on."""


TINY = Sizes(hidden=16, layers=1, experts=4, width=16, steps=4, batch=2, context=16, calibration=4)


class Mixtral:
    """A small Mixtral on the bytes of a text; without a folder of data, on random bytes."""

    def __init__(self, data: Path | None, quick: bool):
        self.sizes = TINY if quick else Sizes()
        if data is None:
            ids = np.random.default_rng(0).integers(0, 256, 4096)
        else:
            text = (data / "lm/tinyshakespeare/input.txt").read_bytes()
            ids = np.frombuffer(text, np.uint8)
        cut = len(ids) * 9 // 10
        self.text = ids[:cut].astype(np.int32)
        self.held_out = ids[cut : cut + HELD_OUT].astype(np.int32)

    def untrained(self) -> Any:
        """Returns the model with random weights."""
        sizes = self.sizes
        config = FAMILIES["mixtral"].config(
            {
                "model_type": "mixtral",
                "vocab_size": 256,
                "hidden_size": sizes.hidden,
                "intermediate_size": sizes.width,
                "num_hidden_layers": sizes.layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "num_local_experts": sizes.experts,
                "num_experts_per_tok": 2,
                "max_position_embeddings": sizes.context,
                "sliding_window": None,
                "tie_word_embeddings": True,
            }
        )
        make = jax.jit(lambda: nnx.split(Decoder(config, head="causal-lm", rngs=nnx.Rngs(0))))
        return nnx.merge(*make())

    def trained(self, model: Any) -> Any:
        """Returns the model after training."""
        sizes = self.sizes
        config = fj.TrainConfig(
            epochs=1000,
            max_steps=sizes.steps,
            batch_size=sizes.batch,
            learning_rate=2e-3,
            weight_decay=0.01,
            router_balance=0.01,
            router_z=0.001,
        )
        data = fj.PlainText(self.text, context=sizes.context)
        return fj.finetune(model, data, config, key=jax.random.key(0), progress=None).model

    def calibration(self, model: Any) -> list[Any]:
        """Returns the batches to calibrate on."""
        count, context = self.sizes.calibration, self.sizes.context
        windows = self.text[: len(self.text) // context * context].reshape(-1, context)
        chosen = np.random.default_rng(0).permutation(len(windows))[:count]
        rows = windows[np.sort(chosen)]
        return [{"input_ids": rows[i : i + 16]} for i in range(0, count, 16)]

    def judge(self, model: Any) -> float:
        """Returns nats per byte of the held-out text."""
        return nats_per_token(model, self.held_out, self.sizes.context)


def dense(subject: Switch | Mixtral, folder: Path | None) -> Any:
    """Returns the trained model, from a folder if it is there."""
    if folder is not None and folder.is_dir():
        return fj.load_into(subject.untrained(), folder)
    model = subject.trained(subject.untrained())
    if folder is not None:
        fj.save(model, folder)
    return model


def measure(subject: Switch | Mixtral, model: Any, cases: list[dict[str, Any]], table: Table):
    """Runs the cases of one model: the share of the experts' memory, and the method."""
    seen = subject.calibration(model)

    def memory(made: Any) -> int:
        return sum(num_params(site.mlp) for site in fj.sites(made) if site.mlp.stack)

    for case in cases:
        if case["method"] == "dense":
            table.add({**case, "nats": subject.judge(model), "expert_parameters": memory(model)})
            continue
        method = METHODS[case["method"]](case["share"])
        start = time.perf_counter()
        smaller, _ = fj.compress(
            model,
            method,
            layers=".*experts",
            calibration=seen if method.takes_calibration else None,
            key=jax.random.key(0),
            progress=False,
        )
        jax.block_until_ready(nnx.state(smaller))
        seconds = time.perf_counter() - start
        row = {**case, "nats": subject.judge(smaller), "expert_parameters": memory(smaller)}
        table.add({**row, "seconds": seconds})


def all_cases(name: str, quick: bool) -> list[dict[str, Any]]:
    """Returns the cases of one model."""
    cases: list[dict[str, Any]] = [{"model": name, "share": 1.0, "method": "dense"}]
    for share in SHARES[1:2] if quick else SHARES:
        cases += [{"model": name, "share": share, "method": method} for method in METHODS]
    return [case for case in cases if not quick or case["method"] in QUICK]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with nlg/e2e/ and lm/tinyshakespeare/")
    arguments.add_argument("--cache", type=Path, help="folder for the trained models")
    arguments.add_argument("--only", default="", help="regular expression for the cases to run")
    options = arguments.parse_args()
    if options.data is None and not options.quick:
        raise SystemExit("give --data DIR, or --quick")
    # A self-check compiles most of the time.
    jax.config.update("jax_disable_most_optimizations", options.quick)
    table = Table(options.json)
    for name in MODELS[1:] if options.quick else MODELS:
        cases = [
            case
            for case in all_cases(name, options.quick)
            if re.search(options.only, f"{name} {case['share']} {case['method']}")
            and not table.has(case)
        ]
        if not cases:
            continue
        made = {"switch": Switch, "mixtral": Mixtral}[name](options.data, options.quick)
        folder = None if options.cache is None else options.cache / name
        measure(made, dense(made, folder), cases, table)
    show(table.rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
