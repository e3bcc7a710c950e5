"""Closed-form neural tangent kernels of one MLP with respect to all its trainable parameters.

Plain or gated, fused or not, an MLP is a sum of p one-unit sub-MLPs,

    f(x) = sum_i v_i H_i(x) + b_out,

where H_i depends on x through one linear map (plain) or two (gated), z_i = w_i . x + b_i. With
x^ = (x, 1) where the map has a bias, unit i's gradients of output k are

    d f_k / d v_ik = H_i(x)    and    d f_k / d (w_i, b_i) = v_ik c_i(x) x^,   c_i = dH_i / dz_i,

so that every kernel is a few matrix products of H, c and v: no gradient is ever formed. H, c and v
are those of the *stored* weights, so that fixed factors act as they do in training.

Axis letters in shapes: p width, d inputs, o outputs, n examples, t positions.

Example:
    >>> key = jax.random.key(0)
    >>> mlp = MlpWeights(up=jax.random.normal(key, (8, 3)), down=jnp.ones((8, 2)), act="relu")
    >>> x = jnp.ones((4, 3))
    >>> traced_kernel(mlp, x).shape, full_kernel(mlp, x).shape
    ((4, 4), (4, 4, 2, 2))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from ntk.errors import InputError, nearest
from ntk.units import MlpWeights, Units, product, units
from ntk.units import mlp_weights as mlp_weights

Kind = Literal["sgd", "adam"]

_BLOCK = 2**24
"""Numbers in an intermediate array that is formed in blocks: 64 MiB in float32."""


def input_product(x: Array, z: Array, bias: Array | None, second: Second) -> Array:
    """x^ . second(z^), where x^ = (x, 1) for a map with a bias and x^ = x for one without."""
    inner = product(x, second(z))
    return inner if bias is None else inner + 1


Second = Callable[[Array], Array]
"""What is done to the gradient at the second input: nothing for SGD, the sign for Adam."""


def second(kind: Kind | str) -> Second:
    """The function of the second gradient that makes a kernel SGD's or Adam's.

    Raises:
        InputError: The kind is unknown.

    Example:
        >>> second("adam")(jnp.array([-2.0, 0.5])).tolist()
        [-1.0, 1.0]
    """
    if kind not in get_args(Kind):
        raise InputError(f"unknown kind {kind!r}{nearest(str(kind), get_args(Kind))}")
    return jnp.sign if kind == "adam" else _identity


def _identity(x: Array) -> Array:
    return x


def traced_kernel(
    mlp: MlpWeights,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    kind: Kind | str = "sgd",
) -> Float[Array, "n m"]:
    """The kernel summed over outputs, sum_k <g_k(x), g_k(z)> or sum_k <g_k(x), sign g_k(z)>.

    With r_i = |v_i|^2 for SGD and |v_i|_1 for Adam, and c' standing for c(z) or its sign, it is
    ``o (H . H' + 1) + (x^ . z^) sum_i c_i c'_i r_i``; gated MLPs have the last term twice.

    Args:
        mlp: The weights.
        x: First inputs, (n, d).
        z: Second inputs, (m, d); None for the first.
        kind: ``"sgd"``, or ``"adam"``, whose kernel is not symmetric.

    Returns:
        (n, m) in float32, or in float64 if an argument is.

    Raises:
        InputError: Shapes do not fit, the result is not finite, or the kind is unknown.

    References:
        design.md, section 3; Malladi et al. (2023), A Kernel-Based View of Language Model
        Fine-Tuning, for the kernel of sign gradients.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 1)), act="relu")
        >>> traced_kernel(mlp, jnp.array([[2.0]])).item()  # 2 * 2 + 1 + (2 * 2) * 1
        9.0
    """
    mlp, x, z, *_ = prepared(mlp, x, z)
    return finite(_traced(mlp, x, z, kind))


@partial(jax.jit, static_argnames="kind")
def _traced(mlp: MlpWeights, x: Array, z: Array | None, kind: Kind | str) -> Array:
    f = second(kind)
    left = units(mlp, x)
    right = left if z is None else units(mlp, z)
    z = x if z is None else z
    weight = (mlp.down * f(mlp.down)).sum(1)[None]
    total = mlp.down.shape[1] * (product(left.hidden, f(right.hidden)) + int(mlp.out_bias))
    for (_, bias), c, c2 in zip(mlp.maps, left.slopes, right.slopes, strict=True):
        total = total + input_product(x, z, bias, f) * product(c * weight, f(c2))
    return total


def full_kernel(
    mlp: MlpWeights,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    kind: Kind | str = "sgd",
) -> Float[Array, "n m o o"]:
    """The kernel of every pair of outputs, <g_k(x), g_l(z)> or <g_k(x), sign g_l(z)>.

    For SGD it is ``(H . H' + 1) I + (x^ . z^) V^T diag(c c') V``. Pairs of inputs are worked on in
    blocks, so that besides the result little memory is used.

    Args:
        mlp: The weights.
        x: First inputs, (n, d).
        z: Second inputs, (m, d); None for the first, which costs half for SGD.
        kind: ``"sgd"`` or ``"adam"``.

    Returns:
        (n, m, o, o), entry [a, b, k, l] for output k at ``x[a]`` and output l at ``z[b]``.

    Raises:
        InputError: Shapes do not fit, the result is not finite, or the kind is unknown.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 2)), act="relu")
        >>> full_kernel(mlp, jnp.array([[2.0]]))[0, 0].tolist()
        [[9.0, 4.0], [4.0, 9.0]]
    """
    mlp, x, z, *_ = prepared(mlp, x, z)
    return finite(_full(mlp, x, z, kind))


@partial(jax.jit, static_argnames="kind")
def _full(mlp: MlpWeights, x: Array, z: Array | None, kind: Kind | str) -> Array:
    f = second(kind)
    left = units(mlp, x)
    right = left if z is None else units(mlp, z)
    symmetric = z is None and kind == "sgd"
    z = x if z is None else z
    n, m, o = x.shape[0], z.shape[0], mlp.down.shape[1]
    scalars = [input_product(x, z, bias, f) for _, bias in mlp.maps]
    diagonal = product(left.hidden, f(right.hidden)) + int(mlp.out_bias)

    def block(pair: Array) -> Array:
        a, b = pair
        total = diagonal[a, b] * jnp.eye(o, dtype=x.dtype)
        for scalar, c, c2 in zip(scalars, left.slopes, right.slopes, strict=True):
            rows = c[a][:, None] * mlp.down
            total = total + scalar[a, b] * jnp.matmul(
                rows.T, f(c2[b])[:, None] * f(mlp.down), precision="highest"
            )
        return total

    a, b = np.triu_indices(n) if symmetric else map(np.ravel, np.indices((n, m)))
    size = max(1, min(len(a), _BLOCK // mlp.down.size))
    blocks = lax.map(block, jnp.stack([jnp.asarray(a), jnp.asarray(b)], 1), batch_size=size)
    if not symmetric:
        return blocks.reshape(n, m, o, o)
    result = jnp.zeros((n, n, o, o), x.dtype).at[b, a].set(blocks.transpose(0, 2, 1))
    return result.at[a, b].set(blocks)


def upstream_kernel(
    mlp: MlpWeights,
    x: Float[Array, "n ..."],
    gx: Array,
    z: Float[Array, "m ..."] | None = None,
    gz: Array | None = None,
    *,
    kind: Kind | str = "sgd",
) -> Float[Array, "n m"]:
    """The scalar kernel of ``G . f``, where G is the gradient that comes from above the MLP.

    For single positions and SGD, ``(H . H' + 1) (G . G') + (x^ . z^) sum_i c_i c'_i u_i u'_i`` with
    u_i = v_i . G; for Adam the same with signs on every factor of the second input. For sequences
    the gradients of all positions are summed (and then signed), in blocks of hidden units.

    Args:
        mlp: The weights.
        x: First inputs, (n, d), or whole sequences, (n, t, d).
        gx: Their upstream gradients, (n, o) or (n, t, o).
        z: Second inputs, with as many axes; None for the first.
        gz: Their upstream gradients.
        kind: ``"sgd"`` or ``"adam"``.

    Returns:
        (n, m) in float32, or in float64 if an argument is.

    Raises:
        InputError: Shapes do not fit, the result is not finite, or the kind is unknown.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 2)), act="relu")
        >>> x, g = jnp.array([[2.0]]), jnp.array([[1.0, 2.0]])
        >>> upstream_kernel(mlp, x, g).item()  # (4 + 1) * 5 + 4 * 3 * 3
        61.0
        >>> upstream_kernel(mlp, x[:, None], g[:, None]).item()
        61.0
    """
    if (z is None) != (gz is None):
        raise InputError("second inputs z and their upstream gradients gz go together")
    mlp, x, z, g, gz = prepared(mlp, x, z, gx, gz)
    assert g is not None
    other = None if z is None or gz is None else (z, gz)
    return finite((_upstream if x.ndim == 2 else _sequences)(mlp, (x, g), other, kind))


_Side = tuple[Array, Array]
"""Inputs and their upstream gradients."""


@partial(jax.jit, static_argnames="kind")
def _upstream(mlp: MlpWeights, first: _Side, other: _Side | None, kind: Kind | str) -> Array:
    f = second(kind)

    def of(side: _Side) -> tuple[Units, Array]:
        return units(mlp, side[0]), product(side[1], mlp.down)

    left, up = of(first)
    right, up2 = (left, up) if other is None else of(other)
    (x, gx), (z, gz) = first, other or first
    hidden = product(left.hidden, f(right.hidden)) + int(mlp.out_bias)
    total = hidden * product(gx, f(gz))
    for (_, bias), c, c2 in zip(mlp.maps, left.slopes, right.slopes, strict=True):
        total = total + input_product(x, z, bias, f) * product(c * up, f(c2) * f(up2))
    return total


@partial(jax.jit, static_argnames="kind")
def _sequences(mlp: MlpWeights, first: _Side, other: _Side | None, kind: Kind | str) -> Array:
    f = second(kind)
    sides = [first] if other is None else [first, other]
    per_unit = sum(x.shape[0] * (x.shape[2] + g.shape[2] + 4 * x.shape[1]) for x, g in sides)
    block = max(1, min(mlp.width, _BLOCK // per_unit))
    count = -(-mlp.width // block)

    def in_blocks(a: Array) -> Array:
        a = jnp.pad(a, [(0, count * block - mlp.width)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(count, block, *a.shape[1:])

    # Units of zero weights have no gradient, as s(0) = 0.
    rows = jax.tree.map(in_blocks, mlp)

    def gradients(part: MlpWeights, side: _Side) -> list[Array]:
        x, g = side
        at = units(part, x.reshape(-1, x.shape[2]))
        shape = (*x.shape[:2], block)
        up = product(g.reshape(-1, g.shape[2]), part.down).reshape(shape)
        contract = partial(jnp.einsum, precision="highest")
        grads = [contract("ntu,nto->nuo", at.hidden.reshape(shape), g)]
        for (_, bias), c in zip(part.maps, at.slopes, strict=True):
            by_position = c.reshape(shape) * up
            grads.append(contract("ntu,ntd->nud", by_position, x))
            if bias is not None:
                grads.append(by_position.sum(1))
        return [a.reshape(a.shape[0], -1) for a in grads]

    def step(total: Array, part: MlpWeights) -> tuple[Array, None]:
        pairs = zip(gradients(part, sides[0]), gradients(part, sides[-1]), strict=True)
        return total + sum(product(a, f(b)) for a, b in pairs), None

    out = [g.sum(1) for _, g in sides]
    start = product(out[0], f(out[-1])) * int(mlp.out_bias)
    return lax.scan(step, start, rows)[0]


def prepared(
    mlp: MlpWeights, x: Array, z: Array | None, gx: Array | None = None, gz: Array | None = None
) -> tuple[MlpWeights, Array, Array | None, Array | None, Array | None]:
    """Checks weights and inputs, and brings them to one dtype, float32 at least."""
    mlp.check()
    d, o = mlp.up.shape[1], mlp.down.shape[1]
    for name, a, g in (("x", x, gx), ("z", z, gz)):
        if a is not None and (a.ndim != x.ndim or a.shape[-1] != d or 0 in a.shape):
            raise InputError(f"{name} must end in the MLP's {d} inputs, not empty; got {a.shape}")
        if a is not None and g is not None and g.shape != (*a.shape[:-1], o):
            raise InputError(f"g{name} must be {(*a.shape[:-1], o)}; got {g.shape}")
    arrays = (mlp, x, z, gx, gz)
    double = any(a.dtype == jnp.float64 for a in jax.tree.leaves(arrays))
    return jax.tree.map(lambda a: a.astype(jnp.float64 if double else jnp.float32), arrays)


def finite(result: Array) -> Array:
    """Returns a result that holds numbers only; looked at outside of transformations.

    Raises:
        InputError: It does not.
    """
    # Checked here and not in the arguments: weights are thousands of times larger than results.
    if not isinstance(result, Tracer):
        with jax.ensure_compile_time_eval():
            if not jnp.isfinite(result).all():
                raise InputError("weights or inputs hold NaN or infinite values, or overflow")
    return result
