"""One site's certificate: what fusing changed, and what it changed at most, on given inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Array, Float

from ntk.bounds import a_priori as apriori
from ntk.bounds.changes import Grade, kernel_change, on_host, output_change
from ntk.bounds.pairs import Pair, prepared_pair
from ntk.errors import InputError
from ntk.mlp import traced_kernel
from ntk.tables import table
from ntk.units import product, units


class Line(NamedTuple):
    """One quantity of a certificate, in Frobenius norms relative to the original's.

    Args:
        quantity: Such as ``"SGD kernel"``.
        a_priori: The change is at most this, from norms alone.
        data: The change is at most this, from a sketch of each input.
        measured: The change.
    """

    quantity: str
    a_priori: float
    data: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What fusing one MLP changed on given inputs; ``str()`` is a table.

    Args:
        inputs: How many inputs it is for.
        lines: Outputs, and the traced kernels of SGD and Adam at all pairs of the inputs.
    """

    inputs: int
    lines: tuple[Line, ...]

    def violations(self) -> int:
        """How many bounds are below what was measured: zero, but for an error in this library."""
        return sum(line.measured > min(line.a_priori, line.data) for line in self.lines)

    def __str__(self) -> str:
        def percent(x: float) -> str:
            return f"{100 * x:.1f} %"

        rows = [["change, relative", "a priori, at most", "data, at most", "measured"]]
        rows += [[line.quantity, *map(percent, line[1:])] for line in self.lines]
        return table(rows)


def certify(pair: Pair, x: Float[Array, "n d"], *, directions: int = 64) -> Certificate:
    """Bounds and measures the change of the outputs and of both traced kernels on given inputs.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d), at least one.
        directions: As in `ntk.bounds.kernel_change`.

    Returns:
        The certificate.

    Raises:
        InputError: Something does not fit together, a value is not finite, or the original is zero
            at the inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from ntk.mlp import MlpWeights
        >>> rng = np.random.default_rng(0)
        >>> up, down, x = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(3))
        >>> centroids = {"up": (up[:2] + up[2:]) / 2, "down": (down[:2] + down[2:]) / 2}
        >>> both = Pair(
        ...     MlpWeights(up=up, down=down, act="gelu"),
        ...     MlpWeights(**centroids, outer=jnp.full(2, 2.0), act="gelu"),
        ...     jnp.array([0, 1, 0, 1]))
        >>> certify(both, x).violations()
        0
    """
    pair, side, _ = prepared_pair(pair, x, None, None, None)
    x, k = side.x, apriori.constants(pair)
    outputs = product(units(pair.original, x).hidden, pair.original.down.T)
    changes = [output_change(pair, x, grade=grade, constants=k) for grade in get_args(Grade)]
    lines = [_line("outputs", outputs, changes)]
    for kind, name in (("sgd", "SGD kernel"), ("adam", "Adam kernel")):
        change = partial(kernel_change, pair, x, kind=kind)
        prior = change(grade="a priori", constants=k).bound
        data = change(grade="data", directions=directions).bound
        measured = change(grade="measured").mid
        original = traced_kernel(pair.original, x, kind=kind)
        lines.append(_line(name, original, [prior, data, measured]))
    return Certificate(inputs=x.shape[0], lines=tuple(lines))


def _line(quantity: str, original: Array, changes: list[Array]) -> Line:
    size, *rest = (float(np.linalg.norm(on_host(a))) for a in (original, *changes))
    if size == 0:
        raise InputError(f"the original has no {quantity} at these inputs: all are zero")
    prior, data, measured = (a / size for a in rest)
    return Line(quantity, prior, data, measured)
