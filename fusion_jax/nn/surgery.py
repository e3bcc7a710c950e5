"""Finds and replaces modules of a model by their paths."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeVar

from flax import nnx

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def path_name(path: tuple[Hashable, ...]) -> str:
    """Returns a path of the module tree as one string, such as ``"layers.3.mlp"``.

    Example:
        >>> path_name(("layers", 3, "mlp"))
        'layers.3.mlp'
    """
    return ".".join(map(str, path))


def find_modules(model: nnx.Module, *kinds: type[ModuleT]) -> dict[str, ModuleT]:
    """Returns the modules of some classes by path, in the order of a model's layers.

    A module comes before the modules inside it, and a shared module is there once.

    Example:
        >>> model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(11)])
        >>> list(find_modules(model, nnx.Linear))[-2:]
        ['9', '10']
    """
    found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, kinds)]
    # Layer 10 comes after layer 9, not after layer 1.
    found.sort(key=lambda item: [(isinstance(name, str), name) for name in item[0]])
    return {path_name(path): module for path, module in found}


def at(model: Any, path: str) -> Any:
    """Returns the module at a path, such as ``"layers.3.mlp"``; the model for an empty path."""
    for name in path.split(".") if path else ():
        model = own(model, name)
    return model


def own(module: Any, name: str) -> Any:
    """Returns what a module holds under a name, even if a property of its class has the name."""
    if name in vars(module):
        return vars(module)[name]
    return module[int(name)] if name.isdigit() else getattr(module, name)


def value_of(leaf: Any) -> Any:
    """Returns the value of a leaf of a state, which is a variable or an array."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def with_value(leaf: Any, value: Any) -> Any:
    """Returns a leaf of a state with another value."""
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def replaced(model: ModuleT, path: str, new: nnx.Module) -> ModuleT:
    """Puts another module at a path, and at all other places that share the old module.

    Returns the model, which is changed in place; the new module if the path is empty.
    """
    if not path:
        return new  # type: ignore[return-value] - the whole model is the layer
    old = at(model, path)
    for _, holder in list(nnx.iter_modules(model)):
        for name, value in list(vars(holder).items()):
            if value is old and name.isdigit():
                holder[int(name)] = new  # type: ignore[index]
            elif value is old:
                setattr(holder, name, new)
    return model
