"""The weights of one MLP, and its hidden units at given inputs.

Axis letters in shapes: p width, d inputs, o outputs, n examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ntk.activations import Activation, canonical, function, outside
from ntk.arrays import inner_products
from ntk.errors import InputError

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class MlpWeights:
    """The weights of one MLP as it stores them, one row per hidden unit, and its fixed factors.

    Plain:  ``f(x) = sum_i outer v s(inner (w . x + b)) + b_out``
    Gated:  ``f(x) = sum_i outer v (middle (u . x + a)) s(inner (g . x + c)) + b_out``

    The factors do not train; those of a fused MLP hold its cluster sizes.

    Args:
        up: Input weights, (p, d).
        down: Output weights, (p, o).
        up_bias: Input biases, (p,), or None.
        gate: Weights inside the activation of a gated MLP, (p, d), or None if not gated.
        gate_bias: Their biases, (p,), or None.
        outer: Positive factors of the hidden units, (p,), or None for 1.
        inner: Positive factors of the activation's arguments, (p,), or None for 1.
        middle: Positive factors of a gated MLP's linear values, (p,), or None for 1.
        act: Activation: a name such as ``"gelu"`` (exact) or ``"gelu_new"`` (tanh form), or a
            function of arrays that works on each number alone; bounds need a name.
        out_bias: Whether there is a trainable output bias.

    Example:
        >>> MlpWeights(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)), act="relu").width
        8
    """

    # check() checks the shapes; its messages name the field.
    up: Array
    down: Array
    up_bias: Array | None = None
    gate: Array | None = None
    gate_bias: Array | None = None
    outer: Array | None = None
    inner: Array | None = None
    middle: Array | None = None
    act: Activation = field(metadata=_STATIC)
    out_bias: bool = field(default=True, metadata=_STATIC)

    @property
    def width(self) -> int:
        """The number p of hidden units."""
        return self.up.shape[0]

    @property
    def maps(self) -> list[tuple[Array, Array | None]]:
        """The linear maps of the input and their biases; the activation's argument comes first."""
        up = (self.up, self.up_bias)
        return [up] if self.gate is None else [(self.gate, self.gate_bias), up]

    def check(self) -> MlpWeights:
        """Returns the weights unchanged if their shapes fit together.

        Raises:
            InputError: A field does not fit; the message names it.
        """
        if not callable(self.act):
            canonical(self.act)
        if self.up.ndim != 2 or 0 in self.up.shape:
            raise InputError(f"up must be (p, d) and not empty; got {self.up.shape}")
        width = self.width
        if self.down.ndim != 2 or self.down.shape[0] != width or 0 in self.down.shape:
            raise InputError(f"down must be ({width}, o) and not empty; got {self.down.shape}")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise InputError(f"gate must be {self.up.shape}; got {self.gate.shape}")
        factors = ("outer", "inner", "middle")
        for name in ("up_bias", "gate_bias", *factors):
            x = getattr(self, name)
            if x is None:
                continue
            if x.shape != (width,):
                raise InputError(f"{name} must be ({width},); got {x.shape}")
            if name in factors and not isinstance(x, Tracer) and not (np.asarray(x) > 0).all():
                raise InputError(f"{name} must be positive")
            if self.gate is None and name in ("gate_bias", "middle"):
                raise InputError(f"{name} is given, but gate is not")
        return self


def mlp_weights(module: Any) -> MlpWeights:
    """Returns the weights of a Flax NNX module.

    Args:
        module: An MLP, such as those of ``fusion_jax``. It has ``up`` and ``down`` (each an
            ``nnx.Linear``), ``gate`` too if it is gated, the activation as ``act`` (a name or a
            function), and factors as ``outer``, ``inner`` and ``middle`` if it is fused.

    Raises:
        InputError: An attribute is missing or does not fit.

    Example:
        >>> from flax import nnx
        >>> class Mlp(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.up, self.down = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        ...         self.act = "silu"
        >>> mlp_weights(Mlp(nnx.Rngs(0))).down.shape
        (8, 2)
    """
    for name in ("up", "down", "act"):
        if not hasattr(module, name):
            raise InputError(f"{type(module).__name__} has no {name}; an MLP has up, down and act")
    if not isinstance(module.act, str) and not callable(module.act):
        raise InputError(f"act must be an activation's name or function; got {module.act!r}")

    def linear(layer: Any) -> tuple[Array, Array | None]:
        if hasattr(layer, "matrix") or not hasattr(layer, "kernel"):
            # Its parameters are not the matrix itself, so that its kernel is another one.
            raise InputError(
                f"{type(layer).__name__} is not a plain linear layer; closed forms and bounds need "
                "one, ntk.kernel accepts any layer"
            )
        return layer.kernel[...], None if layer.bias is None else layer.bias[...]

    up, up_bias = linear(module.up)
    down, out_bias = linear(module.down)
    gate, gate_bias = linear(module.gate) if hasattr(module, "gate") else (None, None)
    names = ("outer", "inner") if gate is None else ("outer", "inner", "middle")
    factors = {name: getattr(module, name)[...] for name in names if hasattr(module, name)}
    return MlpWeights(
        up=up.T,
        down=down,
        up_bias=up_bias,
        gate=None if gate is None else gate.T,
        gate_bias=gate_bias,
        **factors,
        act=module.act,
        out_bias=out_bias is not None,
    ).check()


class HiddenUnits(NamedTuple):
    """The hidden units at n inputs: with the output weights, all that a kernel needs.

    Args:
        hidden: H, (n, p), the values that the output weights multiply.
        slopes: The derivatives of H with respect to the value of each linear map, (n, p) each.
    """

    hidden: Float[Array, "n p"]
    slopes: tuple[Float[Array, "n p"], ...]


def hidden_units(mlp: MlpWeights, x: Float[Array, "n d"]) -> HiddenUnits:
    """Returns the hidden units and their slopes.

    Returns:
        H and dH/dz, for the value z of each linear map in the order of ``mlp.maps``.

    Example:
        >>> mlp = MlpWeights(up=jnp.ones((1, 1)), down=jnp.ones((1, 1)), act="relu")
        >>> hidden, slopes = hidden_units(mlp, jnp.array([[2.0]]))
        >>> hidden.item(), slopes[0].item()
        (2.0, 1.0)
    """
    z = tuple(linear_values(kernel, bias, x) for kernel, bias in mlp.maps)
    zeros, ones = jnp.zeros_like(z[0]), jnp.ones_like(z[0])

    def derivative(j: int) -> tuple[Array, Array]:
        tangents = tuple(ones if i == j else zeros for i in range(len(z)))
        return jax.jvp(partial(_hidden, mlp), z, tangents)

    hidden, slopes = zip(*(derivative(j) for j in range(len(z))), strict=True)
    return HiddenUnits(hidden[0], slopes)


def linear_values(rows: Array, bias: Array | None, x: Array) -> Array:
    """Returns the values (n, p) of a linear map with one row per unit."""
    z = inner_products(x, rows)
    return z if bias is None else z + bias[None]


def _hidden(mlp: MlpWeights, *z: Array) -> Array:
    def times(x: Array, factor: Array | None) -> Array:
        return x if factor is None else x * factor.astype(x.dtype)[None]

    hidden, of_linear = function(mlp.act)(times(z[0], mlp.inner)), outside(mlp.act)
    if len(z) == 2:
        linear = times(z[1], mlp.middle)
        hidden = hidden * (linear if of_linear is None else of_linear(linear))
    return times(hidden, mlp.outer)
