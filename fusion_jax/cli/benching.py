"""The command bench: how fast models are, and how much memory they take."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tyro.conf import Positional, arg

from fusion_jax.checkpoint.opening import load, open_checkpoint
from fusion_jax.checkpoint.writing import export_hf
from fusion_jax.cli.options import DType
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Model
from fusion_jax.models.decoding import generate
from fusion_jax.models.tokens import check_takes_text
from fusion_jax.progress import show_stage
from fusion_jax.report import num_params
from ntk.tables import table

REPEATS = 5
READ, FIRST, WRITE = "read tokens/s", "first token ms", "write tokens/s"
PEAK = "peak MB"


def bench(
    models: Positional[
        Annotated[list[str], arg(metavar="MODEL...", help_behavior_hint="(one or more)")]
    ],
    batch: int = 1,
    tokens: int = 128,
    new_tokens: int = 32,
    torch: bool = False,
    dtype: DType = None,
) -> None:
    """Measure speed and memory of models, such as one before and after compressing.

    Texts are random tokens. Each model runs in a process of its own; compiling does not count, and
    each time is the shortest of a few. Peak memory is that of the process, with loading.

    Args:
        models: Hub ids, Hugging Face folders, or artefacts.
        batch: Texts at a time.
        tokens: Tokens of each text.
        new_tokens: Tokens to generate for each text, if the model generates.
        torch: Measure transformers with PyTorch on the same device too.
        dtype: Type of the parameters.
    """
    if not models:
        raise InputError("give at least one model")
    check_at_least(1, batch=batch, tokens=tokens)
    check_at_least(2, new_tokens=new_tokens)
    if torch and importlib.util.find_spec("torch") is None:
        raise InputError("--torch needs PyTorch: pip install torch")
    sizes = batch, tokens, new_tokens, dtype
    rows: list[dict[str, Any]] = []
    for model in models:
        # An error about either model comes before the first measurement.
        check_takes_text(open_checkpoint(model).abstract)
    for model in models:
        with show_stage(f"Measuring {model}"):
            rows.append(
                {"model": model, "with": "fusion_jax", **_in_a_process("jax", model, *sizes)}
            )
        if torch:
            with show_stage(f"Measuring {model} with PyTorch"), tempfile.TemporaryDirectory() as t:
                head = open_checkpoint(model).family.text_head
                exported = export_hf(load(model, head=head, dtype=dtype), Path(t) / "model")
                measured = _in_a_process("torch", str(exported), *sizes)
                rows.append({"model": model, "with": "transformers", **measured})
    names = [name for name in rows[0] if name not in ("model", "with")]
    body = [[row["model"], row["with"], *(_cell(row[n]) for n in names)] for row in rows]
    device = jax.devices()[0].device_kind
    print(f"{device}, {batch} x {tokens} tokens\n\n{table([['model', 'with', *names], *body])}")
    if len(models) > 1:
        first = rows[0]
        for row in rows[1:]:
            if row["with"] == first["with"]:
                ratio = row[READ] / first[READ]
                print(f"\n{row['model']} reads {ratio:.2f} times as fast as {first['model']}.")


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _in_a_process(framework: str, model: str, *sizes: Any) -> dict[str, float]:
    """Returns what a process of its own measures."""
    call = f"from {__name__} import print_measured; print_measured()"
    command = [sys.executable, "-c", call, json.dumps([framework, model, *sizes])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise InputError(f"measuring {model} failed: {last[0].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def print_measured() -> None:
    """Measures as the arguments of this process say, and prints JSON."""
    framework, *sizes = json.loads(sys.argv[1])
    measured = _of_torch if framework == "torch" else _of_jax
    print(json.dumps(measured(*sizes)))


def _shortest(run: Callable[[], Any]) -> float:
    """Returns the shortest of some times, after one run that may compile."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _results(
    params: int, megabytes: float, batch: int, tokens: int, read: float, written: list[float]
) -> dict[str, float]:
    """Returns the figures, given the seconds to read, and to write one and more tokens."""
    found = {"million parameters": params / 1e6, "MB": megabytes, READ: batch * tokens / read}
    if written:
        first, more, number = written
        found |= {FIRST: 1e3 * first, WRITE: batch * (number - 1) / max(more - first, 1e-9)}
    return {**found, PEAK: _peak_megabytes()}


def _peak_megabytes() -> float:
    try:
        import resource
    except ImportError:  # on Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _ids(vocab: int, batch: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (batch, tokens)).astype(np.int32)


def _of_jax(name: str, batch: int, tokens: int, new_tokens: int, dtype: Any) -> dict[str, float]:
    head = open_checkpoint(name).family.text_head
    model = load(name, head=head, dtype=dtype)
    ids = jnp.asarray(_ids(model.config.vocab_size, batch, tokens))
    graph, state = nnx.split(model)
    extra = (jnp.ones_like(ids),) if head == "seq2seq-lm" else ()

    @jax.jit
    def read(state: Any, ids: Any) -> Any:
        model: Model = nnx.merge(graph, state)
        if extra:
            return model(input_ids=ids, decoder_input_ids=ids[:, :1])
        return model(input_ids=ids)

    seconds = _shortest(lambda: jax.block_until_ready(read(state, ids)))
    written: list[float] = []
    if head is not None:
        for number in (1, new_tokens):
            written.append(_shortest(lambda n=number: _generated(model, ids, n)))
        written.append(new_tokens)
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param))) / 1e6
    return _results(num_params(model), size, batch, tokens, seconds, written)


def _generated(model: Model, ids: Any, number: int) -> np.ndarray:
    return np.asarray(generate(model, ids, max_new_tokens=number, eos=()))


def _of_torch(name: str, batch: int, tokens: int, new_tokens: int, dtype: Any) -> dict[str, float]:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    head = open_checkpoint(name).family.text_head
    auto = {
        None: transformers.AutoModel,
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    }[head]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = auto.from_pretrained(name).to(device).eval()
    ids = torch.tensor(_ids(model.config.vocab_size, batch, tokens), dtype=torch.long)
    ids = ids.to(device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def read() -> None:
        more = {"decoder_input_ids": ids[:, :1]} if head == "seq2seq-lm" else {}
        model(input_ids=ids, **more)
        wait()

    @torch.inference_mode()
    def write(number: int) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=number,
            max_new_tokens=number,
            pad_token_id=0,
        )
        wait()

    seconds, written = _shortest(read), []
    if head is not None:
        written = [_shortest(lambda: write(1)), _shortest(lambda: write(new_tokens)), new_tokens]
    params = list(model.parameters())
    size = sum(p.numel() * p.element_size() for p in params) / 1e6
    return _results(sum(p.numel() for p in params), size, batch, tokens, seconds, written)


COMMANDS = {"bench": bench}
