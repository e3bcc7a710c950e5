"""Makes functions of chosen parameters from models: which parameters count, and which outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import EllipsisType
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Float, PyTree

from ntk.errors import InputError, nearest
from ntk.selection import select

Outputs = str | Callable[[PyTree], Array] | None


def functional(
    model: nnx.Module | Callable[..., PyTree],
    params: PyTree = None,
    *,
    wrt: Any = None,
    outputs: Outputs = None,
) -> tuple[Callable[[PyTree, PyTree], Array], PyTree]:
    r"""Returns a model as a function ``f(params, x)`` of the chosen parameters, and these.

    Everything else is a constant of ``f``: all other parameters, and variables that are not an
    `nnx.Param`, such as batch statistics or the Frozen sizes of clusters. Turn dropout off before
    (``model.eval()``, or the model's own way).

    Args:
        model: A Flax NNX module, called with inputs; or a plain function, called with parameters
            and inputs.
        params: The parameters of a plain function, any pytree; None for a module.
        wrt: The parameters to choose: a regular expression that matches whole dotted paths, such as
            ``r"layers\.0\.mlp\..*"``; a function of a dotted path; indices or a slice; an nnx
            filter, such as a type of `nnx.Param` or a function of path and value; None for all.
        outputs: The output to choose: the name of an attribute or key of the model's result, such
            as ``"logits"``; a function of the result, such as `token` and `probability` return;
            None for the result itself, if it is one array.

    Returns:
        ``f`` and the chosen parameters. ``f(params, x)`` calls ``model(**x)`` if x is a mapping,
        ``model(*x)`` if it is a tuple or list, else ``model(x)``; a plain function gets its
        parameters first. The parameters are an `nnx.State`, or for a plain function a dict from
        dotted path to array.

    Raises:
        InputError: No parameter is chosen, ``wrt`` is not a valid regular expression, or the model
            is a Linen module; in ``f``, the model does not return the named output, or it changes
            its own state, as in training mode.

    Example:
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> f, params = functional(model, wrt="kernel")
        >>> f(params, jnp.ones((4, 3))).shape, list(params)
        ((4, 2), ['kernel'])
    """
    get_output = _output_getter(outputs)
    if isinstance(model, nnx.Module):
        if params is not None:
            raise InputError("params are given, but an nnx.Module holds its own")
        flat = list(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        chosen = nnx.filterlib.PathIn(*(flat[i][0] for i in _choose(wrt, flat)))
        graph, params, rest = nnx.split(model, chosen, ...)

        def of_module(params: PyTree, x: PyTree) -> PyTree:
            try:
                return get_output(_call(nnx.merge(graph, params, rest), x))
            except (TraceContextError, ValueError) as error:
                # nnx.scan and nnx.remat take only variables that were made inside of the function.
                if "different trace level" not in str(error):
                    raise
            copy = nnx.merge(graph, params, rest, copy=True)
            if _in_training_mode(copy):  # of a copy, changes would not be noticed
                raise InputError(_CHANGES)
            return get_output(_call(copy, x))

        return of_module, params

    check_function(model)
    if params is None:
        raise InputError("a plain function needs params; only an nnx.Module holds its own")
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = [tuple(_name((entry,)) for entry in path) for path, _ in leaves]
    names = [_dotted(key) for key in keys]
    values = [jnp.asarray(value) for _, value in leaves]
    counted = {names[i]: values[i] for i in _choose(wrt, list(zip(keys, values, strict=True)))}

    def f(params: Mapping[str, Array], x: PyTree) -> Array:
        merged = [params.get(name, value) for name, value in zip(names, values, strict=True)]
        return get_output(_call(model, x, tree.unflatten(merged)))

    return f, counted


_CHANGES = (
    "the model changes its own state while it runs, as dropout and batch normalization do in "
    "training mode; call model.eval() before ntk.functional"
)


def _in_training_mode(model: nnx.Module) -> bool:
    modules = [module for _, module in nnx.iter_modules(model)]
    drops = any(
        getattr(m, "deterministic", True) is False and getattr(m, "rate", 1) for m in modules
    )
    return drops or any(getattr(m, "use_running_average", True) is False for m in modules)


def check_function(f: object) -> None:
    """Raises `InputError` if a module is given where a function of parameters is needed."""
    if isinstance(f, nnx.Module):
        raise InputError(
            "a module is not a function of its parameters; make one: "
            "f, params = ntk.functional(model), then ntk.kernel(f, params, x)"
        )
    if any(cls.__module__.startswith("flax.linen") for cls in type(f).__mro__):
        raise InputError(
            "a Linen module does not hold its parameters; give its function and its variables: "
            "f, params = ntk.functional(module.apply, variables)"
        )


def token(position: int, of: str | None = None) -> Callable[[PyTree], Array]:
    """Returns a function that takes the outputs at one position of a sequence.

    Args:
        position: The position; negative ones count from the end.
        of: The attribute or key of the model's result, (n, t, ...); None for the result itself.

    Returns:
        A function for the argument ``outputs`` of `functional`.

    Example:
        >>> token(0)(jnp.ones((2, 5, 3))).shape
        (2, 3)
    """
    get_output = _output_getter(of)
    return lambda result: get_output(result)[:, position]


def probability(label: int, of: str | None = "logits") -> Callable[[PyTree], Array]:
    """Returns a function that takes the softmax probability of one class, a scalar output.

    Args:
        label: The class; the paper takes 0.
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
    get_output = _output_getter(of)

    def class_probability(result: PyTree) -> Float[Array, " n *o"]:
        return jax.nn.softmax(get_output(result), axis=-1)[..., label]

    return class_probability


def _choose(wrt: Any, parameters: Sequence[tuple[tuple[Hashable, ...], object]]) -> list[int]:
    """Returns the positions of the chosen parameters; each is given by its path and value."""
    choose = partial(select, paths=[_dotted(path) for path, _ in parameters], argument="wrt")
    if not _is_nnx_filter(wrt):
        return choose(wrt, noun="parameter")
    matches = nnx.filterlib.to_predicate(wrt)
    return choose(lambda item: matches(*item), noun="parameter", items=parameters)


def _is_nnx_filter(wrt: Any) -> bool:
    """Returns whether a choice is an nnx filter; a string is a pattern here, and not a tag."""
    if isinstance(wrt, type | bool | EllipsisType):
        return True
    if isinstance(wrt, tuple | list):
        return not all(isinstance(i, SupportsIndex) for i in wrt)
    if not callable(wrt):
        return False
    required = [p for p in inspect.signature(wrt).parameters.values() if p.default is p.empty]
    return len(required) > 1


def _output_getter(outputs: Outputs) -> Callable[[PyTree], Array]:
    """Returns a function that takes the chosen output of a model's result."""
    if outputs is None:
        return lambda result: result
    if not isinstance(outputs, str):
        return outputs

    def named_output(result: PyTree) -> Array:
        if isinstance(result, Mapping):
            fields = dict(result)
        else:
            known = getattr(result, "_fields", None) or getattr(result, "__dict__", {})
            fields = {name: getattr(result, name) for name in known}
        if outputs not in fields:
            raise InputError(f"the model does not return {outputs!r}{nearest(outputs, fields)}")
        if fields[outputs] is None:
            raise InputError(f"the model returns None as {outputs!r}")
        return fields[outputs]

    return named_output


def _call(model: Callable[..., PyTree], x: PyTree, *params: PyTree) -> PyTree:
    if isinstance(x, Mapping):
        return model(*params, **x)
    if isinstance(x, tuple | list):
        return model(*params, *x)
    return model(*params, x)


_name = partial(jax.tree_util.keystr, simple=True)


def _dotted(path: tuple[Hashable, ...]) -> str:
    return ".".join(map(str, path))
