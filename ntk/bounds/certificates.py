"""Certificates of single MLPs: the changes that fusing made on given inputs, and bounds on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import jax
from jaxtyping import Array, Float

from ntk.arrays import host_float64, host_norms, inner_products
from ntk.bounds.changes import Grade, kernel_change
from ntk.bounds.norms import weight_norms
from ntk.bounds.outputs import output_change
from ntk.bounds.pairs import Pair, prepare_pair
from ntk.errors import InputError
from ntk.kinds import KernelKind
from ntk.mlp import traced_kernel
from ntk.tables import table
from ntk.units import MlpWeights, hidden_units


class CertificateLine(NamedTuple):
    """The change of one quantity, in Frobenius norms relative to the original's.

    Args:
        quantity: Such as ``"SGD kernel"``.
        a_priori: A bound on the change, without running the fused MLP.
        data: A bound on the change, from a sketch of each input.
        measured: The change.
    """

    quantity: str
    a_priori: float
    data: float
    measured: float


_KERNELS: dict[KernelKind, str] = {"sgd": "SGD kernel", "adam": "Adam kernel"}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The changes that fusing one MLP made on given inputs; ``str()`` is a table.

    Args:
        inputs: The number of inputs.
        lines: The outputs, and the traced kernels of SGD and Adam at all pairs of the inputs.
    """

    inputs: int
    lines: tuple[CertificateLine, ...]

    def violations(self) -> int:
        """Returns how many quantities changed by more than a bound; not 0 means a bug of ours."""
        return sum(line.measured > min(line.a_priori, line.data) for line in self.lines)

    def __str__(self) -> str:
        def percent(x: float) -> str:
            return f"{100 * x:.1f} %"

        rows = [["change, relative", "a priori, at most", "data, at most", "measured"]]
        rows += [[line.quantity, *map(percent, line[1:])] for line in self.lines]
        return table(rows)


def certify(pair: Pair, x: Float[Array, "n d"], *, directions: int = 128) -> Certificate:
    """Returns bounds and measurements of the change of outputs and both traced kernels.

    Args:
        pair: An MLP and its fused version.
        x: Inputs, (n, d), at least one.
        directions: As in `ntk.bounds.kernel_change`.

    Raises:
        InputError: The arguments do not fit together, a value is not finite, or the original is
            zero at the inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
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
    pair, (x, _), _ = prepare_pair(pair, x)
    norms = weight_norms(pair)
    outputs = _outputs(pair.original, x)
    changes = [output_change(pair, x, grade=grade, norms=norms) for grade in get_args(Grade)]
    lines = [_line("outputs", outputs, changes)]
    for kind, name in _KERNELS.items():
        change = partial(kernel_change, pair, x, kind=kind)
        prior = change(grade="a priori").bound
        data = change(grade="data", directions=directions).bound
        measured = change(grade="measured").mid
        original = traced_kernel(pair.original, x, kind=kind)
        lines.append(_line(name, original, [prior, data, measured]))
    return Certificate(inputs=x.shape[0], lines=tuple(lines))


@jax.jit
def _outputs(mlp: MlpWeights, x: Array) -> Array:
    return inner_products(hidden_units(mlp, x).hidden, mlp.down.T)


def _line(quantity: str, original: Array, changes: list[Array]) -> CertificateLine:
    size, *rest = (float(host_norms(host_float64(a))) for a in (original, *changes))
    if size == 0:
        raise InputError(f"the {quantity} of the original MLP is zero at these inputs")
    prior, data, measured = (a / size for a in rest)
    return CertificateLine(quantity, prior, data, measured)
