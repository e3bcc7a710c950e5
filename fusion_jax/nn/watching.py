"""Watches the matrix products of chosen weights while any function runs.

The function is traced, and its operations are run one after the other. A weight is followed through
operations that only lay it out anew, into inner functions and loops, to the products it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

_LAYOUTS = {
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "mul",
    "optimization_barrier",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
"""Operations after which a weight is still the same weight: in another layout, dtype or scale."""
_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


class Product(NamedTuple):
    """A product ``inputs @ matrix = outputs``, in which the matrix is a watched weight.

    Loops add axes in front of all three.

    Args:
        inputs: (..., d).
        matrix: (d, o).
        outputs: (..., o).
    """

    inputs: Array
    matrix: Array
    outputs: Array


def products(
    f: Callable[[dict[str, Array]], PyTree], weights: Mapping[str, Array]
) -> tuple[PyTree, dict[str, list[Product]]]:
    """Returns the result of a function of weights, and the products with each weight.

    Args:
        f: The function, called with the weights by name.
        weights: The weights, each a matrix or a stack of matrices for a loop.

    Returns:
        ``f(weights)``, and by name the products in their order; no entry for a weight that is in no
        product that can be seen. Works under ``jit``.

    Example:
        >>> w = jnp.ones((3, 2))
        >>> out, seen = products(lambda w: jnp.ones((5, 3)) @ w["a"], {"a": w})
        >>> out.shape, seen["a"][0].inputs.shape
        ((5, 2), (5, 3))
    """
    names, values = list(weights), list(weights.values())
    closed, shape = jax.make_jaxpr(
        lambda values: f(dict(zip(names, values, strict=True))), return_shape=True
    )(values)
    found: list[tuple[str, Product]] = []
    outs = _run(closed.jaxpr, closed.consts, values, dict(enumerate(names)), found)
    by_name: dict[str, list[Product]] = {}
    for name, product in found:
        by_name.setdefault(name, []).append(product)
    return jax.tree.unflatten(jax.tree.structure(shape), outs), by_name


def _run(
    jaxpr: jex_core.Jaxpr,
    consts: Sequence[ArrayLike],
    args: Sequence[ArrayLike],
    watched: Mapping[int, str],
    found: list[tuple[str, Product]],
) -> list[Array]:
    """Runs a jaxpr, some of whose arguments are watched weights, and collects their products."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    names = {jaxpr.invars[i]: name for i, name in watched.items()}

    def read(atom: jex_core.Var | jex_core.Literal) -> PyTree:
        return atom.val if isinstance(atom, jex_core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        ins = [read(atom) for atom in eqn.invars]
        marks = {
            i: names[atom]
            for i, atom in enumerate(eqn.invars)
            if not isinstance(atom, jex_core.Literal) and atom in names
        }
        kind = eqn.primitive.name
        if marks and kind in _CALLS:
            inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            body, own = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            outs = _run(body, own, ins, marks, found)
        elif marks and kind == "scan":
            outs = _scan(eqn, ins, marks, found)
        else:
            outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
            outs = outs if eqn.primitive.multiple_results else [outs]
        if len(marks) == 1:
            ((place, name),) = marks.items()
            if kind in _LAYOUTS and outs[0].size >= ins[place].size:
                names[eqn.outvars[0]] = name
            elif kind == "dot_general":
                product = _product(eqn, ins, outs[0], place)
                found += [] if product is None else [(name, product)]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _product(
    eqn: jex_core.JaxprEqn, ins: Sequence[Array], out: Array, place: int
) -> Product | None:
    """Returns a product with a matrix, or None if the weight is in another kind of product."""
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    weight, other = ins[place], ins[1 - place]
    mine, others = (left, right) if place == 0 else (right, left)
    if batch or len(mine) != 1 or weight.ndim != 2:
        return None
    matrix = jnp.moveaxis(weight, mine[0], 0)
    outputs = out if place == 1 else jnp.moveaxis(out, 0, -1)
    return Product(jnp.moveaxis(other, others[0], -1), matrix, outputs)


def _scan(
    eqn: jex_core.JaxprEqn,
    ins: Sequence[Array],
    marks: Mapping[int, str],
    found: list[tuple[str, Product]],
) -> list[Array]:
    """Runs a loop, with the products of all its steps as further results."""
    params, inner = eqn.params, eqn.params["jaxpr"]
    body = getattr(inner, "jaxpr", inner)
    # Versions of JAX state the numbers of constants and of carried values in different ways. What
    # is split over the steps has an axis more outside of the loop than inside.
    n_carry = sum(map(_as_inside, eqn.outvars, body.outvars))
    end = sum(map(_as_inside, eqn.invars, body.invars))
    n_consts = end - n_carry
    consts, carry, xs = ins[:n_consts], ins[n_consts:end], ins[end:]
    kept = {i: name for i, name in marks.items() if not n_consts <= i < end}
    names: list[str] = []

    def step(carry: list[Array], xs: list[Array]) -> tuple[list[Array], PyTree]:
        seen: list[tuple[str, Product]] = []
        args = [*consts, *carry, *xs]
        outs = _run(body, getattr(inner, "consts", ()), args, kept, seen)
        names[:] = [name for name, _ in seen]
        return outs[:n_carry], (outs[n_carry:], [product for _, product in seen])

    carry, (ys, seen) = lax.scan(
        step, list(carry), list(xs), length=params["length"], reverse=params["reverse"]
    )
    found += zip(names, seen, strict=True)
    return [*carry, *ys]


def _as_inside(outside: Any, inside: Any) -> bool:
    return outside.aval.shape == inside.aval.shape
