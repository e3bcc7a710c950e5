"""MLPs inside modules of other classes, whose own code runs through the parameters of our MLP.

An adopted module holds a `Mlp` or `GatedMlp` as its attribute ``adopted``. It has a subclass of its
own class, in which the names of its layers are properties: they give layers of the original kind
with the arrays that the MLP has now. So all of the class's own code stays in force.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import AnyLinear, matrix_of, with_matrix
from fusion_jax.nn.mlp import AnyMlp, Mlp
from fusion_jax.nn.surgery import find_modules, own

CHILD = "adopted"
"""The attribute of an adopted module that holds its MLP."""
_SHELLS = "adopted_shells"


@dataclass(frozen=True)
class Part:
    """One layer of a foreign module, and which matrices of our MLP it is.

    Args:
        name: The attribute of the module that holds the layer.
        roles: ``("up",)``, ``("gate",)`` or ``("down",)``; or the gate and up, in their order, of a
            layer that has both side by side.
        kernel: The attribute of the layer that holds the matrix; None if the layer is an array.
        bias: The attribute with the bias: of the layer, or of the module if the layer is an array;
            None if there is none.
        transposed: Whether the matrix has its outputs first.
        zeros: Attributes of the layer with vectors of zeros, one for each output, that are not
            variables: layers without a bias may add them.
    """

    name: str
    roles: tuple[str, ...]
    kernel: str | None = "kernel"
    bias: str | None = None
    transposed: bool = False
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adoption:
    """How a class of modules is adopted: the class, and the layers that are parts of the MLP."""

    original: type[nnx.Module]
    parts: tuple[Part, ...]

    @property
    def child(self) -> str:
        """The name in the module under which the MLP is kept."""
        # The names in a list are numbers. There, the MLP takes the place of the input layer.
        if not issubclass(self.original, nnx.List):
            return CHILD
        return next(part.name for part in self.parts if "up" in part.roles)


def adoption_of(module: nnx.Module) -> Adoption | None:
    """Returns how a module is adopted, or None."""
    adoption = getattr(type(module), "adoption", None)
    return adoption if isinstance(adoption, Adoption) else None


def adopted_modules(model: nnx.Module) -> dict[str, tuple[nnx.Module, Adoption, AnyMlp]]:
    """Returns the adopted modules of a model by path, how they are adopted, and their MLPs."""
    found = {}
    for path, module in find_modules(model, nnx.Module).items():
        adoption = adoption_of(module)
        if adoption is not None:
            found[path] = (module, adoption, own(module, adoption.child))
    return found


def adopted_sites(model: nnx.Module) -> dict[str, Adoption]:
    """Returns how the modules around adopted MLPs are adopted, by the path of the MLP."""
    found = adopted_modules(model)
    return {
        f"{path}.{adoption.child}".lstrip("."): adoption for path, (_, adoption, _) in found.items()
    }


def put_in(module: nnx.Module, parts: tuple[Part, ...], mlp: Mlp) -> None:
    """Makes a module an adopted one, in place.

    Args:
        module: The module, of any class.
        parts: Which of its layers are parts of the MLP.
        mlp: Our MLP, with the arrays of these layers.
    """
    adoption = Adoption(type(module), parts)
    shells: dict[str, nnx.Module] = {}
    for part in parts:
        layer = own(module, part.name)
        if part.kernel is not None and not isinstance(layer, nnx.Linear):
            shells[part.name] = _shell(layer, part)
        if part.kernel is None and part.bias is not None:
            delattr(module, part.bias)
        if part.name != adoption.child:
            if isinstance(module, nnx.List):
                setattr(module, part.name, None)
            else:
                delattr(module, part.name)
    setattr(module, adoption.child, mlp)
    if shells and isinstance(module, nnx.List):
        raise InputError("layers in a list must be of nnx.Linear to be adopted")
    if shells:
        setattr(module, _SHELLS, nnx.Dict(shells))
    object.__setattr__(module, "__class__", _owner_class(adoption))


def take_out(module: nnx.Module, adoption: Adoption, mlp: Mlp) -> None:
    """Makes an adopted module one of its original class again, in place, with plain layers."""
    layers = {part: _layer(module, part, mlp) for part in adoption.parts}
    arrays = [part for part in adoption.parts if part.kernel is None]
    biases = {part.bias: _bias_variable(part, mlp) for part in arrays}
    object.__setattr__(module, "__class__", adoption.original)
    if not isinstance(module, nnx.List):
        delattr(module, CHILD)
    if _SHELLS in vars(module):
        delattr(module, _SHELLS)
    for part, layer in layers.items():
        setattr(module, part.name, layer)
    for name, bias in biases.items():
        if name is not None:
            setattr(module, name, bias)


@cache
def _owner_class(adoption: Adoption) -> type[nnx.Module]:
    """Returns the class of adopted modules; the same class for the same layers."""
    original = adoption.original
    names: dict[str, object] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "adoption": adoption,
    }
    for part in adoption.parts:
        names[part.name] = property(lambda self, part=part: _layer(self, part), _setter(part.name))
        if part.kernel is None and part.bias is not None:
            names[part.bias] = property(
                lambda self, part=part: _bias_variable(part, own(self, adoption.child))
            )
    return cast("type[nnx.Module]", type(original.__name__, (original,), names))


def _setter(name: str) -> Callable[[nnx.Module, object], None]:
    def put(self: nnx.Module, value: object) -> None:
        if not isinstance(self, nnx.List):  # whose MLP is at one of the names
            raise AttributeError(f"{name} is part of an adopted MLP, which is at {CHILD}")
        vars(self)[name] = value

    return put


def _shell(layer: nnx.Module, part: Part) -> nnx.Module:
    """Returns a layer without its matrix and bias."""
    shell = nnx.clone(layer)
    for name in (part.kernel, part.bias):
        if name is not None:
            delattr(shell, name)
    return shell


def _layer(module: Any, part: Part, mlp: Mlp | None = None) -> Any:
    """Returns a layer of the original kind, with the arrays that the MLP has now."""
    given: Mlp = own(module, module.adoption.child) if mlp is None else mlp
    layers: list[Any] = [effective(given, role) for role in part.roles]
    shells = vars(module).get(_SHELLS)
    shell = None if shells is None else vars(shells).get(part.name)
    if part.kernel is not None and shell is None:
        if len(layers) == 1:
            return layers[0]
        kernel = jnp.concatenate([matrix_of(layer) for layer in layers], -1)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = jnp.concatenate([bias[...] for bias in biases], -1) if biases else None
        return with_matrix(layers[0], kernel, bias)
    (layer,) = layers
    plain = isinstance(layer, nnx.Linear)
    same = plain and not part.transposed
    matrix = matrix_of(layer)
    if part.transposed:
        # Before the product, so that XLA does not make another product of both, whose last bits
        # differ from the original's.
        matrix = lax.optimization_barrier(matrix.mT)
    kernel = layer.kernel if same else nnx.Param(matrix)
    if shell is None:
        return kernel
    new = nnx.clone(shell)
    setattr(new, part.kernel or "", kernel)
    if part.bias is not None:
        setattr(new, part.bias, layer.bias)
    for name in part.zeros:
        setattr(
            new, name, nnx.data(jnp.zeros(matrix_of(layer).shape[-1], getattr(new, name).dtype))
        )
    _update_shapes(new, kernel, part)
    return new


def _update_shapes(layer: nnx.Module, kernel: nnx.Variable, part: Part) -> None:
    for name, variable in (("kernel_shape", kernel), ("bias_shape", getattr(layer, "bias", None))):
        if getattr(layer, name, None) is not None and variable is not None:
            before = getattr(layer, name)
            setattr(layer, name, variable.get_value().shape[-len(before) :])


def _bias_variable(part: Part, mlp: Mlp) -> nnx.Variable | None:
    return effective(mlp, part.roles[0]).bias


def effective(mlp: Mlp, role: str) -> AnyLinear:
    """Returns a linear layer of the plain MLP that is the same function as an MLP.

    It is the MLP's own layer where no factors are around it.
    """
    layer, factor = mlp.linears()[role], mlp.factor(role)
    if factor is None:
        return layer
    bias = None if layer.bias is None else layer.bias[...]
    matrix = matrix_of(layer)
    if matrix.ndim != factor.ndim + 1:
        raise InputError(
            "a loop over layers splits the parameters, but not the cluster sizes, which are "
            "fusion_jax.Frozen: give nnx.StateAxes the same axis for both"
        )
    if role == "down":
        kernel = _times(matrix, factor[..., :, None])
    else:
        kernel = _times(matrix, factor[..., None, :])
        bias = None if bias is None else _times(bias, factor)
    return with_matrix(layer, kernel, bias)


def _times(x: Array, factor: Array) -> Array:
    y = wide(x)
    return (y * factor.astype(y.dtype)).astype(x.dtype)
