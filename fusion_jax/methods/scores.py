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
from fusion_jax.methods.gram import (
    in_blocks,
    level_of,
    mirrored,
    product,
    sum_over_blocks,
    upper_gram,
)
from fusion_jax.methods.removal import (
    first_losses,
    regular_inverse,
    removal,
    removed_in_order,
    units_left,
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
    inverse = regular_inverse(seen.relative if relative else seen.gram, ridge)
    if score in ONE_AT_A_TIME:
        return first_losses(inverse, down)
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
    inverse, down = regular_inverse(compared, ridge), wide(subs.down)
    units = units_left(removed_in_order(down, inverse, count), len(down))
    return Kept(units, first_losses(inverse, down), compared, seen.gram if gram else None)


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
