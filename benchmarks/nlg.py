"""Measures texts of compressed language models: the paper's WebNLG table at a small scale.

A GPT-2 is trained from scratch by our own trainer, with a byte-level BPE of its texts: E2E's pairs,
the texts (not the triples) of WebNLG's training set, and plain text. Then the last two thirds of
its MLPs are compressed, as in the paper, and it is fine-tuned on WebNLG: dense, by the paper's
fusion and by ours, each with and without layer-wise tuning. Our method is calibrated on training
pairs. The model after the last step generates greedily from the test set; the texts are measured on
categories of the training set (seen), on other categories (unseen), and on all.

    python -m benchmarks.nlg --data DIR [--runs DIR] [--seeds 3] [--epochs 3] [--budget SECONDS]
        [--layers 4] [--features 128] [--pretraining 2000] [--quick] [--json FILE]

The model is trained once and kept as a Hugging Face folder in --runs. Runs are added to FILE when
they end. The same command with the same --runs resumes: it skips the runs in FILE, and an
interrupted run starts from its last checkpoint. --budget stops after this many seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import fusion_jax as fj
from benchmarks.common import finish, parser
from benchmarks.finetune import CALIBRATION, Cell, OutOfTimeError, cells, mean_seconds, method
from fusion_jax.models.gpt2 import Gpt2, Gpt2Config
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.report import num_params
from fusion_jax.training import Recipe, TextPairs, measure_pairs
from fusion_jax.training.engine.config import with_current_names

VOCABULARY = 4096
POSITIONS = 384
CONTEXT = 129
END = "<|endoftext|>"
PLAIN = ("wikitext-2/valid.txt", "tinyshakespeare/input.txt")
METRICS = ("bleu", "chrf", "ter")


def documents(data: Path, webnlg: TextPairs, seed: int) -> list[str]:
    """Returns the training texts of the language model in random order."""
    e2e = fj.load_pairs("e2e", data / "nlg").train
    texts = [f"{a}\n{b}" for a, each in zip(e2e.sources, e2e.references, strict=True) for b in each]
    texts += [text for each in webnlg.train.references for text in each]
    for name in PLAIN:
        plain = (data / "lm" / name).read_text(encoding="utf-8").split("\n")
        # Eight lines at a time, since single lines are short.
        texts += ["\n".join(plain[i : i + 8]) for i in range(0, len(plain), 8)]
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order]


def tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Trains a byte-level BPE and writes it into a folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, VOCABULARY, special_tokens=[END], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END)
    fast.save_pretrained(folder)


def pretrained(
    arguments: argparse.Namespace, webnlg: TextPairs, watch: Callable[[int, Any], None]
) -> Path:
    """Returns the folder of the language model; trains it, or resumes that, if it is missing."""
    sizes = arguments.layers, arguments.features, arguments.pretraining
    name = "-".join(map(str, sizes))
    done, raw = arguments.runs / f"model-{name}", arguments.runs / f"raw-{name}"
    if done.is_dir():
        return done
    texts = documents(arguments.data, webnlg, 0)
    if not (raw / "tokenizer.json").is_file():
        tokenizer(texts, raw)
    reader = load_tokenizer(str(raw))
    fields = {
        "model_type": "gpt2",
        "vocab_size": len(reader),
        "n_positions": POSITIONS,
        "n_embd": arguments.features,
        "n_layer": arguments.layers,
        "n_head": max(1, arguments.features // 32),
        "bos_token_id": reader.eos_token_id,
        "eos_token_id": reader.eos_token_id,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    config = json.dumps(fields)
    model = Gpt2(Gpt2Config.from_json(fields), head="causal-lm", rngs=nnx.Rngs(0))
    model.provenance = Provenance(str(raw), str(raw), config, "causal-lm")
    ids = [i for row in reader([t + END for t in texts])["input_ids"] for i in row]
    held_out = len(ids) // 100
    training = fj.TrainConfig(
        epochs=1000,
        max_steps=arguments.pretraining,
        batch_size=16,
        learning_rate=1e-3,
        eval_every=500,
        checkpoint_every=100,
    )
    dev, train = np.split(np.array(ids, np.int32), [held_out])
    fit = fj.finetune(
        model,
        fj.PlainText(train, dev, context=CONTEXT),
        training,
        key=jax.random.key(0),
        folder=raw / "run",
        recipe=Recipe(on_step=watch),
        progress=True,
    )
    if not fit.finished:
        raise KeyboardInterrupt
    fj.export_hf(fit.model, done)
    (done / "pretraining.json").write_text(json.dumps({"tokens": len(ids), **fit.history[-1]}))
    shutil.rmtree(raw)
    return done


def measure(
    cell: Cell,
    base: Path,
    data: TextPairs,
    config: fj.TrainConfig,
    folder: Path,
    watch: Callable[[int, Any], None],
) -> dict[str, Any]:
    """Runs or resumes a cell."""
    assert data.dev is not None and data.test is not None
    key = jax.random.key(cell.seed)
    model: Any = fj.load(base, head="causal-lm")
    start = time.perf_counter()
    how = method(cell.method, cell.width)
    if how is not None:
        teacher = model
        layers = slice(len(teacher.layers) // 3, None)
        pairs = zip(data.train.sources, data.train.references, strict=True)
        seen = [f"{source}\n{texts[0]}" for source, texts in pairs]
        order = np.random.default_rng(cell.seed).permutation(len(seen))[:CALIBRATION]
        seen = [seen[i] for i in order] if cell.method in ("fusion", "means") else None
        model, _ = fj.compress(
            teacher, how, layers=layers, key=key, calibration=seen, progress=False
        )
        if cell.tuned:
            once = replace(config, epochs=1)
            fit = fj.tune(model, teacher, data.train, once, key=key, folder=folder / "tune")
            if not fit.finished:
                raise KeyboardInterrupt
            model = fit.model
    parameters = num_params(model)
    recipe = Recipe(on_step=watch)
    fit = fj.finetune(model, data, config, key=key, folder=folder / "run", recipe=recipe)
    if not fit.finished:
        raise KeyboardInterrupt
    training = time.perf_counter() - start
    start = time.perf_counter()
    texts = fj.generate_texts(fit.model, data.test, max_new_tokens=96, batch_size=64, truncate=True)
    found = fj.measure_texts(data.test, texts, METRICS)
    return {
        **asdict(cell),
        "parameters": parameters,
        "steps": fit.step,
        "dev_nats": fit.history[-1]["nats"],
        "test_nats": measure_pairs(fit.model, data.test, truncate=True)["nats"],
        **{f"{group} {name}": x for group, each in found.items() for name, x in each.items()},
        "training_seconds": training,
        "generating_seconds": time.perf_counter() - start,
    }


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over seeds, one row per method, as seen/unseen/all like the paper's table."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["method"], r["width"], r["tuned"]), []).append(r)
    rows = []
    for (name, width, tuned), runs in sorted(groups.items()):
        row = {"method": name, "width": width, "tuned": tuned}
        for metric in METRICS:
            values = []
            for group in ("seen", "unseen", "all"):
                each = [run[f"{group} {metric}"] for run in runs if f"{group} {metric}" in run]
                values.append(f"{statistics.mean(each):.1f}" if each else "-")
            row[f"{metric} seen/unseen/all"] = "/".join(values)
        bleu = [run["all bleu"] for run in runs]
        row["bleu's spread"] = f"{statistics.stdev(bleu):.2f}" if len(bleu) > 1 else "-"
        row |= {name: statistics.mean(run[name] for run in runs) for name in ("test_nats",)}
        row |= {"seeds": len(runs), "seconds": mean_seconds(runs, "training_seconds")}
        rows.append(row)
    return rows


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--data", type=Path, help="folder with nlg/ and lm/")
    arguments.add_argument("--runs", type=Path, help="folder of the model and the runs")
    choices = ["paper", "fusion", "means", "clustering"]
    arguments.add_argument("--methods", nargs="+", choices=choices, default=["paper", "means"])
    arguments.add_argument("--widths", nargs="+", type=float, default=[0.25])
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--steps", type=int, help="at most so many steps per run")
    arguments.add_argument("--learning-rate", type=float, default=5e-4)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--features", type=int, default=128)
    arguments.add_argument("--pretraining", type=int, default=2000, metavar="STEPS")
    arguments.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    arguments = arguments.parse_args()
    if arguments.data is None:
        print("give --data, a folder with nlg/ and lm/; nothing was measured")
        return 0 if arguments.quick else 2
    scratch = None
    if arguments.runs is None:
        scratch = arguments.runs = Path(tempfile.mkdtemp())
    end = time.perf_counter() + arguments.budget

    def watch(step: int, state: Any) -> None:
        if time.perf_counter() > end:
            raise OutOfTimeError

    data = fj.load_pairs("webnlg", arguments.data / "nlg")
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.pretraining = 1, 3, 5
        arguments.layers, arguments.features = 2, 32
        parts = {name: few(getattr(data, name)) for name in ("train", "dev", "test")}
        data = replace(data, **parts)
    config = fj.TrainConfig(
        epochs=arguments.epochs,
        max_steps=arguments.steps,
        batch_size=16,
        learning_rate=arguments.learning_rate,
        max_length=256,
        truncate=True,
    )
    model = {name: getattr(arguments, name) for name in ("layers", "features", "pretraining")}
    settings = {name: value for name, value in config.to_json().items() if value is not None}
    settings |= {"model": model, "quick": arguments.quick}
    results: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.is_file():
        kept = json.loads(arguments.json.read_text())["rows"]
        results = [row for row in kept if with_current_names(row["config"]) == settings]
    done = {row["name"] for row in results}
    arguments.tasks = ["webnlg"]
    left = [cell for cell in cells(arguments) if cell.name not in done]
    summary: dict[str, Any] = {}

    def report() -> None:
        counts = {"runs": len(results), "runs_left": len(left)}
        finish(arguments, results, summary | counts, "optax", "sacrebleu", shown=table(results))

    try:
        base = pretrained(arguments, data, watch)
        summary |= json.loads((base / "pretraining.json").read_text())
        while left and time.perf_counter() < end:
            cell = left[0]
            folder = arguments.runs / "-".join([*map(str, model.values()), cell.name])
            found = measure(cell, base, data, config, folder, watch)
            results.append({"name": cell.name, **found, "config": settings})
            left.pop(0)
            shutil.rmtree(folder)
            jax.clear_caches()
            print(f"{cell.name}: {found['training_seconds']:.0f} s", file=sys.stderr, flush=True)
            report()
    except OutOfTimeError:
        pass
    if len(results) == len(done):
        report()
    if scratch is not None:
        shutil.rmtree(scratch)
    return 0


def few(pairs: Any) -> Any:
    """Returns a few of the pairs."""
    rows = np.linspace(0, len(pairs.sources) - 1, 16).astype(int).tolist()
    taken = ([part[i] for i in rows] if part is not None else None for part in pairs)
    return type(pairs)(*taken)


if __name__ == "__main__":
    sys.exit(main())
