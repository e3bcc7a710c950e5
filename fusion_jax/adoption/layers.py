"""The layers of other people's MLPs: how they are named, and where their arrays are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from fusion_jax.errors import InputError
from fusion_jax.nn.surgery import at, own
from ntk.activations import Activation

USUAL_NAMES: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
    ("gate", "up", "down"),
    ("linear_gate", "linear_up", "linear_down"),
    (None, "fc1", "fc2"),
    (None, "linear1", "linear2"),
    (None, "lin1", "lin2"),
    (None, "dense1", "dense2"),
    (None, "Dense_0", "Dense_1"),
    (None, "wi", "wo"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "up_proj", "down_proj"),
    (None, "up", "down"),
    (None, "w1", "w2"),
)
"""The names of the gate, up and down layers that are looked for, in this order."""
_SIDE_BY_SIDE = (("gate_up_proj", "down_proj"), ("wi", "wo"))
"""The names of a layer that has the gate and up side by side, and of the down layer."""


@dataclass(frozen=True)
class MlpSpec:
    """Says which layers of a module are its MLP, for `fusion_jax.adopt`.

    Each layer is an attribute of the module (or deeper, such as ``"layers.0"``): an `nnx.Linear`,
    an `nnx.Einsum`, another module that holds one matrix, or the matrix itself as an `nnx.Param`.

    Args:
        up: The layer to the hidden units; of a gated MLP the one without activation.
        down: The layer from the hidden units.
        gate: The layer inside the activation of a gated MLP; None if it is not gated. The same name
            as ``up`` for a layer that has both side by side.
        act: The activation, a name or a function; None to find out which it is.
        up_bias: Where ``up`` is a matrix itself: the attribute with its bias, if there is one.
        gate_bias: The same for ``gate``.

    Example:
        >>> MlpSpec(up="fc1", down="fc2", act="gelu").gate is None
        True
    """

    up: str
    down: str
    gate: str | None = None
    act: Activation | None = None
    up_bias: str | None = None
    gate_bias: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of the layers and biases."""
        names = (self.gate, self.up, self.down, self.gate_bias, self.up_bias)
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def holder(self) -> str:
        """The path, in the module, of the module that holds all the layers."""
        holders = {name.rpartition(".")[0] for name in self.names}
        if len(holders) > 1:
            raise InputError(
                f"{', '.join(self.names)} are in different modules; the layers of an MLP must be "
                "attributes of one module"
            )
        return holders.pop()


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a foreign module.

    Args:
        name: The attribute of the module that holds it.
        kernel_name: The attribute of the layer with its matrix; None if it is the matrix itself.
        kernel: The variable with its matrix.
        bias_name: The attribute with its bias, of the layer, or of the module if it is the matrix
            itself.
        bias: The variable with its bias.
        plain: Whether it is an `nnx.Linear`.
        zeros: The attributes of the layer with vectors of zeros that are not variables.
    """

    name: str
    kernel_name: str | None
    kernel: nnx.Variable
    bias_name: str | None
    bias: nnx.Variable | None
    plain: bool
    zeros: tuple[str, ...] = ()

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of the matrix."""
        return self.kernel.get_value().shape[:-2]


def layer_of(holder: nnx.Module, name: str, bias: str | None = None) -> Layer | None:
    """Returns a layer of a module, or None if there is none that could be part of an MLP."""
    value = _held(holder, name)
    if isinstance(value, nnx.Variable):
        given = None if bias is None else _held(holder, bias)
        if not _axes(value) >= 2 or (bias is not None and not isinstance(given, nnx.Variable)):
            return None
        return Layer(name, None, value, bias, given, False)
    if not isinstance(value, nnx.Module) or bias is not None:
        return None
    held = {key: v for key, v in vars(value).items() if isinstance(v, nnx.Param) and _axes(v)}
    if not held:
        return None
    most = max(map(_axes, held.values()))
    matrices = [key for key, v in held.items() if _axes(v) == most]
    vectors = [key for key in held if key not in matrices]
    if most < 2 or len(matrices) != 1 or len(vectors) > 1:
        return None
    bias = vectors[0] if vectors else None
    plain = type(value) is nnx.Linear
    arrays = {key: v for key, v in vars(value).items() if isinstance(v, jax.Array)}
    zeros = tuple(key for key, v in arrays.items() if v.ndim == 1 and _all_zero(v))
    return Layer(name, matrices[0], held[matrices[0]], bias, held.get(bias or ""), plain, zeros)


def _all_zero(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and not isinstance(x, Tracer) and not x.any()


def _held(holder: Any, name: str) -> Any:
    try:
        return own(holder, name)
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


def _axes(variable: nnx.Variable) -> int:
    value: Any = variable.get_value()
    floating = hasattr(value, "ndim") and jnp.issubdtype(value.dtype, jnp.floating)
    return value.ndim if floating else 0


def layers_of(module: nnx.Module, spec: MlpSpec) -> dict[str, Layer] | None:
    """Returns the layers of a module by role, or None if it does not have them all."""
    try:
        holder = at(module, spec.holder)
    except (AttributeError, IndexError, KeyError, TypeError):
        return None
    biases = {"gate": spec.gate_bias, "up": spec.up_bias, "down": None}
    found = {}
    for role in ("gate", "up", "down"):
        name = getattr(spec, role)
        if name is not None:
            found[role] = layer_of(holder, name.rpartition(".")[2], _last(biases[role]))
    return None if None in found.values() else found  # type: ignore[return-value]


def _last(name: str | None) -> str | None:
    return None if name is None else name.rpartition(".")[2]


def usual_specs(module: nnx.Module) -> list[MlpSpec]:
    """Returns the specs by usual names that a module has the layers for; the first are likelier."""
    if isinstance(module, nnx.Sequential):
        places = [i for i, layer in enumerate(module.layers) if isinstance(layer, nnx.Linear)]
        if len(places) != 2 or places[1] == places[0] + 1:
            return []
        return [MlpSpec(up=f"layers.{places[0]}", down=f"layers.{places[1]}")]
    specs = []
    for gate, up, down in USUAL_NAMES:
        specs.append(MlpSpec(up=up, down=down, gate=gate))
        if gate is not None:  # the activation may be on either
            specs.append(MlpSpec(up=gate, down=down, gate=up))
    specs += [MlpSpec(up=both, down=down, gate=both) for both, down in _SIDE_BY_SIDE]
    found = []
    for spec in specs:
        layers = layers_of(module, spec)
        if layers is not None and (spec.gate != spec.up or layers["up"].plain):
            found.append(spec)
    if any(spec.gate is not None and spec.gate != spec.up for spec in found):
        found = [spec for spec in found if spec.gate is not None]
    return found
