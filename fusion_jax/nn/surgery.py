"""Finding and replacing modules of a model by their paths."""

from __future__ import annotations

from typing import Any

from flax import nnx


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path in a model as text, such as ``"layers.3.mlp.up.kernel"``."""
    return ".".join(map(str, path))


def at(model: Any, path: str) -> Any:
    """The module at a path, such as ``"layers.3.mlp"``; the model itself if the path is empty."""
    for name in path.split(".") if path else ():
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def replaced(model: Any, path: str, new: nnx.Module) -> Any:
    """The model with another module at a path, and wherever the old one is besides.

    Args:
        model: The model, which is changed in place, unless the path is empty.
        path: The path.
        new: The module to put there.

    Returns:
        The model; the new module, if the path is empty.
    """
    if not path:
        return new
    old = at(model, path)
    for _, holder in list(nnx.iter_modules(model)):
        for name, value in list(vars(holder).items()):
            if value is old and name.isdigit():
                holder[int(name)] = new  # type: ignore[index]
            elif value is old:
                setattr(holder, name, new)
    return model
