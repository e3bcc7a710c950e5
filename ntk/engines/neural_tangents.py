"""The package neural-tangents on current JAX, as an engine.

The last release of neural-tangents, 0.6.5, cannot be imported with jax 0.6 or later and is
unmaintained. This module supplies what it lacks, without `jax._src` and without changing jax:

1. While it is imported, and only then, jax has the names that it looks up: classes that are now in
   `jax.extend.core`, two mapping functions of `jax.util`, and two primitives.
2. Its module ``experimental``, which needs TensorFlow and which nothing else in it uses, is empty.
3. Structured derivatives run a backward pass of their own over a linear jaxpr, which they made with
   internals of jax that no longer exist. Two functions of the package are replaced: the one that
   makes this jaxpr now uses `jax.linearize`, the one that transposes an equation uses
   `jax.linear_transpose`.

``tests/test_ntk_engine_nt.py`` compares all three implementations with brute force in float64, on
every version of Python and jax that the tests run on. They passed on jax 0.10.2 with Python 3.11
and on jax 0.12.0 with Python 3.12, with TensorFlow installed and without.
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
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ntk.engines.base import (
    Abstract,
    BlockPlan,
    Examples,
    KernelTask,
    OneCallEngine,
    Values,
    cut,
    nbytes,
)
from ntk.engines.contraction import KernelArray
from ntk.engines.structure import Program
from ntk.errors import InputError

IMPLEMENTATIONS = {
    "structured-derivatives": 3,
    "jacobian-contraction": 1,
    "ntk-vector-products": 2,
}
"""The package's own numbers of its implementations."""


class NeuralTangentsEngine(OneCallEngine[BlockPlan]):
    """Computes kernels with neural-tangents; see the module.

    Args:
        task: The kernel to compute.
        implementation: A key of `IMPLEMENTATIONS`; None for structured derivatives, or for the
            contraction of Jacobians if the function has branches, see `add`.

    Raises:
        InputError: The kernel is Adam's, or the package is not installed.
    """

    def __init__(self, task: KernelTask, implementation: str | None = None):
        if task.sign:
            raise InputError(
                "engine 'neural-tangents' does not have the Adam kernel; use 'jacobian' or "
                "'vector-product'"
            )
        super().__init__(task)
        if implementation is None:
            branches = task.program.branches
            implementation = "jacobian-contraction" if branches else "structured-derivatives"
        self._implementation = implementation
        self._number = IMPLEMENTATIONS[implementation]
        load_neural_tangents()
        self._add = task.program.jitted(_added, static=2)

    def plan(self, max_block: int, budget: float) -> BlockPlan:
        """Returns a plan for a budget in bytes, guessing that full gradients need it all."""
        task = self.task
        gradients = 3 * task.program.outputs * nbytes(task.leaves) + task.program.bytes()
        largest = max(1, min(max_block, int(budget / 2 / gradients)))
        rows, columns = (cut(n, largest, n, task.shards)[0] for n in (task.n1, task.n2))
        return BlockPlan(rows=rows, columns=columns)

    def _arguments(
        self,
        plan: BlockPlan,
        total: KernelArray | jax.ShapeDtypeStruct,
        values: Values,
        first: Examples | Abstract,
        second: Examples | Abstract | None,
    ) -> tuple:
        return self._number, self.task.kept, total, *values, first, second

    def add(
        self,
        plan: BlockPlan,
        group: int,
        total: KernelArray,
        sides: tuple[tuple[Values, Examples], tuple[Values, Examples] | None],
        advance: Callable[[], None],
    ) -> KernelArray:
        """Returns a total plus the kernel of two blocks.

        Raises:
            InputError: Structured derivatives met an infinite value or slope in a branch that is
                not taken. They multiply derivatives, where the others select.
        """
        total = super().add(plan, group, total, sides, advance)
        structured = self._implementation == "structured-derivatives"
        if structured and self.task.program.branches and not jnp.isfinite(total).all():
            raise InputError(
                "neural-tangents' structured-derivatives computes every branch of lax.cond and "
                "lax.switch, and its result is not finite; use implementation="
                "'jacobian-contraction', which leaves out branches that are not taken"
            )
        return total

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Explains errors of the package that mean that it cannot trace the function."""
        try:
            yield
        except (AssertionError, AttributeError, NotImplementedError) as error:
            # The function itself has been traced before; most often a loop is the cause.
            raise InputError(
                f"neural-tangents' {self._implementation} cannot do an operation of this function; "
                "another implementation may"
            ) from error


def _added(
    program: Program,
    number: int,
    kept: int,
    total: KernelArray,
    leaves: Sequence[Array],
    constants: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array] | None,
) -> KernelArray:
    """Returns a total plus the kernel of two blocks of examples."""
    # Structured derivatives would take a gate for the use of a parameter, and be wrong or slow.
    gates = number != IMPLEMENTATIONS["structured-derivatives"]

    def batch(leaves: Sequence[Array], examples: Sequence[Array]) -> Array:
        def one(example: Sequence[Array]) -> Array:
            out, _ = program(leaves, constants, example, gates=gates)
            return out.reshape(kept, -1)

        # The package asks for one example at a time, and a vmap would hide structure from it.
        if examples[0].shape[0] == 1:
            return one([x[0] for x in examples])[None]
        return jax.vmap(one)(examples)

    ntk = load_neural_tangents().empirical_ntk_fn(
        batch, trace_axes=(2,), diagonal_axes=(), vmap_axes=0, implementation=number
    )
    with _default_settings():
        mean = ntk(first, second, leaves)
    # (n, m, r, r), and a mean over the traced axis.
    return total + (mean * (program.outputs // kept)).transpose(0, 2, 1, 3).astype(total.dtype)


@contextmanager
def _default_settings() -> Iterator[None]:
    """Sets jax's defaults for the package's code, and ignores warnings of slower correct paths."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        warnings.filterwarnings("ignore", message="No Jacobian rule found")
        yield


@cache
def load_neural_tangents() -> types.ModuleType:
    """Returns the package neural-tangents, made to work on the installed jax.

    Other code of the same process that imports the package gets the same module.

    Raises:
        InputError: The package is not installed; it cannot be with Python 3.14 and above.

    Example:
        >>> from ntk.engines.neural_tangents import load_neural_tangents
        >>> ntk_fn = load_neural_tangents().empirical_ntk_fn(lambda p, x: x @ p, trace_axes=())
        >>> float(ntk_fn(jnp.ones((1, 3)), None, jnp.ones((3, 1))).squeeze())
        3.0
    """
    with _old_names(), warnings.catch_warnings():
        # Its first import causes warnings of escapes in docstrings and of deprecated names of jax.
        warnings.simplefilter("ignore")
        try:
            package = importlib.import_module("neural_tangents")
        except ModuleNotFoundError as error:
            if error.name != "neural_tangents":
                raise
            raise InputError(
                "engine 'neural-tangents' needs the package neural-tangents, which is not "
                "installed; it is a dependency of fusion-jax for Python below 3.14 only, as its "
                "requirement TensorFlow has no newer wheels"
            ) from None
    empirical: Any = importlib.import_module("neural_tangents._src.empirical")
    empirical._get_primals_out_and_pullback = _primals_out_and_pullback(empirical._backward_pass)
    empirical._eqn_vjp_fn = _transposed
    # Names that it uses at run time and that these modules no longer have, or warn about.
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
    """Adds the names that neural-tangents looks up in jax while it is imported."""
    util: Any = types.ModuleType("jax.util")
    util.safe_map = lambda f, *args: [f(*x) for x in zip(*args, strict=True)]
    util.safe_zip = lambda *args: list(zip(*args, strict=True))
    modules = {
        "jax.util": util,
        "neural_tangents.experimental": types.ModuleType("neural_tangents.experimental"),
    }
    names: dict[tuple[types.ModuleType, str], object] = {
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


def _overlay(module: types.ModuleType, **names: object) -> types.ModuleType:
    """Returns a module that looks names up in ``names`` first, then in ``module``."""
    over: Any = types.ModuleType(module.__name__)
    over.__getattr__ = lambda name: getattr(module, name)
    vars(over).update(names)
    return over


def _bind(eqn: jex_core.JaxprEqn, args: Sequence[ArrayLike]) -> PyTree:
    return eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))


def _linear(
    function: Callable[..., PyTree], primals: Sequence[PyTree]
) -> tuple[PyTree, types.SimpleNamespace, list[ArrayLike]]:
    """Returns the value of a function, and its derivative as a jaxpr with constants.

    Equations of the derivative that do not depend on its inputs are evaluated and become constants,
    since the package assumes that every other variable is linear.
    """

    def literal(atom: object) -> bool:
        return isinstance(atom, jex_core.Literal)

    with jax.disable_jit():  # so that the jaxpr has no calls
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


def _primals_out_and_pullback(backward_pass: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns a replacement of the package's function of that name, based on `_linear`."""

    def primals_out_and_pullback(
        fn: Callable[..., PyTree],
        mode: object,
        _j_rules: bool,
        _s_rules: bool,
        _fwd: object,
        *primals: PyTree,
    ) -> tuple[PyTree, Callable[..., PyTree]]:
        out, jaxpr, consts = _linear(fn, primals)

        def pullback(*cotangents: PyTree) -> PyTree:
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
    """Returns cotangents of the undefined inputs of an equation, and None for the others.

    It replaces the package's ``_eqn_vjp_fn``.
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
    # The package passes a reshape's cotangent in the shape of its input.
    cotangent = cotangent.reshape(jax.eval_shape(function, *avals).shape)
    for i, value in zip(undefined, jax.linear_transpose(function, *avals)(cotangent), strict=True):
        out[i] = value
    return out
