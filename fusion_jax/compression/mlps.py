"""Compresses the MLPs of a model in three steps, checked, solved, reported; or single MLPs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.calibration.sources import CalibrationSource
from fusion_jax.compression.batching import Problems, solve_stacked, unstacked, working_memory
from fusion_jax.compression.checks import Checked, all_finite, checked, checked_key, naming
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import Method, Solution, check_method
from fusion_jax.models.moe import mixtures
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.registry import state_expert_count
from fusion_jax.nn.mlp import AnyMlp, Mlp
from fusion_jax.nn.site import Site, gradients_of, sites
from fusion_jax.nn.submlps import SubMLPs, activation
from fusion_jax.nn.surgery import at, replaced
from fusion_jax.nn.uneven_experts import UnevenExperts, take_experts
from fusion_jax.progress import show_progress
from fusion_jax.report import Report, SiteReport, size_of
from ntk.activations import Activation
from ntk.selection import Selection

ModelT = TypeVar("ModelT", bound=nnx.Module)
TreeT = TypeVar("TreeT")


class Made(NamedTuple):
    """The result of a method at a site.

    Args:
        mlp: The compressed MLP.
        facts: The method's facts.
        experts: The experts of a mixture that stay, where others were dropped; else None.
    """

    mlp: AnyMlp
    facts: dict[str, Array]
    experts: list[int] | None = None


@on_auto_axes
def compress(
    model: ModelT,
    method: Method | Mapping[str, Method],
    *,
    key: Key[Array, ""],
    layers: Selection = None,
    budget: float | None = None,
    calibration: CalibrationSource | None = None,
    gradients: Mapping[str, Array] | None = None,
    progress: bool | None = None,
) -> tuple[ModelT, Report]:
    """Compresses MLPs of a model in one shot; the model itself is not changed.

    Args:
        model: A model from `fusion_jax.load`, or any NNX module that holds its MLPs as `Mlp` or
            `GatedMlp`, such as `fusion_jax.adopt` makes of the models of others.
        method: The method, such as ``Fusion(width=0.25)``; or a method for each site by its path,
            as `allocate` returns them.
        key: Random key; a site's result does not depend on which other sites are compressed.
        layers: Which sites: a regular expression that matches whole paths; indices (negative ones
            count from the end) or a slice; a function of a `Site`; None for all.
        budget: The share of each MLP's parameters to keep, such as 0.25, in place of the method's
            own size, so that methods can be compared. Output biases do not count.
        calibration: Text for methods that fit to the inputs of the MLPs (a few hundred unlabeled
            sentences are enough), or other inputs of the model. Strings; a list of batches, each of
            them the model's arguments (an array, a tuple, a mapping of keyword arguments, whose
            ``attention_mask`` leaves out padding, or a `TokenBatch`); inputs by site path, as
            `calibrate` returns them; a file of such inputs (.safetensors), of the model's arguments
            by name (.npz; or .npy, its first argument; or a folder of both), or of text, a sentence
            per line; or ``"random"`` for random tokens where there is no text at all. Each expert
            is fitted to the positions that its router sends to it; if they are few, also to
            positions of other experts.
        gradients: For methods that use a loss: its gradients by path of a parameter, as
            `mean_gradients` returns them.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The smaller model, which shares all other arrays with the original, and a report.

    Raises:
        InputError: ``layers`` matches nothing, the method does not fit a site, a weight is NaN or
            infinite, or the calibration is invalid; the message names the site. Raised before
            any long work.

    Example:
        >>> from fusion_jax import Fusion, Mlp
        >>> mlp = Mlp(4, 64, act="gelu", rngs=nnx.Rngs(0))
        >>> smaller, report = compress(mlp, Fusion(width=16), key=jax.random.key(0))
        >>> smaller.width, report.rows[0].width_before
        (16, 64)
    """
    job = checked(model, method, key, layers, budget, calibration, gradients)
    smaller, rows = _solved(job, progress)
    return _reported(job, smaller, rows)


def _solved(job: Checked[ModelT], progress: bool | None) -> tuple[ModelT, list[SiteReport]]:
    """Returns the smaller model, and the report of each site."""
    smaller = nnx.clone(job.model)
    rows = []
    count = len(job.chosen)
    with show_progress("Compressing", count, progress, first="compiling") as advance:
        if job.calibrator is not None:
            job.calibrator.capture()
        for batch in _sites_by_call(job):
            start = time.perf_counter()
            with naming(*batch):
                made = _solved_sites(job, batch)
            for site, (new, facts, experts) in zip(batch, made, strict=True):
                if experts is None:
                    smaller = replaced(smaller, site.path, new)
                else:
                    mixture = site.path.rpartition(".")[0]
                    fewer = at(smaller, mixture).with_experts(experts)
                    smaller = replaced(smaller, mixture, fewer)
                if job.calibrator is not None:
                    job.calibrator.compressed(site, new)
                seconds = (time.perf_counter() - start) / len(batch)
                use = None if job.calibrator is None else job.calibrator.use(site)
                values = {name: _fact(value) for name, value in facts.items()}
                row = SiteReport.of(site.path, site.mlp, new, values, seconds, use, experts)
                rows.append(row)
                advance(site.path)
    state_expert_count(smaller)
    return smaller, rows


def _sites_by_call(job: Checked) -> Iterator[list[Site]]:
    """Yields the sites that are solved in one call: of one method, and of arrays of one shape.

    The experts of a site are in one call anyway.
    """
    if job.calibrator is not None and job.calibrator.sequential:
        yield from ([site] for site in job.chosen)
        return
    groups: dict[object, list[Site]] = {}
    for site in job.chosen:
        method = job.methods[site.path]
        seen = None
        if job.calibrator is not None and method.takes_calibration:
            seen = job.calibrator.abstract(site)
        shapes = str(jax.eval_shape(site.mlp.sub_mlps))
        groups.setdefault((method, site.mlp.act, shapes, seen), []).append(site)
    for group in groups.values():
        limit = _sites_per_call(job.methods[group[0].path], group[0].mlp)
        for i in range(0, len(group), limit):
            yield group[i : i + limit]


def _sites_per_call(method: Method, mlp: AnyMlp) -> int:
    """Returns how many sites like this one to solve in one call."""
    if method.model_needs.expert_use or method.model_needs.router:
        return 1
    # A call holds copies of its arguments, and returns about as many bytes.
    arrays = jax.tree.leaves(jax.eval_shape(mlp.sub_mlps))
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    return max(1, min(_mlps_per_call() // math.prod(mlp.stack), working_memory() // (2 * size)))


def _mlps_per_call() -> int:
    """Returns how many MLPs go into one call at most; one on a CPU, which shows progress."""
    return 1 if jax.default_backend() == "cpu" else 16


def _solved_sites(job: Checked, batch: list[Site]) -> Sequence[Made]:
    """Returns the compressed MLPs of some sites that are solved in one call."""
    method = job.methods[batch[0].path]
    if method.model_needs.router:
        return [_with_fewer_experts(job, method, batch[0])]
    seen = slopes = None
    if job.calibrator is not None and method.takes_calibration:
        follows = method.model_needs.earlier_sites is not None
        seen = [job.calibrator.of(site, follows) for site in batch]
        if not method.takes_upstream:
            seen = [each._replace(upstream=None) for each in seen]
    if job.gradients is not None and method.takes_gradients:
        slopes = [gradients_of(site, job.gradients) for site in batch]
    mlps = [site.mlp for site in batch if isinstance(site.mlp, Mlp)]  # all are, see `Checked`
    keys = [_keys(job.key, site) for site in batch]
    if method.model_needs.expert_use and batch[0].mlp.stack:
        assert job.calibrator is not None and seen is not None
        use = job.calibrator.use(batch[0])
        assert use is not None
        return [_solved_by_groups(method, mlps[0], keys[0], seen[0], use)]
    return _solved_together(method, mlps, keys, seen, slopes)


def _with_fewer_experts(job: Checked, method: Method, site: Site) -> Made:
    """Returns the experts of a site that a method keeps."""
    routing = None
    if method.takes_calibration:
        assert job.calibrator is not None
        routing = job.calibrator.routing(site)
        if not all_finite(routing):
            raise InputError(
                "on the calibration, the experts' outputs hold NaN or infinite numbers"
            )
    groups = mixtures(job.model)[site.path].rule.groups
    experts, facts = method.kept_experts(site.mlp.plain().sub_mlps(), routing, groups)
    return Made(take_experts(site.mlp, experts), facts._asdict(), experts)


def _keys(key: Key[Array, ""], site: Site) -> Key[Array, "*e"]:
    """Returns the random key of a site, or of each of its experts."""
    key = jax.random.fold_in(key, site.index)
    return jax.random.split(key, site.mlp.stack) if site.mlp.stack else key


def _solved_together(
    method: Method,
    mlps: list[Mlp],
    keys: list[Array],
    seen: list[Calibration] | None,
    slopes: list[SubMLPs] | None = None,
) -> list[Made]:
    """Compresses MLPs of one shape in one call."""
    problems = Problems(
        _joined([mlp.sub_mlps() for mlp in mlps]),
        _joined(keys),
        None if seen is None else _joined(seen),
        None if slopes is None else _joined(slopes),
    )
    solutions = jax.block_until_ready(solve_stacked(method, mlps[0].act, problems))
    each = [solutions] if len(mlps) == 1 else unstacked(solutions, len(mlps))
    pairs = zip(mlps, each, strict=True)
    return [Made(method.build(mlp, one), one.facts._asdict()) for mlp, one in pairs]


def _joined(trees: list[TreeT]) -> TreeT:
    """Returns the trees stacked; a single one as it is, since stacking would only copy it."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _solved_by_groups(
    method: Method, mlp: Mlp, keys: Key[Array, " e"], seen: Calibration, use: tuple[float, ...]
) -> Made:
    """Compresses the experts of a site group by group, as the method groups them by their use."""
    groups = method.expert_groups(mlp.width, use)
    made = [
        _solved_together(
            own,
            [take_experts(mlp, members)],
            [take_experts(keys, members)],
            [take_experts(seen, members)],
        )[0]
        for own, members in groups
    ]
    facts = jax.tree.map(lambda *x: jnp.concatenate(x), *(each.facts for each in made))
    parts = [each.mlp for each in made if isinstance(each.mlp, Mlp)]  # all are
    if len(parts) == 1:
        return Made(parts[0], facts)
    return Made(UnevenExperts(parts, [members for _, members in groups]), facts)


def _fact(value: Array) -> bool | int | float:
    """Returns one value of experts for the report: the mean, the largest count, or whether all."""
    on_host = np.asarray(value)
    if on_host.dtype == bool:
        return on_host.all().item()
    return (on_host.mean() if np.issubdtype(on_host.dtype, np.floating) else on_host.max()).item()


def _reported(job: Checked, smaller: ModelT, rows: list[SiteReport]) -> tuple[ModelT, Report]:
    """Returns the smaller model with its provenance, and the report of the compression."""
    provenance = getattr(smaller, "provenance", None)
    if isinstance(provenance, Provenance):
        done = {
            "compress": job.described,
            "sites": [site.path for site in job.chosen],
            "calibration": job.calibration,
        }
        kept = {row.site: row.experts for row in rows if row.experts is not None}
        done |= {"experts": kept} if kept else {}
        smaller.provenance = provenance.after(done)  # type: ignore[attr-defined]
    report = Report(
        method=job.described,
        calibration=job.calibration,
        new_head=isinstance(provenance, Provenance) and provenance.new_head,
        rows=tuple(rows),
        before=size_of(job.model, (site.mlp for site in sites(job.model))),
        after=size_of(smaller, (site.mlp for site in sites(smaller))),
    )
    return smaller, report


@on_auto_axes
def compress_mlp(
    subs: SubMLPs,
    method: Method,
    *,
    key: Key[Array, ""],
    act: Activation | None = None,
    calibration: Calibration | Float[Array, "*s t d"] | None = None,
    gradients: SubMLPs | None = None,
) -> Solution:
    """Compresses the sub-MLPs of one MLP, or of several of one shape, from any model.

    For models of other libraries: take the rows out of your weights, and put the rows of the result
    back.

    Args:
        subs: Sub-MLPs; along leading axes (layers, experts), each MLP is compressed on its own.
        method: The method, such as ``Fusion(width=0.25, scaling="folded")``.
        key: Random key.
        act: The activation: a name such as ``"gelu"``, or a function; needed with calibration.
        calibration: The inputs of each MLP, (..., t, d), or a `Calibration`.
        gradients: The gradients of a loss, laid out as the sub-MLPs, for methods that use them.

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
    key = checked_key(key)
    subs = jax.tree.map(jnp.asarray, subs).check()
    method.check(subs, calibrated=calibration is not None)
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    method.check_given(calibration=calibration is not None, gradients=gradients is not None)
    if method.takes_upstream and (calibration is None or calibration.upstream is None):
        raise InputError(
            f"{type(method).__name__} needs a Calibration with upstream: the gradients of a loss "
            "at the outputs"
        )
    options = [option for option in method.model_needs if option]
    if options:
        raise InputError(f"{' and '.join(options)}: only for the sites of a model, see compress")
    if calibration is not None:
        activation(act or "")
    if not all_finite((subs, calibration, gradients)):
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
    solution = solve_stacked(method, act, Problems(subs, keys, calibration, gradients))
    method.verify(solution)
    return solution
