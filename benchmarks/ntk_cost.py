"""Measures time and peak memory of exact kernels with every engine and with neural-tangents.

``python -m benchmarks.ntk_cost [--quick] [--model PATH] [--models DIR --data DIR] [--json FILE]``

1. One MLP of RoBERTa-base's size (768 -> 3,072 -> 768, 16 inputs), traced over its outputs and in
   full: the closed form, our engines, and neural-tangents' three implementations.
2. A whole model that all of them can handle: a small random encoder, or the checkpoint at PATH.
3. The 64-example, 2-logit kernels, SGD and Adam, of a random encoder of RoBERTa-base's size.
4. With ``--models`` and ``--data``: the kernels, SGD and Adam, of Qwen2.5-Coder 0.5B for 16 texts
   of 64 tokens; the output is the log-odds of the token that follows. Some entries are compared
   with whole gradients of two texts.

Each row runs in a process of its own, whose peak memory is the row's. If kernels of one problem do
not agree, the exit status is 1. ``--quick`` uses small sizes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.common import finish, parser, peak_gib

IMPLEMENTATIONS = ("structured-derivatives", "jacobian-contraction", "ntk-vector-products")
TOLERANCE = 1e-4
"""The largest difference of kernels in float32, relative to the largest entry."""
LIMIT_GIB = 14
"""The memory limit of a row, beside parameters, inputs and result."""
TIMEOUT_S = {"mlp-traced": 60, "mlp-full": 60, "model": 60, "encoder": 900, "language": 900}
"""A row is stopped after this time: only the fastest of neural-tangents' three matters."""
SECONDS = 10
"""A row repeats its kernel for this long, and reports the fastest."""
ONCE_S = 30
"""A kernel that takes longer runs once: its compilation hardly matters."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        problem: A key of `PROBLEMS`.
        engine: ``"closed-form"``, or an engine of `ntk.kernel`.
        implementation: An implementation of neural-tangents.
        kind: The kind of the kernel.
    """

    problem: str
    engine: str
    implementation: str | None = None
    kind: str = "sgd"


def rows(problem: str | None, language: bool) -> list[Row]:
    """Returns the measurements; each is compared with the first of its problem."""
    theirs = [("neural-tangents", name) for name in IMPLEMENTATIONS]
    ours = [("jacobian", None), ("vector-product", None)]
    made = [
        Row(problem, *how)
        for problem in ("mlp-traced", "mlp-full", "model")
        for how in ([] if problem == "model" else [("closed-form", None)]) + ours + theirs
    ]
    whole = ["encoder", *(["language"] if language else [])]
    made += [Row(name, "auto", kind=kind) for name in whole for kind in ("sgd", "adam")]
    return [row for row in made if problem in (None, row.problem)]


def mlp(quick: bool, traced: bool) -> dict[str, Any]:
    import jax
    from flax import nnx

    import ntk
    from ntk.mlp import full_kernel, mlp_weights, traced_kernel

    d, p, n = (64, 256, 8) if quick else (768, 3072, 16)

    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.up = nnx.Linear(d, p, rngs=rngs)
            self.down = nnx.Linear(p, d, rngs=rngs)
            self.act = "gelu"

        def __call__(self, x: Any) -> Any:
            return self.down(jax.nn.gelu(self.up(x), approximate=False))

    model = Mlp(nnx.Rngs(0))
    f, params = ntk.functional(model)

    weights = mlp_weights(model)
    closed_form = partial(traced_kernel if traced else full_kernel, weights)
    return {
        "f": f,
        "params": params,
        "x": jax.random.normal(jax.random.key(1), (n, d)),
        "closed_form": closed_form,
        "trace_axes": (-1,) if traced else (),
    }


def encoder(base: bool, quick: bool, path: str | None) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import fusion_jax
    import ntk
    from fusion_jax.models.bert import Bert, BertConfig

    n, tokens = (64, 32) if base and not quick else (8, 16)
    if path is not None and not base:
        model = fusion_jax.load(path, head="classification")
    else:
        large = base and not quick
        config = BertConfig.roberta(
            pad_token_id=1,
            vocab_size=50265 if large else 1000,
            hidden_size=768 if large else 64 if quick else 128,
            num_attention_heads=12 if large else 4,
            intermediate_size=3072 if large else 256 if quick else 512,
            num_hidden_layers=12 if large else 1 if quick else 2,
            max_position_embeddings=514,
            type_vocab_size=1,
        )
        model = Bert(config, head="classification", rngs=nnx.Rngs(0))
    f, params = ntk.functional(model, outputs="logits")
    ids = jax.random.randint(jax.random.key(1), (n, tokens), 3, 1000)
    return {
        "f": f,
        "params": params,
        "x": {"input_ids": ids, "attention_mask": jnp.ones(ids.shape, bool)},
        "trace_axes": (),
    }


def language(models: Path | None, data: Path | None) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import fusion_jax as fj
    import ntk
    from fusion_jax.models.tokens import load_tokenizer

    assert models is not None and data is not None
    model = fj.load(models / "qwen2.5-coder-0.5b", head="causal-lm", dtype="float32")
    tokenizer = load_tokenizer(model.provenance.folder)
    texts, tokens = 16, 64
    text = (data / "lm/wikitext-2/test.txt").read_text()[: texts * tokens * 40]
    ids = np.asarray(tokenizer(text)["input_ids"], np.int32)[: texts * (tokens + 1)]
    ids = ids.reshape(texts, tokens + 1)
    logits, params = ntk.functional(model, outputs=ntk.token(-1, of="logits"))

    def log_odds(params: Any, x: Any) -> Any:
        """Returns the logit of the token that follows, less the log of the sum for the others."""
        found = logits(params, {"input_ids": x["ids"]})
        chosen = jax.nn.one_hot(x["next"], found.shape[1], dtype=bool)
        return jnp.where(chosen, found, 0).sum(1) - jax.nn.logsumexp(
            jnp.where(chosen, -jnp.inf, found), axis=1
        )

    return {
        "f": log_odds,
        "params": params,
        "x": {"ids": jnp.asarray(ids[:, :-1]), "next": jnp.asarray(ids[:, -1])},
        "trace_axes": (),
        "gradients": True,
    }


def largest_difference(problem: dict[str, Any], kind: str, found: np.ndarray) -> float:
    """Returns how far a kernel is from products of whole gradients of its first two examples.

    The largest difference of the four entries, relative to the largest of them.
    """
    import jax

    f, params, x = problem["f"], problem["params"], problem["x"]
    gradient = jax.jit(jax.grad(lambda params, x: f(params, x)[0]))

    def of(example: int) -> list[np.ndarray]:
        alone = jax.tree.map(lambda a: a[example : example + 1], x)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(gradient(params, alone))]

    def entry(first: list[np.ndarray], second: list[np.ndarray]) -> float:
        pairs = zip(first, second, strict=True)
        return sum(float(np.vdot(g, np.sign(h) if kind == "adam" else h)) for g, h in pairs)

    two = [of(0), of(1)]
    exact = np.array([[entry(a, b) for b in two] for a in two])
    return float(np.abs(found[:2, :2] - exact).max() / np.abs(exact).max())


PROBLEMS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "mlp-traced": lambda given: mlp(given.quick, traced=True),
    "mlp-full": lambda given: mlp(given.quick, traced=False),
    "model": lambda given: encoder(False, given.quick, given.model),
    "encoder": lambda given: encoder(True, given.quick, given.model),
    "language": lambda given: language(given.models, given.data),
}


def measure(row: Row, given: Any) -> dict[str, Any]:
    """Runs one row in this process and writes the kernel to a file."""
    import jax

    import ntk

    problem = PROBLEMS[row.problem](given)
    params, x = problem["params"], problem["x"]
    jax.block_until_ready((params, x))
    before = peak_gib()
    if row.engine == "closed-form":
        compute = partial(problem["closed_form"], x)
    else:
        compute = partial(
            ntk.kernel,
            problem["f"],
            params,
            x,
            kind=cast(Any, row.kind),
            trace_axes=problem["trace_axes"],
            engine=cast(Any, row.engine),
            implementation=cast(Any, row.implementation),
            memory_limit=LIMIT_GIB * 2**30,
        )
    times = []
    try:
        seconds = SECONDS / 10 if given.quick else SECONDS
        while not times or (times[0] < ONCE_S and sum(times[1:]) < seconds):
            start = time.perf_counter()
            result = jax.block_until_ready(compute())
            times.append(time.perf_counter() - start)
    except ntk.InputError as error:
        return {"refused": str(error)}
    np.save(given.out, np.asarray(result))
    measured = {
        "seconds": min(times),
        "first_seconds": times[0],
        "peak_gib": peak_gib(),
        "gib_before": before,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "shape": list(result.shape),
    }
    if problem.get("gradients"):
        measured["rel_diff"] = largest_difference(problem, row.kind, np.asarray(result))
    return measured


def run(row: Row, given: Any, out: Path) -> dict[str, Any]:
    """Runs one row in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ntk_cost", "--row", json.dumps(asdict(row))]
    command += ["--out", str(out)] + (["--quick"] if given.quick else [])
    for name in ("model", "models", "data"):
        value = getattr(given, name)
        command += [] if value is None else [f"--{name}", str(value)]
    limit = TIMEOUT_S[row.problem]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"refused": f"took longer than {limit} s"}
    if done.returncode < 0:
        return {"refused": f"ended by signal {-done.returncode}"}
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def difference(one: Path, two: Path) -> float:
    """Returns the largest difference of two kernels, relative to the largest value."""
    a, b = (np.load(path, mmap_mode="r") for path in (one, two))
    if a.shape != b.shape:
        return math.inf
    largest = max(float(np.abs(b[i]).max()) for i in range(len(b)))
    return max(float(np.abs(a[i] - b[i]).max()) for i in range(len(b))) / largest


def compare(results: list[dict[str, Any]], kernels: list[Path]) -> None:
    """Adds to each row the difference of its kernel from the first one of its problem."""
    first: dict[tuple[str, str], Path] = {}
    for result, path in zip(results, kernels, strict=True):
        if path.exists():
            reference = first.setdefault((result["problem"], result["kind"]), path)
            if reference != path:
                result["rel_diff"] = difference(path, reference)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the headline figures; None if one side has no result."""

    def fastest(problem: str, engines: tuple[str, ...]) -> float:
        times = [
            r["seconds"]
            for r in results
            if r["problem"] == problem and r["engine"] in engines and "seconds" in r
        ]
        return min(times, default=math.nan)

    def speedup(problem: str, *ours: str) -> float | None:
        ratio = fastest(problem, ("neural-tangents",)) / fastest(problem, ours)
        return None if math.isnan(ratio) else ratio

    diffs = [r["rel_diff"] for r in results if "rel_diff" in r]
    return {
        "speedup_mlp_traced": speedup("mlp-traced", "closed-form"),
        "speedup_mlp_full": speedup("mlp-full", "closed-form"),
        "speedup_mlp_traced_engine": speedup("mlp-traced", "jacobian", "vector-product"),
        "speedup_mlp_full_engine": speedup("mlp-full", "jacobian", "vector-product"),
        "speedup_model": speedup("model", "jacobian", "vector-product"),
        "max_rel_diff": max(diffs, default=0.0),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--model", help="folder of a checkpoint for the whole-model rows")
    arguments.add_argument("--models", type=Path, help="folder with qwen2.5-coder-0.5b")
    arguments.add_argument("--data", type=Path, help="folder with lm/wikitext-2")
    arguments.add_argument("--problem", choices=PROBLEMS, help="run only this problem")
    arguments.add_argument("--row", help="run one row, given as JSON, in this process")
    arguments.add_argument("--out", help="file for that row's kernel")
    options = arguments.parse_args()
    if options.row:
        print(json.dumps(measure(Row(**json.loads(options.row)), options)))
        return 0

    with tempfile.TemporaryDirectory() as folder:
        # With --quick, times do not matter, and two rows may run at the same time.
        with ThreadPoolExecutor(2 if options.quick else 1) as pool:
            real = options.models is not None and options.data is not None
            every = list(enumerate(rows(options.problem, real)))
            outs = [Path(folder) / f"{i}.npy" for i, _ in every]
            measured = pool.map(lambda item: run(item[1], options, outs[item[0]]), every)
            results = []
            for (_, row), result in zip(every, measured, strict=True):
                results.append({**asdict(row), **result})
                print(
                    f"{row.problem} {row.implementation or row.engine} {row.kind}: done",
                    file=sys.stderr,
                    flush=True,
                )
        compare(results, outs)
    found = summary(results)
    finish(options, results, found, "neural-tangents")
    if found["max_rel_diff"] > TOLERANCE:
        print(f"FAILED: kernels differ by more than {TOLERANCE}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
