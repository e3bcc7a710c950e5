"""Matrix product operators: a matrix as a chain of small tensors, and products with it.

A matrix of d = i_1 ... i_m rows and o = j_1 ... j_m columns is the product of cores T_k of shape
(b_{k-1}, i_k, j_k, b_k), summed over the bonds b_1 to b_{m-1}; b_0 = b_m = 1.

Axis letters in shapes: d inputs, o outputs, n positions.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import opt_einsum
from flax import nnx
from jaxtyping import Array, Float, Int

from fusion_jax.errors import InputError
from fusion_jax.forms import Form, Frozen, dtype_of
from fusion_jax.submlps import wide


class Layout(NamedTuple):
    """How a matrix is split into cores.

    Args:
        inputs: i_1 ... i_m; their product is at least the rows, which are filled up with zeros.
        outputs: j_1 ... j_m, likewise for the columns.
        bonds: b_1 ... b_{m-1}.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bonds: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shapes of the cores."""
        ends = (1, *self.bonds, 1)
        return list(zip(ends, self.inputs, self.outputs, ends[1:], strict=False))

    @property
    def params(self) -> int:
        """The numbers in all cores."""
        return sum(math.prod(shape) for shape in self.shapes)

    def capped(self, bond: int) -> Layout:
        """The layout with no bond above a number."""
        return self._replace(bonds=tuple(min(b, bond) for b in self.bonds))


def full_bonds(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[int, ...]:
    """The bonds at which every matrix is represented exactly.

    Args:
        inputs: i_1 ... i_m.
        outputs: j_1 ... j_m.

    Returns:
        ``b_k = min(prod_{l<=k} i_l j_l, prod_{l>k} i_l j_l)``.

    References:
        MPOP (Liu et al., ACL 2021), equation 2.

    Example:
        >>> full_bonds((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
        (12, 192, 384, 16)
    """
    sizes = [i * j for i, j in zip(inputs, outputs, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


@lru_cache
def balanced(n: int, parts: int) -> tuple[int, ...]:
    """Factors of about the same size whose product is n, or a little more where n has none.

    Args:
        n: What to factorise.
        parts: How many factors.

    Returns:
        The factors of the smallest number from n on of which the largest factor is at most twice
        the geometric mean, rounded up; the largest in the middle.

    Example:
        >>> balanced(768, 5), balanced(3072, 5), balanced(7, 2)
        ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4), (4, 2))
    """
    most = math.ceil(2 * n ** (1 / parts))
    while (factors := _factors(n, parts)) is None or max(factors) > most:
        n += 1
    ordered: list[int] = []
    for i, factor in enumerate(sorted(factors, reverse=True)):
        ordered = [*ordered, factor] if i % 2 else [factor, *ordered]
    return tuple(ordered)


def _factors(n: int, parts: int) -> list[int] | None:
    """Factors of which the largest is as small as can be; None if a prime is too large."""
    if parts == 1:
        return [n]
    best = None
    for first in range(1, math.floor(n ** (1 / parts) + 1e-9) + 1):
        if n % first == 0:
            rest = _factors(n // first, parts - 1)
            assert rest is not None
            found = [first, *rest]
            if best is None or (max(found), sum(found)) < (max(best), sum(best)):
                best = found
    return best


def chain(d: int, o: int, parts: int) -> Layout:
    """The layout that adds parameters: two outer cores, and square matrices between them.

    Args:
        d: Rows.
        o: Columns.
        parts: Cores, at least 2.

    Returns:
        A layout at full bonds in which all inner factors are 1.

    References:
        OPF (Gao et al., ACL 2023), section 4.1: 768 x 3072 as (32, 1, ..., 24) x (64, 1, ..., 48).

    Example:
        >>> chain(768, 3072, 4).shapes
        [(1, 32, 64, 1152), (1152, 1, 1, 1152), (1152, 1, 1, 1152), (1152, 24, 48, 1)]
    """
    (a, b), (c, e) = balanced(d, 2), balanced(o, 2)
    ones = (1,) * (parts - 2)
    inputs, outputs = (max(a, b), *ones, min(a, b)), (max(c, e), *ones, min(c, e))
    return Layout(inputs, outputs, full_bonds(inputs, outputs))


def layout_of(d: int, o: int, parts: int, *, share: float | None = None) -> Layout:
    """A balanced layout of a matrix.

    Args:
        d: Rows.
        o: Columns.
        parts: Cores.
        share: The most parameters, as a share of the matrix's; None for full bonds.

    Returns:
        The layout, whose bonds have one limit, the largest that keeps to the share.

    Raises:
        InputError: Even bonds of 1 are above the share.
    """
    inputs, outputs = balanced(d, parts), balanced(o, parts)
    orders = [Layout(inputs, j, full_bonds(inputs, j)) for j in (outputs, outputs[::-1])]
    full = min(orders, key=lambda layout: layout.params)
    if share is None:
        return full
    limit = share * d * o
    most = bisect.bisect_right(
        range(1, max(full.bonds, default=1) + 1), limit, key=lambda bond: full.capped(bond).params
    )
    if not most:
        raise InputError(
            f"{parts} cores of a {d} x {o} matrix have at least {full.capped(1).params} "
            f"parameters; a share of {share:g} allows {limit:.0f}"
        )
    return full.capped(most)


class Train(NamedTuple):
    """A matrix as a chain of cores.

    Args:
        cores: T_1 ... T_m, (b_{k-1}, i_k, j_k, b_k); every bond's singular values are half in the
            core before it and half in the one after it.
        spectra: The singular values of the matrix at each bond, before truncation.
        bound: sqrt(sum_k eps_k^2), eps_k^2 the sum of squares of the values cut off at bond k: what
            the Frobenius norm of the error is at most.
    """

    cores: tuple[Float[Array, "_ _ _ _"], ...]
    spectra: tuple[Float[Array, " _"], ...]
    bound: Float[Array, ""]


def decompose(matrix: Float[Array, "d o"], layout: Layout) -> Train:
    """Decomposes a matrix by singular value decompositions, one bond after the other.

    Exact at full bonds. At smaller ones, what is cut off at each bond is the least that can be,
    given what was cut off at those after it.

    Args:
        matrix: The matrix.
        layout: The factors and bonds.

    Returns:
        The cores, in float32 or float64.

    References:
        MPOP (Liu et al., ACL 2021), section 3 and theorem 1 of the supplement, with the squares
        that its equation 3 leaves out.

    Example:
        >>> matrix = jnp.arange(24.0).reshape(4, 6)
        >>> train = decompose(matrix, Layout((2, 2), (2, 3), (4,)))
        >>> bool(jnp.allclose(contract(train.cores, (4, 6)), matrix, atol=1e-4))
        True
    """
    inputs, outputs, bonds = layout
    m = len(inputs)
    rest = _split(wide(matrix), layout)
    cores: list[Array] = []
    spectra: list[Array] = []
    before = 1
    for k in range(m - 1):
        inside = inputs[k] * outputs[k]
        if inside == 1 and k:
            # What is left is diag(values) V already, of which the left factor is the identity.
            cores.append(jnp.eye(before, dtype=rest.dtype).reshape(before, 1, 1, before))
            spectra.append(spectra[-1])
            continue
        left, values, right = signed_svd(rest.reshape(before * inside, -1))
        cores.append(left.reshape(before, inputs[k], outputs[k], -1))
        spectra.append(values)
        rest, before = values[:, None] * right, len(values)
    cores.append(rest.reshape(before, inputs[-1], outputs[-1], 1))
    bound = jnp.zeros((), rest.dtype)
    for values, bond in zip(spectra, bonds, strict=True):
        bound += jnp.square(values[bond:]).sum()
    values = spectra
    if any(b < len(s) for b, s in zip(bonds, spectra, strict=True)):
        cores, values = _truncated(cores, bonds)
    return Train(_balanced_gauge(cores, values), tuple(spectra), jnp.sqrt(bound))


def _split(matrix: Array, layout: Layout) -> Array:
    """The matrix filled up with zeros, with axes i_1, j_1, ..., i_m, j_m."""
    inputs, outputs, _ = layout
    d, o = matrix.shape
    matrix = jnp.pad(matrix, ((0, math.prod(inputs) - d), (0, math.prod(outputs) - o)))
    m = len(inputs)
    order = [axis for k in range(m) for axis in (k, m + k)]
    return matrix.reshape(*inputs, *outputs).transpose(order)


def signed_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """An economical decomposition whose signs do not depend on the backend."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    largest = jnp.take_along_axis(left, jnp.abs(left).argmax(0)[None], axis=0)
    sign = jnp.where(largest < 0, -1, 1).astype(left.dtype)
    return left * sign, values, right * sign.T


def _truncated(cores: list[Array], bonds: Sequence[int]) -> tuple[list[Array], list[Array]]:
    """Cuts bonds from the last to the first, then makes the cores orthonormal from the left."""
    cores = list(cores)
    for k in range(len(cores) - 1, 0, -1):
        b, i, j, c = cores[k].shape
        left, values, right = signed_svd(cores[k].reshape(b, i * j * c))
        keep = min(bonds[k - 1], len(values))
        cores[k] = right[:keep].reshape(keep, i, j, c)
        carried = left[:, :keep] * values[None, :keep]
        cores[k - 1] = jnp.tensordot(cores[k - 1], carried, 1, precision="highest")
    found = []
    for k in range(len(cores) - 1):
        b, i, j, c = cores[k].shape
        left, values, right = signed_svd(cores[k].reshape(b * i * j, c))
        cores[k] = left.reshape(b, i, j, -1)
        found.append(values)
        carried = values[:, None] * right
        cores[k + 1] = jnp.tensordot(carried, cores[k + 1], 1, precision="highest")
    return cores, found


def recompressed(cores: Sequence[Array], bonds: Sequence[int]) -> Train:
    """The cores of the nearest matrix with smaller bonds, found without making the matrix.

    Args:
        cores: T_1 ... T_m, in any gauge.
        bonds: The new bonds, none above the old.

    Returns:
        The cores, the spectra before truncation, and the bound on what truncation changes.

    Example:
        >>> layout = Layout((2, 3), (2, 2), (4,))
        >>> cores = decompose(jnp.arange(24.0).reshape(6, 4), layout).cores
        >>> recompressed(cores, (2,)).cores[0].shape
        (1, 2, 2, 2)
    """
    left = [wide(core) for core in cores]
    for k in range(len(left) - 1):
        b, i, j, c = left[k].shape
        q, r = jnp.linalg.qr(left[k].reshape(b * i * j, c))
        left[k] = q.reshape(b, i, j, -1)
        left[k + 1] = jnp.tensordot(r, left[k + 1], 1, precision="highest")
    whole, spectra = _truncated(left, [core.shape[-1] for core in left[:-1]])
    bound = jnp.zeros((), left[0].dtype)
    for values, bond in zip(spectra, bonds, strict=True):
        bound += jnp.square(values[bond:]).sum()
    values = spectra
    if any(b < len(s) for b, s in zip(bonds, spectra, strict=True)):
        whole, values = _truncated(whole, bonds)
    return Train(_balanced_gauge(whole, values), tuple(spectra), jnp.sqrt(bound))


def _balanced_gauge(cores: list[Array], spectra: Sequence[Array]) -> tuple[Array, ...]:
    """The same matrix with the square roots of a bond's values on both of its sides."""
    result = list(cores)
    for k, values in enumerate(spectra):
        # A value of 0 has zeros on its right, which nothing scales.
        safe = values > jnp.finfo(values.dtype).eps * values.max()
        root = jnp.sqrt(jnp.where(safe, values, 1))
        result[k] = result[k] * root[None, None, None]
        result[k + 1] = result[k + 1] / root[:, None, None, None]
    return tuple(result)


def contract(cores: Sequence[Array], shape: tuple[int, int]) -> Float[Array, "d o"]:
    """The matrix that cores make.

    Args:
        cores: T_1 ... T_m.
        shape: Its rows and columns; what was filled up is cut off.

    Returns:
        The matrix.
    """
    whole = cores[0]
    for core in cores[1:]:
        whole = jnp.tensordot(whole, core, 1, precision="highest")
    m = len(cores)
    axes = range(1, 2 * m + 1)
    whole = whole.reshape(whole.shape[1:-1]).transpose(*(a - 1 for a in (*axes[::2], *axes[1::2])))
    d, o = (math.prod(core.shape[axis] for core in cores) for axis in (1, 2))
    return whole.reshape(d, o)[: shape[0], : shape[1]]


def entropies(spectra: Sequence[Float[Array, " _"]]) -> Float[Array, " _"]:
    """The entanglement entropy of each bond, in nats.

    Args:
        spectra: Its singular values, see `Train`.

    Returns:
        ``- sum_j v_j ln v_j`` with v the values divided by their sum.

    References:
        MPOP (Liu et al., ACL 2021), section 3.2.

    Example:
        >>> bool(jnp.isclose(entropies([jnp.ones(8)])[0], math.log(8)))
        True
    """
    shares = [values / values.sum() for values in spectra]
    return jnp.stack([-(v * jnp.log(jnp.where(v > 0, v, 1))).sum() for v in shares])


WRITE = 128
"""What writing a number of an intermediate result costs, in multiply-adds: operations alone favour
orders with many small products, which are slow."""


class Plan(NamedTuple):
    """In which order a product is computed.

    Args:
        subscripts: For ``einsum``: the input split into factors, and the cores.
        path: Which two operands are multiplied, one step after the other.
        flops: Operations (two a multiply-add) of this order.
        rebuild_flops: Operations of making the matrix first and multiplying then.
        rebuilds: Whether making the matrix first is this order.
        cost: What this order costs by the measure it was chosen by, see `plan`.
    """

    subscripts: str
    path: tuple[tuple[int, ...], ...]
    flops: int
    rebuild_flops: int
    rebuilds: bool
    cost: int


@lru_cache(maxsize=4096)
def plan(n: int, layout: Layout, *, transposed: bool = False) -> Plan:
    """The cheapest order of a product of n rows with a matrix made of cores.

    Args:
        n: Rows of the input.
        layout: The cores.
        transposed: Whether the product is with the transposed matrix.

    Returns:
        The order of least cost, by dynamic programming over all orders: multiply-adds, and `WRITE`
        for each number of a result.

    Example:
        >>> small = Layout((32, 24), (64, 48), (8,))
        >>> plan(1, small).rebuilds, plan(1, small).flops < plan(1, small).rebuild_flops
        (False, True)
    """
    m = len(layout.inputs)
    symbol = opt_einsum.get_symbol
    rows, columns = [symbol(k) for k in range(m)], [symbol(m + k) for k in range(m)]
    bonds = [symbol(2 * m + k) for k in range(m + 1)]
    batch = symbol(3 * m + 1)
    cores = [f"{bonds[k]}{rows[k]}{columns[k]}{bonds[k + 1]}" for k in range(m)]
    # Ends of the chain and factors of 1 are left out, as the input has no axes for them.
    drop = {bonds[0], bonds[m]}
    drop |= {s for s, size in zip(rows, layout.inputs, strict=True) if size == 1}
    drop |= {s for s, size in zip(columns, layout.outputs, strict=True) if size == 1}
    cores = ["".join(s for s in core if s not in drop) for core in cores]
    ins, outs = (columns, rows) if transposed else (rows, columns)
    source = batch + "".join(s for s in ins if s not in drop)
    target = batch + "".join(s for s in outs if s not in drop)
    subscripts = f"{source},{','.join(cores)}->{target}"
    sizes = {batch: n}
    sizes |= dict(zip(rows, layout.inputs, strict=True))
    sizes |= dict(zip(columns, layout.outputs, strict=True))
    sizes |= dict(zip(bonds, (1, *layout.bonds, 1), strict=True))
    shapes = [tuple(sizes[s] for s in term) for term in (source, *cores)]
    search = opt_einsum.DynamicProgramming(minimize=f"combo-{WRITE}")
    found, _ = opt_einsum.contract_path(subscripts, *shapes, shapes=True, optimize=search)
    path = tuple(tuple(pair) for pair in found)
    # The matrix is made from the left, as `contract` does.
    rebuild = _cost([set(core) for core in cores], sizes)
    entries = math.prod(layout.inputs) * math.prod(layout.outputs)
    last = n * (entries + WRITE * (math.prod(layout.inputs if transposed else layout.outputs)))
    direct = _path_cost([set(source), *map(set, cores)], path, set(target), sizes)
    rebuilds = m > 1 and (_input_comes_last(path) or rebuild.cost + last <= direct.cost)
    rebuild_flops = 2 * (rebuild.multiplies + n * entries)
    return Plan(
        subscripts,
        path,
        rebuild_flops if rebuilds else 2 * direct.multiplies,
        rebuild_flops,
        rebuilds,
        rebuild.cost + last if rebuilds else direct.cost,
    )


class _Cost(NamedTuple):
    multiplies: int
    cost: int


def _path_cost(
    terms: list[set[str]],
    path: Sequence[tuple[int, ...]],
    target: set[str],
    sizes: Mapping[str, int],
) -> _Cost:
    """What an order costs."""
    terms, multiplies, written = list(terms), 0, 0
    for pair in path:
        both: set[str] = set().union(*(terms.pop(i) for i in sorted(pair, reverse=True)))
        left = both & target.union(*terms)
        multiplies += math.prod(sizes[s] for s in both)
        written += math.prod(sizes[s] for s in left)
        terms.append(left)
    return _Cost(multiplies, multiplies + WRITE * written)


def _cost(cores: list[set[str]], sizes: Mapping[str, int]) -> _Cost:
    """What making the matrix from the left costs."""
    every = set().union(*cores)
    inner = {s for s in every if sum(s in core for core in cores) > 1}
    path = [(0, len(cores) - 1 - k) if k else (0, 1) for k in range(len(cores) - 1)]
    # The result of a step comes last in the list of operands.
    return _path_cost(cores, path, every - inner, sizes)


def _input_comes_last(path: Sequence[tuple[int, ...]]) -> bool:
    """Whether operand 0 takes part in no step but the last."""
    where = 0
    for pair in path[:-1]:
        if where in pair:
            return False
        where -= sum(i < where for i in pair)
    return True


def product(
    x: Float[Array, "n d"], cores: Sequence[Array], columns: int, *, transposed: bool = False
) -> Float[Array, "n o"]:
    """``x W`` for a matrix W made of cores, in the cheapest order for these sizes.

    Args:
        x: The rows.
        cores: T_1 ... T_m.
        columns: How many columns of the result count; the rest was filled up.
        transposed: For ``x W^T``.

    Returns:
        The product, in the dtype of x.
    """
    shapes = [core.shape for core in cores]
    layout = Layout(
        tuple(s[1] for s in shapes), tuple(s[2] for s in shapes), tuple(s[3] for s in shapes[:-1])
    )
    found = plan(len(x), layout, transposed=transposed)
    if found.rebuilds:
        whole = contract(
            [core.astype(x.dtype) for core in cores],
            (columns, x.shape[1]) if transposed else (x.shape[1], columns),
        )
        return x @ (whole.T if transposed else whole)
    ins, outs = (layout.outputs, layout.inputs) if transposed else (layout.inputs, layout.outputs)
    x = jnp.pad(x, ((0, 0), (0, math.prod(ins) - x.shape[1])))
    operands = [x.reshape(len(x), *(i for i in ins if i > 1))]
    last = len(cores) - 1
    for k, core in enumerate(cores):
        b, i, j, c = core.shape
        kept = [*([b] if k else []), *(s for s in (i, j) if s > 1), *([c] if k < last else [])]
        operands.append(core.astype(x.dtype).reshape(kept))
    y = jnp.einsum(found.subscripts, *operands, optimize=list(found.path))
    return y.reshape(len(x), math.prod(outs))[:, :columns]


class Mpo(Form):
    """A linear layer whose matrix is made of cores.

    Args:
        *args: As for `Form`.
        inputs: See `Layout`.
        outputs: See `Layout`.
        bonds: See `Layout`.
        frozen: Numbers of the cores that do not train.
        **kwargs: As for `Form`.

    Example:
        >>> sizes = dict(inputs=(2, 3), outputs=(2, 2), bonds=(2,))
        >>> layer = Mpo(6, 4, use_bias=True, param_dtype=jnp.float32, **sizes)
        >>> layer(jnp.ones((3, 6))).shape
        (3, 4)
    """

    kind = "mpo"
    _axes = 4

    def __init__(
        self,
        *args: Any,
        inputs: Sequence[int],
        outputs: Sequence[int],
        bonds: Sequence[int],
        frozen: Sequence[int] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.layout = Layout(tuple(inputs), tuple(outputs), tuple(bonds))
        self.frozen = tuple(frozen)
        self.cores = nnx.List(
            [
                (Frozen if k in self.frozen else nnx.Param)(jnp.zeros(shape, kwargs["param_dtype"]))
                for k, shape in enumerate(self.layout.shapes)
            ]
        )

    def arrays(self) -> list[nnx.Variable]:
        """The cores."""
        return list(self.cores)

    def _values(self) -> list[Array]:
        return [core[...] for core in self.cores]

    def _matrix(self) -> Array:
        return contract(self._values(), (self.in_features, self.out_features))

    def times(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """``x W``, in the cheapest order for as many positions as there are."""
        y = product(x.reshape(-1, x.shape[-1]), self._values(), self.out_features)
        return y.reshape(*x.shape[:-1], -1)

    @property
    def flops(self) -> int:
        """Operations (two a multiply-add) for one position, in batches of 1,024."""
        return round(plan(1024, self.layout).flops / 1024)

    def spec(self) -> dict[str, Any]:
        """The form and its layout."""
        fields = {name: list(sizes) for name, sizes in self.layout._asdict().items()}
        return {"form": self.kind, **fields, "frozen": list(self.frozen)}


class MpoEmbed(Mpo):
    """An embedding whose matrix, a row per token, is made of cores.

    The arguments are those of `Mpo`; inputs are the tokens, outputs the features.
    """

    kind = "mpo-embedding"

    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n o"]:  # type: ignore[override]
        """The rows of tokens, each core looked up at its digit of the token's number."""
        flat = ids.reshape(-1)
        digits = jnp.unravel_index(flat, self.layout.inputs)
        trained = [core.dtype for core in self.cores if isinstance(core, nnx.Param)]
        cores = [core.astype((trained or [self.dtype])[0]) for core in self._values()]
        rows = cores[0][0][digits[0]]  # (n, j, b)
        for core, digit in zip(cores[1:], digits[1:], strict=True):
            rows = jnp.einsum("nja,ankb->njkb", rows, core[:, digit])
            rows = rows.reshape(len(flat), -1, core.shape[-1])
        return rows.reshape(len(flat), -1)[:, : self.out_features].reshape(*ids.shape, -1)

    def attend(self, x: Float[Array, "*n o"]) -> Float[Array, "*n d"]:
        """Products of states with all rows, the logits of a tied head."""
        flat = x.reshape(-1, x.shape[-1])
        y = product(flat, self._values(), self.in_features, transposed=True)
        return y.reshape(*x.shape[:-1], -1)

    def plain(self) -> nnx.Embed:
        """The same function as a plain embedding."""
        make = partial(nnx.Embed, self.in_features, self.out_features, param_dtype=self.dtype)
        new = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        new.embedding.set_value(self.matrix())
        return new

    @classmethod
    def abstract(cls, linear: Any, **spec: Any) -> Any:
        """The form of an embedding, with shapes in place of arrays."""
        d, o, dtype = linear.num_embeddings, linear.features, dtype_of(linear)
        return nnx.eval_shape(lambda: cls(d, o, use_bias=False, param_dtype=dtype, **spec))


AnyEmbed = nnx.Embed | MpoEmbed
