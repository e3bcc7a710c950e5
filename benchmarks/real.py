"""Compares ways to narrow MLPs on real models: what is kept, and whether weights are refitted.

Every MLP of a model is narrowed, without training. Language models (Gemma 3 270M, Qwen2.5-Coder
0.5B and two small ones) are judged by their nats per token on text that was not used otherwise,
encoders (all-MiniLM-L6-v2, all-mpnet-base-v2) by how well similarities of sentences agree with the
dense model's on text of another domain (Spearman), and by the relative errors of outputs and of the
SGD and Adam kernels, means over MLPs.

"+ refit" is a ridge regression of the output weights, as in GRAIL; "flap" puts the mean of the
units that go into a bias, and the other scores are those of `Prune`. Gradients are those of next
tokens for language models, and of random directions of the final hidden states for encoders.

Results are written after every case, and a case that is already in the file is not run again.

    python -m benchmarks.real --models DIR --data DIR --json FILE [--only PATTERN] [--quick]

``--only`` is a regular expression for "model width method; calibration"; DIR of ``--models`` holds
``gemma-3-270m``, ``qwen2.5-coder-0.5b`` and ``all-mpnet-base-v2``, as folders of transformers.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusion_jax as fj
from benchmarks.common import environment, parser, peak_gib, show
from benchmarks.language import CONTEXT, WINDOWS
from benchmarks.language import texts as small_texts
from benchmarks.quality import POSITIONS, Agreement, errors, texts
from benchmarks.small_models import hf_folder
from fusion_jax.calibration.upstream import drawn_loss
from fusion_jax.cli.demo import find_model
from fusion_jax.methods.base import Method
from fusion_jax.models.decoder import Decoder
from fusion_jax.models.decoder_config import DecoderConfig
from fusion_jax.models.tokens import batches, load_tokenizer
from fusion_jax.nn.surgery import at
from fusion_jax.training import mean_gradients, mean_loss, nats_per_token
from fusion_jax.training.engine.losses import next_token

FOLDERS = {
    "gemma": "gemma-3-270m",
    "qwen": "qwen2.5-coder-0.5b",
    "mpnet": "all-mpnet-base-v2",
}
SMALL = {"tinygpt": "tinygpt-shakespeare", "stories260k": "stories260K"}
MODELS = ["stories260k", "tinygpt", "minilm", "mpnet", "gemma", "qwen"]
WIDTHS = {
    "language": [0.75, 0.5, 0.9, 0.8, 0.25],
    "encoder": [0.25, 0.125, 0.5],
}
TOKENS = 8192
"""Tokens to calibrate on and to evaluate on, for the larger language models."""
MORE = 4
"""The calibration "more" has this many times the tokens."""
WINDOW = 512
"""The context of the larger language models."""
MEAN = "Fusion(represent='mean')"
BY_LOSS = "Fusion(), widths by loss"
"""The same number of units in all, shared out by `fusion_jax.allocate`."""
SCORES = (
    "activation",
    "magnitude",
    "hidden",
    "wanda",
    "fluctuation",
    "leverage",
    "obs",
    "relative",
    "gradient",
    "fisher",
    "saliency",
)


def methods() -> dict[str, Callable[[float], Method]]:
    """Returns the methods by name, each as a function of the width."""
    found: dict[str, Callable[[float], Any]] = {
        "Fusion()": lambda w: fj.Fusion(width=w),
        BY_LOSS: lambda w: fj.Fusion(width=w),
        MEAN: lambda w: fj.Fusion(width=w, represent="mean"),
        "Fusion.paper()": lambda w: fj.Fusion.paper(width=w),
    }
    for refit in (True, False):
        for score in SCORES:
            name = f"{score}{' + refit' if refit else ''}"
            if name != "relative + refit":  # as a function it is Fusion()
                found[name] = lambda w, s=score, r=refit: fj.Prune(width=w, score=s, refit=r)
    found["flap"] = lambda w: fj.Prune(width=w, score="fluctuation")
    return found


class Rows:
    """Windows of tokens as batches of one row, each of which predicts all its tokens but one."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns a batch."""
        ids = self.rows[step : step + 1]
        ones = np.ones_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "weights": np.ones(1, np.float32)}

    def names(self, step: int) -> list[str]:
        """Returns where the rows of a batch come from."""
        return [f"window {step + 1}"]


class Subject:
    """A model, the text that it is calibrated on, and how it is judged.

    Args:
        name: One of `MODELS`.
        models: The folder of ``--models``.
        data: The folder of ``--data``.
        tokens: Tokens to calibrate on and to evaluate on.
    """

    kind = "language"

    def __init__(self, name: str, models: Path | None, data: Path | None, tokens: int):
        self.name, self.tokens = name, tokens
        self.data = Path() if data is None else data
        self.model: Any = self.load(models)

    def load(self, models: Path | None) -> Any:
        """Loads the model."""
        if self.name in SMALL:
            with tempfile.TemporaryDirectory() as folder:
                made = hf_folder(self.data, SMALL[self.name], Path(folder) / "model")
                return fj.load(made, head="causal-lm")
        assert models is not None
        return fj.load(models / FOLDERS[self.name], head="causal-lm", dtype="float32")

    @cached_property
    def windows(self) -> dict[str, np.ndarray]:
        """The windows of tokens to calibrate on, more, and of another domain, and to judge by."""
        if self.name in SMALL:
            train, held_out = small_texts(SMALL[self.name], self.model, self.data)
            count = WINDOWS * (CONTEXT - 1)
            rows = np.asarray(train[: len(train) // (CONTEXT - 1) * (CONTEXT - 1)])
            rows = rows.reshape(-1, CONTEXT - 1)
            chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:WINDOWS])
            return {"text": rows[chosen], "judged": np.asarray(held_out[:count])}
        tokenizer = load_tokenizer(self.model.provenance.folder)
        files = {
            "text": "lm/wikitext-2/valid.txt",
            "judged": "lm/wikitext-2/test.txt",
            "more": "lm/wikitext-2/valid.txt",
            "other": "lm/tinyshakespeare/input.txt",
        }
        found = {}
        for use, file in files.items():
            count = self.tokens * (MORE if use == "more" else 1)
            text = (self.data / file).read_text()[: count * 8]
            ids = np.asarray(tokenizer(text)["input_ids"], np.int32)
            rows = ids[:count].reshape(-1, WINDOW).copy()
            if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
                rows[:, 0] = tokenizer.bos_token_id  # these models are lost without it
            found[use] = rows
        return found

    def batches(self, use: str) -> list[Any]:
        """Returns the batches to calibrate on."""
        rows = self.windows[use]
        return [{"input_ids": rows[i : i + 4]} for i in range(0, len(rows), 4)]

    @cached_property
    def gradients(self) -> Mapping[str, Any]:
        """The gradients of the loss of next tokens."""
        return mean_gradients(self.model, Rows(self.windows["text"]), next_token)

    def judge(self, model: Any, sgd: Any = None) -> dict[str, float]:
        """Returns the numbers that a model is judged by; ``sgd`` is one with that scaling."""
        judged = self.windows["judged"]
        if self.name in SMALL:
            return {"nats": nats_per_token(model, judged, CONTEXT)}
        return {"nats": mean_loss(model, Rows(judged), next_token)}


class Tiny(Subject):
    """A random decoder on random tokens, for a self-check without any data."""

    def load(self, models: Path | None) -> Any:
        """Makes the model."""
        fields = {
            "vocab_size": 61,
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        config = DecoderConfig.read(fields)
        return Decoder(config, head="causal-lm", rngs=nnx.Rngs(0))

    @cached_property
    def windows(self) -> dict[str, np.ndarray]:
        """Random tokens."""
        draw = np.random.default_rng(0)
        return {use: draw.integers(0, 61, (8, 32), np.int32) for use in ("text", "judged")}


class Encoder(Subject):
    """An encoder of sentences."""

    kind = "encoder"

    def load(self, models: Path | None) -> Any:
        """Loads the model."""
        if self.name == "minilm":
            return fj.load(find_model())
        assert models is not None
        return fj.load(models / FOLDERS[self.name])

    @cached_property
    def texts(self) -> Any:
        """The sentences."""
        return texts(self.data)

    @cached_property
    def agreement(self) -> Agreement:
        """Compares embeddings on text of another domain."""
        return Agreement(self.model, self.texts.other)

    @cached_property
    def held_out(self) -> dict[str, Any]:
        """The inputs of the sites on text that no method saw."""
        made = batches(load_tokenizer(self.model.provenance.folder), self.texts.held_out)
        return fj.calibrate(self.model, made, key=jax.random.key(1), max_positions=POSITIONS)

    def batches(self, use: str) -> list[Any]:
        """Returns the batches to calibrate on."""
        sentences = self.texts.calibration if use == "text" else self.texts.other
        return batches(load_tokenizer(self.model.provenance.folder), sentences)

    @cached_property
    def gradients(self) -> Mapping[str, Any]:
        """The gradients of random directions of the final hidden states."""
        total: dict[str, Any] = {}
        graph, state = nnx.split(self.model)

        @jax.jit
        def slopes(state: Any, batch: Any, key: Any) -> Any:
            def loss(state: Any) -> Any:
                return drawn_loss(nnx.merge(graph, state)(*batch), key, batch.attention_mask)

            return jax.grad(loss)(state)

        for i, batch in enumerate(self.batches("text")):
            found = slopes(state, batch, jax.random.key(i))
            for path, variable in nnx.to_flat_state(found):
                name = ".".join(map(str, path))
                total[name] = total.get(name, 0) + variable.get_value()
        return total

    def judge(self, model: Any, sgd: Any = None) -> dict[str, float]:
        """Returns the numbers that a model is judged by."""
        found = []
        three = (self.model, model if sgd is None else sgd, model)
        for old, tried, new in zip(*map(fj.sites, three), strict=True):
            x = jnp.asarray(self.held_out[old.path])
            found.append(errors(old, tried.mlp, new.mlp, x))
        means = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
        return {"agreement": self.agreement(model)["embedding_agreement"], **means}


def with_mean_outputs(model: Any, smaller: Any, seen: Mapping[str, Any]) -> Any:
    """Returns the smaller model with biases that keep each MLP's mean output: FLAP's compensation.

    MLPs without a bias get one, which no checkpoint of these families could hold.
    """
    made = nnx.clone(smaller)
    for site in fj.sites(model):
        new, x = at(made, site.path), jnp.asarray(seen[site.path].inputs)
        change = _mean_change(site.mlp, new, x)
        bias = new.down.bias
        new.down.bias = nnx.Param(change if bias is None else bias[...] + change)
        new.down.use_bias = True
    return made


@nnx.jit
def _mean_change(old: Any, new: Any, x: Any) -> Any:
    blocks = x[: len(x) // 16 * 16].reshape(16, -1, x.shape[-1])
    return jax.lax.map(lambda b: (old(b) - new(b)).mean(0), blocks).mean(0)


def first_step(model: Any, smaller: Any, seen: Mapping[str, Any]) -> float:
    """Returns how far a first step of Adam moves outputs, in relation to the dense model's step.

    Each MLP takes one step of sign descent at a rate of 1e-3 alone, for one random linear loss of
    its outputs. The result is the largest ratio of the lengths of the changes.
    """
    found = []
    for old, new in zip(fj.sites(model), fj.sites(smaller), strict=True):
        x = jnp.asarray(seen[old.path].inputs)[:POSITIONS]
        found.append(float(_step_of(new.mlp, x) / _step_of(old.mlp, x)))
    return max(found)


@nnx.jit
def _step_of(mlp: Any, x: Any) -> Any:
    graph, params, rest = nnx.split(mlp, nnx.Param, ...)
    outputs = mlp(x)
    above = jax.random.normal(jax.random.key(0), outputs.shape)
    slopes = jax.grad(lambda p: (nnx.merge(graph, p, rest)(x) * above).sum())(params)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, slopes)
    return jnp.linalg.norm(nnx.merge(graph, moved, rest)(x) - outputs)


class Table:
    """Rows in a file that is written after every case."""

    def __init__(self, file: Path | None):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file is not None and file.is_file():
            self.rows = json.loads(file.read_text())["rows"]

    def has(self, case: Mapping[str, Any]) -> bool:
        """Returns whether a case was run already."""
        return any(case.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            result = {"env": environment("transformers"), "rows": self.rows, "summary": {}}
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(self.file)


def narrowed(
    model: Any, case: Mapping[str, Any], method: Any, seen: Any, gradients: Mapping[str, Any] | None
) -> Any:
    """Returns the model with every MLP narrowed by the method of a case."""
    key = jax.random.key(0)
    common: dict[str, Any] = {"calibration": seen, "key": key, "progress": False}
    if case["method"] == BY_LOSS:
        method = fj.allocate(model, method, total_width=case["width"], by="loss", **common)
    return fj.compress(model, method, gradients=gradients, **common)[0]


def measure(subject: Subject, cases: list[dict[str, Any]], table: Table) -> None:
    """Runs the cases of one model: width, method, and the text to calibrate on."""
    seen: dict[str, Any] = {}
    made = methods()
    for case in cases:
        if case["method"] == "dense":
            table.add({**case, **subject.judge(subject.model)})
            continue
        method = made[case["method"]](case["width"])
        use = case["calibration"]
        start = time.perf_counter()
        if use not in seen:
            alike = [other["method"] for other in cases if other["calibration"] == use]
            found = fj.calibrate(
                subject.model,
                subject.batches(use),
                key=jax.random.key(2),
                upstream=any("fisher" in name or name == BY_LOSS for name in alike),
                max_positions=MORE * TOKENS,
            )
            seen[use] = {
                path: x if isinstance(x, fj.Calibration) else fj.Calibration(jnp.asarray(x))
                for path, x in found.items()
            }
        gradients = subject.gradients if method.takes_gradients else None
        prepared = time.perf_counter()

        given = seen[use] if method.takes_calibration else None
        smaller = narrowed(subject.model, case, method, given, gradients)
        if case["method"] == "flap":
            smaller = with_mean_outputs(subject.model, smaller, seen[use])
        jax.block_until_ready(nnx.state(smaller))
        solved = time.perf_counter()
        sgd = None
        if subject.kind == "encoder" and isinstance(method, fj.Fusion):
            sgd = narrowed(subject.model, case, replace(method, scaling="sgd"), given, gradients)
        row = {**case, **subject.judge(smaller, sgd)}
        if isinstance(method, fj.Fusion) and use in seen and case["method"] != BY_LOSS:
            row["first_step"] = first_step(subject.model, smaller, seen[use])
        row |= {"prepare_seconds": prepared - start, "solve_seconds": solved - prepared}
        table.add({**row, "peak_gib": peak_gib()})
        del smaller, sgd
        gc.collect()


def all_cases(name: str, quick: bool) -> list[dict[str, Any]]:
    """Returns the cases of one model; what matters most comes first."""
    kind = "encoder" if name in ("minilm", "mpnet") else "language"
    case = {"model": name, "width": 1.0, "method": "dense", "calibration": "text"}
    cases = [case]
    for width in WIDTHS[kind][: 1 if quick else None]:
        cases += [{**case, "width": width, "method": method} for method in methods()]
    if name in ("gemma", "qwen"):
        chosen = ("Fusion()", BY_LOSS, "activation + refit", "leverage + refit", MEAN)
        for use, width in (("more", 0.75), ("more", 0.5), ("other", 0.75)):
            cases += [
                {**case, "width": width, "method": method, "calibration": use} for method in chosen
            ]
    if quick:
        few = ("dense", "Fusion()", MEAN, BY_LOSS, "fisher + refit", "gradient", "flap", "obs")
        cases = [each for each in cases if each["method"] in few]
    return cases


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, help="folder with the larger models")
    arguments.add_argument("--data", type=Path, help="folder with glue/, lm/ and models/")
    arguments.add_argument("--only", default="", help="regular expression for the cases to run")
    options = arguments.parse_args()
    if options.data is None and not options.quick:
        raise SystemExit("give --data DIR, or --quick")
    table = Table(options.json)
    for name in ["tiny"] if options.quick else MODELS:
        cases = [
            case
            for case in all_cases(name, options.quick)
            if re.search(
                options.only, f"{name} {case['width']} {case['method']}; {case['calibration']}"
            )
            and not table.has(case)
        ]
        if cases and (options.models is not None or name not in FOLDERS):
            cls = {"minilm": Encoder, "mpnet": Encoder, "tiny": Tiny}.get(name, Subject)
            measure(cls(name, options.models, options.data, TOKENS), cases, table)
    show(table.rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
