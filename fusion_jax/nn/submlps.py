"""Sub-MLPs: an MLP as a bundle of one-unit MLPs, in rows.

An MLP of width p is a sum of p one-unit sub-MLPs, one per hidden unit,

    plain:  f(x) = sum_i v_i s(w_i . x + b_i) + b_out
    gated:  f(x) = sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out

Axis letters in shapes: p width, c clusters, d inputs, o outputs, t positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.errors import InputError, nearest
from fusion_jax.nn.dtypes import wide
from ntk.activations import FUNCTIONS, Activation, canonical
from ntk.units import HiddenUnits, MlpWeights, hidden_units

_NAMES = (
    "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "quick_gelu", "relu", "relu2", "silu", "swish", "tanh",
)  # fmt: skip
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {name: FUNCTIONS[canonical(name)] for name in _NAMES}
)
"""Activations by their Hugging Face names."""


@dataclass(frozen=True)
class ClampedSwish:
    """The activation of gated MLPs in gpt-oss, ``f(x) = sum_i v_i (c(u) + 1) s(g) + b_out``.

    With u and g the values of a unit's two linear maps, s(g) = m sigmoid(alpha m) for m the smaller
    of g and the limit, and c(u) is u within the limit on both sides. As in every gated MLP, a unit
    is v_i times a function of u and g, so that units with the same weights can be one.

    Args:
        alpha: The gain of the sigmoid.
        limit: The limit.

    Example:
        >>> act = ClampedSwish(limit=7.0)
        >>> float(act.outside(jnp.array(9.0))), float(act(jnp.array(0.0)))
        (8.0, 0.0)
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: Array) -> Array:
        """Returns what the gate is multiplied by."""
        gate = jnp.minimum(gate, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate)

    def outside(self, linear: Array) -> Array:
        """Returns the factor outside the activation."""
        return jnp.clip(linear, -self.limit, self.limit) + 1


def activation(name: Activation) -> Callable[[Array], Array]:
    """Returns the activation function with a Hugging Face name, elementwise.

    Args:
        name: A key of `ACTIVATIONS`, such as ``"gelu"`` (exact) or ``"gelu_new"`` (tanh form); or
            the function itself, which works on each number alone.

    Raises:
        InputError: The name is unknown.

    Example:
        >>> float(activation("relu")(jnp.array(-1.0)))
        0.0
    """
    if callable(name):
        return name
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(
            f"unknown activation {name!r}{nearest(str(name), ACTIVATIONS)}; it is a name or a "
            "function"
        )
    return ACTIVATIONS[name]


class SubMLPs(NamedTuple):
    """The sub-MLPs of one MLP as rows, or of several MLPs of one shape along leading axes.

    Args:
        up: Input weights, (..., p, d).
        down: Output weights, (..., p, o).
        up_bias: Input biases, (..., p), or None.
        gate: Weights inside the activation of a gated MLP, (..., p, d), or None if not gated.
        gate_bias: Their biases, (..., p), or None.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)), up_bias=jnp.zeros(8))
        >>> subs.width, subs.rows().shape
        (8, (8, 6))
    """

    up: Float[Array, "*s p d"]
    down: Float[Array, "*s p o"]
    up_bias: Float[Array, "*s p"] | None = None
    gate: Float[Array, "*s p d"] | None = None
    gate_bias: Float[Array, "*s p"] | None = None

    @property
    def width(self) -> int:
        """The number p of sub-MLPs."""
        return self.up.shape[-2]

    def _blocks(self) -> dict[str, Array]:
        # A bias is one more coordinate of the row. The order is the paper's.
        blocks = {
            "gate": self.gate,
            "gate_bias": self.gate_bias,
            "up": self.up,
            "up_bias": self.up_bias,
            "down": self.down,
        }
        return {
            name: x[..., None] if name.endswith("bias") else x
            for name, x in blocks.items()
            if x is not None
        }

    def rows(self) -> Float[Array, "*s p row"]:
        """Returns the points to cluster: [g, c, u, a, v] or [w, b, v] in one row per sub-MLP.

        Returns:
            Rows in float32, or in float64 if the weights are.

        References:
            MLP Fusion (arXiv 2307.08941), section 4.2.
        """
        blocks = [wide(x) for x in self._blocks().values()]
        return jnp.concatenate(blocks, axis=-1)

    def with_rows(self, rows: Float[Array, "*s c row"]) -> SubMLPs:
        """Returns sub-MLPs of the same layout, read from rows as `rows` writes them.

        Args:
            rows: (..., c, row) for any number c of rows.

        Returns:
            The sub-MLPs, in the dtype of the rows.
        """
        fields, start = {}, 0
        for name, block in self._blocks().items():
            size = block.shape[-1]
            part = rows[..., start : start + size]
            fields[name] = part[..., 0] if name.endswith("bias") else part
            start += size
        return self._replace(**fields)

    def scaled(
        self, *, down: Float[Array, "*s p"], up: Float[Array, "*s p"], gate: Float[Array, "*s p"]
    ) -> SubMLPs:
        """Returns the sub-MLPs multiplied by one factor each, in float32 or float64.

        Args:
            down: The factors of the output weights.
            up: The factors of the input weights and biases.
            gate: The factors of the gate's weights and biases, if there is a gate.
        """

        def times(x: Array | None, factor: Array) -> Any:
            if x is None:
                return None
            x = wide(x)
            factor = factor.astype(x.dtype)
            return x * (factor if x.ndim == factor.ndim else factor[..., None])

        return SubMLPs(
            up=times(self.up, up),
            down=times(self.down, down),
            up_bias=times(self.up_bias, up),
            gate=times(self.gate, gate),
            gate_bias=times(self.gate_bias, gate),
        )

    def check(self) -> SubMLPs:
        """Returns itself if the shapes fit together.

        Raises:
            InputError: The shapes do not fit; the message names the field.
        """
        if self.up.ndim < 2 or 0 in self.up.shape:
            raise InputError(f"up must be (..., p, d) and not empty; got {self.up.shape}")
        stack, width = self.up.shape[:-2], self.up.shape[-2]
        if self.gate is None and self.gate_bias is not None:
            raise InputError("gate_bias is given, gate is not")
        for name in ("down", "gate", "up_bias", "gate_bias"):
            x = getattr(self, name)
            if x is None:
                continue
            want = (*stack, width) if name.endswith("bias") else (*stack, width, x.shape[-1])
            if x.shape != want or (name == "gate" and x.shape != self.up.shape):
                raise InputError(f"{name} has shape {x.shape}, which does not fit {self.up.shape}")
        return self


def responses(subs: SubMLPs, x: Float[Array, "t d"], act: Activation) -> HiddenUnits:
    """Returns the values and slopes of the units of an MLP at given inputs, see `HiddenUnits`.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)))
        >>> responses(subs, jnp.ones((5, 3)), "gelu").hidden.shape
        (5, 8)
    """
    weights = jax.tree.map(wide, subs)._asdict()
    return hidden_units(MlpWeights(**weights, act=act), wide(x))
