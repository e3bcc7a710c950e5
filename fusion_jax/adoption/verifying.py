"""Puts our MLPs into modules, and checks that the modules do the same as before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusion_jax.adoption.layers import Layer, MlpSpec, layers_of
from fusion_jax.adoption.observing import Candidate, Observed, Run, call_alone, observe
from fusion_jax.errors import InputError
from fusion_jax.nn.adopted import CHILD, Part, adopted_modules, put_in
from fusion_jax.nn.linear_forms import plain_linear, with_matrix
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.surgery import at, own


def verified_alone(candidate: Candidate) -> Observed:
    """Returns what a module does that is run alone, one layer of a stack."""
    module: Any = nnx.clone(candidate.module)
    if candidate.layers["up"].stack:
        graph, state = nnx.split(module)
        module = nnx.merge(graph, jax.tree.map(lambda x: x[0] if x.ndim else x, state))
    layers = layers_of(module, candidate.spec)
    assert layers is not None
    call = call_alone(module, _inputs(candidate, layers), layers["up"].kernel.get_value().dtype)
    run = Run(module, list(layers.values()), call)
    observed = observe(replace(candidate, module=module, layers=layers), run.seen(layers))
    check_outputs(run, {"": (candidate.spec, observed)})
    return observed


def _inputs(candidate: Candidate, layers: Mapping[str, Layer]) -> list[int]:
    """Returns the numbers of inputs that a module may have by the shapes of its layers."""
    a, b = layers["up"].kernel.get_value().shape
    if candidate.joint or layers["up"].plain:
        return [a]
    down = layers["down"].kernel.get_value().shape
    # The inputs are the axis that the output layer does not share, the first if it has both.
    return sorted({a, b}, key=lambda size: (size == a and b not in down, size in down and a != b))


def check_outputs(run: Run, found: Mapping[str, tuple[MlpSpec, Observed]]) -> None:
    """Checks that adopted modules have the same outputs, and run with one hidden unit less.

    Raises:
        InputError: They do not.
    """
    where = "" if set(found) == {""} else "the model: "
    before = run.call(run.made())
    model = run.made()
    for path, (spec, observed) in found.items():
        take_over(at(model, path), spec, observed)
    after = run.call(model)
    if not all(_equal(x, y) for x, y in zip(before, after, strict=True)):
        raise InputError(f"{where}the outputs change when its layers are adopted")
    holders = list(adopted_modules(model).values())
    mlps: list[Any] = [mlp for _, _, mlp in holders]
    for mlp in mlps:
        rows = mlp.sub_mlps()
        rows = rows._replace(down=rows.down.at[..., -1, :].set(0))
        mlp.load_sub_mlps(rows, mlp.out_bias())
    want = run.call(model)
    for (module, adoption, _), mlp in zip(holders, mlps, strict=True):
        rows = mlp.sub_mlps()
        new = mlp.abstract(type(mlp), mlp.width - 1)
        new.load_sub_mlps(rows.with_rows(rows.rows()[..., :-1, :]), mlp.out_bias())
        setattr(module, adoption.child, new)
    try:
        narrower = run.call(model)
    except Exception as error:  # other people's code
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise InputError(
            f"{where}its code does not run with another number of hidden units ({reason})"
        ) from error
    if not all(_close(x, y) for x, y in zip(want, narrower, strict=True)):
        raise InputError(f"{where}its code uses the hidden units for something else as well")


def _equal(x: Array, y: Array) -> bool:
    return x.shape == y.shape and bool(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True))


def _close(x: Array, y: Array) -> bool:
    if x.shape != y.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        return x.shape == y.shape
    share = 0.1 if jnp.finfo(x.dtype).bits < 32 else 3e-3
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return bool(np.abs(a - b).max(initial=0) <= share * np.abs(a).max(initial=0))


def take_over(module: Any, spec: MlpSpec, observed: Observed) -> None:
    """Makes a module an adopted one, in place."""
    layers = layers_of(module, spec)
    assert layers is not None
    holder = at(module, spec.holder)
    by_name = {layer.name: layer for layer in layers.values()}
    if hasattr(holder, CHILD):
        raise InputError(f"{type(holder).__name__} already has an attribute {CHILD!r}")
    cls = GatedMlp if spec.gate is not None else Mlp
    mlp: Any = nnx.eval_shape(lambda: cls(1, 1, act=observed.act, rngs=nnx.Rngs(0)))
    for part in observed.parts:
        layer = by_name[part.name]
        for role, linear in zip(part.roles, _linears(holder, layer, part), strict=True):
            setattr(mlp, role, linear)
    stack = layers["up"].stack
    mlp.top_k = stack[0] if stack else 1  # each position goes through all layers of a stack
    put_in(holder, observed.parts, mlp)


def _linears(holder: Any, layer: Layer, part: Part) -> list[nnx.Linear]:
    """Returns a foreign layer as one of ours, or as two if it has the gate and up side by side."""
    if layer.plain:
        linear = own(holder, layer.name)
        if len(part.roles) == 1:
            return [linear]
        kernels = jnp.split(linear.kernel[...], 2, axis=-1)
        biases = [None, None] if layer.bias is None else jnp.split(layer.bias[...], 2, axis=-1)
        return [with_matrix(linear, *arrays) for arrays in zip(kernels, biases, strict=True)]
    value = layer.kernel.get_value()
    bias = None if layer.bias is None else layer.bias.get_value()
    linear: Any = plain_linear(value.mT if part.transposed else value, bias)
    # The variables keep their kind and what is known of them, such as their sharding.
    if not part.transposed:
        linear.kernel = layer.kernel
    if layer.bias is not None:
        linear.bias = layer.bias
    return [linear]
