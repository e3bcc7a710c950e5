r"""Bounds the wide copy's features from the original's values, by Jensen's inequality.

If a centroid is the mean of its cluster's rows, its value z_c is the mean of the values z_i of the
units in the cluster, by linearity. Any other centroid's value is off by at most ``offset r``,
r = |x^|. So for a function phi that is convex and does not fall, and weights w_c >= 0 of clusters,

    sum_c n_c w_c phi(z_c)  <=  sum_i w_{c(i)} phi(z_i + offset r),                           (7)

and the same for |z_c| and |z_i|. Activations and slopes are not convex. But with z+ = max(z, 0) and
with L1, gap (`relu_gap`), k and a (`steepness`) of `ntk.activations`:

- |s(z)|^q <= max(gap, s(z+))^q and |s(z)|^q <= |z|^q. The first bound is convex for q >= 2, as s^2
  is convex on z > 0 (the tests enclose its second derivative); for q = 1, z+ replaces s(z+).
- s'(z)^2 <= max((L1 - 1)^2, k + a z), whose square is convex too; and s'(z)^2 <= L1^2.

For the products of a gated MLP, Cauchy-Schwarz gives (sum w |y s|^q)^2 <=
(sum w |y|^2q) (sum w |s|^2q), and (7) bounds both factors.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ntk.activations import FUNCTIONS, canonical, relu_gap, slope, steepness
from ntk.bounds.balls import EVALUATION, ball_products, gamma, row_norms
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
    """Returns bounds, (n,) for each term of a kernel, on the norms of the wide copy's features.

    Args:
        original: The original's weights.
        x: Inputs, (n, d).
        offsets: For each linear map, the largest distance of a row of the wide copy from the mean
            of its cluster.
        sizes: The absolute factors of the slopes of the wide copy's p units, the same for all
            inputs (1, p) or for each input (n, p).
        power: 2 for Euclidean norms, 1 for sums of absolute values.
    """
    act, q = original.act, power
    values = []
    for (rows, bias), offset in zip(original.maps, offsets, strict=True):
        z = ball_products(x, rows, bias)
        length = row_norms(x) if bias is None else jnp.hypot(row_norms(x), 1.0)
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
    """Returns a bound on the sum of weights times |s|^q."""
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
