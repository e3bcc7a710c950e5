"""Scores of hidden units: how much each unit matters, by weights, activity, or the model's loss.

Axis letters in shapes: p width, c units left, d inputs, o outputs, t positions.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fusion_jax.calibration.data import Calibration
from fusion_jax.methods.least_squares import (
    in_blocks,
    inverse_of,
    level_of,
    mirrored,
    product,
    sum_over_blocks,
    upper_gram,
)
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.submlps import SubMLPs, responses
from ntk.activations import Activation

UnitScore = Literal[
    "magnitude",
    "hidden",
    "activation",
    "wanda",
    "fluctuation",
    "leverage",
    "obs",
    "relative",
    "fisher",
    "gradient",
    "saliency",
]
ON_UPSTREAM = ("fisher",)
"""The scores that need the inputs of the MLP on text and upstream gradients, see `Calibration`."""
ON_GRADIENTS = ("gradient", "saliency")
"""The scores that need the gradients of a loss with respect to the weights."""
ON_INPUTS = tuple(s for s in get_args(UnitScore) if s not in ("magnitude", *ON_GRADIENTS))
"""The scores that need the inputs of the MLP on text."""
ONE_AT_A_TIME = ("obs", "relative")
"""The scores that change with every unit that goes, see `removal`."""
CANDIDATES = 128
"""Units among which these scores look for the next ones to remove, half of them at a time."""

_Small = tuple[Array, Array, Array]
"""(G + l I)^-1, output weights, and which units are left."""


class Moments(NamedTuple):
    """Sums over positions of an MLP's hidden values h, whose weights add up to 1.

    Args:
        size: (p,) sum of |h|.
        mean: (p,) sum of h.
        square: (p,) sum of h^2.
        fisher: (p,) sum of (h v . g)^2, where g is the upstream gradient; 0 without it.
        gram: (p, p) sum of h h^T, or (0, 0) where it is not wanted.
        relative: The same for the hidden values of each position divided by their length.
    """

    size: Float[Array, " p"]
    mean: Float[Array, " p"]
    square: Float[Array, " p"]
    fisher: Float[Array, " p"]
    gram: Float[Array, "a a"]
    relative: Float[Array, "b b"]


def importance(subs: SubMLPs) -> Float[Array, " p"]:
    """Returns ``|(w_i, b_i)| |v_i|`` of each sub-MLP; with a gate, w_i has all input weights.

    Example:
        >>> importance(SubMLPs(up=jnp.array([[3.0, 4.0]]), down=jnp.array([[2.0]]))).tolist()
        [10.0]
    """
    rows, outputs = subs.rows(), subs.down.shape[-1]
    inner, outer = rows[:, :-outputs], rows[:, -outputs:]
    return jnp.linalg.norm(inner, axis=-1) * jnp.linalg.norm(outer, axis=-1)


def unit_scores(
    score: UnitScore,
    subs: SubMLPs,
    *,
    act: Activation | None = None,
    calibration: Calibration | None = None,
    gradients: SubMLPs | None = None,
    ridge: float = 0.01,
) -> Float[Array, " p"]:
    r"""Returns the score of each hidden unit of an MLP; larger ones matter more.

    With h_i the values of unit i at the calibration inputs, v_i its output weights, means over
    positions, ``G = mean h h^T``, ``l = ridge trace(G) / p``, and L a loss:

    =================  ============================================  ==============================
    score              unit i                                        source
    =================  ============================================  ==============================
    ``magnitude``      ``|(w_i, b_i)| |v_i|``
    ``hidden``         ``mean |h_i|``                                Minitron (arXiv 2407.14679)
    ``activation``     ``rms(h_i) |v_i|``
    ``wanda``          ``rms(h_i) sum_o |v_io|``                     Wanda-sp (arXiv 2306.11695)
    ``fluctuation``    ``var(h_i) |v_i|^2``                          FLAP (arXiv 2312.11983)
    ``leverage``       ``[G (G + l I)^-1]_ii``                       MoDeGPT (arXiv 2408.09632)
    ``obs``            ``|v_i|^2 / [(G + l I)^-1]_ii``               Optimal Brain Surgeon (1993)
    ``relative``       the same, with ``h / |h|`` in G               this library
    ``fisher``         ``mean (h_i v_i . dL/dy)^2``, y the output    Theis et al. (arXiv 1801.05787)
    ``gradient``       ``|<dL/dv_i, v_i>|``                          Molchanov et al. (CVPR 2019)
    ``saliency``       sum over the weights w of ``|w dL/dw|``       NIRVANA (arXiv 2509.14230)
    =================  ============================================  ==============================

    ``"relative"`` counts the error at each position in relation to what the MLP says there. A few
    positions, such as the first one of a text, have hidden values that are many times larger than
    all others, and would decide alone which units stay.

    Args:
        score: Which score.
        subs: The p sub-MLPs.
        act: The activation; needed with calibration.
        calibration: The inputs of the MLP; for ``"fisher"`` with ``upstream``.
        gradients: The gradients of the loss, laid out as the sub-MLPs, for those that need them.
        ridge: The strength l, relative to the mean of G's diagonal.

    Returns:
        (p,) scores, at least 0. Where all gradients are 0 (an expert that no position reached),
        they are those of ``"magnitude"``.
    """
    by_weights = importance(subs)
    if score == "magnitude":
        return by_weights
    down = wide(subs.down)
    if score in ON_GRADIENTS:
        assert gradients is not None
        if score == "gradient":
            found = jnp.abs((wide(gradients.down) * down).sum(-1))
        else:
            found = jnp.abs(gradients.rows() * subs.rows()).sum(-1)
        return jnp.where(found.max() > 0, found, by_weights.astype(found.dtype))
    assert act is not None
    assert calibration is not None
    correlated = score == "leverage" or score in ONE_AT_A_TIME
    relative = score == "relative"
    seen = hidden_moments(
        subs, calibration, act, gram=correlated and not relative, relative=relative
    )
    rms = jnp.sqrt(seen.square)
    if score == "hidden":
        return seen.size
    if score == "activation":
        return rms * jnp.linalg.norm(down, axis=-1)
    if score == "wanda":
        return rms * jnp.abs(down).sum(-1)
    if score == "fluctuation":
        variance = jnp.maximum(seen.square - jnp.square(seen.mean), 0)
        return variance * jnp.square(down).sum(-1)
    if score == "fisher":
        assert calibration.upstream is not None
        return jnp.where(seen.fisher.max() > 0, seen.fisher, by_weights.astype(seen.fisher.dtype))
    inverse = _inverse(seen.relative if relative else seen.gram, ridge)
    if score in ONE_AT_A_TIME:
        return _losses(inverse, down)
    return 1 - level_of(seen.gram, ridge) * jnp.diagonal(inverse)


def hidden_moments(
    subs: SubMLPs,
    calibration: Calibration,
    act: Activation,
    *,
    gram: bool = False,
    relative: bool = False,
) -> Moments:
    """Returns sums over positions of the hidden values, block by block, see `Moments`."""
    down = wide(subs.down)

    def moments(x: Array, r: Array, *upstream: Array) -> Moments:
        hidden = r[:, None] * responses(subs, x, act).hidden
        squares = jnp.square(hidden)
        slopes = jnp.square(product(upstream[0], down.T)) if upstream else jnp.zeros(())
        none = jnp.zeros((0, 0), hidden.dtype)
        found = Moments(
            size=(r[:, None] * jnp.abs(hidden)).sum(0),
            mean=(r[:, None] * hidden).sum(0),
            square=squares.sum(0),
            fisher=(squares * slopes).sum(0),
            gram=upper_gram(hidden) if gram else none,
            relative=none,
        )
        if not relative:
            return found
        hidden = r[:, None] * _of_length_one(_of_length_one(hidden, jnp.inf), 2)
        return found._replace(relative=upper_gram(hidden))

    known = () if calibration.upstream is None else (wide(calibration.upstream),)
    found = sum_over_blocks(moments, wide(calibration.inputs), calibration.root_weights(), *known)
    return found._replace(gram=mirrored(found.gram), relative=mirrored(found.relative))


def _of_length_one(x: Float[Array, "t p"], norm: int | float) -> Float[Array, "t p"]:
    """Returns rows divided by a norm of theirs; rows of zeros stay."""
    size = jnp.linalg.norm(x, ord=norm, axis=1, keepdims=True)
    return x / jnp.where(size > 0, size, 1)


class Removal(NamedTuple):
    """The units that go, one after the other.

    Args:
        units: (n,) the units, the first one to go first.
        costs: (n,) the loss of each removal, given those before it.
    """

    units: Int[Array, " n"]
    costs: Float[Array, " n"]


class Kept(NamedTuple):
    """The units that a score leaves.

    Args:
        units: (c,) the units, in their order.
        scores: (p,) the scores of all units.
        compared: (p, p) the Gram matrix that the score is made of, if it is in `ONE_AT_A_TIME`.
        gram: (p, p) the Gram matrix of hidden values, if it is wanted and the score is of those.
    """

    units: Int[Array, " c"]
    scores: Float[Array, " p"]
    compared: Float[Array, "p p"] | None = None
    gram: Float[Array, "p p"] | None = None


def kept_units(
    score: UnitScore,
    subs: SubMLPs,
    count: int,
    *,
    act: Activation | None = None,
    calibration: Calibration | None = None,
    gradients: SubMLPs | None = None,
    ridge: float = 0.01,
    gram: bool = False,
) -> Kept:
    """Returns the units that a score leaves, and the scores of all units.

    Args:
        score: Which score; those in `ONE_AT_A_TIME` change with every unit that goes, and the first
            ones are returned.
        subs: The p sub-MLPs.
        count: The number c of units to leave.
        act: See `unit_scores`, as for the other arguments.
        calibration: Inputs.
        gradients: Gradients of the weights.
        ridge: The strength l.
        gram: Whether the Gram matrix of hidden values is wanted.
    """
    if score not in ONE_AT_A_TIME:
        scores = unit_scores(
            score, subs, act=act, calibration=calibration, gradients=gradients, ridge=ridge
        )
        return Kept(jnp.sort(lax.top_k(scores, count)[1]), scores)
    assert act is not None and calibration is not None
    relative = score == "relative"
    seen = hidden_moments(subs, calibration, act, gram=gram or not relative, relative=relative)
    compared = seen.relative if relative else seen.gram
    inverse, down = _inverse(compared, ridge), wide(subs.down)
    units = _left(_removal(down, inverse, count), len(down))
    return Kept(units, _losses(inverse, down), compared, seen.gram if gram else None)


def _left(removal: Removal, width: int) -> Int[Array, " c"]:
    """Returns the units that are not removed, in their order."""
    count = width - len(removal.units)
    return jnp.flatnonzero(jnp.ones(width, bool).at[removal.units].set(False), size=count)


def removal(
    down: Float[Array, "p o"], gram: Float[Array, "p p"], count: int, ridge: float
) -> Removal:
    """Returns the order in which Optimal Brain Surgeon removes units, and what each removal costs.

    It removes the unit whose loss ``|v_i|^2 / [(G + l I)^-1]_ii`` is smallest, changes the output
    weights of the others to make up for it, and repeats. Here the next units are looked for among
    the `CANDIDATES` that are cheapest now, and the matrices are updated for half as many at once.

    Args:
        down: Output weights.
        gram: G, the mean of h h^T.
        count: The number c of units to leave.
        ridge: The strength l, relative to the mean of G's diagonal.

    References:
        Hassibi and Stork (NIPS 1992).
    """
    return _removal(wide(down), _inverse(gram, ridge), count)


def _losses(inverse: Array, down: Array) -> Array:
    """Returns the loss of removing each unit first."""
    return jnp.square(down).sum(-1) / jnp.diagonal(inverse)


def _removal(down: Array, inverse: Array, count: int) -> Removal:
    """Returns the order of removal, given (G + l I)^-1.

    What removals change in the inverse is kept as ``F^T F``, one row of F for each unit that went:
    only the diagonal and the rows of the next units are ever needed.
    """
    left = len(down) - count
    size = max(1, min(CANDIDATES // 2, left))
    groups, rest = divmod(left, size)
    state = _Removing(
        down=down,
        diagonal=jnp.diagonal(inverse),
        alive=jnp.ones(len(down), bool),
        removed=jnp.zeros((max(1, left), len(down)), inverse.dtype),
        number=jnp.int32(0),
    )
    state, found = lax.scan(lambda s, _: _without(inverse, s, size), state, None, length=groups)
    found = jax.tree.map(lambda x: x.reshape(-1), found)
    if rest:
        _, last = _without(inverse, state, rest)
        found = jax.tree.map(lambda *x: jnp.concatenate(x), found, last)
    return found


class _Removing(NamedTuple):
    """The state of `_removal`."""

    down: Array
    diagonal: Array  # of the inverse
    alive: Array
    removed: Array  # F, filled from the top
    number: Array  # of rows of F


def _without(inverse: Array, s: _Removing, count: int) -> tuple[_Removing, Removal]:
    """Removes some units one at a time, and then changes the state for all of them at once."""
    losses = jnp.where(s.alive, jnp.square(s.down).sum(-1) / s.diagonal, jnp.inf)
    candidates = lax.top_k(-losses, min(2 * count, len(s.down)))[1]

    def remove(carry: _Small, _: None) -> tuple[_Small, tuple[Array, Array]]:
        small, weights, there = carry
        costs = jnp.where(there, _losses(small, weights), jnp.inf)
        j = jnp.argmin(costs)
        share = small[:, j] / small[j, j]
        weights = weights - share[:, None] * weights[j][None]
        small = small - share[:, None] * small[j][None]
        return (small, weights, there.at[j].set(False)), (j, costs[j])

    changed = s.removed[:, candidates]
    small = inverse[candidates][:, candidates] - product(changed.T, changed)
    start = (small, s.down[candidates], s.alive[candidates])
    order, costs = lax.scan(remove, start, None, length=count)[1]
    gone = candidates[order]
    rows = inverse[gone] - product(s.removed[:, gone].T, s.removed)
    root = jnp.linalg.cholesky(rows[:, gone])
    both = jnp.concatenate([rows, s.down[gone]], axis=1)
    both = jax.scipy.linalg.solve_triangular(root, both, lower=True)
    rows, weights = both[:, : len(s.down)], both[:, len(s.down) :]
    least = jnp.finfo(rows.dtype).tiny  # of a unit that the others explain in all digits
    state = _Removing(
        down=s.down - product(rows.T, weights),
        diagonal=jnp.maximum(s.diagonal - jnp.square(rows).sum(0), least),
        alive=s.alive.at[gone].set(False),
        removed=lax.dynamic_update_slice(s.removed, rows, (s.number, jnp.int32(0))),
        number=s.number + count,
    )
    return state, Removal(gone, costs)


def _inverse(gram: Array, ridge: float) -> Array:
    return inverse_of(gram + level_of(gram, ridge) * jnp.eye(len(gram), dtype=gram.dtype))


@partial(jax.jit, static_argnames=("act", "count", "ridge"))
def loss_of_removal(
    subs: SubMLPs, calibration: Calibration, act: Activation, count: int, ridge: float
) -> Float[Array, " n"]:
    """Returns by how much the model's loss grows with each unit that goes, to second order.

    With r the part of ``h / |h|`` that the units left do not explain, outputs change by
    ``|h| sum_i r_i v_i``, and the loss by half of the mean of the square of its product with the
    gradient g. That is taken for ``tr(E[r r^T] V E[|h|^2 g g^T] V^T) / 2``, as if both factors were
    independent. Products ``|h| |g|`` above their 99th percentile are clipped to it.

    Args:
        subs: The p sub-MLPs.
        calibration: Inputs and upstream gradients g.
        act: The activation.
        count: The number of units to leave.
        ridge: See `removal`.

    Returns:
        (p - count,) the cost of each removal, a mean over positions.

    References:
        Martens and Grosse, K-FAC (ICML 2015), for the independence.
    """
    assert calibration.upstream is not None
    x, upstream = wide(calibration.inputs), wide(calibration.upstream)
    length = lambda x: jnp.linalg.norm(responses(subs, x, act).hidden, axis=1)  # noqa: E731
    sizes = lax.map(length, in_blocks(x)).reshape(-1)[: len(x)]
    strength = sizes * jnp.linalg.norm(upstream, axis=1)
    clip = jnp.minimum(1, jnp.quantile(strength, 0.99) / jnp.where(strength > 0, strength, 1))
    rows = (calibration.root_weights() * clip * sizes)[:, None] * upstream
    values, vectors = jnp.linalg.eigh(product(rows.T, rows))
    half = vectors * jnp.sqrt(jnp.maximum(values, 0) / 2)[None]
    gram = hidden_moments(subs, calibration, act, relative=True).relative
    return removal(product(wide(subs.down), half), gram, count, ridge).costs
