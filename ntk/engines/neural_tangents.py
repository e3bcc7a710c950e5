"""The package neural-tangents on current JAX, as an engine.

neural-tangents 0.6.5, its last release, stopped importing with jax 0.6 and cannot be changed any
more, so that what it lacks is given to it here, without `jax._src` and without changing jax:

1. While it is imported, and only then, jax has the names that it looks up: classes that are in
   `jax.extend.core` now, two mapping functions of `jax.util`, and two primitives.
2. Its module ``experimental``, which needs TensorFlow and which nothing else in it uses, is empty.
3. Structured derivatives run a backward pass of their own over a linear jaxpr, which they got from
   internals of jax that are gone. Two functions of the package are replaced: one that makes this
   jaxpr, by `jax.linearize`, and one that transposes an equation, by `jax.linear_transpose`.

How it is checked: ``tests/test_ntk_engine_nt.py`` compares all three implementations with a brute
force in float64, on every version of Python and jax that the tests run on; they were green on jax
0.10.2 with Python 3.11 and on jax 0.12.0 with Python 3.12, with TensorFlow installed and without.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.interpreters import ad
from jaxtyping import Array

from ntk.engines.base import Engine, Plan, Task, cut, nbytes, temporary
from ntk.engines.contraction import Kernel
from ntk.engines.structure import Program
from ntk.errors import InputError

IMPLEMENTATIONS = {
    "structured-derivatives": 3,
    "jacobian-contraction": 1,
    "ntk-vector-products": 2,
}
"""neural-tangents' own numbers of its implementations."""


class NeuralTangentsEngine(Engine):
    """Kernels by neural-tangents; see the module.

    Args:
        task: What to compute.
        implementation: A key of `IMPLEMENTATIONS`.

    Raises:
        InputError: The task is beyond the package, or it is not installed.
    """

    def __init__(self, task: Task, implementation: str):
        if task.sign:
            raise InputError(
                "engine 'neural-tangents' knows no Adam kernel; use 'jacobian' or 'vector-product'"
            )
        super().__init__(task)
        self._implementation = implementation
        self._number = IMPLEMENTATIONS[implementation]
        neural_tangents()
        self._add = task.program.jitted(_added, static=2)

    def plan(self, most: int, budget: float) -> Plan:
        """A plan for some bytes, which are guessed to go into gradients of all parameters."""
        task = self.task
        gradients = 3 * task.program.outputs * nbytes(task.leaves) + task.program.bytes()
        largest = max(1, min(most, int(budget / 2 / gradients)))
        rows, columns = (cut(n, largest, n, task.shards)[0] for n in (task.n1, task.n2))
        return Plan(rows=rows, columns=columns)

    def add(
        self,
        plan: Plan,
        group: int,
        total: Kernel,
        sides: tuple[Any, Any],
        advance: Callable[[], None],
    ) -> Kernel:
        """Adds the kernel of two blocks."""
        values, first = sides[0]
        second = None if sides[1] is None else sides[1][1]
        with self._refusing():
            total = self._add(self._number, self.task.kept, total, *values, first, second)
        total = jax.block_until_ready(total)
        advance()
        return total

    def memory(self, plan: Plan, values: Any, blocks: tuple[Any, Any]) -> int:
        """Bytes that a plan needs beside parameters, inputs and result."""
        total = self.task.block(plan.rows, plan.columns)
        alone = self.task.same and plan.rows >= self.task.n1
        second = None if alone else blocks[1]
        arguments = (self._number, self.task.kept, total, *values, blocks[0], second)
        with self._refusing():
            return temporary(self._add, *arguments) + nbytes(total)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Says in one sentence that the package cannot trace the function."""
        try:
            yield
        except (AssertionError, AttributeError, NotImplementedError) as error:
            # The function itself has been traced already; loops are what mostly leads here.
            raise InputError(
                f"neural-tangents' {self._implementation} cannot do an operation of this function; "
                "another implementation may"
            ) from error


def _added(
    program: Program,
    number: int,
    kept: int,
    total: Kernel,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array] | None,
) -> Kernel:
    """Adds the kernel of two blocks of examples."""

    def batch(leaves: Sequence[Array], examples: Sequence[Array]) -> Array:
        def one(example: Sequence[Array]) -> Array:
            return program(leaves, constants, example)[0].reshape(kept, -1)

        # It asks for one example at a time, and a vmap of one would hide structure from it.
        if examples[0].shape[0] == 1:
            return one([x[0] for x in examples])[None]
        return jax.vmap(one)(examples)

    ntk = neural_tangents().empirical_ntk_fn(
        batch, trace_axes=(2,), diagonal_axes=(), vmap_axes=0, implementation=number
    )
    with _lenient():
        mean = ntk(first, second, leaves)
    # (n, m, r, r), and a mean over the traced axis.
    return total + (mean * (program.outputs // kept)).transpose(0, 2, 1, 3).astype(total.dtype)


@contextmanager
def _lenient() -> Iterator[None]:
    """For the package's own code: jax's defaults, and no warning of slower but correct paths."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        warnings.filterwarnings("ignore", message="No Jacobian rule found")
        yield


@cache
def neural_tangents() -> types.ModuleType:
    """The package neural-tangents, made to work on this jax.

    Returns:
        The package; other code of the same process that imports it gets the same.

    Raises:
        InputError: It is not installed, as always with Python 3.14 and above.

    Example:
        >>> from ntk.engine_nt import neural_tangents
        >>> ntk_fn = neural_tangents().empirical_ntk_fn(lambda p, x: x @ p, trace_axes=())
        >>> float(ntk_fn(jnp.ones((1, 3)), None, jnp.ones((3, 1))).squeeze())
        3.0
    """
    with _old_names(), warnings.catch_warnings():
        # On its first import Python warns of escapes in its docstrings, jax of deprecated names.
        warnings.simplefilter("ignore")
        try:
            package = importlib.import_module("neural_tangents")
        except ModuleNotFoundError as error:
            if error.name != "neural_tangents":
                raise
            raise InputError(
                "engine 'neural-tangents' needs the package neural-tangents, which is not "
                "installed; it comes with this one for Python below 3.14, since its requirement "
                "TensorFlow has no newer wheels"
            ) from None
    empirical: Any = importlib.import_module("neural_tangents._src.empirical")
    empirical._get_primals_out_and_pullback = _primals_out_and_pullback(empirical._backward_pass)
    empirical._eqn_vjp_fn = _transposed
    # What it reads of these modules at run time and they no longer have, or warn of.
    empirical.core = _overlay(jax.core, DShapedArray=type("DShapedArray", (), {}))
    empirical.ad = _overlay(
        ad,
        source_info_util=source_info_util,
        config=types.SimpleNamespace(jax_enable_checks=False),
    )
    empirical.jnp = _overlay(jnp, dtype=jnp.result_type, size=lambda a: math.prod(jnp.shape(a)))
    return package


@contextmanager
def _old_names() -> Iterator[None]:
    """Names that neural-tangents looks up in jax while it is imported."""
    util: Any = types.ModuleType("jax.util")
    util.safe_map = lambda f, *args: [f(*x) for x in zip(*args, strict=True)]
    util.safe_zip = lambda *args: list(zip(*args, strict=True))
    modules = {
        "jax.util": util,
        "neural_tangents.experimental": types.ModuleType("neural_tangents.experimental"),
    }
    names: dict[tuple[Any, str], Any] = {
        (jax.core, name): getattr(jex_core, name)
        for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
    }
    names[ad, "zeros_like_p"] = jex_core.Primitive("zeros_like")  # never bound
    names[jax.lax, "device_put_p"] = jex_core.primitives.device_put_p
    missing = {key: value for key, value in names.items() if key[1] not in vars(key[0])}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update({name: m for name, m in modules.items() if before[name] is None})
    for (module, name), value in missing.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name in missing:
            delattr(module, name)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]


def _overlay(module: types.ModuleType, **names: Any) -> types.ModuleType:
    """A module that looks names up in ``names`` first, then in ``module``."""
    over: Any = types.ModuleType(module.__name__)
    over.__getattr__ = lambda name: getattr(module, name)
    vars(over).update(names)
    return over


def _bind(eqn: Any, args: Sequence[Any]) -> Any:
    return eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))


def _linear(function: Callable[..., Any], primals: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """The value of a function, and its derivative as a jaxpr with constants.

    Equations of the derivative that do not depend on its inputs are evaluated and join the
    constants, since the package takes every variable that is no constant for linear.
    """

    def literal(atom: Any) -> bool:
        return isinstance(atom, jex_core.Literal)

    with jax.disable_jit():  # so that no calls are in the jaxpr
        out, derivative = jax.linearize(function, *primals)
        closed = jax.make_jaxpr(derivative)(*primals)
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    linear, eqns = set(closed.jaxpr.invars), []
    for eqn in closed.jaxpr.eqns:
        if any(not literal(atom) and atom in linear for atom in eqn.invars):
            eqns.append(eqn)
            linear.update(eqn.outvars)
            continue
        values = _bind(eqn, [a.val if literal(a) else known[a] for a in eqn.invars])
        values = values if eqn.primitive.multiple_results else [values]
        known.update(zip(eqn.outvars, values, strict=True))
    jaxpr = types.SimpleNamespace(
        constvars=list(known), invars=closed.jaxpr.invars, outvars=closed.jaxpr.outvars, eqns=eqns
    )
    return out, jaxpr, list(known.values())


def _primals_out_and_pullback(backward_pass: Callable[..., Any]) -> Callable[..., Any]:
    """The package's function of that name, over `_linear`."""

    def primals_out_and_pullback(
        fn: Callable[..., Any], mode: Any, _j_rules: bool, _s_rules: bool, _fwd: Any, *primals: Any
    ) -> tuple[Any, Callable[..., Any]]:
        out, jaxpr, consts = _linear(fn, primals)

        def pullback(*cotangents: Any) -> Any:
            result = backward_pass(
                jaxpr,
                mode=mode,
                consts=consts,
                primals_in=[ad.UndefinedPrimal(var.aval) for var in jaxpr.invars],
                cotangents_in=tuple(jax.tree.leaves(cotangents)),
                _j_rules=_j_rules,
                _s_rules=_s_rules,
                _fwd=_fwd,
            )
            return jax.tree.unflatten(jax.tree.structure(primals), result)

        return out, pullback

    return primals_out_and_pullback


def _transposed(eqn: Any, cotangent: Any, *values: Any) -> Any:
    """Cotangents of the undefined inputs of an equation, None for the others.

    Takes the place of the package's ``_eqn_vjp_fn``.
    """
    if eqn is None:  # the identity
        return (cotangent,)
    out: list[Any] = [None] * len(values)
    if isinstance(cotangent, ad.Zero):
        return out
    undefined = [i for i, value in enumerate(values) if ad.is_undefined_primal(value)]

    def function(*xs: Any) -> Any:
        args = list(values)
        for i, x in zip(undefined, xs, strict=True):
            args[i] = x
        return _bind(eqn, args)

    avals = [values[i].aval for i in undefined]
    # A reshape's cotangent comes in the shape of its input.
    cotangent = cotangent.reshape(jax.eval_shape(function, *avals).shape)
    for i, value in zip(undefined, jax.linear_transpose(function, *avals)(cotangent), strict=True):
        out[i] = value
    return out
