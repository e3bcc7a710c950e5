"""Heals compressed language models: nats per token after 0, 50, 200 and 1,000 steps.

Every MLP of a model is narrowed, and the model is then trained towards the original by
`fusion_jax.heal` with its default settings, for so many steps in a run of its own. Small models
(tinygpt, stories260K) are narrowed to a quarter and heal on 127 tokens at a time, Gemma 3 270M to
a half and on 512. Texts to calibrate on and to judge by are those of ``benchmarks.real``. The text
to heal on is the whole text that those to calibrate on were chosen from.

Results are written after every case, and a case that is already in the file is not run again.

    python -m benchmarks.heal --models DIR --data DIR --json FILE [--only PATTERN] [--quick]

``--only`` is a regular expression for "model method; steps"; DIR of ``--models`` holds
``gemma-3-270m`` as a folder of transformers, and may be left out.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fusion_jax as fj
from benchmarks.common import parser, peak_gib, show
from benchmarks.language import CONTEXT
from benchmarks.language import texts as small_texts
from benchmarks.real import MEAN, SMALL, TOKENS, WINDOW, Subject, Table, Tiny, methods, narrowed
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.training import heal_config

MODELS = {"stories260k": 0.25, "tinygpt": 0.25, "gemma": 0.5}
"""The models, and their new widths."""
PARTS = {"gemma": 8}
"""Into how many parts a batch is split, as logits of a large vocabulary take much memory."""
METHODS = ("Fusion()", MEAN, "activation + refit", "Fusion.paper()")
STEPS = (0, 50, 200, 1000)


class Drawn:
    """Batches of 8 windows of tokens, in another order in each epoch."""

    size = 8

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows) // self.size

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step."""
        epoch, i = divmod(step, len(self))
        order = np.random.default_rng(epoch).permutation(len(self.rows))
        ids = self.rows[order[i * self.size : (i + 1) * self.size]]
        weights = np.ones(self.size, np.float32)
        return {"input_ids": ids, "attention_mask": np.ones(ids.shape, bool), "weights": weights}

    def names(self, step: int) -> list[str]:
        """Returns where the rows of a batch come from."""
        return [f"step {step + 1}"]


class Healed(Subject):
    """A model with a text to heal on, besides those to calibrate on and to judge by."""

    @cached_property
    def windows(self) -> dict[str, np.ndarray]:
        """The windows of tokens."""
        found = super().windows
        if self.name in SMALL:
            text = np.asarray(small_texts(SMALL[self.name], self.model, self.data)[0])
            rows = text[: len(text) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
            return {**found, "training": rows}
        tokenizer = load_tokenizer(self.model.provenance.folder)
        text = (self.data / "lm/wikitext-2/valid.txt").read_text()
        ids = np.asarray(tokenizer(text)["input_ids"], np.int32)
        rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
        rows[:, 0] = found["text"][0, 0]
        return {**found, "training": rows}


class TinyHealed(Tiny):
    """A random decoder on random tokens, for a self-check without any data."""

    @cached_property
    def windows(self) -> dict[str, np.ndarray]:
        """Random tokens."""
        found = super().windows
        return {**found, "training": found["text"]}


def measure(subject: Any, cases: list[dict[str, Any]], table: Table) -> None:
    """Runs the cases of one model, each a method and a number of steps."""
    seen = fj.calibrate(
        subject.model, subject.batches("text"), key=jax.random.key(2), max_positions=4 * TOKENS
    )
    made, smaller = methods(), {}
    for case in cases:
        name = case["method"]
        if name == "dense":
            table.add({**case, **subject.judge(subject.model)})
            continue
        if name not in smaller:
            smaller.clear()
            method: Any = made[name](case["width"])
            given = seen if method.takes_calibration else None
            smaller[name] = narrowed(subject.model, case, method, given, None)
        start, model = time.perf_counter(), smaller[name]
        if case["steps"]:
            fit = fj.heal(
                model,
                subject.model,
                Drawn(subject.windows["training"]),
                heal_config(model, accumulate=PARTS.get(case["model"], 1)),
                steps=case["steps"],
                key=jax.random.key(1),
                progress=False,
            )
            if not fit.finished:  # told to stop: a row would say what is not true
                raise SystemExit(f"stopped after step {fit.step}")
            model = fit.model
        seconds = time.perf_counter() - start
        row = {**case, **subject.judge(model), "heal_seconds": seconds, "peak_gib": peak_gib()}
        table.add(row)
        del model
        gc.collect()


def all_cases(name: str, width: float, quick: bool) -> list[dict[str, Any]]:
    """Returns the cases of one model."""
    dense = {"model": name, "width": 1.0, "method": "dense", "steps": 0}
    chosen = METHODS[1:2] if quick else METHODS
    steps = (0, 2) if quick else STEPS
    return [dense] + [
        {"model": name, "width": width, "method": method, "steps": n}
        for method in chosen
        for n in steps
    ]


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, help="folder with the larger models")
    arguments.add_argument("--data", type=Path, help="folder with lm/ and models/")
    arguments.add_argument("--only", default="", help="regular expression for the cases to run")
    options = arguments.parse_args()
    if options.data is None and not options.quick:
        raise SystemExit("give --data DIR, or --quick")
    table = Table(options.json)
    for name, width in {"tiny": 0.5}.items() if options.quick else MODELS.items():
        cases = [
            case
            for case in all_cases(name, width, options.quick)
            if re.search(options.only, f"{name} {case['method']}; {case['steps']}")
            and not table.has(case)
        ]
        if cases and (options.models is not None or name in SMALL or options.quick):
            cls = TinyHealed if options.quick else Healed
            measure(cls(name, options.models, options.data, TOKENS), cases, table)
    show(table.rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
