"""A model as a function of chosen parameters: which parameters count, and which outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ntk.errors import InputError, nearest

Outputs = str | Callable[[Any], Array] | None


def functional(
    model: Any,
    params: Any = None,
    *,
    wrt: Any = None,
    outputs: Outputs = None,
) -> tuple[Callable[[Any, Any], Array], Any]:
    r"""A model as ``f(params, x)``, in which only the chosen parameters count.

    Whatever is not chosen is part of ``f`` as a constant: all other parameters, and variables that
    are no `nnx.Param`, such as batch statistics or the Frozen sizes of clusters. Dropout should be
    off (``model.eval()``, or the model's own way).

    Args:
        model: A Flax NNX module, called with inputs; or a plain function, called with parameters
            and inputs.
        params: The parameters of a plain function, any pytree; None for a module.
        wrt: Which parameters count: a regular expression that matches whole dotted paths, such as
            ``r"layers\.0\.mlp\..*"``; an nnx filter, such as a type of `nnx.Param` or a function
            of path and value; None for all.
        outputs: Which outputs count: the name of an attribute or key of what the model returns,
            such as ``"logits"``; a function of what it returns, such as `token` and `probability`
            make; None for all that it returns, which is then one array.

    Returns:
        ``f`` and the chosen parameters. ``f(params, x)`` calls ``model(**x)`` if x is a mapping,
        ``model(*x)`` if it is a tuple or list, else ``model(x)``; a plain function gets its
        parameters first. The parameters are an `nnx.State`, or for a plain function a dict of
        dotted path to array.

    Raises:
        InputError: No parameter is chosen, or ``wrt`` is no regular expression; in ``f``, the model
            does not return the named output.

    Example:
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> f, params = functional(model, wrt="kernel")
        >>> f(params, jnp.ones((4, 3))).shape, list(params)
        ((4, 2), ['kernel'])
    """
    chosen = _filter(wrt)
    pick = _picked(outputs)
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InputError("params are given, but an nnx.Module holds its own")
        every = nnx.All(nnx.Param, chosen)
        graph, params, rest = nnx.split(model, every, ...)
        paths = [_dotted(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        _check_chosen(len(jax.tree.leaves(params)), wrt, paths)
        return lambda params, x: pick(_called(nnx.merge(graph, params, rest), x)), params

    if params is None:
        raise InputError("a plain function needs params; an nnx.Module is called without")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = [tuple(_name((entry,)) for entry in path) for path, _ in leaves]
    names = [_dotted(key) for key in keys]
    values = [jnp.asarray(value) for _, value in leaves]
    matches = nnx.filterlib.to_predicate(chosen)
    counted = {
        name: value
        for key, name, value in zip(keys, names, values, strict=True)
        if matches(key, value)
    }
    _check_chosen(len(counted), wrt, names)

    def f(params: Any, x: Any) -> Array:
        merged = [params.get(name, value) for name, value in zip(names, values, strict=True)]
        return pick(_called(model, x, tree.unflatten(merged)))

    return f, counted


def token(position: int, of: str | None = None) -> Callable[[Any], Array]:
    """Outputs at one position of a sequence.

    Args:
        position: Which position; negative ones count from the end.
        of: The attribute or key of the model's result, (n, t, ...); None for the result itself.

    Returns:
        A function for the argument ``outputs`` of `functional`.

    Example:
        >>> token(0)(jnp.ones((2, 5, 3))).shape
        (2, 3)
    """
    pick = _picked(of)
    return lambda result: pick(result)[:, position]


def probability(label: int, of: str | None = "logits") -> Callable[[Any], Array]:
    """The softmax probability of one class, the scalar output of the MLP Fusion paper.

    Args:
        label: Which class; the paper takes 0.
        of: The attribute or key of the model's result with the logits, (n, ..., classes); None for
            the result itself.

    Returns:
        A function for the argument ``outputs`` of `functional`.

    References:
        MLP Fusion (arXiv 2307.08941), section 5.

    Example:
        >>> float(probability(0, of=None)(jnp.zeros((1, 4)))[0])
        0.25
    """
    pick = _picked(of)

    def chosen(result: Any) -> Float[Array, " n *o"]:
        return jax.nn.softmax(pick(result), axis=-1)[..., label]

    return chosen


def _filter(wrt: Any) -> Any:
    """An nnx filter; nnx itself takes a string for a tag, here it is a pattern of paths."""
    if wrt is None:
        return ...
    if not isinstance(wrt, str):
        return wrt
    try:
        pattern = re.compile(wrt)
    except re.error as error:
        raise InputError(f"wrt {wrt!r} is no regular expression: {error}") from None
    return lambda path, _: pattern.fullmatch(_dotted(path)) is not None


def _check_chosen(count: int, wrt: Any, names: list[str]) -> None:
    if count:
        return
    if not names:
        raise InputError("the model has no parameters")
    listing = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise InputError(
        f"wrt {wrt!r} chooses no parameter (a pattern must match a whole path); "
        f"the parameters are {listing}"
    )


def _picked(outputs: Outputs) -> Callable[[Any], Array]:
    """The chosen output of a model's result."""
    if outputs is None:
        return lambda result: result
    if not isinstance(outputs, str):
        return outputs

    def named(result: Any) -> Array:
        if isinstance(result, Mapping):
            fields = dict(result)
        else:
            known = getattr(result, "_fields", None) or getattr(result, "__dict__", {})
            fields = {name: getattr(result, name) for name in known}
        if outputs not in fields:
            raise InputError(f"the model returns no {outputs!r}{nearest(outputs, fields)}")
        if fields[outputs] is None:
            raise InputError(f"the model returns None as {outputs!r}")
        return fields[outputs]

    return named


def _called(model: Callable[..., Any], x: Any, *params: Any) -> Any:
    if isinstance(x, Mapping):
        return model(*params, **x)
    if isinstance(x, tuple | list):
        return model(*params, *x)
    return model(*params, x)


_name = partial(jax.tree_util.keystr, simple=True)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
