"""Finds out by running a module what its layers are: which MLP it has, and which activation.

Only the code is of interest here: the weights are replaced by random numbers, so that no accident
(such as weights that are still zero) makes two different functions look equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from fusion_jax.adoption.layers import Layer, MlpSpec
from fusion_jax.errors import InputError
from fusion_jax.nn.adopted import Part
from fusion_jax.nn.submlps import activation
from fusion_jax.nn.watching import Product, products
from ntk.activations import Activation, describe

_NAMES = ("gelu", "gelu_new", "relu", "silu", "tanh")


def quick_gelu(x: Array) -> Array:
    """Returns ``x * sigmoid(1.702 x)``, the activation of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


def squared_relu(x: Array) -> Array:
    """Returns ``max(x, 0) ** 2``."""
    return jnp.square(jax.nn.relu(x))


_FUNCTIONS = (
    quick_gelu,
    squared_relu,
    jax.nn.relu6,
    jax.nn.sigmoid,
    jax.nn.softplus,
    jax.nn.elu,
    jax.nn.selu,
    jax.nn.celu,
    jax.nn.leaky_relu,
    jax.nn.hard_swish,
    jax.nn.mish,
)
"""Activations without a name in this library that are recognized."""
_ATTRIBUTES = ("act", "act_fn", "activation", "activation_fn", "act_func", "hidden_act", "nonlin")
"""Attributes of modules that hold their activation."""
_MODES = {"deterministic": True, "train": False, "training": False, "is_training": False}
"""Arguments of calls by which modules turn dropout off."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that may hold an MLP.

    Args:
        path: Its path in the model.
        module: The module.
        spec: Which layers would be the MLP.
        layers: These layers, by role.
    """

    path: str
    module: nnx.Module
    spec: MlpSpec
    layers: Mapping[str, Layer]

    @property
    def joint(self) -> bool:
        """Whether one layer has the gate and up side by side."""
        return self.spec.gate is not None and self.spec.gate == self.spec.up


@dataclass(frozen=True)
class Observed:
    """The layers and the activation that were found in a module.

    Args:
        parts: Its layers as parts of an MLP.
        act: The activation.
    """

    parts: tuple[Part, ...]
    act: Activation


@dataclass(frozen=True, eq=False)
class Seen:
    """The matrix products of one layer, recorded while its module ran.

    Args:
        products: The products with its matrix.
        kernel: The variable's matrix at that time.
        bias: Its bias, (..., o), or None.
    """

    products: list[Product]
    kernel: Array
    bias: Array | None

    def values(self) -> Array:
        """Returns the outputs with the bias, as rows."""
        found = []
        for _, _, y in self.products:
            if self.bias is not None:
                b = self.bias.astype(y.dtype)
                shape = (*b.shape[:-1], *(1,) * (y.ndim - b.ndim), b.shape[-1])
                y = y + b.reshape(shape)
            found.append(y)
        return _joined(found)


class Run:
    """Runs a module, or a whole model, in evaluation mode and with random weights in its MLPs.

    Args:
        module: What to run; not changed.
        layers: The layers that get random weights and are watched.
        call: Calls it, and returns its outputs as a list of arrays.
    """

    def __init__(
        self, module: nnx.Module, layers: Sequence[Layer], call: Callable[[PyTree], list[Array]]
    ):
        self.call = call
        paths = {id(v): path for path, v in nnx.iter_graph(module) if isinstance(v, nnx.Variable)}
        evaluated = nnx.clone(module)
        evaluated.eval()
        self._graph, state = nnx.split(evaluated)
        self._flat = dict(nnx.to_flat_state(state))
        self._paths = {}
        for layer in layers:
            for variable in (layer.kernel, layer.bias):
                if variable is None or id(variable) in self._paths:
                    continue
                path = paths[id(variable)]
                if path not in self._flat:
                    raise InputError(f"{layer.name} shares its arrays with another layer")
                self._paths[id(variable)] = path
                self._randomize(path, jax.random.key(len(self._paths)))
        weights = {_name(layer): self._value(layer.kernel) for layer in layers}
        self._products = products(lambda w: self.call(self.made(w)), weights)[1]

    def _value(self, variable: nnx.Variable) -> Array:
        return self._flat[self._paths[id(variable)]].get_value()

    def _randomize(self, path: Any, key: Array) -> None:
        variable = self._flat[path]
        value = variable.get_value()
        scale = value.shape[-2] ** -0.5 if value.ndim > 1 else 1.0
        new = scale * jax.random.normal(key, value.shape, jnp.float32)
        self._flat[path] = variable.replace(new.astype(value.dtype))

    def made(self, weights: Mapping[str, Array] | None = None) -> PyTree:
        """Returns the module, with given matrices in place of the random ones, by their names."""
        flat = dict(self._flat)
        for name, value in (weights or {}).items():
            path = self._paths[int(name)]
            flat[path] = flat[path].replace(value)
        return nnx.merge(self._graph, nnx.from_flat_state(flat), copy=True)

    def seen(self, layers: Mapping[str, Layer]) -> dict[str, Seen]:
        """Returns what was seen of some of the layers, by their roles; of gate and up first."""
        found = {}
        for role, layer in layers.items():
            bias = None if layer.bias is None else self._value(layer.bias)
            seen = self._products.get(_name(layer), [])
            found[role] = Seen(seen, self._value(layer.kernel), bias)
        return found


def _name(layer: Layer) -> str:
    return str(id(layer.kernel))


def call_alone(
    module: nnx.Module, inputs: Sequence[int], dtype: DTypeLike
) -> Callable[[PyTree], list[Array]]:
    """Returns how to call a module with random vectors of one of these lengths.

    Raises:
        InputError: It cannot be called so.
    """
    signature = inspect.signature(type(module).__call__).parameters
    modes = {name: value for name, value in _MODES.items() if name in signature}
    reasons = []
    for shape in [(*first, d) for d in inputs for first in ((2, 3), (3,))]:
        x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
        probe = nnx.clone(module)
        probe.eval()
        graph, state = nnx.split(probe)
        try:
            jax.eval_shape(lambda s, x, g=graph: outputs(nnx.merge(g, s)(x, **modes)), state, x)
        except Exception as error:  # the module is other people's code: anything can happen
            reasons.append(str(error).strip().split("\n")[0][:200] or type(error).__name__)
            continue
        return lambda module, x=x: outputs(module(x, **modes))
    raise InputError(
        f"it cannot be called with one array (..., {inputs[0]}) ({reasons[0]}); give a batch of "
        "the whole model's arguments: fusion_jax.adopt(model, ..., batch=...)"
    )


def outputs(result: PyTree) -> list[Array]:
    """Returns the arrays of a result."""
    return [x for x in jax.tree.leaves(result) if hasattr(x, "dtype")]


def observe(candidate: Candidate, seen: Mapping[str, Seen]) -> Observed:
    """Returns what a candidate does.

    Args:
        candidate: The module.
        seen: What was seen of its layers, by role.

    Raises:
        InputError: It is not an MLP of these layers, or the activation is not known.
    """
    for role, each in seen.items():
        if not each.products:
            raise InputError(
                f"no product of vectors with {candidate.layers[role].name} is seen when it runs; "
                "experts in one array, and layers that are not one matrix, are not supported"
            )
    parts = {role: _part(candidate, role, each) for role, each in seen.items()}
    hidden = _joined([product.inputs for product in seen["down"].products])
    before = [role for role in seen if role != "down"]
    inputs = [_joined([product.inputs for product in seen[role].products]) for role in before]
    values = {role: seen[role].values() for role in before}
    if not (inputs[0] != 0).any():
        raise InputError("its inputs are all 0, so that nothing can be seen; give another batch")
    if inputs[0].shape != inputs[-1].shape or not bool((inputs[0] == inputs[-1]).all()):
        raise InputError("its gate and up layers do not have the same inputs")
    if candidate.joint:
        first, second = jnp.split(values["up"], 2, axis=-1)
        orders = {("gate", "up"): (first, second), ("up", "gate"): (second, first)}
        fits = {order: _fits(candidate, *pair, hidden) for order, pair in orders.items()}
        order = min(fits, key=lambda order: min(fits[order].values()))
        act = _act(candidate, fits[order], values["up"], hidden)
        return Observed((replace(parts["up"], roles=order), parts["down"]), act)
    gated = "gate" in seen
    z, u = (values["gate"], values["up"]) if gated else (values["up"], None)
    fits = _fits(candidate, z, u, hidden)
    if gated and min(fits.values()) > _tolerance(hidden):
        swapped = _fits(candidate, values["up"], values["gate"], hidden)
        if min(swapped.values()) <= _tolerance(hidden):
            raise InputError(
                f"the activation is on {candidate.spec.up}, so that it is the gate; give "
                f"gate={candidate.spec.up!r}, up={candidate.spec.gate!r}"
            )
    act = _act(candidate, fits, z, hidden)
    return Observed(tuple(parts.values()), act)


def _joined(arrays: Sequence[Array]) -> Array:
    """Returns the rows of all arrays."""
    return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in arrays])


def _part(candidate: Candidate, role: str, seen: Seen) -> Part:
    """Returns a layer as a part of an MLP, with its layout."""
    layer, kernel = candidate.layers[role], seen.kernel
    close = {
        transposed: all(
            _same(product.matrix, kernel.mT if transposed else kernel) for product in seen.products
        )
        for transposed in (False, True)
    }
    if not any(close.values()):
        raise InputError(f"its code scales or reshapes the matrix of {layer.name}")
    transposed = not close[False]
    if layer.plain and transposed:
        raise InputError(f"its code uses the matrix of {layer.name} transposed")
    names = layer.kernel_name, layer.bias_name
    return Part(layer.name, (role,), *names, transposed, layer.zeros)


def _same(seen: Array, kernel: Array) -> bool:
    seen = seen.reshape(-1, *seen.shape[-2:])
    kernel = kernel.reshape(-1, *kernel.shape[-2:])
    if seen.shape[1:] != kernel.shape[1:] or len(seen) % len(kernel):
        return False
    close = jnp.abs(seen[: len(kernel)].astype(jnp.float32) - kernel.astype(jnp.float32))
    return bool(close.max() <= 0.02 * jnp.abs(kernel.astype(jnp.float32)).max())


def _fits(
    candidate: Candidate, z: Array, u: Array | None, hidden: Array
) -> dict[Activation, float]:
    """Returns the relative error of the hidden values with each activation, likely ones first."""
    known: list[Activation] = [] if candidate.spec.act is None else [candidate.spec.act]
    attributes = [getattr(candidate.module, name, None) for name in _ATTRIBUTES]
    known += [*_NAMES, *(act for act in attributes if callable(act)), *_FUNCTIONS]
    return {act: _error(act, z, u, hidden) for act in dict.fromkeys(known)}


def _error(act: Activation, z: Array, u: Array | None, hidden: Array) -> float:
    if z.shape != hidden.shape:
        return inf
    try:
        h = activation(act)(z)
        # An activation works on each number alone; a softmax does not.
        if not bool(jnp.allclose(activation(act)(z[:, :1]), h[:, :1], rtol=1e-2, atol=1e-6)):
            return inf
    except Exception:  # a function of other people, which may need other arguments
        return inf
    h = (h if u is None else h * u.astype(h.dtype)).astype(jnp.float32)
    size = jnp.abs(hidden.astype(jnp.float32)).mean()
    error = float(jnp.abs(h - hidden.astype(jnp.float32)).mean() / jnp.maximum(size, 1e-30))
    return error if np.isfinite(error) else inf


def _tolerance(hidden: Array) -> float:
    eps = float(jnp.finfo(hidden.dtype).eps)
    return 4 * eps if eps > 1e-5 else 30 * max(eps, 1e-7)


def _act(
    candidate: Candidate, fits: Mapping[Activation, float], z: Array, hidden: Array
) -> Activation:
    """Returns the activation that fits, if it is the one that is given, and the only one.

    Raises:
        InputError: None fits, another fits better, or several fit.
    """
    tolerance, given = _tolerance(hidden), candidate.spec.act
    best = min(fits, key=lambda act: fits[act])
    arrays = any(layer.kernel_name is None for layer in candidate.layers.values())
    biases = " (and up_bias=, gate_bias= of arrays)" if arrays else ""
    if fits[best] > tolerance:
        tried = (
            "no known activation fits its hidden values"
            if given is None
            else (
                f"act {describe(given)!r} gives hidden values that are wrong by {fits[given]:.2g} "
                "(relative)"
            )
        )
        raise InputError(
            f"{tried}; check which layers are up, gate and down{biases}, "
            "and give act= as a name or as the function itself"
        )
    if given is not None:
        # In low precision, two activations may be equally near.
        if fits[given] > max(2 * fits[best], tolerance / 100):
            raise InputError(
                f"act {describe(given)!r} is wrong: its hidden values are those of "
                f"{describe(best)!r} (give that, or leave act out)"
            )
        return given
    others = [
        act
        for act, error in fits.items()
        if error <= 2 * fits[best] and not _same_function(act, best, z)
    ]
    if others:
        raise InputError(
            f"{describe(best)} and {', '.join(map(describe, others))} fit equally well in "
            f"{hidden.dtype}; give act="
        )
    return best


def _same_function(a: Activation, b: Activation, z: Array) -> bool:
    z = z.astype(jnp.float32)
    return bool(jnp.allclose(activation(a)(z), activation(b)(z), rtol=1e-6, atol=1e-6))
