"""Traces a function as a flat program of one example, and finds the products with its parameters.

The gradient of a matrix that is multiplied with inputs X (t, a) is X^T D, where D (t, b) is the
gradient with respect to the product. For a table from which rows are looked up it is the same with
one-hot rows X. The pair (X, D) is far smaller than the gradient, and an inner product of two
gradients needs only <X X'^T, D D'^T>. `Program` finds these uses of parameters in any traced
function. It evaluates the function so that JAX's own differentiation gives D: a zero is added to
each product, and D is the gradient with respect to that zero.

Axis letters: n examples, o outputs, e batched products (experts), t positions, a inputs and
b outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core
from jax.stages import Wrapped
from jax.typing import ArrayLike
from jaxtyping import Array, Num, PyTree

_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
# These place the values of a batch of one example, and do not apply to a block of examples.
_PLACEMENTS = {"sharding_constraint", "reshard", "mesh_cast"}
_PLACES = ("sharding", "out_sharding")
# These change the layout of a parameter, but neither inner products nor signs of its gradients.
_LAYOUTS = {"transpose", "reshape", "squeeze", "convert_element_type", "copy", "copy_p"}


class Operation(NamedTuple):
    """One primitive operation on numbered values.

    Args:
        eqn: The operation; None for a gate at the entry of a branch, see `_gate`.
        ins: The numbers of its arguments.
        outs: The numbers of its results.
        taken: For an operation in a branch, the number of whether the branch is taken.
    """

    eqn: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    taken: int | None = None


@dataclass(frozen=True)
class ParameterUse:
    """One product or look-up with a parameter.

    Args:
        op: The number of the operation.
        other: The number of the other operand: inputs, or indices of rows.
        lookup: Whether rows are looked up.
        perm: The permutation of the inputs' axes to (e, t, a); empty for a look-up.
        shape: The sizes (e, t, a, b).
        first: Whether the parameter is the first operand, so that the product is (e, b, t).
        clipped: Whether a look-up clips indices that are out of range; else it ignores them.
        layout: The operations that map the parameter to (e, a, b); uses of the same layout can be
            joined.
    """

    op: int
    other: int
    lookup: bool
    perm: tuple[int, ...]
    shape: tuple[int, int, int, int]
    first: bool
    clipped: bool

    layout: Hashable

    def inputs(self, value: Array) -> Array:
        """Returns inputs X (e, t, a) of a product, or rows (t,) of a look-up, a if ignored."""
        e, t, a, _ = self.shape
        if not self.lookup:
            return value.transpose(self.perm).reshape(e, t, a)
        rows = value.reshape(t).astype(jnp.int32)
        if self.clipped:
            return rows.clip(0, a - 1)
        return jnp.where((rows >= 0) & (rows < a), rows, a)

    def cotangent(self, value: Array) -> Num[Array, "e t b"]:
        """Returns the gradient D (e, t, b) with respect to the product."""
        e, t, _, b = self.shape
        return value.reshape(e, b, t).swapaxes(1, 2) if self.first else value.reshape(e, t, b)


class Program:
    """A function of parameters and one example as a flat list of operations.

    Calls are inlined, operations that the output does not need are dropped, and arrays that the
    function closes over become arguments instead of constants in compiled code.

    Args:
        function: Takes a list of parameters and a list of arrays of one example; returns a vector.
        leaves: Shapes and dtypes of the parameters.
        example: Shapes and dtypes of one example.

    Example:
        >>> shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
        >>> program = Program(lambda p, x: x[0] @ p[0] + p[1], [shape(3, 2), shape(2)], [shape(3)])
        >>> program.uses[0][0].shape, 1 in program.uses, program.outputs
        ((1, 1, 3, 2), False, 2)
    """

    operations: list[Operation]
    constants: list[Array]
    uses: dict[int, tuple[ParameterUse, ...]]
    """By number, the parameters that are only used in products or look-ups of one layout."""
    unused: frozenset[int]
    """The parameters that the output does not depend on."""
    plan_bytes: dict[Hashable, int]
    """A cache for callers: the memory of plans of this program."""

    def __init__(
        self,
        function: Callable[[list[Array], list[Array]], Array],
        leaves: Sequence[jax.ShapeDtypeStruct],
        example: Sequence[jax.ShapeDtypeStruct],
    ):
        closed = jax.make_jaxpr(function)(list(leaves), list(example))
        self.constants = []
        self.plan_bytes = {}
        self._jitted: dict[Callable, Wrapped] = {}
        self._literals: dict[int, Any] = {}
        self._constant_ids: list[int] = []
        self._count = 0
        self.operations = []
        arguments = [self._new() for _ in closed.jaxpr.invars]
        self._leaf_ids = arguments[: len(leaves)]
        self._example_ids = arguments[len(leaves) :]
        (self._out,) = self._inline(closed.jaxpr, closed.consts, arguments)
        self._drop_dead()
        self.outputs: int = closed.out_avals[0].shape[0]
        self.uses, self.unused = self._find_uses(leaves)

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _inline(
        self,
        jaxpr: jex_core.Jaxpr,
        consts: Sequence[ArrayLike],
        arguments: Sequence[int],
        taken: int | None = None,
    ) -> list[int]:
        numbers: dict[jex_core.Var, int] = {}
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = self._new()
            self._constant_ids.append(numbers[var])
            self.constants.append(jnp.asarray(const))
        numbers.update(zip(jaxpr.invars, arguments, strict=True))

        def number(atom: jex_core.Var | jex_core.Literal) -> int:
            if not isinstance(atom, jex_core.Literal):
                return numbers[atom]
            new = self._new()
            self._literals[new] = atom.val
            return new

        for eqn in jaxpr.eqns:
            ins = tuple(map(number, eqn.invars))
            if eqn.primitive.name in _PLACEMENTS:
                outs = list(ins)
            elif eqn.primitive.name in _CALLS:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                outs = self._inline(
                    getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), ins, taken
                )
            elif eqn.primitive.name == "cond":
                outs = self._select(eqn, ins, taken)
            else:
                outs = [self._new() for _ in eqn.outvars]
                self.operations.append(Operation(eqn, ins, tuple(outs), taken))
            numbers.update(zip(eqn.outvars, outs, strict=True))
        return [number(atom) for atom in jaxpr.outvars]

    def _select(self, eqn: Any, ins: Sequence[int], taken: int | None) -> list[int]:
        """Inlines all branches and a choice of one, as a batch of examples would run them.

        A branch that is not taken may compute infinite values and slopes. The choice drops the
        values, and gates drop the gradients.
        """
        index, *operands = ins
        branches = []
        for number, branch in enumerate(eqn.params["branches"]):
            (now,) = self._traced(
                partial(_is_taken, number),
                [eqn.invars[0].aval] if taken is None else [eqn.invars[0].aval, _BOOL],
                [index] if taken is None else [index, taken],
            )
            gated = []
            for operand, var in zip(operands, eqn.invars[1:], strict=True):
                if jnp.issubdtype(var.aval.dtype, jnp.inexact):
                    gated.append(self._new())
                    self.operations.append(Operation(None, (now, operand), (gated[-1],)))
                else:
                    gated.append(operand)
            branches.append(self._inline(branch.jaxpr, branch.consts, gated, now))
        outs = []
        for var, *cases in zip(eqn.outvars, *branches, strict=True):
            avals = [eqn.invars[0].aval, *(var.aval for _ in cases)]
            outs += self._traced(lax.select_n, avals, [index, *cases])
        return outs

    def _traced(
        self, function: Callable[..., Array], avals: Sequence[Any], ins: Sequence[int]
    ) -> list[int]:
        """Adds the operations of a function of numbered values."""
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        return self._inline(jax.make_jaxpr(function)(*shapes).jaxpr, (), ins)

    def _drop_dead(self) -> None:
        live, kept = {self._out}, []
        for op in reversed(self.operations):
            if live.intersection(op.outs):
                live.update(op.ins if op.taken is None else (*op.ins, op.taken))
                kept.append(op)
        self.operations = kept[::-1]

    def _find_uses(
        self, leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> tuple[dict[int, tuple[ParameterUse, ...]], frozenset[int]]:
        laid_out: dict[int, tuple[int, tuple[Hashable, ...]]] = {
            number: (leaf, ()) for leaf, number in enumerate(self._leaf_ids)
        }
        found: dict[int, list[ParameterUse]] = {}
        touched, other = set(), set()
        for index, op in enumerate(self.operations):
            slots = [slot for slot, number in enumerate(op.ins) if number in laid_out]
            if not slots:
                continue
            touched.update(laid_out[op.ins[slot]][0] for slot in slots)
            leaf, chain = laid_out[op.ins[slots[0]]]
            if op.eqn is None:
                laid_out[op.outs[0]] = leaf, chain
                continue
            name = op.eqn.primitive.name
            if name in _LAYOUTS and jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.floating):
                steps = (name, op.eqn.outvars[0].aval.shape, str(op.eqn.params))
                laid_out[op.outs[0]] = leaf, (*chain, steps)
                continue
            use = _use(index, op, slots[0]) if len(slots) == 1 else None
            if use is None:
                other.update(laid_out[op.ins[slot]][0] for slot in slots)
            else:
                found.setdefault(leaf, []).append(replace(use, layout=(chain, use.layout)))
        if self._out in laid_out:
            touched.add(laid_out[self._out][0])
            other.add(laid_out[self._out][0])
        uses = {
            leaf: tuple(uses)
            for leaf, uses in found.items()
            if leaf not in other and len({use.layout for use in uses}) == 1
        }
        return uses, frozenset(range(len(leaves))) - touched

    def __call__(
        self,
        leaves: Sequence[Array],
        constants: Sequence[Array],
        example: Sequence[Array],
        taps: Mapping[int, Array] | None = None,
        gates: bool = True,
    ) -> tuple[Num[Array, " o"], dict[int, Array]]:
        """Runs the program.

        Args:
            leaves: The parameters.
            constants: `constants`, possibly traced.
            example: The arrays of one example.
            taps: By the number of an operation, a value to add to its result.
            gates: Whether branches that are not taken get gradients of zero, whatever they compute.
                Forward derivatives do not need it: the choice of a branch drops the others'.

        Returns:
            The output; and for every operation with a tap, the operand beside the parameter.
        """
        taps = {} if taps is None else taps
        others = {use.op: use.other for uses in self.uses.values() for use in uses}
        values = dict(self._literals)
        values.update(zip(self._leaf_ids, leaves, strict=True))
        values.update(zip(self._constant_ids, constants, strict=True))
        values.update(zip(self._example_ids, example, strict=True))
        operands = {}
        gate = _gate if gates else lambda _, x: x
        for index, op in enumerate(self.operations):
            args = [values[i] for i in op.ins]
            results = [gate(*args)] if op.eqn is None else _run(op.eqn, args)
            if index in taps:
                operand, result = values[others[index]], results[0] + taps[index]
                if op.taken is not None:
                    taken = values[op.taken]
                    operand, result = _where(taken, operand), _gate(taken, result)
                operands[index], results = operand, [result]
            values.update(zip(op.outs, results, strict=True))
        return values[self._out], operands

    def jitted(self, function: Callable[..., PyTree], static: int) -> Wrapped:
        """Returns a jitted function of this program, the same one at every call.

        The function takes the program, then ``static`` hashable arguments, then pytrees of arrays.
        """
        if function not in self._jitted:
            self._jitted[function] = jax.jit(
                partial(function, self), static_argnums=tuple(range(static))
            )
        return self._jitted[function]

    @property
    def branches(self) -> bool:
        """Whether branches were inlined, all of which are computed."""
        return any(op.eqn is None for op in self.operations)

    def tap(self, use: ParameterUse) -> Array:
        """Returns the zero to add to a product."""
        aval = self.operations[use.op].eqn.outvars[0].aval
        return jnp.zeros(aval.shape, aval.dtype)

    def flops(self) -> int:
        """Returns the operations of the matrix products for one example, two per multiply-add."""
        return sum(_flops(op.eqn) for op in self.operations if op.eqn is not None)

    def bytes(self) -> int:
        """Returns the bytes of all intermediate values for one example."""
        eqns = [op.eqn for op in self.operations if op.eqn is not None]
        avals = [var.aval for eqn in eqns for var in eqn.outvars]
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in avals if hasattr(a, "shape"))


_BOOL = jax.ShapeDtypeStruct((), jnp.bool_)


def _is_taken(branch: int, index: Array, outer: Array | None = None) -> Array:
    """Returns whether a branch is taken, and the branch around it, if there is one."""
    taken = index.astype(jnp.int32) == branch
    return taken if outer is None else taken & outer


def _where(taken: Array, x: Array) -> Array:
    """Returns x if a branch is taken, else zeros."""
    return lax.select(jnp.broadcast_to(taken, x.shape), x, jnp.zeros_like(x))


@jax.custom_jvp
def _gate(taken: Array, x: Array) -> Array:
    """Returns x, with zero derivatives unless a branch is taken.

    Without it, a gradient of zero times an infinite slope would be NaN. The value itself is not
    selected, so that a parameter is not copied for each example.
    """
    return x


@_gate.defjvp
def _gate_jvp(primals: tuple[Array, Array], tangents: tuple[PyTree, Array]) -> tuple[Array, Array]:
    (taken, x), (_, tangent) = primals, tangents
    return x, _where(taken, tangent)


def _run(eqn: Any, args: list[ArrayLike]) -> list[Array]:
    if eqn.primitive.name == "broadcast_in_dim" and len(args) == 1:
        # Broadcast axes of size 1 are removed from the operand first, since neural-tangents assumes
        # that every axis of the operand has the size of the result's.
        shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
        kept = [axis for i, axis in enumerate(axes) if jnp.shape(args[0])[i] == shape[axis]]
        operand = lax.reshape(args[0], [shape[axis] for axis in kept])
        return [lax.broadcast_in_dim(operand, shape, kept)]
    params = dict(eqn.primitive.get_bind_params(eqn.params))
    params.update({name: None for name in _PLACES if params.get(name) is not None})
    result = eqn.primitive.bind(*args, **params)
    return result if eqn.primitive.multiple_results else [result]


def _flops(eqn: Any) -> int:
    if eqn.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _use(index: int, op: Operation, slot: int) -> ParameterUse | None:
    name = op.eqn.primitive.name
    if name == "dot_general":
        return _product(index, op, slot)
    if name == "gather" and slot == 0:
        return _lookup(index, op)
    return None


def _product(index: int, op: Operation, slot: int) -> ParameterUse:
    contracted, batch = op.eqn.params["dimension_numbers"]
    shapes = [var.aval.shape for var in op.eqn.invars]

    def free(side: int) -> tuple[int, ...]:
        bound = {*contracted[side], *batch[side]}
        return tuple(i for i in range(len(shapes[side])) if i not in bound)

    def size(side: int, axes: Sequence[int]) -> int:
        return math.prod(shapes[side][i] for i in axes)

    beside = 1 - slot
    e, a = size(slot, batch[slot]), size(slot, contracted[slot])
    t, b = size(beside, free(beside)), size(slot, free(slot))
    return ParameterUse(
        op=index,
        other=op.ins[beside],
        lookup=False,
        perm=(*batch[beside], *free(beside), *contracted[beside]),
        shape=(e, t, a, b),
        first=slot == 0,
        clipped=False,
        layout=(tuple(batch[slot]), tuple(contracted[slot])),
    )


def _lookup(index: int, op: Operation) -> ParameterUse | None:
    """Finds rows ``table[ids]``; other gathers are not recognized."""
    table, ids = (var.aval.shape for var in op.eqn.invars)
    out = op.eqn.outvars[0].aval.shape
    numbers, mode = op.eqn.params["dimension_numbers"], op.eqn.params["mode"]
    lead = len(ids) - 1
    rows = (
        ids[-1:] == (1,)
        and numbers.offset_dims == tuple(range(lead, len(out)))
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(op.eqn.params["slice_sizes"]) == (1, *table[1:])
    )
    if not rows:
        return None
    return ParameterUse(
        op=index,
        other=op.ins[1],
        lookup=True,
        perm=(),
        shape=(1, math.prod(ids[:-1]), table[0], math.prod(table[1:])),
        first=False,
        clipped=mode == lax.GatherScatterMode.CLIP,
        layout="rows",
    )
