"""Makes a model smaller: finds its MLPs, compresses them, and reports what changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method, Solution
from fusion_jax.mlp import GatedMlp, Mlp, SubMLPs
from fusion_jax.origin import Origin
from fusion_jax.progress import progress as show_progress
from fusion_jax.report import Report, SiteReport, size_of

ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclass(frozen=True)
class Site:
    """One MLP in a model.

    Args:
        index: Its number in the order of the model's layers.
        path: Where it is, such as ``"layers.3.mlp"``.
        mlp: The module.
    """

    index: int
    path: str
    mlp: Mlp


Layers = str | int | slice | Iterable[int] | Callable[[Site], bool] | None


def sites(model: nnx.Module) -> list[Site]:
    """The MLPs of a model, in the order of its layers.

    Args:
        model: Any Flax NNX module that holds its MLPs as `Mlp` or `GatedMlp`.

    Returns:
        The sites; empty if there are none.

    Example:
        >>> from fusion_jax.mlp import Mlp
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> [site.path for site in sites(block)]
        ['0', '1']
    """
    found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, Mlp)]
    # Layer 10 after layer 9, not after layer 1.
    found.sort(key=lambda item: [(isinstance(p, str), p) for p in item[0]])
    return [Site(i, ".".join(map(str, path)), m) for i, (path, m) in enumerate(found)]


def select(found: Sequence[Site], layers: Layers) -> list[Site]:
    r"""The sites that a choice of layers means.

    Args:
        found: All sites of the model.
        layers: A regular expression that matches whole paths; indices (negative ones count from
            the end) or a slice; a function of a `Site`; None for all.

    Returns:
        The chosen sites, in order.

    Raises:
        InputError: The choice matches nothing or an index is out of range; lists the sites.

    Example:
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(12)])
        >>> [[site.path for site in select(sites(block), layers)] for layers in (r"1\d", -1)]
        [['10', '11'], ['11']]
    """
    listing = ", ".join(f"{s.index}: {s.path or '(the model)'}" for s in found)
    if not found:
        raise InputError("the model has no MLP that can be compressed")
    if layers is None:
        return list(found)
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise InputError(f"layers {layers!r} is no regular expression: {error}") from None
        chosen = [s for s in found if pattern.fullmatch(s.path)]
    elif isinstance(layers, slice):
        chosen = list(found[layers])
    elif callable(layers):
        chosen = [s for s in found if layers(s)]
    else:
        indices = [layers] if isinstance(layers, int) else list(layers)
        for i in indices:
            if not isinstance(i, int) or not -len(found) <= i < len(found):
                raise InputError(f"layers: no site {i!r}; the sites are {listing}")
        wanted = {i % len(found) for i in indices}
        chosen = [s for s in found if s.index in wanted]
    if not chosen:
        raise InputError(
            f"layers {layers!r} matches no site (a pattern must match a whole path); "
            f"the sites are {listing}"
        )
    return chosen


def compress(
    model: ModelT,
    method: Method,
    *,
    key: Key[Array, ""],
    layers: Layers = None,
    progress: bool | None = None,
) -> tuple[ModelT, Report]:
    """Compresses MLPs of a model in one shot; the model itself is not changed.

    Args:
        model: A model from `fusion_jax.load`, or any NNX module that holds its MLPs as `Mlp` or
            `GatedMlp`.
        method: What to do, such as ``Fusion(width=0.25)``.
        key: Random key; a site's result does not depend on which others are compressed.
        layers: Which sites, see `select`; None for all.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The smaller model, which shares all other arrays with the original, and a report.

    Raises:
        InputError: ``layers`` matches nothing, the method does not fit a site, or a weight is NaN
            or infinite; the message names the site. Raised before any long work.

    Example:
        >>> from fusion_jax import Fusion, Mlp
        >>> mlp = Mlp(4, 64, act="gelu", rngs=nnx.Rngs(0))
        >>> smaller, report = compress(mlp, Fusion(width=16), key=jax.random.key(0))
        >>> smaller.width, report.rows[0].width_before
        (16, 64)
    """
    found = sites(model)
    chosen = select(found, layers)
    for site in chosen:
        with _naming(site):
            if type(site.mlp) not in (Mlp, GatedMlp):
                raise InputError(
                    f"is a {type(site.mlp).__name__} already; compress the original model"
                )
            method.check(jax.eval_shape(site.mlp.sub_mlps))
    finite = jax.device_get([_all_finite(site.mlp) for site in chosen])
    bad = [site.path or "(the model)" for site, ok in zip(chosen, finite, strict=True) if not ok]
    if bad:
        raise InputError(f"NaN or infinite weights in {', '.join(bad)}")

    compressed: Any = nnx.clone(model)
    rows = []
    with show_progress("Compressing", len(chosen), progress) as advance:
        for batch in _batches(chosen):
            start = time.perf_counter()
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *(s.mlp.sub_mlps() for s in batch))
            keys = jnp.stack([jax.random.fold_in(key, site.index) for site in batch])
            solutions = jax.block_until_ready(_solve(method, stacked, keys))
            for i, site in enumerate(batch):
                solution = jax.tree.map(lambda x, i=i: x[i], solutions)
                new = method.build(site.mlp, solution)
                compressed = replaced(compressed, site.path, new)
                seconds = (time.perf_counter() - start) / len(batch)
                facts = {name: value.item() for name, value in solution.facts._asdict().items()}
                rows.append(SiteReport.of(site.path, site.mlp, new, facts, seconds))
                advance(site.path)
    origin = getattr(compressed, "origin", None)
    if isinstance(origin, Origin):
        step = {"compress": method.to_json(), "sites": [site.path for site in chosen]}
        compressed.origin = origin.after(step)
    report = Report(
        method=method.to_json(),
        rows=tuple(rows),
        before=size_of(model, (site.mlp for site in found)),
        after=size_of(compressed, (site.mlp for site in sites(compressed))),
    )
    return compressed, report


def compress_mlp(subs: SubMLPs, method: Method, *, key: Key[Array, ""]) -> Solution:
    """Compresses the sub-MLPs of one MLP, or of several of one shape, of any model.

    For models that are not this library's: take the rows out of your weights, put the result's
    rows back.

    Args:
        subs: Sub-MLPs; leading axes (layers, experts) are compressed each on its own.
        method: What to do, such as ``Fusion(width=0.25, scaling="folded")``.
        key: Random key.

    Returns:
        The method's solution, with the same leading axes; for `Fusion`, ``parts.rows`` are the
        sub-MLPs to store, ``parts.sizes`` and ``parts.labels`` the clusters.

    Raises:
        InputError: The shapes do not fit together, the method does not fit them, or a value is NaN
            or infinite.

    Example:
        >>> from fusion_jax import Fusion, SubMLPs
        >>> subs = SubMLPs(up=jnp.ones((2, 8, 3)), down=jnp.ones((2, 8, 3)))
        >>> solution = compress_mlp(subs, Fusion(width=4), key=jax.random.key(0))
        >>> solution.parts.rows.up.shape, solution.parts.sizes.shape
        ((2, 4, 3), (2, 4))
    """
    subs = jax.tree.map(jnp.asarray, subs).check()
    method.check(subs)
    if not _all_finite(subs):
        raise InputError("NaN or infinite weights")
    stack = subs.up.shape[:-2]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), subs)
    solutions = _solve(method, flat, jax.random.split(key, flat.up.shape[0]))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), solutions)


def _solve(method: Method, subs: SubMLPs, keys: Key[Array, " s"]) -> Solution:
    """Solves stacked problems; where the stack is sharded over a mesh, each device its own."""
    sharding = subs.up.sharding
    if isinstance(sharding, NamedSharding) and sharding.spec and sharding.spec[0] is not None:
        spec = PartitionSpec(sharding.spec[0])
        keys = jax.device_put(keys, NamedSharding(sharding.mesh, spec))
        return _solve_on_mesh(method, sharding.mesh, spec, subs, keys)
    return _solve_stack(method, subs, keys)


@partial(jax.jit, static_argnames="method")
def _solve_stack(method: Method, subs: SubMLPs, keys: Array) -> Solution:
    # One after the other on a CPU, where batching gains nothing and the slowest would decide.
    batch = None if jax.default_backend() == "cpu" else keys.shape[0]
    return lax.map(lambda a: method.solve(a[0], key=a[1]), (subs, keys), batch_size=batch)


@partial(jax.jit, static_argnames=("method", "mesh", "spec"))
def _solve_on_mesh(
    method: Method, mesh: Any, spec: PartitionSpec, subs: SubMLPs, keys: Array
) -> Solution:
    local = partial(_solve_stack, method)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return mapped(subs, keys)


@jax.jit
def _all_finite(tree: object) -> Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _batches(chosen: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that are solved in one call: of one shape; singly on a CPU, to show progress."""
    limit = 1 if jax.default_backend() == "cpu" else 16
    groups: dict[object, list[Site]] = {}
    for site in chosen:
        groups.setdefault(str(jax.eval_shape(site.mlp.sub_mlps)), []).append(site)
    for group in groups.values():
        for i in range(0, len(group), limit):
            yield group[i : i + limit]


def replaced(model: Any, path: str, new: nnx.Module) -> Any:
    """The model with another module at a path.

    Args:
        model: The model, which is changed in place, unless the path is empty.
        path: A site's path.
        new: The module to put there.

    Returns:
        The model; the new module, if the path is empty.
    """
    if not path:
        return new
    *parents, last = path.split(".")
    holder = model
    for name in parents:
        holder = holder[int(name)] if name.isdigit() else getattr(holder, name)
    if last.isdigit():
        holder[int(last)] = new
    else:
        setattr(holder, last, new)
    return model


@contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Puts the site's path in front of an `InputError` from inside the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{site.path or 'the model'}: {error}") from None
