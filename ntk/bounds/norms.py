r"""Norms of an MLP's weights and of their distances from the fused MLP's, for a priori bounds.

Notation: u_i is the input row (w_i, b_i) of unit i and v_i its output row; u and v without index
are the rows of unit i in the wide copy, the MLP of the original's width in which the centroid of
its cluster replaces each unit. delta_i = u_i - u and eta_i = v_i - v. U, V and Delta are the
matrices of all rows, U~ and V~ those of the wide copy. P averages over clusters, and Q = 1 - P.

**Factors.** In the wide copy, n_c units with rows ``inner w`` and output weights ``outer v / n_c``
replace each unit of the smaller MLP. The smaller MLP's kernel is the wide copy's with cluster c
weighted by omega_c instead of n_c, which changes a term of the kernel by at most
max|1 - omega_c / n_c| |F| |F'|, with the wide copy's features F and F'. *Proof*: with a copy's
hidden unit h, H = outer h, so that H H' = outer^2 h h' and H sign(H') = outer h sign(h').
The derivative with respect to a stored row is the factor of that row times the derivative with
respect to the row multiplied by its factor, whose output weights are n_c times a copy's. So
omega / n is outer^2 / n and n factor^2 for SGD, outer / n and factor for Adam. All of them are 1
with outer = sqrt n and inner = middle = 1 / sqrt n for SGD, with outer = n alone for Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ntk.activations import Activation
from ntk.arrays import host_float64, host_norms
from ntk.bounds.pairs import Pair, check_pair
from ntk.units import MlpWeights

Numbers = Float[np.ndarray, "*n"]

TINY = float(np.finfo(np.float64).tiny)


@np.errstate(over="ignore")
def times(*factors: Any) -> Any:
    """Returns a product of bounds that is zero if a factor is, also beside infinite ones.

    Only then: a product that underflows is at most the smallest normal number.
    """
    zero = reduce(np.logical_or, (np.asarray(a) == 0 for a in factors))
    factors = tuple(np.where(zero, 1.0, a) for a in factors)
    return np.where(zero, 0.0, reduce(lambda a, b: np.maximum(a * b, TINY), factors))[()]


class MapNorms(NamedTuple):
    """Norms of one linear map's rows, biases included.

    Args:
        op: |U|_2.
        row: Largest |u_i|.
        wide_op: |U~|_2 of the wide copy.
        wide_row: Largest |u|.
        delta_op: |Delta|_2.
        delta_row: Largest |delta_i|.
        kappa: Root of the largest mean of |delta_i|^2 over a cluster.
        offset: |P Delta|_F, zero up to rounding if the centroids are means.
        weighted: |diag(|v_i|) Delta|_2.
        biased: 1 if the map has a bias, else 0.
    """

    op: float
    row: float
    wide_op: float
    wide_row: float
    delta_op: float
    delta_row: float
    kappa: float
    offset: float
    weighted: float
    biased: int


class OutputNorms(NamedTuple):
    """Norms of the output weights, all Frobenius or all spectral.

    Args:
        unit: |V|.
        fused: |V~| of the wide copy.
        within: |Q V|.
        offset: |P V - V~|.
    """

    unit: float
    fused: float
    within: float
    offset: float


class WeightNorms(NamedTuple):
    """All that a priori bounds use of an MLP and its fused version.

    Args:
        act: The activation.
        inputs: d.
        width: p.
        outputs: o.
        maps: Norms of the linear maps; the map inside the activation comes first.
        frobenius: Frobenius norms of the output weights.
        spectral: Spectral norms of the output weights.
        absolute: Sums of the absolute output weights of the original and of the wide copy.
        largest_mean: Largest |mean v_i| over clusters.
        kappa: Root of the largest mean of |Q v_i|^2 over a cluster.
        mismatch: For each kind of kernel, the largest |1 - omega_c / n_c| of each term.
    """

    act: Activation
    inputs: int
    width: int
    outputs: int
    maps: tuple[MapNorms, ...]
    frobenius: OutputNorms
    spectral: OutputNorms
    absolute: tuple[float, float]
    largest_mean: float
    kappa: float
    mismatch: dict[str, list[float]]


def weight_norms(pair: Pair) -> WeightNorms:
    """Returns all norms that a priori bounds need, computed in float64 on the host.

    Args:
        pair: An MLP and its fused version.
    """
    pair = check_pair(pair)
    original, labels, sizes = pair.original, np.asarray(pair.labels), _sizes(pair)
    mean = partial(_means, labels=labels, sizes=sizes)
    v, v_wide = host_float64(original.down), _wide_rows(pair, "down")[labels]
    v_mean = mean(v)
    v_norm = host_norms(v, axis=1)

    def of_map(name: str) -> MapNorms:
        rows, wide = stored_rows(original, name), _wide_rows(pair, name)[labels]
        delta = rows - wide
        size, largest = host_norms(delta, axis=1), v_norm.max() or 1.0
        return MapNorms(
            op=_spectral(rows),
            row=float(host_norms(rows, axis=1).max()),
            wide_op=_spectral(wide),
            wide_row=float(host_norms(wide, axis=1).max()),
            delta_op=_spectral(delta),
            delta_row=float(size.max()),
            kappa=_root_mean_square(size, mean),
            offset=float(host_norms(mean(delta)[labels])),
            weighted=times(largest, _spectral((v_norm / largest)[:, None] * delta)),
            biased=int(getattr(original, f"{name}_bias") is not None),
        )

    parts = v, v_wide, v - v_mean[labels], v_mean[labels] - v_wide
    return WeightNorms(
        act=original.act,
        inputs=original.up.shape[1],
        width=original.width,
        outputs=original.down.shape[1],
        maps=tuple(of_map(name) for name in (["up"] if original.gate is None else ["gate", "up"])),
        frobenius=OutputNorms(*(float(host_norms(a)) for a in parts)),
        spectral=OutputNorms(*(_spectral(a) for a in parts)),
        absolute=(float(np.abs(v).sum()), float(np.abs(v_wide).sum())),
        largest_mean=float(host_norms(v_mean, axis=1).max()),
        kappa=_root_mean_square(host_norms(parts[2], axis=1), mean),
        mismatch=_mismatch(pair),
    )


def _means(rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns averages over clusters, (c, ...)."""
    chosen = labels[None] == np.arange(len(sizes))[:, None]
    return chosen.astype(np.float64) @ rows / sizes[:, None]


def stored_rows(mlp: MlpWeights, name: str) -> np.ndarray:
    """Returns the rows of a linear map as stored, in float64, with their biases."""
    rows, bias = host_float64(getattr(mlp, name)), getattr(mlp, f"{name}_bias", None)
    return rows if bias is None else np.concatenate([rows, host_float64(bias)[:, None]], 1)


def effective_rows(mlp: MlpWeights, name: str) -> np.ndarray:
    """Returns the rows of a linear map with the factors multiplied in."""
    return stored_rows(mlp, name) * _factor(mlp, name)[:, None]


def _sizes(pair: Pair) -> np.ndarray:
    return np.bincount(np.asarray(pair.labels)).astype(np.float64)


def _factor(mlp: MlpWeights, name: str) -> np.ndarray:
    """Returns the fixed factor of a stored parameter, (c,)."""
    up = mlp.inner if mlp.gate is None else mlp.middle
    factor = {"up": up, "gate": mlp.inner, "down": mlp.outer}[name]
    return np.ones(mlp.width) if factor is None else host_float64(factor)


def _wide_rows(pair: Pair, name: str) -> np.ndarray:
    """Returns the rows of the wide copy, one for each cluster, with the factors multiplied in."""
    rows = effective_rows(pair.fused, name)
    return rows / _sizes(pair)[:, None] if name == "down" else rows


def _mismatch(pair: Pair) -> dict[str, list[float]]:
    sizes, names = _sizes(pair), ["up"] if pair.fused.gate is None else ["gate", "up"]
    root = np.sqrt(sizes)
    outer, slopes = _factor(pair.fused, "down"), [_factor(pair.fused, name) for name in names]
    weights = {
        "sgd": [np.square(a) for a in (outer / root, *(root * f for f in slopes))],
        "adam": [outer / sizes, *slopes],
    }
    return {kind: [float(np.abs(1 - w).max()) for w in terms] for kind, terms in weights.items()}


def _root_mean_square(sizes: np.ndarray, mean: Callable[[np.ndarray], np.ndarray]) -> float:
    """Returns the root of the largest mean of squares over a cluster."""
    largest = sizes.max() or 1.0
    return float(largest * np.sqrt(mean(np.square(sizes / largest)[:, None]).max()))


def _spectral(a: np.ndarray) -> float:
    """Returns a spectral norm, rounded up: eigvalsh and the product are backward stable."""
    largest = np.abs(a).max() or 1.0
    a = a / largest
    gram = a.T @ a if a.shape[0] > a.shape[1] else a @ a.T
    return times(largest, np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0) + 1e-12 * np.trace(gram)))
