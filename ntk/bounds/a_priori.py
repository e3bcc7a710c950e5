r"""Bounds from norms of weights alone, which hold for every input of a given norm.

They show that kernels change to second order only.

In the notation of `ntk.bounds.norms`, write z_i = u_i . x^, r = |x^|, and L1, L2, L3, secant,
spread, gap and ceiling for the constants of the activation (`ntk.activations`). Every feature phi
(H, or c_i v_i), with the wide copy's feature F, is bounded by four numbers,

    unit >= |phi|,    fused >= |F|,    change >= |P phi - F|,    within >= |Q phi|.

With total = |P phi + F| <= min(unit + fused, 2 unit + change, 2 fused + change), identity (1) of
`ntk.bounds.enclosure` and the triangle inequality give

    |phi . phi' - F . F'| <= min( (change total' + total change') / 2 + within within',
                                  unit unit' + fused fused' ).                               (3)

**Hidden units of a plain MLP**, H_i = s(z_i):

- unit: |s(z)| <= secant |z|, so |H| <= secant |U|_2 r; at most ceiling sqrt(p).
- fused: the same bound with U~; and |H| + gap sqrt(p) + |offset|_2 r. *Proof*: relu is convex, so
  for centroids that are means relu(z) <= mean relu(z_i) <= mean s(z_i) + gap, and s <= relu in all
  activations with a finite gap; so s(z) is between -gap and mean H_i + gap. Centroids that are not
  means move relu(z) by at most their offset.
- change: |P(H - F)| <= |H - F| <= L1 |Delta|_2 r. And, to *second* order,

      |P H - F| <= L2/2 kappa |Delta|_2 r^2 + L1 |offset|_2 r,                               (4)

  where kappa^2 is the largest mean of |delta_i|^2 over a cluster. *Proof*: by Taylor's theorem
  s(z_i) - s(z) = s'(z) delta_i . x^ + t_i, |t_i| <= L2/2 (delta_i . x^)^2. The mean of delta_i is
  zero, or the offset. With m_c the mean of (delta_i . x^)^2 in cluster c,
  sum_c n_c m_c^2 <= max_c m_c  sum_i (delta_i . x^)^2 <= kappa^2 r^2 |Delta|_2^2 r^2.
- within: |Q H| = |Q (H - F)| <= L1 |Delta|_2 r, as F is constant in clusters. Only products of two
  of these occur in (3): second order again.

**Slopes of a plain MLP**, rows c_i v_i with c_i = s'(z_i), in the Frobenius norm:

- unit: L1 |V|_F. fused: L1 |V~|_F.
- move >= |diag(c_i - c) V|_F: min(L2 |diag(|v_i|) Delta|_2 r, spread |V|_F).
- change: mean(c_i v_i) - c v = mean((c_i - c) v_i) + c (mean v_i - v), so move + L1 |offset_v|_F;
  and, to second order, with mean((c_i - c) v_i) = mean v_i mean(c_i - c) + mean((c_i - c) Q v_i),

      max|mean v_i| (L3/2 kappa |Delta|_2 r^2 + L2 |offset|_2 r) + kappa_v |c_i - c|_2
      + L1 |offset_v|_F,    |c_i - c|_2 <= min(L2 |Delta|_2 r, spread sqrt(p)).              (5)

- within: c_i v_i - c mean v_i = c Q v_i + (c_i - c) v_i, so L1 |Q V|_F + move.

**Output**: f - f~ = V~^T n^(1/2) (P H - F) + (Q V)^T Q H + offset_v^T P H, so that

    |f - f~| <= |V~|_2 change + |Q V|_2 within + |offset_v|_2 unit.                          (6)

This is of second order in (Delta, eta) for means, where the bound of the MLP Fusion paper
(appendix C) is of first order.

**Gated MLPs**, H_i = y_i s(g_i): let Y and G be the largest row norms of the two maps, so that
|y_i| <= Y r and |s(g_i)| <= secant G r, and Y~ that of the wide copy. Then |H - F| <=
secant G r |Delta_y|_2 r + Y~ r L1 |Delta_g|_2 r, and the slopes y_i s'(g_i) and s(g_i) move by
L1 |diag(|v|) Delta_y| r + Y~ r move(g) and L1 |diag(|v|) Delta_g| r.

**Adam**: the second factor is signs, so |phi . sign - F . sign| <= |phi|_1 + |F|_1. Nothing better
holds for all inputs: a unit whose phi(z) is near zero flips its sign under any change of the
weights, which moves the kernel by 2 |phi_i(x)|.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ntk.activations import ceiling, curvature, jerk, relu_gap, secant, slope, slope_spread
from ntk.bounds.balls import OUTWARD
from ntk.bounds.norms import TINY, MapNorms, Numbers, OutputNorms, WeightNorms, times
from ntk.kinds import KernelKind


class FeatureBounds(NamedTuple):
    """Bounds on a feature at n inputs: on |phi|, |F|, |P phi - F| and |Q phi|."""

    unit: Numbers
    fused: Numbers
    change: Numbers
    within: Numbers


# Bounds may become infinite. NaN, from infinity times zero, is no better than that.
_unwarned = np.errstate(over="ignore", invalid="ignore")


@_unwarned
def product_bound(a: FeatureBounds, b: FeatureBounds) -> Float[np.ndarray, "n m"]:
    """Returns (3) for all pairs of inputs."""

    def total(s: FeatureBounds) -> np.ndarray:
        least = np.minimum(s.unit, s.fused)
        return np.minimum(s.unit + s.fused, 2 * least + s.change)

    change = np.outer(a.change, total(b)) + np.outer(total(a), b.change)
    either = np.outer(a.unit, b.unit) + np.outer(a.fused, b.fused)
    return OUTWARD * np.fmin(change / 2 + np.outer(a.within, b.within), either) + 8 * TINY


def input_lengths(norms: WeightNorms, x: Numbers) -> list[np.ndarray]:
    """Returns |x^| for each linear map from |x|."""
    return [np.hypot(x, m.biased) * OUTWARD for m in norms.maps]


def hidden_bounds(norms: WeightNorms, x: Numbers) -> FeatureBounds:
    """Returns bounds, (n,) each, on the hidden units at inputs.

    Args:
        norms: The norms of the weights.
        x: Norms of n inputs, or upper bounds on them.
    """
    l1, l2 = slope(norms.act), curvature(norms.act)
    m, r = norms.maps[0], input_lengths(norms, x)[0]
    if len(norms.maps) == 1:
        most = ceiling(norms.act) * np.sqrt(norms.width)
        known = np.minimum(times(secant(norms.act), m.op, r), most)
        move = times(l1, m.delta_op, r)
        offset = times(m.offset, r)
        change = times(l2 / 2, times(m.kappa, r), times(m.delta_op, r)) + l1 * offset
        fused = np.minimum(times(secant(norms.act), m.wide_op, r), most)
        fused = np.minimum(fused, known + relu_gap(norms.act) * np.sqrt(norms.width) + offset)
    else:
        up, q = norms.maps[1], input_lengths(norms, x)[1]
        inner = secant(norms.act) * r
        row, op = times(m.row, inner), times(m.op, inner)
        known = _gated(row, op, times(up.row, q), times(up.op, q))
        row, op = times(m.wide_row, inner), times(m.wide_op, inner)
        fused = _gated(row, op, times(up.wide_row, q), times(up.wide_op, q))
        move = times(times(m.row, inner), times(up.delta_op, q))
        move = move + times(times(up.wide_row, q), l1, times(m.delta_op, r))
        change = move
    change = np.minimum(change, move)
    fused = np.minimum(fused, known + change)
    return FeatureBounds(known, fused, np.minimum(change, known + fused), np.minimum(move, known))


def _gated(row: np.ndarray, op: np.ndarray, row2: np.ndarray, op2: np.ndarray) -> np.ndarray:
    """Returns a bound on the norm of products a_i b_i from largest entries and norms of a and b."""
    return np.minimum(times(row, op2), times(op, row2))


def slope_bounds(norms: WeightNorms, x: Numbers) -> list[FeatureBounds]:
    """Returns bounds, (n,) each, on the rows c_i v_i at inputs, for each linear map.

    Args:
        norms: The norms of the weights.
        x: Norms of n inputs, or upper bounds on them.
    """
    out, act = norms.frobenius, norms.act
    l1, l2, l3, spread = slope(act), curvature(act), jerk(act), slope_spread(act)
    m, r = norms.maps[0], input_lengths(norms, x)[0]

    def move(factor: float, m: MapNorms, r: np.ndarray) -> np.ndarray:
        """Returns a bound on |diag(factor |delta_i . x^|) V|."""
        return np.minimum(
            times(factor, times(m.delta_row, r), out.unit), times(factor, m.weighted, r)
        )

    def bounds(most: Numbers, most_fused: Numbers, moved: Numbers) -> FeatureBounds:
        known = times(most, out.unit)
        change = moved + times(most_fused, out.offset)
        if len(norms.maps) == 1:
            between = times(l3 / 2, times(m.kappa, r), times(m.delta_op, r))
            between = between + times(l2, m.offset, r)
            each = np.minimum(times(l2, m.delta_op, r), spread * np.sqrt(norms.width))
            second = times(norms.largest_mean, between) + times(norms.kappa, each)
            second = second + l1 * out.offset
            change = np.minimum(change, second)
        fused = np.minimum(times(most_fused, out.fused), known + change)
        within = np.minimum(times(most_fused, out.within) + moved, known)
        return FeatureBounds(known, fused, np.minimum(change, known + fused), within)

    steep = np.minimum(move(l2, m, r), spread * out.unit)
    if len(norms.maps) == 1:
        flat = np.full_like(r, l1)
        return [bounds(flat, flat, steep)]
    up, q = norms.maps[1], input_lengths(norms, x)[1]
    gate_move = move(l1, up, q) + times(up.wide_row, q, steep)
    return [
        bounds(times(l1, up.row, q), times(l1, up.wide_row, q), gate_move),
        bounds(times(secant(act), m.row, r), times(secant(act), m.wide_row, r), move(l1, m, r)),
    ]


def _absolute_bounds(norms: WeightNorms, x: Numbers) -> list[np.ndarray]:
    """Returns bounds on the original's and the wide copy's sums of absolute features, for Adam."""
    root = np.sqrt(norms.width)
    hidden = hidden_bounds(norms, x)
    sums = [times(root, hidden.unit), times(root, hidden.fused)]
    steepest = [(np.full_like(x, slope(norms.act)),) * 2]
    if len(norms.maps) == 2:
        r, q = input_lengths(norms, x)
        (gate, up), l1, most = norms.maps, slope(norms.act), secant(norms.act)
        steepest = [
            (times(l1, up.row, q), times(l1, up.wide_row, q)),
            (times(most, gate.row, r), times(most, gate.wide_row, r)),
        ]
    pairs = [[times(c, v) for c, v in zip(s, norms.absolute, strict=True)] for s in steepest]
    return [np.stack(pair) for pair in (sums, *pairs)]


@_unwarned
def output_bound(
    out: OutputNorms, change: Numbers, within: Numbers, unit: Numbers, fused: Numbers
) -> np.ndarray:
    """Returns (6) at n inputs, from spectral norms of output weights and norms of hidden units."""
    parts = times(out.fused, change) + times(out.within, within) + times(out.offset, unit)
    sizes = times(out.unit, unit) + times(out.fused, fused)
    return OUTWARD * np.minimum(parts, sizes)


@_unwarned
def traced_kernel_bound(norms: WeightNorms, radius: float, kind: KernelKind) -> float:
    """Returns a bound on the change of the traced kernel if |x| and |z| are at most a radius."""
    bound = _traced_kernel_bound(norms, radius, kind)
    return float("inf") if np.isnan(bound) else bound


def _traced_kernel_bound(norms: WeightNorms, radius: float, kind: KernelKind) -> float:
    x = np.array([radius])
    outputs, inputs = norms.outputs, norms.inputs
    off = norms.mismatch[kind]
    if kind == "sgd":
        sizes = [hidden_bounds(norms, x), *slope_bounds(norms, x)]
        # Each feature times the root of its scalar: neither may underflow alone.
        roots = [np.sqrt(outputs), *input_lengths(norms, x)]
        sizes = [
            FeatureBounds(*(times(a, root) for a in s))
            for s, root in zip(sizes, roots, strict=True)
        ]
        bounds = [
            product_bound(s, s)[0, 0] + times(off[t], s.fused, s.fused)[0]
            for t, s in enumerate(sizes)
        ]
        return float(OUTWARD * sum(bounds))
    scalars = [outputs, *(np.sqrt(inputs) * radius + m.biased for m in norms.maps)]
    sums = _absolute_bounds(norms, x)
    bounds = [(unit + (1 + off[t]) * fused)[0] for t, (unit, fused) in enumerate(sums)]
    return float(OUTWARD * sum(times(c, b) for c, b in zip(scalars, bounds, strict=True)))
