r"""What the wide copy's features are at most, from what the original computes: Jensen's inequality.

A centroid that is the mean of its cluster's rows has as its value the mean of theirs, by
linearity; any other is off by at most ``offset r``, r = |x^|. So for a function phi that is convex
and does not fall, and weights w_c >= 0 of clusters,

    sum_c n_c w_c phi(z_c)  <=  sum_i w_{c(i)} phi(z_i + offset r),                           (7)

and likewise for |z_c| and |z_i|. Activations and slopes are not convex, but with z+ = max(z, 0) and
L1, `relu_gap` and `steepness` of `ntk.activations`

- |s(z)|^q <= max(gap, s(z+))^q and |s(z)|^q <= |z|^q. The first is convex for q >= 2, as s^2 is on
  z > 0 (the tests enclose its second derivative); for q = 1 it is with z+ in place of s(z+).
- s'(z)^2 <= max((L1 - 1)^2, k + a z), whose square is convex too; and s'(z)^2 <= L1^2.

The products of a gated MLP are taken apart by Cauchy-Schwarz, (sum w |y s|^q)^2 <=
(sum w |y|^2q) (sum w |s|^2q), and (7) bounds both factors.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk.activations import FUNCTIONS, canonical, relu_gap, slope, steepness
from ntk.bounds.balls import EVALUATION, ball_product, gamma, norms
from ntk.units import MlpWeights


@partial(jax.jit, static_argnames="power")
def wide_norms(
    original: MlpWeights,
    x: Float[Array, "n d"],
    offsets: tuple[float, ...] | tuple[Array, ...],
    sizes: Float[Array, "m p"],
    *,
    power: int,
) -> list[Float[Array, " n"]]:
    """Bounds on the norms of the wide copy's features, without running it.

    Args:
        original: The original's weights.
        x: Inputs, (n, d).
        offsets: For each linear map, how far the rows of the wide copy are from the means of
            their clusters at most.
        sizes: What multiplies the slopes of each of the wide copy's p units, in absolute value,
            at all inputs (1, p) or at each (n, p).
        power: 2 for Euclidean norms, 1 for sums of absolute values.

    Returns:
        For each term of a kernel, (n,).
    """
    act, q = original.act, power
    values = []
    for (rows, bias), offset in zip(original.maps, offsets, strict=True):
        z = ball_product(x, rows, bias)
        length = norms(x) if bias is None else jnp.hypot(norms(x), 1.0)
        values.append((z.value, z.error + (offset * length)[:, None]))
    (z, shift), *linear = values
    weight = sizes**q
    one = jnp.ones_like(weight)
    steep = _steep(act, z + shift)
    hidden, through = (_hidden(act, z, shift, r, q) for r in (one, weight))
    if not linear:
        slopes = (weight * steep).sum(1)
        if q == 1:
            slopes = jnp.sqrt(weight.sum(1) * slopes)
        found = [hidden, jnp.minimum(slopes, slope(act) ** q * weight.sum(1))]
    else:
        y = jnp.abs(linear[0][0]) + linear[0][1]
        quartic = _hidden(act, z, shift, one, 2 * q)
        slopes = jnp.sqrt((weight * y ** (2 * q)).sum(1) * (weight * steep**q).sum(1))
        slopes = jnp.minimum(slopes, slope(act) ** q * (weight * y**q).sum(1))
        found = [jnp.sqrt((y ** (2 * q)).sum(1) * quartic), slopes, through]
    outward = 1 + gamma(4 * z.shape[1] + 64, x.dtype)
    return [outward * a ** (1 / q) for a in found]


def _hidden(act: str, z: Array, shift: Array, weight: Array, q: int) -> Array:
    """The sum of weights times |s|^q, at most."""
    most = jnp.maximum(z + shift, 0)
    if q > 1:
        evaluation = EVALUATION * jnp.finfo(z.dtype).eps * (1 + most)
        most = jnp.minimum(most, FUNCTIONS[canonical(act)](most) + evaluation)
    bounds = jnp.maximum(relu_gap(act), most), jnp.abs(z) + shift
    sums = [(weight * a**q).sum(1) for a in bounds]
    return jnp.minimum(*sums)


def _steep(act: str, z: Array) -> Array:
    k, a = steepness(act)
    return jnp.maximum((slope(act) - 1) ** 2, k + a * z)
