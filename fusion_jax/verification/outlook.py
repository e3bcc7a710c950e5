"""Will the smaller model train like the original? One real step of both, and what kernels say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ntk import KernelKind

EXPLAINED = 0.9
"""A kernel that explains at least this part of a step describes it."""
NEAR, SIMILAR = 0.1, 0.3
"""Up to these relative differences, training is nearly that of the original, or similar."""
RATES: Mapping[KernelKind, tuple[float, ...]] = {
    "sgd": (0.01, 0.1, 1.0),
    "adam": (1e-5, 1e-4, 1e-3),
}
"""Learning rates; for SGD, over one by the largest eigenvalue of the original's kernel."""
OPTIMIZERS: Mapping[KernelKind, str] = {"sgd": "SGD", "adam": "Adam"}
_TEXTS = 8


class FirstStep(NamedTuple):
    """What one real step on all texts does to the outputs of two models.

    Args:
        learning_rate: For half the sum of squared differences from the targets.
        apart: ``|move of the smaller - move of the original| / |move of the original|``.
        size: ``|move of the smaller| / |move of the original|``.
        explained: ``1 - |move - predicted|^2 / |move|^2`` of the original, where the prediction is
            linear in the parameters, as that of its kernel.
    """

    learning_rate: float
    apart: float
    size: float
    explained: float


Mover = Callable[[KernelKind, float], Float[np.ndarray, " n"]]
"""Returns how far one step with an optimizer at a learning rate moves the outputs of a model."""


def mover(
    f: Callable[[Any, Any], Array],
    params: Any,
    batch: tuple[Array, ...],
    targets: Float[np.ndarray, " n"],
) -> Mover:
    """Returns a function that takes one step of a model and returns how its outputs move, (n,).

    The steps are those of SGD, or the first of Adam, whose directions are the signs of gradients.

    Args:
        f: The model as a function of parameters and batch that returns (n,).
        params: Its parameters.
        batch: Arrays, each with n in front.
        targets: (n,).
    """
    n = len(targets)
    count = -(-n // _TEXTS)
    size = -(-n // count)
    # Parts of one size, as each size is compiled; the last one repeats texts that do not count.
    rows = [np.arange(i * size, (i + 1) * size) for i in range(count)]
    parts = [jax.tree.map(lambda x, row=row: x[row % n], (batch, targets)) for row in rows]

    @jax.jit
    def outputs(params: Any, direction: Any, rate: Array, x: Any) -> Array:
        moved = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, direction)
        return f(moved, x)

    @jax.jit
    def gradient(params: Any, x: Any, y: Array, counts: Array) -> Any:
        return jax.grad(lambda p: (counts * jnp.square(f(p, x) - y)).sum() / 2)(params)

    total = reduce(
        jax.jit(partial(jax.tree.map, jnp.add)),
        (
            gradient(params, x, jnp.asarray(y, jnp.float32), jnp.asarray(row < n, jnp.float32))
            for row, (x, y) in zip(rows, parts, strict=True)
        ),
    )
    directions = {"sgd": total, "adam": jax.jit(partial(jax.tree.map, jnp.sign))(total)}

    def at(kind: KernelKind, rate: float) -> Float[np.ndarray, " n"]:
        given = jnp.float32(rate)
        found = [np.asarray(outputs(params, directions[kind], given, x)) for x, _ in parts]
        return np.concatenate(found)[:n].astype(np.float64)

    before = at("sgd", 0.0)
    return lambda kind, rate: at(kind, rate) - before


def first_steps(
    original: Mover, smaller: Mover, kind: KernelKind, rates: Sequence[float]
) -> list[FirstStep]:
    """Takes one step of each model at each learning rate, and compares how the outputs move.

    Args:
        original: The original model, by `mover`.
        smaller: The smaller model.
        kind: ``"sgd"`` or ``"adam"``.
        rates: Learning rates.
    """
    small = min(rates) / 10
    line = (original(kind, small) - original(kind, -small)) / (2 * small)  # the linear part
    found = []
    for rate in rates:
        move, other = original(kind, rate), smaller(kind, rate)
        size = max(float(np.linalg.norm(move)), float(np.finfo(np.float64).tiny))
        missed = float(np.linalg.norm(move - rate * line))
        found.append(
            FirstStep(
                rate,
                float(np.linalg.norm(other - move)) / size,
                float(np.linalg.norm(other)) / size,
                1 - (missed / size) ** 2,
            )
        )
    return found


def verdict(kind: KernelKind, change: float, steps: Sequence[FirstStep]) -> str:
    """Returns whether the smaller model trains like the original, in one sentence.

    Args:
        kind: The optimizer's kernel.
        change: The relative change of the kernel.
        steps: The first steps, in ascending order of learning rates.

    Example:
        >>> verdict("adam", 0.08, [FirstStep(1e-4, 0.05, 1.0, 0.99)]).partition(":")[0]
        'With Adam, the smaller model starts to train nearly like the original'
    """
    step = _described(steps) or steps[0]
    worst = float(np.maximum(change, step.apart))
    # "<=" is false for NaN.
    how = "nearly like" if worst <= NEAR else "much like" if worst <= SIMILAR else "unlike"
    return (
        f"With {OPTIMIZERS[kind]}, the smaller model starts to train {how} the original: its "
        f"kernel changed by {100 * change:.0f} %, and a step at the learning rate "
        f"{step.learning_rate:.2g} moves the outputs {100 * step.apart:.0f} % apart."
    )


def validity(kind: KernelKind, steps: Sequence[FirstStep]) -> str:
    """Returns how far the kernel describes training, in one sentence.

    Args:
        kind: The optimizer's kernel.
        steps: The first steps, in ascending order of learning rates.
    """
    described = _described(steps)
    part = f"at least {100 * EXPLAINED:.0f} % of how the original's outputs move"
    if described is None:
        return (
            f"At none of these rates does the {OPTIMIZERS[kind]} kernel explain {part}: it says "
            "little about this model."
        )
    return (
        f"The {OPTIMIZERS[kind]} kernel explains {part} in a step at rates up to "
        f"{described.learning_rate:.2g}. It says little about later training, in which features "
        "change: fine-tune both and compare their scores."
    )


def step_table(steps: Sequence[FirstStep]) -> list[list[str]]:
    """Returns the rows of a table of first steps, the head first."""
    return [
        ["learning rate", "outputs apart", "size of the move", "explained by the kernel"],
        *(
            [
                f"{step.learning_rate:.2g}",
                f"{100 * step.apart:.1f} %",
                f"{step.size:.2f} x",
                f"{100 * max(step.explained, 0.0):.0f} %",
            ]
            for step in steps
        ),
    ]


def _described(steps: Sequence[FirstStep]) -> FirstStep | None:
    """Returns the largest step that the kernel explains."""
    explained = [step for step in steps if step.explained >= EXPLAINED]
    return explained[-1] if explained else None
