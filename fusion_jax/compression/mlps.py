"""Makes a model smaller: finds its MLPs, compresses them, and reports what changed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.calibrator import Calibrator, Source
from fusion_jax.calibration.data import Calibration
from fusion_jax.compression.batching import memory, solve, unstacked
from fusion_jax.errors import InputError, nearest
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import Method, Solution, check_method, kept_width
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.linear_forms import check_plain
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.site import Layers, Site, gradients_of, select, sites
from fusion_jax.nn.submlps import SubMLPs, activation
from fusion_jax.nn.surgery import replaced
from fusion_jax.nn.uneven_experts import UnevenExperts, by_use, some
from fusion_jax.progress import show_progress
from fusion_jax.report import Report, SiteReport, size_of

ModelT = TypeVar("ModelT", bound=nnx.Module)
TreeT = TypeVar("TreeT")


@on_auto_axes
def compress(
    model: ModelT,
    method: Method | Mapping[str, Method],
    *,
    key: Key[Array, ""],
    layers: Layers = None,
    budget: float | None = None,
    calibration: Source | None = None,
    gradients: Mapping[str, Array] | None = None,
    progress: bool | None = None,
) -> tuple[ModelT, Report]:
    """Compresses MLPs of a model in one shot; the model itself is not changed.

    Args:
        model: A model from `fusion_jax.load`, or any NNX module that holds its MLPs as `Mlp` or
            `GatedMlp`.
        method: What to do, such as ``Fusion(width=0.25)``; or the method of each site by its path,
            as `allocate` gives them.
        key: Random key; a site's result does not depend on which others are compressed.
        layers: Which sites, see `select`; None for all.
        budget: The share of each MLP's parameters to keep, such as 0.25, in place of the method's
            own size: methods compare like with like. Biases of outputs do not count.
        calibration: For methods that fit to what the MLPs see (a few hundred unlabelled sentences
            do): strings; batches of tokens (`Batch`, or mappings of the model's arguments, whose
            ``attention_mask`` leaves out padding); inputs by site path, as `calibrate` gives them;
            a file of such inputs (.safetensors) or of text, a sentence per line; or ``"random"``,
            for random tokens where there is no text at all. Each expert is fitted to those
            positions alone that its router sends to it, or if they are few to others' as well.
        gradients: For methods that look at a loss: its gradients by path of a parameter, as
            `mean_gradients` gives them.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The smaller model, which shares all other arrays with the original, and a report.

    Raises:
        InputError: ``layers`` matches nothing, the method does not fit a site, a weight is NaN or
            infinite, or the calibration makes no sense; the message names the site. Raised before
            any long work.

    Example:
        >>> from fusion_jax import Fusion, Mlp
        >>> mlp = Mlp(4, 64, act="gelu", rngs=nnx.Rngs(0))
        >>> smaller, report = compress(mlp, Fusion(width=16), key=jax.random.key(0))
        >>> smaller.width, report.rows[0].width_before
        (16, 64)
    """
    found = sites(model)
    if isinstance(method, Mapping):
        if not method:
            raise InputError("no site is given a method: the mapping is empty")
        methods: dict[str, Method] = dict(method)
        unknown = [path for path in methods if path not in {site.path for site in found}]
        if unknown:
            raise InputError(
                f"no site {unknown[0]!r}{nearest(unknown[0], [s.path for s in found])}"
            )
        chosen = select([site for site in found if site.path in methods], layers)
    else:
        chosen = select(found, layers)
        methods = {site.path: method for site in chosen}
    for given in methods.values():
        check_method(given)
    key = _one_key(key)
    if budget is not None and isinstance(method, Mapping):
        raise InputError("methods by site have their sizes; give a budget, or those")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget must be in (0, 1]; got {budget}")
    # Of several methods, some may do without what others take.
    calibrated = any(methods[site.path].calibrated for site in chosen)
    graded = any(methods[site.path].graded for site in chosen)
    for site in chosen:
        method = methods[site.path]
        with _naming(site):
            if method.any_mlp and isinstance(site.mlp, UnevenExperts):
                raise InputError(
                    "has experts of different widths; fusion_jax.compress_matrices takes their "
                    "matrices"
                )
            if not method.any_mlp and type(site.mlp) not in (Mlp, GatedMlp):
                raise InputError(
                    f"is a {type(site.mlp).__name__} already; compress the original model"
                )
            for name, linear in site.mlp.linears().items():
                check_plain(linear, name)
            subs = jax.eval_shape(site.mlp.sub_mlps)
            if budget is not None:
                methods[site.path] = method = method.within(subs, budget)
            method.check(subs, calibrated=calibration is not None)
            method.check_given(
                calibration=calibration is not None and (method.calibrated or not calibrated),
                gradients=gradients is not None and (method.graded or not graded),
            )
            if gradients is not None:
                gradients_of(site, gradients)
    uneven = any(methods[site.path].by_use for site in chosen)
    if uneven and not any(site.mlp.stack for site in chosen):
        raise InputError("by_use is for experts, and no chosen site has any")
    finite = jax.device_get([_all_finite(site.mlp) for site in chosen])
    bad = [site.path or "(the model)" for site, ok in zip(chosen, finite, strict=True) if not ok]
    if bad:
        raise InputError(f"NaN or infinite weights in {', '.join(bad)}")
    if gradients is not None:
        slopes = [gradients_of(site, gradients) for site in chosen]
        if not _all_finite(slopes):
            raise InputError("NaN or infinite gradients")

    compressed: Any = nnx.clone(model)
    rows = []
    # Sites are counted from 0, so that no site's key is the calibration's.
    text_key = jax.random.fold_in(key, 2**31 - 1)
    with show_progress("Compressing", len(chosen), progress) as advance:
        calibrator = None
        if calibration is not None:
            sequential = any(methods[site.path].sequential for site in chosen)
            calibrator = Calibrator(model, chosen, calibration, sequential=sequential, key=text_key)
            if sequential and not calibrator.sequential:
                raise InputError(
                    "sequential needs calibration text or tokens; inputs by site do not follow "
                    "what is compressed"
                )
            for site in chosen:
                if methods[site.path].by_use and site.mlp.stack and calibrator.use(site) is None:
                    raise InputError(
                        f"{site.path}: by_use needs calibration text or tokens; inputs of experts "
                        "do not tell how often the router uses each"
                    )
        for batch in _batches(chosen, methods, calibrator):
            method = methods[batch[0].path]
            start = time.perf_counter()
            keys = [_keys(key, site) for site in batch]
            seen = (
                None
                if calibrator is None or not method.calibrated
                else [calibrator.of(site, method.sequential) for site in batch]
            )
            slopes = None
            if gradients is not None and method.graded:
                slopes = [gradients_of(site, gradients) for site in batch]
            if method.by_use and batch[0].mlp.stack:
                assert calibrator is not None and seen is not None
                use = calibrator.use(batch[0])
                made = [_uneven(method, batch[0].mlp, keys[0], seen[0], use)]
            else:
                made = _even(method, [site.mlp for site in batch], keys, seen, slopes)
            for site, (new, found_facts) in zip(batch, made, strict=True):
                compressed = replaced(compressed, site.path, new)
                if calibrator is not None:
                    calibrator.compressed(site, new)
                seconds = (time.perf_counter() - start) / len(batch)
                facts = {name: _fact(value) for name, value in found_facts.items()}
                use = None if calibrator is None else calibrator.use(site)
                rows.append(SiteReport.of(site.path, site.mlp, new, facts, seconds, use))
                advance(site.path)
    described = methods[chosen[0].path].to_json()
    if len(set(methods.values())) > 1:
        described = {site.path: methods[site.path].to_json() for site in chosen}
    provenance = getattr(compressed, "provenance", None)
    if isinstance(provenance, Provenance):
        step = {
            "compress": described,
            "sites": [site.path for site in chosen],
            "calibration": None if calibrator is None else calibrator.description,
        }
        compressed.provenance = provenance.after(step)
    report = Report(
        method=described,
        calibration=None if calibrator is None else calibrator.description,
        rows=tuple(rows),
        before=size_of(model, (site.mlp for site in found)),
        after=size_of(compressed, (site.mlp for site in sites(compressed))),
    )
    return compressed, report


@on_auto_axes
def compress_mlp(
    subs: SubMLPs,
    method: Method,
    *,
    key: Key[Array, ""],
    act: str | None = None,
    calibration: Calibration | Float[Array, "*s t d"] | None = None,
    gradients: SubMLPs | None = None,
) -> Solution:
    """Compresses the sub-MLPs of one MLP, or of several of one shape, of any model.

    For models that are not this library's: take the rows out of your weights, put the result's
    rows back.

    Args:
        subs: Sub-MLPs; leading axes (layers, experts) are compressed each on its own.
        method: What to do, such as ``Fusion(width=0.25, scaling="folded")``.
        key: Random key.
        act: The activation's name, such as ``"gelu"``; needed with calibration.
        calibration: The inputs that each MLP saw, (..., t, d), or a `Calibration`.
        gradients: A loss's gradients, laid out as the sub-MLPs, for methods that look at them.

    Returns:
        The method's solution, with the same leading axes; for `Fusion`, ``parts.rows`` are the
        sub-MLPs to store, ``parts.sizes`` and ``parts.labels`` the clusters.

    Raises:
        InputError: The shapes do not fit together, the method does not fit them, a value is NaN or
            infinite, or calibration comes without the activation.

    Example:
        >>> from fusion_jax import Fusion, SubMLPs
        >>> subs = SubMLPs(up=jnp.ones((2, 8, 3)), down=jnp.ones((2, 8, 3)))
        >>> solution = compress_mlp(subs, Fusion(width=4), key=jax.random.key(0))
        >>> solution.parts.rows.up.shape, solution.parts.sizes.shape
        ((2, 4, 3), (2, 4))
    """
    check_method(method)
    key = _one_key(key)
    subs = jax.tree.map(jnp.asarray, subs).check()
    method.check(subs, calibrated=calibration is not None)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    method.check_given(calibration=calibration is not None, gradients=gradients is not None)
    if method.sequential or method.by_use:
        raise InputError("sequential and by_use are for the sites of a model: see compress")
    if calibration is not None:
        activation(act or "")
    if not _all_finite((subs, calibration, gradients)):
        raise InputError("NaN or infinite weights, calibration or gradients")
    stack = subs.up.shape[:-2]
    if calibration is not None and calibration.inputs.shape[:-2] != stack:
        raise InputError(
            f"calibration {calibration.inputs.shape} does not fit sub-MLPs {subs.up.shape}"
        )
    if gradients is not None and jax.tree.map(jnp.shape, gradients) != jax.tree.map(
        jnp.shape, subs
    ):
        raise InputError(f"gradients do not have the shapes of sub-MLPs {subs.up.shape}")
    keys = jax.random.split(key, stack)
    solution = solve(method, act, (subs, keys, calibration, gradients))
    method.verify(solution)
    return solution


def _one_key(key: Any) -> Key[Array, ""]:
    """A random key, perhaps of the old kind; raises `InputError` if it is none."""
    array = isinstance(key, jax.Array)
    if array and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key)
    if not array or key.shape or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError(f"key must be one random key, such as jax.random.key(0); got {key!r}")
    return key


def _stack(trees: list[TreeT]) -> TreeT:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _keys(key: Key[Array, ""], site: Site) -> Key[Array, "*e"]:
    """The random key of a site, or of each of its experts."""
    key = jax.random.fold_in(key, site.index)
    return jax.random.split(key, site.mlp.stack) if site.mlp.stack else key


def _even(
    method: Method,
    mlps: list[Mlp],
    keys: list[Array],
    seen: list[Calibration] | None,
    slopes: list[SubMLPs] | None = None,
) -> list[tuple[Mlp, dict[str, Array]]]:
    """Modules of one shape compressed in one call, and the facts of each."""
    lone = len(mlps) == 1  # whose experts stacking would only copy
    join: Any = itemgetter(0) if lone else _stack
    problems = (
        join([mlp.sub_mlps() for mlp in mlps]),
        join(keys),
        None if seen is None else join(seen),
        None if slopes is None else join(slopes),
    )
    solutions = jax.block_until_ready(solve(method, mlps[0].act, problems))
    each = [solutions] if lone else unstacked(solutions, len(mlps))
    pairs = zip(mlps, each, strict=True)
    return [(method.build(mlp, one), one.facts._asdict()) for mlp, one in pairs]


def _uneven(
    method: Method,
    mlp: Mlp,
    keys: Key[Array, " e"],
    seen: Calibration,
    use: Sequence[float] | None,
) -> tuple[Mlp, dict[str, Array]]:
    """Experts compressed to widths that follow the router's use, and their facts."""
    fields: Any = method
    assert use is not None
    width = kept_width(fields.width, mlp.width, fields.round_to)
    plan = by_use(use, width, method.by_use, most=mlp.width, round_to=fields.round_to)
    made = [
        _even(
            dataclasses.replace(fields, width=size),
            [some(mlp, members)],
            [keys[jnp.asarray(members)]],
            [some(seen, members)],
        )[0]
        for size, members in plan.items()
    ]
    facts = jax.tree.map(lambda *x: jnp.concatenate(x), *(facts for _, facts in made))
    groups = [group for group, _ in made]
    return (groups[0] if len(plan) == 1 else UnevenExperts(groups, list(plan.values()))), facts


def _fact(value: Array) -> Any:
    """One value for the report; of experts the mean, the largest count, and whether all are so."""
    if value.dtype == bool:
        return value.all().item()
    return (value.mean() if jnp.issubdtype(value.dtype, jnp.floating) else value.max()).item()


@jax.jit
def _all_finite(tree: object) -> Array:
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def _batches(
    chosen: Sequence[Site], methods: Mapping[str, Method], calibrator: Calibrator | None
) -> Iterator[list[Site]]:
    """Sites that are solved in one call: of one shape, of calibration too, and one method.

    The experts of a site are one call in any case.
    """
    if calibrator is not None and calibrator.sequential:
        yield from ([site] for site in chosen)
        return
    groups: dict[object, list[Site]] = {}
    for site in chosen:
        seen = None
        if calibrator is not None and methods[site.path].calibrated:
            seen = calibrator.abstract(site)
        shapes = str(jax.eval_shape(site.mlp.sub_mlps))
        groups.setdefault((methods[site.path], site.mlp.act, shapes, seen), []).append(site)
    for group in groups.values():
        # A call has copies of what it takes, and gives about as much.
        subs = jax.tree.leaves(jax.eval_shape(group[0].mlp.sub_mlps))
        size = sum(x.size * x.dtype.itemsize for x in subs)
        limit = min(_most() // math.prod(group[0].mlp.stack), memory() // (2 * size))
        limit = 1 if methods[group[0].path].by_use else max(1, limit)
        for i in range(0, len(group), limit):
            yield group[i : i + limit]


def _most() -> int:
    """MLPs that go into one call; on a CPU one, to show progress."""
    return 1 if jax.default_backend() == "cpu" else 16


@contextmanager
def _naming(site: Site) -> Iterator[None]:
    """Puts the site's path in front of an `InputError` from inside the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{site.path or 'the model'}: {error}") from None
