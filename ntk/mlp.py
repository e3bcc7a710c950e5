"""Closed-form neural tangent kernels of one MLP with respect to all its trainable parameters.

Plain or gated, fused or not, an MLP is a sum of p one-unit sub-MLPs,

    f(x) = sum_i v_i H_i(x) + b_out,

where H_i depends on x through one linear map (plain) or two (gated), z_i = w_i . x + b_i. With
x^ = (x, 1) where the map has a bias, unit i's gradients of output k are

    d f_k / d v_ik = H_i(x)    and    d f_k / d (w_i, b_i) = v_ik c_i(x) x^,   c_i = dH_i / dz_i,

so that every kernel is a few matrix products of H, c and v, and no gradient is formed. H, c and v
are those of the *stored* weights: the fixed factors act as they do in training.

Axis letters in shapes: p width, d inputs, o outputs, n examples, t positions.

Example:
    >>> key = jax.random.key(0)
    >>> mlp = MlpWeights(up=jax.random.normal(key, (8, 3)), down=jnp.ones((8, 2)), act="relu")
    >>> x = jnp.ones((4, 3))
    >>> traced_kernel(mlp, x).shape, full_kernel(mlp, x).shape
    ((4, 4), (4, 4, 2, 2))
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ntk.arrays import inner_products, require_finite, row_norms
from ntk.errors import InputError
from ntk.kinds import KernelKind, second_transform
from ntk.units import HiddenUnits, hidden_units
from ntk.units import MlpWeights as MlpWeights
from ntk.units import mlp_weights as mlp_weights

_BLOCK = 2**24
"""Numbers in an intermediate array that is formed in blocks: 64 MiB in float32."""


def traced_kernel(
    mlp: MlpWeights,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    kind: KernelKind = "sgd",
) -> Float[Array, "n m"]:
    """Returns the kernel summed over outputs, sum_k <g_k(x), g_k(z)>; Adam's has sign g_k(z).

    With r_i = |v_i|^2 for SGD and |v_i|_1 for Adam, and c' for c(z) or its sign, it is
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
        Malladi et al. (2023), A Kernel-Based View of Language Model Fine-Tuning, for the kernel of
        sign gradients.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 1)), act="relu")
        >>> traced_kernel(mlp, jnp.array([[2.0]])).item()  # 2 * 2 + 1 + (2 * 2) * 1
        9.0
    """
    mlp, x, z, *_ = prepare(mlp, x, z)
    return require_finite(_traced(mlp, x, z, kind))


@partial(jax.jit, static_argnames="kind")
def _traced(mlp: MlpWeights, x: Array, z: Array | None, kind: KernelKind) -> Array:
    second = second_transform(kind)
    left, right = _both_units(mlp, x, z)
    z = x if z is None else z
    # Norms, whose squares may underflow, are multiplied with each factor.
    if kind == "adam":
        size, size2 = jnp.abs(mlp.down).sum(1)[None], 1
    else:
        size = size2 = row_norms(mlp.down)[None]
    hidden = inner_products(left.hidden, second(right.hidden))
    total = mlp.down.shape[1] * (hidden + int(mlp.out_bias))
    for (_, bias), c, c2 in zip(mlp.maps, left.slopes, right.slopes, strict=True):
        slopes = inner_products(c * size, second(c2) * size2)
        total = total + input_products(x, z, bias, kind) * slopes
    return total


def full_kernel(
    mlp: MlpWeights,
    x: Float[Array, "n _"],
    z: Float[Array, "m _"] | None = None,
    *,
    kind: KernelKind = "sgd",
) -> Float[Array, "n m o o"]:
    """Returns the kernel of every pair of outputs, <g_k(x), g_l(z)>; Adam's has sign g_l(z).

    For SGD it is ``(H . H' + 1) I + (x^ . z^) V^T diag(c c') V``. It is computed in blocks of pairs
    of inputs, which need little memory besides the result.

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
    mlp, x, z, *_ = prepare(mlp, x, z)
    return require_finite(_full(mlp, x, z, kind))


@partial(jax.jit, static_argnames="kind")
def _full(mlp: MlpWeights, x: Array, z: Array | None, kind: KernelKind) -> Array:
    second = second_transform(kind)
    left, right = _both_units(mlp, x, z)
    symmetric = z is None and kind == "sgd"
    z = x if z is None else z
    n, m, o = x.shape[0], z.shape[0], mlp.down.shape[1]
    scalars = [input_products(x, z, bias, kind) for _, bias in mlp.maps]
    diagonal = inner_products(left.hidden, second(right.hidden)) + int(mlp.out_bias)

    def block(pair: Array) -> Array:
        a, b = pair
        total = diagonal[a, b] * jnp.eye(o, dtype=x.dtype)
        for scalar, c, c2 in zip(scalars, left.slopes, right.slopes, strict=True):
            rows = c[a][:, None] * mlp.down
            total = total + scalar[a, b] * jnp.matmul(
                rows.T, second(c2[b])[:, None] * second(mlp.down), precision="highest"
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
    kind: KernelKind = "sgd",
) -> Float[Array, "n m"]:
    """Returns the kernel of the scalar ``G . f``, where G is the gradient from above the MLP.

    For single positions and SGD it is ``(H . H' + 1) (G . G') + (x^ . z^) sum_i c_i c'_i u_i u'_i``
    with u_i = v_i . G; for Adam the same with the sign of every factor of the second input. For
    sequences the gradients of all positions are summed (and then signed), in blocks of hidden
    units.

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
    mlp, x, z, g, gz = prepare(mlp, x, z, gx, gz)
    assert g is not None
    other = None if z is None or gz is None else (z, gz)
    compute = _upstream if x.ndim == 2 else _upstream_sequences
    return require_finite(compute(mlp, (x, g), other, kind))


_WithUpstream = tuple[Array, Array]
"""Inputs and their upstream gradients."""


@partial(jax.jit, static_argnames="kind")
def _upstream(
    mlp: MlpWeights, first: _WithUpstream, other: _WithUpstream | None, kind: KernelKind
) -> Array:
    second = second_transform(kind)
    left, right = _both_units(mlp, first[0], None if other is None else other[0])
    (x, gx), (z, gz) = first, other or first
    up = inner_products(gx, mlp.down)
    up2 = up if other is None else inner_products(gz, mlp.down)
    hidden = inner_products(left.hidden, second(right.hidden)) + int(mlp.out_bias)
    total = hidden * inner_products(gx, second(gz))
    for (_, bias), c, c2 in zip(mlp.maps, left.slopes, right.slopes, strict=True):
        slopes = inner_products(c * up, second(c2) * second(up2))
        total = total + input_products(x, z, bias, kind) * slopes
    return total


@partial(jax.jit, static_argnames="kind")
def _upstream_sequences(
    mlp: MlpWeights, first: _WithUpstream, other: _WithUpstream | None, kind: KernelKind
) -> Array:
    second = second_transform(kind)
    sides = [first] if other is None else [first, other]
    per_unit = sum(x.shape[0] * (x.shape[2] + g.shape[2] + 4 * x.shape[1]) for x, g in sides)
    block = max(1, min(mlp.width, _BLOCK // per_unit))
    count = -(-mlp.width // block)

    def in_blocks(a: Array) -> Array:
        a = jnp.pad(a, [(0, count * block - mlp.width)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(count, block, *a.shape[1:])

    # The padding is units of zero weights, which have no gradient where s(0) = 0, as in all
    # activations with a name; factors of zero make sure of it for others.
    if callable(mlp.act) and mlp.outer is None:
        mlp = dataclasses.replace(mlp, outer=jnp.ones(mlp.width, mlp.up.dtype))
    rows = jax.tree.map(in_blocks, mlp)

    def gradients(part: MlpWeights, side: _WithUpstream) -> list[Array]:
        x, g = side
        at = hidden_units(part, x.reshape(-1, x.shape[2]))
        shape = (*x.shape[:2], block)
        up = inner_products(g.reshape(-1, g.shape[2]), part.down).reshape(shape)
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
        return total + sum(inner_products(a, second(b)) for a, b in pairs), None

    out = [g.sum(1) for _, g in sides]
    start = inner_products(out[0], second(out[-1])) * int(mlp.out_bias)
    return lax.scan(step, start, rows)[0]


def _both_units(mlp: MlpWeights, x: Array, z: Array | None) -> tuple[HiddenUnits, HiddenUnits]:
    left = hidden_units(mlp, x)
    return left, left if z is None else hidden_units(mlp, z)


def input_products(x: Array, z: Array, bias: Array | None, kind: KernelKind) -> Array:
    """Returns x^ . z^ or x^ . sign z^; x^ is (x, 1) for a map with a bias, x for one without."""
    inner = inner_products(x, second_transform(kind)(z))
    return inner if bias is None else inner + 1


def prepare(
    mlp: MlpWeights, x: Array, z: Array | None, gx: Array | None = None, gz: Array | None = None
) -> tuple[MlpWeights, Array, Array | None, Array | None, Array | None]:
    """Returns checked weights and inputs in one dtype: float64 if one of them is, else float32."""
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
