r"""Bounds from norms alone: the a priori grade, and why fusing changes nothing to first order.

Write u_i for the input row (w_i, b_i), v_i for the output row, u and v without index for the
centroid of unit i's cluster, delta_i = u_i - u, eta_i = v_i - v, z_i = u_i . x^, r = |x^|, P for
the average over clusters and Q = 1 - P. L1, L2, L3, secant, spread, gap and ceiling are constants
of the activation (`ntk.activations`). Every feature phi (H, or c_i v_i) is bounded by four numbers,

    unit >= |phi|,    fused >= |F|,    change >= |P phi - F|,    within >= |Q phi|,

F being the wide copy's feature, and with total = |P phi + F| <= min(unit + fused, 2 unit + change,
2 fused + change) identity (1) of `ntk.enclosure` and the triangle inequality give

    |phi . phi' - F . F'| <= min( (change total' + total change') / 2 + within within',
                                  unit unit' + fused fused' ).                               (3)

**Hidden units of a plain MLP**, H_i = s(z_i):

- unit: |s(z)| <= secant |z|, so |H| <= secant |U|_2 r; at most ceiling sqrt(p).
- fused: likewise; from the original's values at an input by (7) of `ntk.jensen`; and at most
  |H| + gap sqrt(p) + |offset|_2 r. *Proof*: relu is convex, so for
  centroids that are means relu(z) <= mean relu(z_i) <= mean s(z_i) + gap, and s <= relu in all
  activations with a gap; so s(z) is between -gap and mean H_i + gap. Centroids that are no means
  move relu(z) by their offset.
- change: |P(H - F)| <= |H - F| <= L1 |Delta|_2 r. And, to *second* order,

      |P H - F| <= L2/2 kappa |Delta|_2 r^2 + L1 |offset|_2 r,                               (4)

  kappa^2 the largest mean of |delta_i|^2 over a cluster. *Proof*: by Taylor's theorem
  s(z_i) - s(z) = s'(z) delta_i . x^ + t_i, |t_i| <= L2/2 (delta_i . x^)^2; the mean of delta_i is
  zero, or the offset; and with m_c the mean of (delta_i . x^)^2 in cluster c,
  sum_c n_c m_c^2 <= max_c m_c  sum_i (delta_i . x^)^2 <= kappa^2 r^2 |Delta|_2^2 r^2.
- within: |Q H| = |Q (H - F)| <= L1 |Delta|_2 r, as F is constant in clusters. Only products of two
  of these occur in (3): second order again.

**Slopes of a plain MLP**, rows c_i v_i with c_i = s'(z_i), in the Frobenius norm:

- unit: L1 |V|_F. fused: L1 |V~|_F; and by (7).
- move >= |diag(c_i - c) V|_F: min(L2 |diag(|v_i|) Delta|_2 r, spread |V|_F).
- change: mean(c_i v_i) - c v = mean((c_i - c) v_i) + c (mean v_i - v), so move + L1 |offset_v|_F;
  and, to second order, with mean((c_i - c) v_i) = mean v_i mean(c_i - c) + mean((c_i - c) Q v_i),

      max|mean v_i| (L3/2 kappa |Delta|_2 r^2 + L2 |offset|_2 r) + kappa_v |c_i - c|_2
      + L1 |offset_v|_F,    |c_i - c|_2 <= min(L2 |Delta|_2 r, spread sqrt(p)).              (5)

- within: c_i v_i - c mean v_i = c Q v_i + (c_i - c) v_i, so L1 |Q V|_F + move.

With an upstream vector G, c_i (v_i . G), the same with the norms of V G, V~ G, Q V G and
(P V - V~) G, move = min(L2 max|delta_i| r, spread) |V G|, and without (5).

**Output**: f - f~ = V~^T n^(1/2) (P H - F) + (Q V)^T Q H + offset_v^T P H, so that

    |f - f~| <= |V~|_2 change + |Q V|_2 within + |offset_v|_2 unit:                          (6)

second order in (Delta, eta) for means, where the paper's bound (appendix C) is first order.

**Gated**, H_i = y_i s(g_i): with the largest |y_i| <= Y r, |s(g_i)| <= secant G r, from row norms,
|H - F| <= secant G r |Delta_y|_2 r + Y~ r L1 |Delta_g|_2 r, and the slopes y_i s'(g_i) and s(g_i)
move by L1 |diag(|v|) Delta_y| r + Y~ r move(g) and L1 |diag(|v|) Delta_g| r.

**Adam**: the second factor is signs, |phi . sign - F . sign| <= |phi|_1 + |F|_1, and nothing better
holds a priori: a unit whose phi(z) is near zero flips its sign under any change of the weights,
which moves the kernel by 2 |phi_i(x)|.

**Factors**: in the wide copy, n_c units with rows ``inner w`` and output weights ``outer v / n_c``
take the place of each unit. The smaller MLP's kernel is the wide copy's with cluster c weighted by
omega_c instead of n_c, which adds at most max|1 - omega_c / n_c| fused fused'. *Proof*: with a
copy's hidden unit h, H = outer h, so that H H' = outer^2 h h' and H sign(H') = outer h sign(h').
The derivative by a stored row is the factor on it times that by the row as it acts, whose output
weights are n_c times a copy's. So omega / n is outer^2 / n and n factor^2 for SGD, outer / n and
factor for Adam: all 1 with outer = sqrt n, inner = middle = 1 / sqrt n, or with outer = n alone.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ntk.activations import ceiling, curvature, jerk, relu_gap, secant, slope, slope_spread
from ntk.bounds.pairs import Pair, check
from ntk.units import MlpWeights

_OUTWARD = 1 + 1e-6
"""All norms are computed in float64, whose rounding this covers many times over."""

Numbers = Float[np.ndarray, "*n"]


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
        offset: |P Delta|_F, zero but for rounding if the centroids are means.
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


class OutNorms(NamedTuple):
    """Norms of the output weights, all Frobenius or all spectral.

    Args:
        unit: |V|.
        fused: |V~| of the wide copy.
        within: |Q V|.
        offset: |P V - V~|.
    """

    unit: Numbers | float
    fused: Numbers | float
    within: Numbers | float
    offset: Numbers | float


class Constants(NamedTuple):
    """All that a priori bounds see of an MLP and its fused version.

    Args:
        act: The activation.
        inputs: d.
        width: p.
        outputs: o.
        maps: Norms of the linear maps; what the activation sees comes first.
        frobenius: Norms of the output weights.
        spectral: Likewise.
        absolute: Sums of the absolute output weights of the original and of the wide copy.
        largest_mean: Largest |mean v_i| over clusters.
        kappa: Root of the largest mean of |Q v_i|^2 over a cluster.
        mismatch: For either kernel, largest |1 - omega_c / n_c| of each term.
    """

    act: str
    inputs: int
    width: int
    outputs: int
    maps: tuple[MapNorms, ...]
    frobenius: OutNorms
    spectral: OutNorms
    absolute: tuple[float, float]
    largest_mean: float
    kappa: float
    mismatch: dict[str, list[float]]


def constants(pair: Pair) -> Constants:
    """Computes all norms, in float64 on the host.

    Args:
        pair: An MLP and its fused version.

    Returns:
        The constants; with them, bounds cost nothing.
    """
    pair = check(pair)
    original, labels, sizes = pair.original, np.asarray(pair.labels), _sizes(pair)
    mean = partial(_means, labels=labels, sizes=sizes)
    v, v_wide = _double(original.down), _wide(pair, "down")[labels]
    v_mean = mean(v)
    v_norm = np.linalg.norm(v, axis=1)

    def of_map(name: str) -> MapNorms:
        rows, wide = _rows(original, name), _wide(pair, name)[labels]
        delta = rows - wide
        square = np.square(delta).sum(1)
        return MapNorms(
            op=_op(rows),
            row=float(np.linalg.norm(rows, axis=1).max()),
            wide_op=_op(wide),
            wide_row=float(np.linalg.norm(wide, axis=1).max()),
            delta_op=_op(delta),
            delta_row=float(np.sqrt(square.max())),
            kappa=float(np.sqrt(mean(square[:, None]).max())),
            offset=float(np.linalg.norm(mean(delta)[labels])),
            weighted=_op(v_norm[:, None] * delta),
            biased=int(getattr(original, f"{name}_bias") is not None),
        )

    parts = v, v_wide, v - v_mean[labels], v_mean[labels] - v_wide
    return Constants(
        act=original.act,
        inputs=original.up.shape[1],
        width=original.width,
        outputs=original.down.shape[1],
        maps=tuple(of_map(name) for name in (["up"] if original.gate is None else ["gate", "up"])),
        frobenius=OutNorms(*(float(np.linalg.norm(a)) for a in parts)),
        spectral=OutNorms(*(_op(a) for a in parts)),
        absolute=(float(np.abs(v).sum()), float(np.abs(v_wide).sum())),
        largest_mean=float(np.linalg.norm(v_mean, axis=1).max()),
        kappa=float(np.sqrt(mean(np.square(parts[2]).sum(1)[:, None]).max())),
        mismatch=_mismatch(pair),
    )


def upstream_norms(pair: Pair, g: object) -> tuple[OutNorms, np.ndarray]:
    """Norms of the output weights times upstream vectors.

    Args:
        pair: An MLP and its fused version.
        g: Upstream vectors, (n, o).

    Returns:
        Euclidean norms (n,) of V G, V~ G, Q V G and (P V - V~) G, and |V~ G| entrywise, (n, p).
    """
    labels, vectors = np.asarray(pair.labels), _double(g)
    products = _double(pair.original.down) @ vectors.T
    wide = (_wide(pair, "down") @ vectors.T)[labels]
    mean = _means(products, labels, _sizes(pair))[labels]
    parts = products, wide, products - mean, mean - wide
    return OutNorms(*(np.linalg.norm(a, axis=0) for a in parts)), np.abs(wide).T


def wide_sizes(pair: Pair, kind: str) -> np.ndarray:
    """|v| of the wide copy's units for SGD, |v|_1 for Adam, (1, p)."""
    v = _wide(pair, "down")[np.asarray(pair.labels)]
    return np.linalg.norm(v, ord=1 if kind == "adam" else 2, axis=1)[None]


def _means(rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Averages over clusters, (c, ...)."""
    chosen = labels[None] == np.arange(len(sizes))[:, None]
    return chosen.astype(np.float64) @ rows / sizes[:, None]


def _double(x: object) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _rows(mlp: MlpWeights, name: str) -> np.ndarray:
    """Rows of a linear map with their biases as stored."""
    rows, bias = _double(getattr(mlp, name)), getattr(mlp, f"{name}_bias", None)
    return rows if bias is None else np.concatenate([rows, _double(bias)[:, None]], 1)


def _sizes(pair: Pair) -> np.ndarray:
    return np.bincount(np.asarray(pair.labels)).astype(np.float64)


def _factor(mlp: MlpWeights, name: str) -> np.ndarray:
    """The fixed factor around a stored parameter, (c,)."""
    up = mlp.inner if mlp.gate is None else mlp.middle
    factor = {"up": up, "gate": mlp.inner, "down": mlp.outer}[name]
    return np.ones(mlp.width) if factor is None else _double(factor)


def _wide(pair: Pair, name: str) -> np.ndarray:
    """Rows of the wide copy, one per cluster, whatever the factors are."""
    rows = _rows(pair.fused, name) * _factor(pair.fused, name)[:, None]
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


def _op(a: np.ndarray) -> float:
    """A spectral norm, rounded up: eigvalsh and the product are backward stable."""
    gram = a.T @ a if a.shape[0] > a.shape[1] else a @ a.T
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0) + 1e-12 * np.trace(gram)))


class Sizes(NamedTuple):
    """What bounds know of a feature at n inputs: ``unit``, ``fused``, ``change``, ``within``."""

    unit: Numbers
    fused: Numbers
    change: Numbers
    within: Numbers


def product_bound(a: Sizes, b: Sizes) -> Float[np.ndarray, "n m"]:
    """(3), for all pairs."""

    def total(s: Sizes) -> np.ndarray:
        least = np.minimum(s.unit, s.fused)
        return np.minimum(s.unit + s.fused, 2 * least + s.change)

    change = np.outer(a.change, total(b)) + np.outer(total(a), b.change)
    either = np.outer(a.unit, b.unit) + np.outer(a.fused, b.fused)
    return _OUTWARD * np.minimum(change / 2 + np.outer(a.within, b.within), either)


def lengths(k: Constants, x: Numbers) -> list[np.ndarray]:
    """|x^| for each linear map from |x|."""
    return [np.hypot(x, m.biased) * _OUTWARD for m in k.maps]


def hidden_sizes(
    k: Constants, x: Numbers, unit: Numbers | None = None, wide: Numbers | None = None
) -> Sizes:
    """The bounds on hidden units at inputs of norm at most x.

    Args:
        k: The constants.
        x: Norms of n inputs.
        unit: Norms of the original's hidden units there, if known.
        wide: What the norms of the wide copy's are at most, if known.

    Returns:
        The bounds, (n,) each.
    """
    l1, l2 = slope(k.act), curvature(k.act)
    m, r = k.maps[0], lengths(k, x)[0]
    if len(k.maps) == 1:
        most = ceiling(k.act) * np.sqrt(k.width)
        known = np.minimum(secant(k.act) * m.op * r, most) if unit is None else unit
        move = l1 * m.delta_op * r
        change = _times(l2 / 2, m.kappa * m.delta_op * r * r) + l1 * m.offset * r
        fused = np.minimum(secant(k.act) * m.wide_op * r, most)
        fused = np.minimum(fused, known + relu_gap(k.act) * np.sqrt(k.width) + m.offset * r)
    else:
        up, q = k.maps[1], lengths(k, x)[1]
        inner = secant(k.act) * r
        known = _gated(m.row * inner, m.op * inner, up.row * q, up.op * q) if unit is None else unit
        fused = _gated(m.wide_row * inner, m.wide_op * inner, up.wide_row * q, up.wide_op * q)
        move = m.row * inner * up.delta_op * q + up.wide_row * q * l1 * m.delta_op * r
        change = move
    change = np.minimum(change, move)
    fused = np.minimum(fused, known + change)
    fused = fused if wide is None else np.minimum(fused, wide)
    return Sizes(known, fused, np.minimum(change, known + fused), np.minimum(move, known))


def _gated(row: np.ndarray, op: np.ndarray, row2: np.ndarray, op2: np.ndarray) -> np.ndarray:
    """The norm of products a_i b_i from largest entries and norms of a and b."""
    return np.minimum(row * op2, op * row2)


def slope_sizes(
    k: Constants,
    x: Numbers,
    upstream: OutNorms | None = None,
    units: list[np.ndarray] | None = None,
    wide: list[np.ndarray] | None = None,
) -> list[Sizes]:
    """The bounds on rows c_i v_i at inputs of norm at most x, for each linear map.

    Args:
        k: The constants.
        x: Norms of n inputs.
        upstream: Norms of the output weights times upstream vectors; None without any.
        units: Norms of the original's there, if known.
        wide: What the norms of the wide copy's are at most, if known.

    Returns:
        The bounds, (n,) each.
    """
    out = k.frobenius if upstream is None else upstream
    frobenius = upstream is None
    l1, l2, l3, spread = slope(k.act), curvature(k.act), jerk(k.act), slope_spread(k.act)
    m, r = k.maps[0], lengths(k, x)[0]

    def move(factor: float, m: MapNorms, r: np.ndarray) -> np.ndarray:
        """|diag(factor |delta_i . x^|) V|."""
        by_row = _times(factor, m.delta_row * r * out.unit)
        return np.minimum(by_row, _times(factor, m.weighted * r)) if frobenius else by_row

    def sizes(i: int, most: np.ndarray, most_fused: np.ndarray, moved: np.ndarray) -> Sizes:
        known = most * out.unit if units is None else units[i]
        change = moved + most_fused * out.offset
        if frobenius and len(k.maps) == 1:
            between = _times(l3 / 2, m.kappa * m.delta_op * r * r) + _times(l2, m.offset * r)
            each = np.minimum(_times(l2, m.delta_op * r), spread * np.sqrt(k.width))
            second = k.largest_mean * between + k.kappa * each + l1 * out.offset
            change = np.minimum(change, second)
        fused = np.minimum(most_fused * out.fused, known + change)
        fused = fused if wide is None else np.minimum(fused, wide[i])
        within = np.minimum(most_fused * out.within + moved, known)
        return Sizes(known, fused, np.minimum(change, known + fused), within)

    steep = np.minimum(move(l2, m, r), spread * out.unit)
    if len(k.maps) == 1:
        flat = np.full_like(r, l1)
        return [sizes(0, flat, flat, steep)]
    up, q = k.maps[1], lengths(k, x)[1]
    gate_move = move(l1, up, q) + up.wide_row * q * steep
    return [
        sizes(0, l1 * up.row * q, l1 * up.wide_row * q, gate_move),
        sizes(1, secant(k.act) * m.row * r, secant(k.act) * m.wide_row * r, move(l1, m, r)),
    ]


def absolute_sizes(
    k: Constants,
    x: Numbers,
    units: list[np.ndarray],
    out: Numbers | float,
    wide: list[np.ndarray] | None = None,
) -> list[Sizes]:
    """The same for Adam's kernel, where sums of absolute values take the place of norms.

    Args:
        k: The constants.
        x: Norms of n inputs.
        units: Sums of the original's absolute features there, for each term.
        out: What multiplies the slopes of the wide copy: sums of |v|_1, or of |v . G|.
        wide: What the sums of the wide copy's are at most, for each term, if known.

    Returns:
        The bounds, of which only ``unit`` and ``fused`` matter.
    """
    root = np.sqrt(k.width)
    hidden = hidden_sizes(k, x)
    fused = hidden.fused * root
    if len(k.maps) == 1:
        gap = relu_gap(k.act) * k.width + root * k.maps[0].offset * lengths(k, x)[0]
        fused = np.minimum(fused, units[0] + gap)
    result = [hidden._replace(unit=units[0], fused=fused)]
    steepest = [slope(k.act) * np.ones_like(x)]
    if len(k.maps) == 2:
        r, q = lengths(k, x)
        linear = k.maps[1].wide_row * q
        steepest = [steepest[0] * linear, secant(k.act) * k.maps[0].wide_row * r]
    zero = np.zeros_like(x)
    result += [Sizes(u, c * out, zero, zero) for u, c in zip(units[1:], steepest, strict=True)]
    if wide is not None:
        pairs = zip(result, wide, strict=True)
        result = [s._replace(fused=np.minimum(s.fused, most)) for s, most in pairs]
    return result


def output_bound(k: Constants, hidden: Sizes) -> np.ndarray:
    """(6) at n inputs."""
    out = k.spectral
    parts = out.fused * hidden.change + out.within * hidden.within + out.offset * hidden.unit
    return _OUTWARD * np.minimum(parts, out.unit * hidden.unit + out.fused * hidden.fused)


def uniform(k: Constants, radius: float, kind: str) -> float:
    """The bound on the change of the traced kernel where |x| and |z| are at most a radius."""
    x = np.array([radius])
    outputs, inputs = k.outputs, k.inputs
    off = k.mismatch[kind]
    if kind == "sgd":
        sizes = [hidden_sizes(k, x), *slope_sizes(k, x)]
        scalars = [outputs, *(radius**2 + m.biased for m in k.maps)]
        bounds = [product_bound(s, s)[0, 0] + off[t] * (s.fused**2)[0] for t, s in enumerate(sizes)]
    else:
        root = np.sqrt(k.width)
        hidden = hidden_sizes(k, x).unit * root
        slopes = [s.unit for s in slope_sizes(k, x)]
        scalars = [outputs, *(np.sqrt(inputs) * radius + m.biased for m in k.maps)]
        # |c_i| is at most the bound on |diag(c) V| over |V|, whichever norm it is in.
        units = [hidden, *(s / k.frobenius.unit * k.absolute[0] for s in slopes)]
        sizes = absolute_sizes(k, x, units, k.absolute[1])
        bounds = [(s.unit + (1 + off[t]) * s.fused)[0] for t, s in enumerate(sizes)]
    return float(_OUTWARD * sum(c * b for c, b in zip(scalars, bounds, strict=True)))


def _times(factor: float, x: np.ndarray) -> np.ndarray:
    """A product in which an infinite constant times exactly zero is zero."""
    return np.where(x == 0, 0.0, factor * np.where(x == 0, 1.0, x))
