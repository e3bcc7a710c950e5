"""Exact neural tangent kernels of any function of parameters and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from ntk.arrays import all_finite
from ntk.engines.base import BlockPlan, Engine, Examples, KernelTask, Values
from ntk.engines.blocks import (
    automatic_mesh,
    caller_mesh,
    compute_blocks,
    count_shards,
    largest_plan,
    put_on_mesh,
)
from ntk.engines.jacobian import JacobianEngine
from ntk.engines.structure import Program
from ntk.engines.vector_product import VectorEngine
from ntk.errors import InputError, check_at_least, check_choice
from ntk.functions import check_function
from ntk.kinds import KernelKind
from ntk.progress import show_stage

EngineName = Literal["auto", "jacobian", "vector-product", "neural-tangents"]
Implementation = Literal["structured-derivatives", "jacobian-contraction", "ntk-vector-products"]

DEFAULT_MEMORY = 4 * 2**30
"""The bytes that blocks are made for if no limit is given."""


def kernel(
    f: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    x1: PyTree = None,
    x2: PyTree = None,
    *,
    kind: KernelKind = "sgd",
    trace_axes: int | Sequence[int] = (),
    engine: EngineName = "auto",
    implementation: Implementation | None = None,
    block_size: int | None = None,
    memory_limit: int | None = None,
    progress: bool | None = None,
) -> Float[Array, "n m ..."]:
    """Returns the exact neural tangent kernel of a function, for all pairs of examples.

    With the gradient g_o(x) of output o with respect to all parameters, the entry for examples
    i, j and outputs o, p is <g_o(x1_i), g_p(x2_j)> (``"sgd"``) or <g_o(x1_i), sign g_p(x2_j)>
    (``"adam"``, not symmetric). Each output must depend on its own example only. As with `jax.jit`,
    a function is traced once for given shapes.

    Args:
        f: ``f(params, x)`` returns one array (n, *o) for n examples, such as `ntk.functional`
            makes.
        params: Pytree of floating-point arrays.
        x1: Pytree of arrays, each with the n examples on its first axis.
        x2: The same for m examples; None for ``x1``.
        kind: ``"sgd"`` or ``"adam"``.
        trace_axes: Axes of f's result, such as -1, over whose diagonal the kernel is *summed*
            (neural-tangents takes the mean).
        engine: ``"jacobian"`` contracts per-example gradients, kept as factors where possible;
            ``"vector-product"`` holds no Jacobian, which suits many outputs of a cheap network;
            ``"neural-tangents"`` is that package, for ``"sgd"`` only; ``"auto"`` takes the one of
            the first two that needs fewer operations.
        implementation: An implementation of neural-tangents: ``"structured-derivatives"`` (the
            default), ``"jacobian-contraction"`` (the default for a function with `jax.lax.cond` or
            `jax.lax.switch`) or ``"ntk-vector-products"``.
        block_size: The largest number of examples in a block.
        memory_limit: The largest number of bytes, on each device, beside parameters, inputs and the
            kernel itself. The limit holds for the memory that the compiler reports. With None,
            blocks are made for `DEFAULT_MEMORY`, and need more if one example needs more.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        (n, m, *o, *o) without the traced axes: first the axes of the first example's outputs, then
        those of the second's. float32, or float64 if a parameter is; matrix products have the
        highest precision.

    Raises:
        InputError: An argument is not valid, a parameter is NaN or infinite, or the limit is too
            small for one example; raised before any long work.

    Example:
        >>> f = lambda p, x: x @ p["w"] + p["b"]
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros((1, 2))}
        >>> kernel(f, params, jnp.ones((4, 3))).shape
        (4, 4, 2, 2)
        >>> float(kernel(f, params, jnp.ones((4, 3)), trace_axes=-1)[0, 0])
        8.0
    """
    check_function(f)
    check_choice("kind", kind, KernelKind)
    check_choice("engine", engine, EngineName)
    if implementation is not None:
        check_choice("implementation", implementation, Implementation)
        if engine != "neural-tangents":
            raise InputError("implementation is an option of engine='neural-tangents' only")
    check_at_least(1, block_size=block_size, memory_limit=memory_limit)
    leaves = _parameters(params)
    arrays = [_inputs("x1", x1), *([] if x2 is None else [_inputs("x2", x2)])]
    _check_pair(x1, x2, arrays)
    with show_stage("Kernel: tracing the function", progress):
        traced = _traced(f, params, leaves, x1, arrays[0], trace_axes)

    mesh = caller_mesh((leaves, arrays))
    with automatic_mesh(mesh) as on_mesh:
        values = on_mesh((leaves, traced.program.constants))
        arrays = on_mesh(arrays)
        inputs = (arrays[0], arrays[-1])
        n1, n2 = (side[0].shape[0] for side in inputs)
        task = KernelTask(
            program=traced.program,
            leaves=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
            kept=math.prod(traced.kept),
            n1=n1,
            n2=n2,
            same=x2 is None,
            sign=kind == "adam",
            dtype=np.dtype("float64" if any(x.dtype == "float64" for x in leaves) else "float32"),
            shards=count_shards(inputs[0]),
        )
        max_block = max(n1, n2) if block_size is None else block_size
        engines = _engines(engine, implementation, task)
        with show_stage("Kernel: choosing an engine and its blocks", progress):
            chosen, plan = _first_that_fits(engines, values, inputs, max_block, memory_limit)
        total = compute_blocks(chosen, plan, values, inputs, progress).transpose(0, 2, 1, 3)
        total = total.reshape(n1, n2, *traced.kept, *traced.kept)
    return put_on_mesh(total, mesh)


@dataclass(frozen=True)
class _Traced:
    """A function as a program, and the shape of its outputs that are not summed over."""

    program: Program
    kept: tuple[int, ...]


_TRACED: WeakKeyDictionary[Callable, dict[Hashable, _Traced]] = WeakKeyDictionary()


def _traced(
    f: Callable[[PyTree, PyTree], Array],
    params: PyTree,
    leaves: Sequence[Array],
    x: PyTree,
    arrays: Sequence[Array],
    trace_axes: int | Sequence[int],
) -> _Traced:
    """Traces a function, unless an earlier call traced it for the same shapes."""
    axes = (trace_axes,) if isinstance(trace_axes, int) else tuple(trace_axes)
    trees = jax.tree.structure(params), jax.tree.structure(x)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in (*leaves, *arrays))
    key = (axes, *trees, shapes, jax.config.read("jax_enable_x64"))
    try:
        known = _TRACED.setdefault(f, {})
    except TypeError:  # not every callable can be referenced weakly
        known = {}
    if key not in known:
        known[key] = _trace(f, trees[0].unflatten, trees[1].unflatten, leaves, arrays, axes)
    return known[key]


def _trace(
    f: Callable[[PyTree, PyTree], Array],
    to_params: Callable[[Sequence[Array]], PyTree],
    to_inputs: Callable[[Sequence[Array]], PyTree],
    leaves: Sequence[Array],
    arrays: Sequence[Array],
    axes: tuple[int, ...],
) -> _Traced:
    def abstract(arrays: Sequence[Array], start: int = 0) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(a.shape[start:], a.dtype) for a in arrays]

    def batch(leaves: Sequence[Array], arrays: Sequence[Array]) -> PyTree:
        return f(to_params(leaves), to_inputs(arrays))

    with jax.default_matmul_precision("highest"):
        n = arrays[0].shape[0]
        shape = _output_shape(jax.eval_shape(batch, abstract(leaves), abstract(arrays)), n)
        summed = _canonical(axes, len(shape))
        stay = [i for i in range(1, len(shape)) if i not in summed]

        def one(leaves: Sequence[Array], arrays: Sequence[Array]) -> Array:
            out = batch(leaves, [a[None] for a in arrays])
            if _output_shape(out, 1)[1:] != shape[1:]:
                raise InputError(
                    f"f returns {out.shape} for one example and {shape} for {n}; every output must "
                    "depend on its own example only"
                )
            return out.transpose(0, *stay, *summed).ravel()

        program = Program(one, abstract(leaves), abstract(arrays, 1))
    return _Traced(program, tuple(shape[i] for i in stay))


def _output_shape(out: PyTree, n: int) -> tuple[int, ...]:
    """Returns the shape of f's result, after checking that it has a kernel."""
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise InputError(
            f"f must return one array; it returns a {type(out).__name__} "
            "(ntk.functional(..., outputs=...) chooses one)"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise InputError(f"f must return floating-point numbers; it returns {out.dtype}")
    if out.shape[:1] != (n,) or 0 in out.shape:
        raise InputError(
            f"f must return an array with the examples on its first axis; for {n} examples it "
            f"returns shape {out.shape}. One example alone is x[None]"
        )
    return out.shape


def _canonical(axes: tuple[int, ...], ndim: int) -> list[int]:
    for axis in axes:
        if not -ndim < axis < ndim or axis == 0:
            raise InputError(
                "trace_axes must be axes of f's result other than the first, the axis of examples; "
                f"it has {ndim} axes, got {axis}"
            )
    canonical = sorted({axis % ndim for axis in axes})
    if len(canonical) != len(axes):
        raise InputError(f"trace_axes name an axis twice: {axes}")
    return canonical


def _engines(
    engine: EngineName, implementation: Implementation | None, task: KernelTask
) -> list[Engine]:
    """Returns the engines to try, the cheapest first."""
    # The engines named below contract in the parameters' own dtype.
    narrow = [str(leaf.dtype) for leaf in task.leaves if leaf.dtype.itemsize < 4]
    if narrow and engine in ("vector-product", "neural-tangents"):
        raise InputError(
            f"engine {engine!r} would sum in {narrow[0]}, the dtype of a parameter; "
            "use 'jacobian', or float32 parameters"
        )
    if engine == "neural-tangents":
        # Imported here, since importing that package takes seconds.
        from ntk.engines.neural_tangents import NeuralTangentsEngine

        return [NeuralTangentsEngine(task, implementation)]
    jacobian = JacobianEngine(task)
    vector = VectorEngine(task)
    if engine == "jacobian" or (engine == "auto" and narrow):
        return [jacobian]
    if engine == "vector-product":
        return [vector]
    both = [jacobian, vector]
    return both if jacobian.flops() <= vector.flops() else both[::-1]


def _first_that_fits(
    engines: Sequence[Engine],
    values: Values,
    inputs: tuple[Examples, Examples],
    max_block: int,
    limit: int | None,
) -> tuple[Engine, BlockPlan]:
    """Returns the first engine that has a plan within the limit, and the plan."""
    if limit is None:
        plan = engines[0].plan(max_block, DEFAULT_MEMORY / 16)
        if plan == engines[0].plan(max_block, float(DEFAULT_MEMORY)):
            # Far below the limit the estimate is good enough; asking the compiler takes seconds.
            return engines[0], plan
    tried = []
    for engine in engines:
        plan, need = largest_plan(engine, values, inputs, max_block, limit or DEFAULT_MEMORY)
        if need <= (limit or DEFAULT_MEMORY):
            return engine, plan
        tried.append((engine, plan, need))
    if limit is None:
        return tried[0][:2]
    raise InputError(
        f"memory_limit {limit:,} bytes is too small for one example, which needs "
        f"{min(need for _, _, need in tried):,}"
    )


def _parameters(params: PyTree) -> list[Array]:
    """Returns the leaves of the parameters, after checking that they have a kernel."""
    with_paths = jax.tree_util.tree_flatten_with_path(params)[0]
    if not with_paths:
        raise InputError("params do not hold any array: no parameter is chosen")
    leaves = _concrete([leaf for _, leaf in with_paths])
    names = [_name(path) for path, _ in with_paths]
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"parameter {name} is {leaf.dtype}, and only floating-point parameters have real "
                "gradients; leave it out with ntk.functional(..., wrt=...)"
            )
    finite = jax.device_get([all_finite(leaf) for leaf in leaves])
    bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
    if bad:
        raise InputError(f"NaN or infinite values in parameter {', '.join(bad)}")
    return leaves


def _name(path: KeyPath) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value") or "params"


def _concrete(leaves: Sequence[ArrayLike]) -> list[Array]:
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise InputError("a kernel cannot be computed under jax.jit or another transformation")
    return [jnp.asarray(leaf) for leaf in leaves]


def _inputs(name: str, x: PyTree) -> list[Array]:
    """Returns the leaves of inputs, after checking that each has the same number of examples."""
    leaves = _concrete(jax.tree.leaves(x))
    if not leaves:
        raise InputError(f"{name} holds no array")
    if len({leaf.shape[:1] for leaf in leaves} | {(), (0,)}) != 3:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise InputError(
            f"every array of {name} must have the examples on its first axis, at least one, and "
            f"the same number of them; got shapes {shapes}"
        )
    return leaves


def _check_pair(x1: PyTree, x2: PyTree, arrays: Sequence[Sequence[Array]]) -> None:
    if x2 is None:
        return
    if jax.tree.structure(x1) != jax.tree.structure(x2):
        raise InputError(
            f"x1 and x2 differ in structure: {jax.tree.structure(x1)} and {jax.tree.structure(x2)}"
        )
    for one, two in zip(*arrays, strict=True):
        if one.shape[1:] != two.shape[1:] or one.dtype != two.dtype:
            raise InputError(
                "x1 and x2 must have the same dtypes and, except for the number of examples, "
                f"the same shapes; got {one.dtype}{one.shape} and {two.dtype}{two.shape}"
            )
