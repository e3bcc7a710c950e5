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

from ntk.activations import FUNCTIONS, Activation, canonical, relu_gap, slope, steepness
from ntk.arrays import row_norms
from ntk.bounds.balls import EVALUATION, ball_products, gamma, tiny
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
    least = tiny(x.dtype)
    values = []
    for (rows, bias), offset in zip(original.maps, offsets, strict=True):
        z = ball_products(x, rows, bias)
        length = row_norms(x) if bias is None else jnp.hypot(row_norms(x), 1.0)
        values.append((z.value, z.error + (offset * length)[:, None] + least))
    (z, shift), *linear = values
    steep = jnp.sqrt(_steep(act, z + shift))
    root = jnp.sqrt(sizes)
    hidden, through = (_hidden(act, z, shift, s, q) for s in (jnp.ones_like(sizes), sizes))
    if not linear:
        # For sums of absolute values, by Cauchy-Schwarz.
        slopes = _norm(sizes * steep, 2) if q == 2 else _norm(root, 2) * _norm(root * steep, 2)
        found = [hidden, jnp.minimum(slopes, slope(act) * _norm(sizes, q))]
    else:
        y = jnp.abs(linear[0][0]) + linear[0][1]
        quartic = _hidden(act, z, shift, jnp.ones_like(sizes), 2 * q)
        slopes = _norm(root * y, 2 * q) * _norm(root * steep, 2 * q)
        slopes = jnp.minimum(slopes, slope(act) * _norm(sizes * y, q))
        found = [_norm(y, 2 * q) * quartic, slopes, through]
    width = z.shape[1]
    outward = 1 + gamma(4 * width + 64, x.dtype)
    return [outward * a + 8 * width * least for a in found]


def _norm(x: Array, q: int) -> Array:
    """Returns the root of the sum of |x|^q over units, scaled so that no power underflows.

    A product that was rounded to zero counts as the smallest normal number.
    """
    x = jnp.abs(x) + tiny(x.dtype)
    largest = x.max(1, keepdims=True)
    share = jnp.where(x == largest, 1, x / largest)  # both may be infinite
    return largest[:, 0] * (share**q).sum(1) ** (1 / q)


def _hidden(act: Activation, z: Array, shift: Array, size: Array, q: int) -> Array:
    """Returns a bound on the root of the sum of (size |s|)^q."""
    most = jnp.maximum(z + shift, 0)
    if q > 1:
        evaluation = EVALUATION * jnp.finfo(z.dtype).eps * (1 + most)
        most = jnp.minimum(most, FUNCTIONS[canonical(act)](most) + evaluation)
    bounds = jnp.maximum(relu_gap(act), most), jnp.abs(z) + shift
    return jnp.minimum(*(_norm(size * a, q) for a in bounds))


def _steep(act: Activation, z: Array) -> Array:
    k, a = steepness(act)
    return jnp.maximum((slope(act) - 1) ** 2, k + a * z)
