"""Compares real training with the training that kernels predict: dense, the paper's method, ours.

The last 4 of the 6 MLPs of all-MiniLM-L6-v2, with a random head, are fused to a quarter. The model
is trained in float32 on sentences with labels -1 and 1, by the squared error of one output: the
difference of two logits minus its value at the start. So the models differ by their kernels only.
All parameters train, with the same head and the same order of data:

- ``sgd``: full-batch gradient descent; the learning rate is a fifth of one over the largest
  eigenvalue of the dense kernel. Models are fused with ``scaling="sgd"``.
- ``adam``: sign descent on one example after another, where each step is a twentieth of a typical
  residual (Malladi et al., 2023). Models are fused with ``scaling="adam"``.

The predictions are those of `ntk.compare`, extended to held-out sentences. The results for each
method, for all of training and for its early part (while the dense model's loss is above 0.8 of the
first):

- ``kernel_error``: relative Frobenius error of its kernel, training sentences.
- ``nonlinear``: distance of its real outputs from those that its own kernel predicts, at the end,
  relative to the real outputs.
- ``apart``, ``apart_predicted``: distance of its outputs from the dense model's at the end,
  relative to the targets: measured, and predicted by the kernels.
- ``explained``: the share of the real difference between the two models' outputs, over all steps
  and sentences, that the kernels predict: 1 - sum (difference - predicted)^2 / sum difference^2.

    python -m benchmarks.dynamics [--quick] [--data DIR] [--figure FILE] [--json FILE]

With ``--data`` the sentences are from SST-2, for calibration from its training set. Without it they
are the package's with random labels, and random tokens serve for calibration.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fusion_jax as fj
import ntk
from benchmarks.common import finish, parser, pyplot
from benchmarks.ntk_models import calibration
from fusion_jax.cli.demo import find_model
from fusion_jax.models.tokens import load_tokenizer, sentences, tokenize

LAYERS = slice(-4, None)
TRAIN, HELD_OUT = 32, 32
EARLY = 0.8
"""The early part of training ends when the dense model's loss falls to this share of the first."""
METHODS = ("dense", "paper", "ours")
COLORS = {"dense": "black", "paper": "tab:orange", "ours": "tab:blue"}


def examples(data: Path | None, count: int) -> tuple[list[str], np.ndarray]:
    """Returns sentences and their labels: -1 for one half, 1 for the other."""
    if data is None:
        labels = np.arange(count) % 2 * 2.0 - 1
        return sentences()[:count], np.random.default_rng(0).permutation(labels)
    lines = (data / "glue" / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.rsplit("\t", 1) for line in lines]
    both = [[text for text, label in rows if label == wanted] for wanted in ("0", "1")]
    texts = [both[i % 2][i // 2] for i in range(count)]
    return texts, np.arange(count) % 2 * 2.0 - 1


def predicted(kernel: np.ndarray, targets: np.ndarray, kind: str, rate: float, steps: int) -> Any:
    """Returns outputs (steps + 1, all) of linearized training on the first examples."""
    n = len(targets)
    outputs = [np.zeros(len(kernel))]
    for step in range(steps):
        residual = targets - outputs[-1][:n]
        if kind == "adam":
            j = step % n
            outputs.append(outputs[-1] + rate * kernel[:, j] * np.sign(residual[j]))
        else:
            outputs.append(outputs[-1] + rate * kernel[:, :n] @ residual)
    return np.stack(outputs)


def trained(
    f: Any,
    params: Any,
    batch: Any,
    targets: np.ndarray,
    kind: str,
    rate: float,
    at: list[int],
) -> np.ndarray:
    """Returns outputs (len(at), all) of real training on the first examples, after some steps."""
    n, wanted = len(targets), jnp.asarray(targets, jnp.float32)
    outputs = jax.jit(f)
    start = outputs(params, batch)

    @jax.jit
    def full(params: Any) -> Any:
        some = jax.tree.map(lambda x: x[:n], batch)

        def loss(params: Any) -> Any:
            return jnp.square(f(params, some) - start[:n] - wanted).sum() / 2

        return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))

    @jax.jit
    def one(params: Any, j: Any) -> Any:
        example = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, j, 1), batch)
        value, gradient = jax.value_and_grad(lambda p: f(p, example)[0])(params)
        sign = jnp.sign(wanted[j] - (value - start[j]))
        return jax.tree.map(lambda p, g: p + rate * sign * jnp.sign(g), params, gradient)

    found = []
    for step in range(at[-1] + 1):
        if step in at:
            found.append(np.asarray(outputs(params, batch) - start, np.float64))
        params = one(params, np.int32(step % n)) if kind == "adam" else full(params)
    return np.stack(found)


def measure(kind: str, data: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Trains the three models and predicts their training."""
    n, held = (4, 4) if quick else (TRAIN, HELD_OUT)
    dense: Any = fj.load(find_model(), head="classification", num_labels=2, key=jax.random.key(0))
    if quick:  # compiling takes most of the time
        dense.layers, dense.schedule = nnx.List(list(dense.layers)[-2:]), (0, 1)
    texts, labels = examples(data, n + held)
    batch = tokenize(load_tokenizer(dense.provenance.folder), texts, max_length=24)._asdict()
    targets = labels[:n]
    rows, curves = [], {}
    rate, steps = 0.0, (8 if quick else {"sgd": 100, "adam": 10 * n}[kind])
    at = list(range(0, steps + 1, max(1, steps // 40)))
    for name in METHODS:
        options = {"width": 0.25, "scaling": cast(Any, kind)}
        model: Any = dense
        if name != "dense":
            if name == "paper":
                method = fj.Fusion.paper(**options)
            else:
                method = fj.Fusion(represent="mean", **options)
            source = calibration(data) if name == "ours" else None
            model, _ = fj.compress(
                dense, method, layers=LAYERS, calibration=source, key=jax.random.key(0)
            )
        f, params = ntk.functional(model, outputs=lambda r: r.logits[:, 1] - r.logits[:, 0])
        kernel = np.asarray(ntk.kernel(f, params, batch, kind=cast(Any, kind)), np.float64)
        kernel = (kernel + kernel.T) / 2 if kind == "sgd" else kernel  # of rounding
        square = kernel[:n, :n]
        if name == "dense":
            typical = np.abs(np.diagonal(square)).mean()
            rate = float(1 / (5 * np.linalg.norm(square, 2) if kind == "sgd" else 20 * typical))
            first = square
        found = ntk.compare(first, square, targets=targets, learning_rate=rate, steps=steps)
        assert found.training is not None
        linear = predicted(kernel, targets, kind, rate, steps)
        np.testing.assert_allclose(linear[:, :n], found.training.outputs[1], atol=1e-6)
        real = trained(f, params, batch, targets, kind, rate, at)
        curves[name] = real, linear[at]
        size = np.linalg.norm(targets)
        row: dict[str, Any] = {
            "kernel": kind, "method": name, "kernel_error": found.frobenius,
            "steps": at, "loss": (np.square(real[:, :n] - targets).sum(1) / size**2).tolist(),
            "loss_predicted": (np.square(linear[at, :n] - targets).sum(1) / size**2).tolist(),
        }  # fmt: skip
        early = np.array(rows[0]["loss"] if rows else row["loss"]) > EARLY
        row["early_until"] = at[early.nonzero()[0][-1]]
        for part, window in (("", np.ones_like(early)), ("_early", early)):
            mine, linear_mine = (outputs[window] for outputs in curves[name])
            dense_real, dense_linear = (outputs[window] for outputs in curves["dense"])
            away = np.linalg.norm(mine[-1] - linear_mine[-1]) / np.linalg.norm(mine[-1])
            row["nonlinear" + part] = float(away)
            if name == "dense":
                continue
            gap, linear_gap = mine - dense_real, linear_mine - dense_linear
            scale = np.sqrt(gap.shape[1])
            row["apart" + part] = float(np.linalg.norm(gap[-1]) / scale)
            row["apart_predicted" + part] = float(np.linalg.norm(linear_gap[-1]) / scale)
            unexplained = np.square(gap - linear_gap).sum() / np.square(gap).sum()
            row["explained" + part] = float(1 - unexplained)
        print(f"{kind} {name}", {k: v for k, v in row.items() if k[:4] not in ("loss", "step")},
              file=sys.stderr, flush=True)  # fmt: skip
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws the loss over steps, real and predicted."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, kind, title in zip(
        axes, ("sgd", "adam"), ("Gradient descent", "Sign descent"), strict=True
    ):
        for row in rows:
            if row["kernel"] == kind:
                color = COLORS[row["method"]]
                ax.plot(row["steps"], row["loss"], color=color, label=row["method"])
                ax.plot(row["steps"], row["loss_predicted"], "--", color=color, alpha=0.7)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("steps")
        ax.set_ylabel("loss, relative")
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].plot([], [], "--", color="0.5", label="predicted by the kernel")
    axes[0].legend(frameon=False, fontsize=8, loc="center right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with glue/SST-2")
    options.add_argument("--figure", type=Path, help="draw the losses here")
    arguments = options.parse_args()
    rows = [
        row for kind in ("sgd", "adam") for row in measure(kind, arguments.data, arguments.quick)
    ]
    summary = {
        f"{row['kernel']} {row['method']} {key}": row[key]
        for row in rows
        for key in row
        if isinstance(row[key], float)
    }
    shown = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    finish(arguments, rows, summary, shown=shown)
    if arguments.figure:
        draw(rows, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
