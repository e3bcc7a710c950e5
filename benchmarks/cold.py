"""Measures what a first call costs: the programs that JAX traces, lowers and compiles for it.

Each case runs in a process of its own: k-means of 3,072 points of 1,537 numbers into 768 clusters;
compressing the last four MLPs of all-MiniLM-L6-v2, 1,536 -> 384, without calibration and calibrated
on random tokens; the first two steps of fine-tuning that model on 64 random texts; the command
``fusion-jax demo``; and an encoder of RoBERTa-base's size with random weights. The folder of
compiled programs is empty at first; in the cases that end with "again", the case has run before.

    python -m benchmarks.cold [--quick] [--json FILE]

``programs`` counts compiled programs, ``lines`` those of their StableHLO, before XLA optimizes.
``trace``, ``lower`` and ``compile`` are seconds. ``seconds`` is the time of the case, once its
modules are imported and its model is loaded; ``cpu`` is the processors' time, of all threads, which
says more where other work runs beside; for the demo both begin with its imports. ``slowest`` names
the programs that took longest to compile, with their seconds; those of one name are added up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import finish, parser

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
SLOWEST = 6


class Programs:
    """Counts what JAX compiles while the block runs.

    Args:
        folder: An empty folder, for the text of the programs.
    """

    def __init__(self, folder: str):
        self._folder = Path(folder)
        self._seconds = dict.fromkeys(_EVENTS.values(), 0.0)
        self._by_name: dict[str, float] = defaultdict(float)
        self._count = 0

    def __enter__(self) -> Programs:
        jax.config.update("jax_dump_ir_to", str(self._folder))
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        now = time.perf_counter(), time.process_time()
        self.elapsed, self.cpu = (b - a for a, b in zip(self._begin, now, strict=True))
        jax.config.update("jax_dump_ir_to", None)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event not in _EVENTS:
            return
        self._seconds[_EVENTS[event]] += duration_secs
        if _EVENTS[event] == "compile":
            self._count += 1
            name = str(kwargs.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._by_name[name] += duration_secs

    def row(self) -> dict[str, Any]:
        """Returns the numbers of the block."""
        texts = (file.read_text().splitlines() for file in self._folder.glob("*.mlir"))
        # Lines that begin with # say from which line of Python an operation comes.
        lines = sum(not line.startswith("#") for text in texts for line in text)
        slowest = sorted(self._by_name.items(), key=lambda item: -item[1])[:SLOWEST]
        return {
            "programs": self._count,
            "lines": lines,
            **self._seconds,
            "seconds": self.elapsed,
            "cpu": self.cpu,
            "slowest": ", ".join(f"{name} {seconds:.2g}" for name, seconds in slowest),
        }


def kmeans(programs: Programs, quick: bool) -> None:
    """Clusters random points."""
    import fusion_jax as fj

    n, d, k = (64, 9, 16) if quick else (3072, 1537, 768)
    x = np.random.RandomState(0).normal(size=(n, d)).astype(np.float32)
    with programs:
        jax.block_until_ready(fj.kmeans(x, k, key=jax.random.key(0)))


def compress(programs: Programs, calibration: str | None) -> None:
    """Compresses MLPs of all-MiniLM-L6-v2 by the default method."""
    import fusion_jax as fj
    from fusion_jax.cli.demo import find_model

    model = fj.load(find_model())
    with programs:
        smaller, _ = fj.compress(
            model,
            fj.Fusion(width=384),
            key=jax.random.key(0),
            layers=slice(-4, None),
            calibration=calibration,
        )
        jax.block_until_ready(jax.tree.leaves(smaller))


def first_step(programs: Programs) -> None:
    """Takes two steps of fine-tuning, on texts of one length."""
    import fusion_jax as fj
    from fusion_jax.cli.demo import find_model
    from fusion_jax.training import Batches, Examples, fit, losses

    model = fj.load(find_model(), head="classification", num_labels=2, key=jax.random.key(0))
    tokens = np.random.RandomState(0).randint(1000, 20000, (64, 32)).astype(np.int32)
    examples = Examples(list(tokens), None, np.arange(64, dtype=np.int32) % 2, [""] * 64)
    train = fj.TrainConfig(max_steps=2, batch_size=32)
    with programs:
        batches = Batches(examples, 32, pad_id=0)
        fit(model, batches, losses.classification, train, key=jax.random.key(0), progress=False)


def demo(programs: Programs) -> None:
    """Runs the command ``fusion-jax demo``."""
    with tempfile.TemporaryDirectory() as folder, programs:
        import fusion_jax_cli

        sys.argv = ["fusion-jax", "demo", "--out", str(Path(folder) / "demo")]
        if fusion_jax_cli.main():
            raise SystemExit("the demo failed")


def random_encoder(programs: Programs, quick: bool) -> None:
    """Makes an encoder of RoBERTa-base's size with random weights."""
    from flax import nnx

    from fusion_jax.models.bert import Bert, BertConfig

    layers = {"num_hidden_layers": 1} if quick else {}
    config = BertConfig.roberta(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **layers
    )
    with programs:
        model = Bert(config, head="classification", rngs=nnx.Rngs(0))
        jax.block_until_ready(nnx.state(model))


CASES = {
    "k-means": kmeans,
    "compress": lambda programs, _: compress(programs, None),
    "compress, calibrated": lambda programs, _: compress(programs, "random"),
    "first steps": lambda programs, _: first_step(programs),
    "demo": lambda programs, _: demo(programs),
    "random encoder": random_encoder,
}
AGAIN = ("compress, calibrated", "first steps", "demo")
QUICK = ("k-means",)


def measure(case: str, quick: bool) -> dict[str, Any]:
    """Runs a case in this process, and returns its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(folder)
        CASES[case](programs, quick)
        return programs.row()


def run(case: str, quick: bool, cache: str) -> dict[str, Any]:
    """Runs a case in a process of its own, and returns its row."""
    command = [sys.executable, "-m", "benchmarks.cold", "--case", case]
    command += ["--quick"] if quick else []
    place = {"FUSION_JAX_CACHE": cache, "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **place})
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--case", choices=CASES, help="one case, in this process, as JSON")
    arguments = arguments.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.quick)))
        return 0
    rows = []
    for case in QUICK if arguments.quick else CASES:
        with tempfile.TemporaryDirectory() as cache:
            rows.append({"case": case, **run(case, arguments.quick, cache)})
            if arguments.quick or case in AGAIN:
                rows.append({"case": f"{case}, again", **run(case, arguments.quick, cache)})
    summary = {f"seconds, {row['case']}": row["seconds"] for row in rows}
    shown = [{**row, "slowest": row["slowest"][:60]} for row in rows]
    finish(arguments, rows, summary, shown=shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
