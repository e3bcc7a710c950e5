"""Makes NNX modules of Flax Linen models, so that their MLPs can be adopted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fusion_jax.errors import InputError
from fusion_jax.nn.linear_forms import LinearForm, plain_linear

_SETTINGS = ("dtype", "precision")


class LinenVariable(nnx.Variable):
    """A variable of a collection other than ``params``, such as batch statistics."""


class LinenScope(nnx.Module):
    """The parameters of one Linen module; those of a `flax.linen.Dense` are an `nnx.Linear`."""

    def __init__(self, params: Mapping[str, Any]):
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, _held(name, value))

    def variables(self) -> dict[str, Any]:
        """Returns the parameters as a nested dict of arrays."""
        return {name: _arrays(getattr(self, name)) for name in self.names}


class LinenModel(nnx.Module):
    """A Linen model with its parameters, see `from_linen`."""

    def __init__(self, module: Any, variables: Mapping[str, Any]):
        self.module = module
        self.params = LinenScope(variables["params"])
        others = {name: value for name, value in variables.items() if name != "params"}
        self.others = nnx.data(jax.tree.map(lambda x: LinenVariable(jnp.asarray(x)), others))

    def variables(self) -> dict[str, Any]:
        """Returns the variables as Linen has them; compressed layers are as narrow as they are."""
        others = jax.tree.map(
            lambda v: v.get_value(), self.others, is_leaf=lambda v: isinstance(v, nnx.Variable)
        )
        return {"params": self.params.variables(), **others}

    def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        """Returns what the Linen module returns, called with these arguments."""
        from flax import linen

        def call(then: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, context: Any) -> Any:
            if type(context.module) is not linen.Dense or context.method_name != "__call__":
                return then(*args, **kwargs)
            layer = _at(self.params, context.module.path)
            if layer is None:
                return then(*args, **kwargs)
            return _dense(context.module, layer, *args, **kwargs)

        with linen.intercept_methods(call):
            return self.module.apply(self.variables(), *args, rngs=rngs, **kwargs)


def from_linen(module: Any, variables: Mapping[str, Any]) -> LinenModel:
    """Returns an NNX module that runs a Flax Linen module with its parameters.

    The Linen module's own code runs, with dropout and whatever else it does; only its `Dense`
    layers are computed with the parameters of the NNX module, which may have become narrower.
    Collections besides ``params`` are constants.

    Args:
        module: The Linen module.
        variables: What ``module.init`` returned, or a trained ``{"params": ...}``.

    Returns:
        The module. Call it with the arguments of ``module.apply`` after the variables;
        ``model.variables()`` gives Linen's nested dict of parameters back.

    Raises:
        InputError: The arguments are not a Linen module and its variables.

    Example:
        >>> from flax import linen
        >>> import fusion_jax as fj
        >>> class Ffn(linen.Module):
        ...     @linen.compact
        ...     def __call__(self, x):
        ...         x = linen.Dense(32)(x)
        ...         return linen.Dense(4)(linen.gelu(x))
        >>> x = jnp.ones((2, 4))
        >>> model = from_linen(Ffn(), Ffn().init(jax.random.key(0), x))
        >>> adopted = fj.adopt(model, {"params": fj.MlpSpec(up="Dense_0", down="Dense_1")}, batch=x)
        >>> smaller, _ = fj.compress(adopted, fj.Fusion(width=8), key=jax.random.key(0))
        >>> smaller(x).shape, smaller.variables()["params"]["Dense_0"]["kernel"].shape
        ((2, 4), (4, 8))
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise InputError(f"module must be a Flax Linen module; got {type(module).__name__}")
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        raise InputError('variables must be what module.init returned, with "params" in it')
    return LinenModel(module, variables)


def _held(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return nnx.Param(jnp.asarray(value))
    kernel: Any = value.get("kernel")
    if not hasattr(kernel, "ndim") or kernel.ndim != 2 or not set(value) <= {"kernel", "bias"}:
        return LinenScope(value)
    bias = value.get("bias")
    return plain_linear(jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))


def _arrays(held: Any) -> Any:
    if isinstance(held, LinenScope):
        return held.variables()
    if isinstance(held, nnx.Variable):
        return held.get_value()
    layer: Any = held.plain() if isinstance(held, LinearForm) else held
    arrays = {"kernel": layer.kernel[...]}
    return arrays if layer.bias is None else {**arrays, "bias": layer.bias[...]}


def _at(scope: Any, path: tuple[str, ...]) -> Any:
    """Returns the layer with the parameters of a Dense module, or None."""
    for name in path:
        scope = getattr(scope, name, None) if isinstance(scope, LinenScope) else None
    return scope if isinstance(scope, nnx.Linear | LinearForm) else None


def _dense(module: Any, layer: Any, x: Any) -> Any:
    """Returns what a Dense module computes, with the parameters of a layer."""
    if not isinstance(layer, nnx.Linear):
        return layer(x)
    new = nnx.clone(layer)
    for name in _SETTINGS:
        setattr(new, name, getattr(module, name))
    if module.dot_general is not None:
        new.dot_general = module.dot_general
    return new(x)
