"""Measures what an accelerator is for, in one short stretch of its time: 8 minutes in all.

- ``cold-kmeans``, ``cold-compress``: first calls, without kept programs: k-means of 3,072 x 1,537
  points, and compressing all-MiniLM-L6-v2 without and with calibration.
- ``clustering``: k-means beside the time of the Gram matrix alone; 64 experts in one call and one.
- ``fit-many``: a step of 16 runs of MiniLM in one program, and of one run.
- ``train-encoder``, ``train-decoder``: training steps in bfloat16 of an encoder of RoBERTa-base's
  size and a Llama of 0.5 billion parameters, dense and with two thirds of the MLPs at a quarter,
  beside transformers with torch, eager and by torch.compile, in one process.
- ``kernels``: neural tangent kernels of the encoder, 64 inputs x 2 outputs.
- ``table``: the paper's table at its own size, by `benchmarks.finetune`, for as many seeds as the
  time allows; needs --model (all-mpnet-base-v2) and --data (GLUE).

    python -m benchmarks.accelerator --json FILE [--model DIR] [--data GLUE] [--only NAME ...]
        [--limit SECONDS] [--dry]

Each case has a process and a time limit of its own, and its rows are in FILE when it ends. A case
that fails or runs out of time leaves the rows that it has and one that says what happened. The same
command resumes: it skips the cases in FILE, but for one that the limit in all cut short; --only
runs cases again, and gives the table more seeds.
--dry takes tiny sizes on the CPU. Models have random weights where only time is measured. Torch and
transformers are left out where they are not installed.

``seconds`` of a training step is the median over some windows of steps, each between two waits for
the device, after a warm-up. ``over_gram`` is the time of a clustering over that of its Gram matrix,
``over_one`` that of many runs or experts over that of one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Rows = Iterator[Row]
TOTAL = 480.0
LEAST = 15.0
"""No case begins when fewer seconds are left."""
OUT_OF_TIME, CUT_SHORT = "out of time", "cut short by the limit in all"
MARK = "row: "
"""Begins the lines in which a case gives its rows."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the cases."""

    points: tuple[tuple[int, int], ...] = ((3072, 1537), (11008, 4096))
    experts: tuple[int, int, int] = (64, 1536, 384)
    runs: int = 16
    batch: tuple[int, int] = (32, 128)
    texts: tuple[int, int] = (8, 512)
    inputs: tuple[int, int] = (64, 32)
    window: int = 10


DRY = Sizes(
    points=((96, 17), (128, 33)),
    experts=(4, 32, 8),
    runs=3,
    batch=(4, 16),
    texts=(2, 16),
    inputs=(4, 8),
    window=1,
)
WINDOWS, WARMUP = 4, 4


def filled(abstract: Any) -> Any:
    """Returns a module of these shapes with random weights that are drawn on the host.

    On an accelerator, a compiled initialization of a large model takes minutes to compile.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, state = nnx.split(abstract)
    draw = np.random.default_rng(0)

    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), x.shape)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        if "bias" in name:
            return jnp.zeros(x.shape, x.dtype)
        if "kernel" in name or "embedding" in name:
            return jnp.asarray(0.02 * draw.standard_normal(x.shape, np.float32), x.dtype)
        return jnp.ones(x.shape, x.dtype)  # of norms, and sizes of clusters

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(leaf, state))


def encoder(dry: bool, **sizes: Any) -> Any:
    """Returns an encoder with a head for two classes, by default of RoBERTa-base's size."""
    from flax import nnx

    from fusion_jax.models.bert import Bert, BertConfig

    small: dict[str, Any] = {
        "vocab_size": 99,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    fields: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514}
    fields |= {"type_vocab_size": 1, **sizes}
    config = BertConfig.roberta(**{**fields, **small} if dry else fields)
    return filled(nnx.eval_shape(lambda: Bert(config, head="classification", rngs=nnx.Rngs(0))))


MINILM: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1280,
    "intermediate_size": 3456,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SMALL_LLAMA: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def decoder(dry: bool) -> Any:
    """Returns a Llama of half a billion parameters."""
    from flax import nnx

    from fusion_jax.models.decoder import Decoder
    from fusion_jax.models.decoder_config import DecoderConfig

    config = DecoderConfig.read(SMALL_LLAMA if dry else LLAMA)
    return filled(nnx.eval_shape(lambda: Decoder(config, head="causal-lm", rngs=nnx.Rngs(0))))


def fused(model: Any) -> Any:
    """Puts fused MLPs of a quarter of the width into the last two thirds of the layers.

    Clusters do not change the time: these have random weights.
    """
    import fusion_jax as fj

    layers = list(model.layers)
    for layer in layers[len(layers) // 3 :]:
        kind = fj.FusedGatedMlp if isinstance(layer.mlp, fj.GatedMlp) else fj.FusedMlp
        width = layer.mlp.width
        layer.mlp = filled(
            layer.mlp.abstract(kind, width // 4, original_width=width, scaling="adam")
        )
    return model


def first_and_next(call: Callable[[], Any], runs: int = 3) -> tuple[float, float]:
    """Returns the seconds of the first call, and the median of the next."""
    import jax

    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


class Compiled:
    """Counts programs and their seconds while the block runs."""

    def __enter__(self) -> Compiled:
        import jax

        self.programs, self.compile_seconds, self._on = 0, 0.0, True
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self._on = time.perf_counter() - self._start, False

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if self._on and event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.compile_seconds += duration_secs

    def row(self) -> Row:
        """Returns the numbers of the block."""
        return {
            "seconds": self.seconds,
            "programs": self.programs,
            "compile_seconds": self.compile_seconds,
        }


def cold_kmeans(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Clusters points for the first time."""
    import jax

    import fusion_jax as fj

    n, d = sizes.points[0]
    x = np.random.default_rng(0).standard_normal((n, d), np.float32)
    jax.devices()
    with Compiled() as compiled:
        jax.block_until_ready(fj.kmeans(x, n // 4, key=jax.random.key(0)))
    yield {"what": f"k-means {n} x {d}", **compiled.row()}


def cold_compress(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Compresses MLPs of MiniLM for the first time."""
    import jax
    from flax import nnx

    import fusion_jax as fj
    from fusion_jax.cli.demo import find_model

    name = find_model()
    real = os.path.isdir(name) and not options.dry
    model = fj.load(name) if real else encoder(options.dry, **MINILM)
    jax.block_until_ready(nnx.state(model))
    draw = np.random.default_rng(1)
    ids = draw.integers(5, model.config.vocab_size, (32, sizes.inputs[1])).astype(np.int32)
    seen = [{"input_ids": ids, "attention_mask": np.ones(ids.shape, bool)}]
    for what, calibration in (("without calibration", None), ("calibrated", seen)):
        with Compiled() as compiled:
            made = fj.compress(
                model,
                fj.Fusion(width=0.25),
                layers=slice(-4 if real else -2, None),
                key=jax.random.key(0),
                calibration=calibration,
                progress=False,
            )[0]
            jax.block_until_ready(nnx.state(made))
        weights = "all-MiniLM-L6-v2" if real else "random"
        yield {"what": f"compress, {what}", "weights": weights, **compiled.row()}


def clustering(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Clusters points, and compresses experts."""
    import jax
    import jax.numpy as jnp

    import fusion_jax as fj

    def points(n: int, d: int, seed: int = 0) -> Any:
        draw = np.random.default_rng(seed)
        x = draw.standard_normal((n, d), np.float32)
        lengths = np.exp(0.35 * draw.standard_normal((n, 1), np.float32))
        return jnp.asarray(x * lengths)

    for n, d in sizes.points:
        x = points(n, d)
        gram = jax.jit(lambda x: jnp.matmul(x, x.T, precision="highest"))
        _, alone = first_and_next(partial(gram, x))
        first, after = first_and_next(
            lambda x=x, n=n: fj.kmeans(x, n // 4, key=jax.random.key(0)).labels
        )
        yield {
            "what": f"k-means {n} x {d} -> {n // 4}",
            "seconds": after,
            "first_seconds": first,
            "gram_seconds": alone,
            "over_gram": after / alone,
        }
    count, p, d = sizes.experts
    rows = jnp.stack([points(p, 2 * d + 1, seed) for seed in range(count)])
    subs = fj.SubMLPs(up=rows[..., :d], up_bias=rows[..., d], down=rows[..., d + 1 :])
    one = jax.tree.map(lambda x: x[0], subs)
    solve = partial(fj.compress_mlp, method=fj.Fusion(width=p // 4), key=jax.random.key(0))
    _, single = first_and_next(lambda: solve(one).parts.labels)
    first, after = first_and_next(lambda: solve(subs).parts.labels, runs=2)
    yield {
        "what": f"{count} experts, {p} x {2 * d + 1} -> {p // 4}, in one call",
        "seconds": after,
        "first_seconds": first,
        "over_one": after / single,
    }


def windows(sizes: Sizes, train: Callable[[Any, Callable[[int, Any], None]], Any]) -> Row:
    """Returns the seconds of a step of `fit` or `fit_jointly`, and of all before the first ones.

    Args:
        sizes: The sizes.
        train: Trains: (settings, what to call after each step).
    """
    import jax

    import fusion_jax as fj

    marks = [time.perf_counter()]

    def mark(step: int, state: Any) -> None:
        if step >= WARMUP and not (step - WARMUP) % sizes.window:
            jax.block_until_ready(state)
            marks.append(time.perf_counter())

    steps = WARMUP + WINDOWS * sizes.window
    config = fj.TrainConfig(epochs=10**6, max_steps=steps, log_every=10**6, eval_every=10**6)
    train(config, mark)
    seconds = [(b - a) / sizes.window for a, b in pairwise(marks[1:])]
    return {"seconds": statistics.median(seconds), "first_seconds": marks[1] - marks[0]}


def source(batch: tuple[int, int], vocabulary: int, labels: bool, seed: int = 0) -> Any:
    """Returns random texts as batches of one shape."""
    from fusion_jax.training import Batches, Examples

    rows, length = batch
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, vocabulary, (4 * rows, length)).astype(np.int32)
    classes = np.arange(4 * rows, dtype=np.int32) % 2 if labels else None
    examples = Examples(list(tokens), None, classes, [""] * len(tokens))
    return Batches(examples, rows, pad_id=1, shapes=1, seed=seed)


def many(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Trains runs of MiniLM in one program."""
    import jax

    from fusion_jax.training import Recipe, fit, losses
    from fusion_jax.training.engine.joint import fit_jointly

    model = encoder(options.dry, **MINILM)
    rows = sizes.batch[0], max(8, sizes.batch[1] // 4)
    sources = [source(rows, model.config.vocab_size, True, seed) for seed in range(sizes.runs)]
    keys = [jax.random.key(seed) for seed in range(sizes.runs)]
    for dtype in ("bfloat16",) if options.dry else ("bfloat16", "float32"):

        def one(config: Any, mark: Any, dtype: Any = dtype) -> Any:
            config = replace(config, compute_dtype=dtype)
            recipe = Recipe(on_step=mark)
            loss = losses.classification
            return fit(model, sources[0], loss, config, key=keys[0], recipe=recipe, progress=False)

        def joint(config: Any, mark: Any, dtype: Any = dtype) -> Any:
            return fit_jointly(
                [model] * sizes.runs,
                sources,
                [losses.classification] * sizes.runs,
                replace(config, compute_dtype=dtype),
                keys=keys,
                recipe=Recipe(on_step=mark),
                progress=False,
            )

        single = windows(sizes, one)
        yield {"what": f"one run of MiniLM, {rows[0]} x {rows[1]}, {dtype}", **single}
        found = windows(sizes, joint)
        over = found["seconds"] / single["seconds"]
        yield {"what": f"{sizes.runs} runs in one program, {dtype}", **found, "over_one": over}


def steps(
    name: str,
    make: Callable[[], Any],
    loss: Any,
    batch: tuple[int, int],
    labels: bool,
    sizes: Sizes,
) -> Rows:
    """Times training steps of a model and of the same model with fused MLPs."""
    import jax

    from fusion_jax.report import num_params
    from fusion_jax.training import Recipe, fit

    for kind, change in (("dense", lambda model: model), ("fused to a quarter", fused)):
        model = change(make())
        data = source(batch, model.config.vocab_size, labels)

        def train(config: Any, mark: Any, model: Any = model, data: Any = data) -> Any:
            config = replace(config, compute_dtype="bfloat16", batch_size=batch[0])
            recipe = Recipe(on_step=mark)
            return fit(
                model, data, loss, config, key=jax.random.key(0), recipe=recipe, progress=False
            )

        what = f"{name}, {batch[0]} x {batch[1]}, bfloat16"
        yield {
            "what": f"{what}: ours, {kind}",
            "parameters": num_params(model),
            **windows(sizes, train),
        }


def torch_steps(name: str, make: Callable[[], Any], batch: tuple[int, int], sizes: Sizes) -> Rows:
    """Times training steps of a model of transformers, eager and compiled (not in a dry run)."""
    what = f"{name}, {batch[0]} x {batch[1]}, bfloat16: transformers and torch"
    if not (find_spec("torch") and find_spec("transformers")):
        yield {"what": what, "note": "not installed"}
        return
    import torch  # type: ignore[import-not-found]

    on = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    for kind in ("eager",) if sizes is DRY else ("eager", "torch.compile"):
        try:
            model = make().to(on).train()
            run: Any = model if kind == "eager" else torch.compile(model)
            optimizer = torch.optim.AdamW(
                model.parameters(),
                lr=2e-5,
                betas=(0.9, 0.98),
                eps=1e-6,
                weight_decay=0.1,
                fused=True,
            )
            ids = torch.randint(5, model.config.vocab_size, batch, device=on)
            language = model.config.model_type == "llama"
            labels = ids if language else torch.arange(batch[0], device=on) % 2
            mask = torch.ones_like(ids)

            def step(run: Any = run, model: Any = model, optimizer: Any = optimizer) -> None:
                with torch.autocast(on, torch.bfloat16):
                    loss = run(input_ids=ids, attention_mask=mask, labels=labels).loss  # noqa: B023
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

            def mark() -> float:
                if on == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter()

            marks = [mark()]
            for _ in range(WARMUP):
                step()
            marks.append(mark())
            for _ in range(WINDOWS):
                for _ in range(sizes.window):
                    step()
                marks.append(mark())
        except Exception as error:  # the other kind may still run
            yield {"what": f"{what} {kind}", "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        seconds = [(b - a) / sizes.window for a, b in pairwise(marks[1:])]
        yield {
            "what": f"{what} {torch.__version__} {kind}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": statistics.median(seconds),
            "first_seconds": marks[1] - marks[0],
        }
        del model, run, optimizer, step


def train_encoder(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Times training steps of an encoder."""
    from fusion_jax.training import losses

    name = "encoder of RoBERTa-base's size"
    make = partial(encoder, options.dry)
    yield from steps(name, make, losses.classification, sizes.batch, True, sizes)

    def peer() -> Any:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        small: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32}
        small |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        fields: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514}
        fields |= {"type_vocab_size": 1, **(small if options.dry else {})}
        config = RobertaConfig(**fields)
        return RobertaForSequenceClassification(config)

    yield from torch_steps(name, peer, sizes.batch, sizes)


def train_decoder(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Times training steps of a language model."""
    from fusion_jax.training import losses

    name = "Llama of 0.5 billion parameters"
    yield from steps(
        name, partial(decoder, options.dry), losses.next_token, sizes.texts, False, sizes
    )

    def peer() -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**(SMALL_LLAMA if options.dry else LLAMA)))

    yield from torch_steps(name, peer, sizes.texts, sizes)


def kernels(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Computes neural tangent kernels of an encoder."""
    import ntk

    model = encoder(options.dry)
    n, length = sizes.inputs
    ids = np.random.default_rng(0).integers(5, model.config.vocab_size, (n, length))
    batch = {"input_ids": ids.astype(np.int32), "attention_mask": np.ones((n, length), bool)}
    f, params = ntk.functional(model, outputs="logits")
    kinds: tuple[ntk.KernelKind, ...] = ("sgd", "adam")
    for kind in kinds:
        call = partial(ntk.kernel, f, params, batch, kind=kind, progress=False)
        first, after = first_and_next(call, runs=2)
        what = f"{kind} kernel of the encoder, {n} inputs of {length} tokens x 2 outputs"
        yield {"what": what, "seconds": after, "first_seconds": first}


def paper_table(sizes: Sizes, options: argparse.Namespace) -> Rows:
    """Runs the paper's table, first one seed of all, then more, and gives what is done by then."""
    from benchmarks.finetune import table as summarized

    if not options.dry and (options.model is None or options.data is None):
        yield {"what": "the paper's table", "note": "give --model and --data"}
        return
    end = time.perf_counter() + options.case_limit - LEAST
    arguments = ["--methods", "paper"]
    if not options.dry:
        arguments = ["--data", str(options.data), "--model", str(options.model), "--last", "8"]
        arguments += ["--widths", "768", "--methods", "paper", "fusion", "activation-refit"]
        arguments += ["--tasks", "sst2", "cola", "--epochs", "1", "5", "--shapes", "2"]
        arguments += ["--learning-rate", "4e-5", "--dtype", "bfloat16"]
    file = Path(options.table)
    for seeds in (1, 3, 5):
        left = end - time.perf_counter()
        if left < LEAST or (options.dry and seeds > 1):
            break
        command = [sys.executable, "-m", "benchmarks.finetune", *arguments, "--seeds", str(seeds)]
        command += ["--budget", f"{left:.0f}", "--json", str(file)] + ["--quick"] * options.dry
        with suppress(subprocess.TimeoutExpired):
            status = subprocess.run(command, stdout=sys.stderr, timeout=left).returncode
            if status:  # what it said comes before
                raise SystemExit(f"benchmarks.finetune ended with exit status {status}")
    if file.is_file():
        for row in summarized(json.loads(file.read_text())["rows"]):
            yield {"what": "the paper's table", **row}


@dataclass(frozen=True)
class Case:
    """A case: what it runs, and its time limit in seconds."""

    run: Callable[[Sizes, argparse.Namespace], Rows]
    limit: float


CASES = {
    "cold-kmeans": Case(cold_kmeans, 45),
    "cold-compress": Case(cold_compress, 75),
    "clustering": Case(clustering, 75),
    "fit-many": Case(many, 100),
    "train-encoder": Case(train_encoder, 140),
    "kernels": Case(kernels, 75),
    "train-decoder": Case(train_decoder, 140),
    "table": Case(paper_table, TOTAL),
}


def run_here(name: str, options: argparse.Namespace) -> int:
    """Runs a case in this process and prints its rows as they come."""
    import jax

    device = jax.devices()[0]
    print(MARK + json.dumps({"device": device.device_kind}), flush=True)
    for row in CASES[name].run(DRY if options.dry else Sizes(), options):
        print(MARK + json.dumps(row), flush=True)
    return 0


def run_case(name: str, limit: float, options: argparse.Namespace) -> list[Row]:
    """Runs a case in a process of its own, and returns its rows."""
    command = [sys.executable, "-m", "benchmarks.accelerator", "--case", name]
    command += ["--case-limit", str(limit)] + ["--dry"] * options.dry
    for option in ("model", "data", "table"):
        value = getattr(options, option)
        command += [f"--{option}", str(value)] if value is not None else []
    place = dict(os.environ)
    if name.startswith("cold"):
        place |= {"FUSION_JAX_CACHE": "off"}
        place.pop("JAX_COMPILATION_CACHE_DIR", None)
    else:
        place.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.programs))
    if name.startswith("train"):  # torch needs memory too
        place["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"
    if name == "table":  # its runs need the memory
        place["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if options.dry:
        place["JAX_PLATFORMS"] = "cpu"
    start, status = time.perf_counter(), "done"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=place, start_new_session=True)
        try:
            if child.wait(timeout=limit):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME if limit >= CASES[name].limit else CUT_SHORT
        finally:  # with the processes that it started
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith(MARK)]
        said = err.read().splitlines()
    rows = [json.loads(line.removeprefix(MARK)) for line in lines]
    device = rows.pop(0)["device"] if rows else None
    end: Row = {"what": "the case", "status": status, "wall_seconds": seconds}
    if status != "done":
        end["stderr"] = said[-12:]
    about = {"case": name, "device": device, "dry": options.dry, **versions()}
    return [{**about, **row} for row in [*rows, end]]


def versions() -> Row:
    """Returns the versions of Python and of packages."""
    found: Row = {"python": platform.python_version()}
    for name in ("jax", "flax", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def show(row: Row) -> str:
    """Returns a row as one line."""
    about = {"case", "device", "dry", "what", *versions()}
    numbers = {name: x for name, x in row.items() if name not in about and x is not None}
    said = ", ".join(
        f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in numbers.items()
    )
    return f"{row['case']}: {row['what']}: {said}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write rows here, and resume from it")
    parser.add_argument("--model", type=Path, help="folder of all-mpnet-base-v2, for the table")
    parser.add_argument("--data", type=Path, help="folder with GLUE's folders, for the table")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--limit", type=float, default=TOTAL, help="seconds in all")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--case-limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        return run_here(options.case, options)
    end = time.perf_counter() + options.limit
    rows: list[Row] = []
    if options.json is not None and options.json.is_file():
        rows = json.loads(options.json.read_text())["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        beside = Path(scratch) / "accelerator" if options.json is None else options.json
        options.programs = beside.with_name(f"{beside.stem}-programs")
        options.table = beside.with_name(f"{beside.stem}-table.json")
        for name in options.only or CASES:
            before = [row for row in rows if row["case"] == name]
            cut = any(row.get("status") == CUT_SHORT for row in before)
            if before and not cut and options.only is None:
                print(f"{name}: in {options.json}, not run again")
                continue
            left = end - time.perf_counter()
            if left < LEAST:
                print(f"{name}: no time left")
                continue
            found = run_case(name, min(CASES[name].limit, left), options)
            rows = [row for row in rows if row["case"] != name] + found
            for row in found:
                print(show(row), flush=True)
            if options.json is not None:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
