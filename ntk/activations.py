"""Activations by name, and the constants of their derivatives that the bounds use.

Each constant is a function of the activation's name, with its proof. Phi and phi are the normal
distribution function and density, sigma is the logistic function. Decimal values are rounded up;
the tests check each of them by interval arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ntk.errors import InputError, nearest

T = TypeVar("T")

FUNCTIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "tanh": jnp.tanh,
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    }
)
"""Activations by canonical name."""

PROVEN = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
"""The activations whose constants are proven here, so that there are bounds for them."""

Activation = str | Callable[[Any], Any]
"""An activation: its name, or a function of arrays that works on each number alone."""

_ALIASES = {
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


def function(act: Activation) -> Callable[[Array], Array]:
    """Returns the function of an activation, which is given by its name or is the function.

    Raises:
        InputError: The name is unknown.

    Example:
        >>> function("relu")(jnp.array(-1.0)).item(), function(jnp.sin)(jnp.array(0.0)).item()
        (0.0, 0.0)
    """
    return act if callable(act) else FUNCTIONS[canonical(act)]


def outside(act: Activation) -> Callable[[Array], Array] | None:
    """Returns what a gated MLP applies to its values outside the activation; None for nothing.

    It is the attribute ``outside`` of an activation that is given as a function.

    Example:
        >>> outside("silu") is None
        True
    """
    return getattr(act, "outside", None)


def canonical(name: Activation) -> str:
    """Returns the canonical name of an activation, a key of `FUNCTIONS`.

    Args:
        name: A name from a Hugging Face configuration, such as ``"gelu"`` (exact), ``"gelu_new"``
            (tanh form) or ``"swish"``.

    Raises:
        InputError: The name is unknown, or a function is given instead of a name.

    Example:
        >>> canonical("gelu_new"), canonical("swish")
        ('gelu_tanh', 'silu')
    """
    if not isinstance(name, str):
        raise InputError(
            f"bounds need the name of an activation, whose constants are proven "
            f"({', '.join(PROVEN)}); got the function {describe(name)}"
        )
    name = _ALIASES.get(name, name)
    if name not in FUNCTIONS:
        raise InputError(f"unknown activation {name!r}{nearest(name, [*FUNCTIONS, *_ALIASES])}")
    return name


def _constant(table: Mapping[str, T], name: Activation) -> T:
    """Returns the constant of an activation; raises `InputError` if none is proven."""
    known = canonical(name)
    if known not in PROVEN:
        raise InputError(
            f"there are no bounds for the activation {name}, only for {', '.join(PROVEN)}"
        )
    return table[known]


def describe(act: Activation) -> str:
    """Returns the name of an activation for messages, also of a function.

    Example:
        >>> describe("gelu"), describe(jnp.sin)
        ('gelu', 'sin')
    """
    return act if isinstance(act, str) else getattr(act, "__name__", repr(act))


def slope(name: Activation) -> float:
    """Returns L1 = sup |s'|, the Lipschitz constant of the activation.

    - gelu: s' = Phi + z phi, s'' = (2 - z^2) phi, so that s' is extreme at z = +-sqrt(2), where it
      is 1.128905 and -0.128905, between its limits 0 and 1.
    - gelu_tanh: 1.128994 near z = 1.4185 (interval arithmetic; no closed form).
    - silu: s' = sigma (1 + z (1 - sigma)), 1.099840 where z = 2 coth(z / 2), z = 2.3994.
    - relu: s' is 0 or 1. tanh: s' = 1 - tanh^2 <= 1.

    Example:
        >>> slope("relu")
        1.0
    """
    table = {"gelu": 1.12891, "gelu_tanh": 1.129, "silu": 1.09984, "relu": 1.0, "tanh": 1.0}
    return _constant(table, name)


def slope_spread(name: Activation) -> float:
    """Returns sup s' - inf s', the largest difference of s' between two points.

    The lower ends are -0.128905 for gelu, -0.128994 for gelu_tanh and -0.099840 for silu: in these,
    s(z) - z/2 is even, so that s' - 1/2 is odd and the ends lie symmetric about 1/2. For relu and
    tanh s' is in [0, 1].

    Example:
        >>> slope_spread("tanh")
        1.0
    """
    table = {"gelu": 1.25782, "gelu_tanh": 1.258, "silu": 1.19968, "relu": 1.0, "tanh": 1.0}
    return _constant(table, name)


def slope_zero(name: Activation) -> tuple[float, float]:
    """Returns an interval that holds the one point where s' changes its sign, from - to +.

    - gelu, gelu_tanh, silu: s' falls from 0 to its minimum (at -1.4142, -1.4185 and -2.3994, see
      `slope`) and rises to its maximum, so that it has one zero between them.
    - tanh: there is no such point, s' > 0. relu: s' is 0 below 0 and 1 above.

    Example:
        >>> slope_zero("silu")
        (-1.278465, -1.278464)
    """
    table = {
        "gelu": (-0.751792, -0.751791),
        "gelu_tanh": (-0.752462, -0.752461),
        "silu": (-1.278465, -1.278464),
        "relu": (0.0, 0.0),
        "tanh": (-inf, -inf),
    }
    return _constant(table, name)


def curvature(name: Activation) -> float:
    """Returns L2 = sup |s''|, infinite if s' jumps.

    - gelu: s'' = (2 - z^2) phi and s''' = z (z^2 - 4) phi, so that s'' is extreme at 0, where it is
      sqrt(2 / pi) = 0.797885, and at +-2, where it is -2 phi(2) = -0.108.
    - gelu_tanh: the same value at 0, as both have s = z/2 + z^2 sqrt(1 / (2 pi)) + O(z^4).
    - silu: s'' = sigma (1 - sigma) (2 - z tanh(z / 2)) <= 2 / 4, with equality at 0, and > -0.037.
    - tanh: s'' = -2 t (1 - t^2) with t = tanh z, largest at t^2 = 1/3: 4 / (3 sqrt 3) = 0.769800.
    - relu: infinite.

    Example:
        >>> curvature("relu")
        inf
    """
    table = {
        "gelu": 0.797885,
        "gelu_tanh": 0.797885,
        "silu": 0.5,
        "relu": inf,
        "tanh": 0.769801,
    }
    return _constant(table, name)


def jerk(name: Activation) -> float:
    """Returns L3 = sup |s'''|, infinite if s' jumps.

    - gelu: s''' = z (z^2 - 4) phi and s'''' = (-z^4 + 7 z^2 - 4) phi, so that s''' is extreme at
      z^2 = (7 - sqrt 33) / 2, where it is 0.778770 (at the other root 0.119).
    - gelu_tanh: 0.776692 near z = 0.7876. silu: 0.308182 near z = 1.0320 (interval arithmetic).
    - tanh: s''' = -2 (1 - t^2)(1 - 3 t^2), -2 at 0 and 2/3 at the other extreme, t^2 = 2/3.
    - relu: infinite.

    Example:
        >>> jerk("tanh")
        2.0
    """
    table = {"gelu": 0.77877, "gelu_tanh": 0.7767, "silu": 0.30819, "relu": inf, "tanh": 2.0}
    return _constant(table, name)


def secant(name: Activation) -> float:
    """Returns sup |s(z) / z|, which is 1 for all activations here; also, s(0) = 0.

    s(z) / z is Phi(z), its tanh form and sigma(z) in gelu, gelu_tanh and silu, all in [0, 1]; it is
    0 or 1 for relu, and for tanh at most sup |tanh'| = 1 by the mean value theorem.

    Example:
        >>> secant("gelu")
        1.0
    """
    return _constant(dict.fromkeys(PROVEN, 1.0), name)


def ceiling(name: Activation) -> float:
    """Returns sup |s|: 1 for tanh, infinite for the others.

    Example:
        >>> ceiling("tanh")
        1.0
    """
    return _constant({**dict.fromkeys(PROVEN, inf), "tanh": 1.0}, name)


def relu_gap(name: Activation) -> float:
    """Returns sup |max(z, 0) - s(z)|, the distance from the convex function relu.

    For gelu, gelu_tanh and silu, relu(z) - s(z) is even, so that the gap is -min s, attained where
    s' = 0: 0.169972 at z = -0.7518, 0.170041 at -0.7525 and 0.278465 at -1.2785. For tanh it is
    unbounded.

    Example:
        >>> relu_gap("relu")
        0.0
    """
    table = {"gelu": 0.169972, "gelu_tanh": 0.170041, "silu": 0.278465, "relu": 0.0, "tanh": inf}
    return _constant(table, name)
