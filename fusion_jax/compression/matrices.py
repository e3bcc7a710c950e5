"""Puts matrices of a model into another form, in attention, MLPs and embeddings alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.compression.checks import all_finite
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import Solution, check_method
from fusion_jax.methods.factored import Factored
from fusion_jax.methods.mpo import MPO
from fusion_jax.models.provenance import Provenance
from fusion_jax.mpo import MpoEmbed
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import (
    AnyLinear,
    LinearForm,
    check_plain,
    find_linears,
    matrix_of,
    stack_of,
)
from fusion_jax.nn.programs import few_programs
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import find_modules, replaced
from fusion_jax.progress import show_progress
from fusion_jax.report import Report, SiteReport, num_params, size_of
from ntk.selection import Selection, select

ModelT = TypeVar("ModelT", bound=nnx.Module)

LAYERS = r"(?!.*\.(router|shared_gate)$)(.*\.)?layers\..*"
"""The matrices of all layers: attention and MLPs, but not the ones that weight experts."""


def weight_matrices(model: nnx.Module) -> dict[str, AnyLinear | nnx.Embed]:
    """Returns the layers of a model that have a matrix, by path: embeddings, then linear layers.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> list(weight_matrices(Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))))
        ['down', 'up']
    """
    return {**find_modules(model, nnx.Embed), **find_linears(model)}


def select_matrices(model: nnx.Module, matrices: Selection) -> dict[str, AnyLinear | nnx.Embed]:
    """Returns the chosen ones of the layers that have a matrix, by path.

    Args:
        model: The model.
        matrices: A regular expression that matches whole paths; indices or a slice; a function of
            a path; None for all.

    Returns:
        The layers, in the order of `weight_matrices`.

    Raises:
        InputError: No matrix is chosen, or an index is out of range; the message lists the
            matrices.
    """
    found = list(weight_matrices(model).items())
    paths = [path for path, _ in found]
    return dict(found[i] for i in select(matrices, paths, argument="matrices", noun="matrix"))


@on_auto_axes
def compress_matrices(
    model: ModelT,
    method: Factored,
    *,
    matrices: Selection,
    progress: bool | None = None,
) -> tuple[ModelT, Report]:
    """Puts matrices of a model into another form; the model itself is not changed.

    Unlike `compress`, which works on MLPs, this takes any linear layer, also in a fused MLP; `MPO`
    takes embeddings as well.

    Args:
        model: The model.
        method: `MPO`, `Svd` or `MaskPrune`.
        matrices: Which matrices, see `select_matrices`; such as ``r".*attention.*"``.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The new model, which shares all other arrays with the original, and a report.

    Raises:
        InputError: No matrix is chosen, or a chosen one cannot have the form.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> mlp = Mlp(16, 64, act="relu", rngs=nnx.Rngs(0))
        >>> smaller, report = compress_matrices(mlp, MPO(bond=0.5, cores=3), matrices="up|down")
        >>> report.rows[0].params_after < report.rows[0].params_before
        True
    """
    check_method(method)
    if not isinstance(method, Factored):
        raise InputError(f"{type(method).__name__} is for MLPs; see fusion_jax.compress")
    picked = select_matrices(model, matrices)
    for path, layer in picked.items():
        try:
            if isinstance(layer, nnx.Embed):
                if not isinstance(method, MPO):
                    raise InputError(f"{type(method).__name__} takes no embeddings")
                method.spec(layer.num_embeddings, layer.features)
            else:
                check_plain(layer, "the layer")
                method.spec(layer.in_features, layer.out_features)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    bad = [path for path, layer in picked.items() if not all_finite(layer)]
    if bad:
        raise InputError(f"NaN or infinite weights in {', '.join(bad)}")
    new: Any = nnx.clone(model)
    rows = []
    with show_progress("Factorizing", len(picked), progress, first="compiling") as advance:
        for path, layer in picked.items():
            start = time.perf_counter()
            solution = jax.block_until_ready(_factor(method, layer))
            method.verify(solution)
            form = _formed(method, layer, solution)
            new = replaced(new, path, form)
            row = SiteReport(
                site=path,
                width_before=None,
                width_after=None,
                params_before=num_params(layer),
                params_after=num_params(form),
                facts={k: v.mean().item() for k, v in solution.facts._asdict().items()},
                seconds=time.perf_counter() - start,
            )
            rows.append(row)
            advance(path)
    provenance = getattr(new, "provenance", None)
    if isinstance(provenance, Provenance):
        new.provenance = provenance.after({"compress": method.to_json(), "matrices": list(picked)})
    report = Report(
        method=method.to_json(),
        new_head=isinstance(provenance, Provenance) and provenance.new_head,
        rows=tuple(rows),
        before=size_of(model, (site.mlp for site in sites(model))),
        after=size_of(new, (site.mlp for site in sites(new))),
    )
    return new, report


def _factor(method: Factored, layer: AnyLinear | nnx.Embed) -> Solution:
    weights = layer.embedding[...] if isinstance(layer, nnx.Embed) else matrix_of(layer)
    stack = () if isinstance(layer, nnx.Embed) else stack_of(layer)
    return _program(method, len(stack))(weights)


@few_programs
def _program(method: Factored, stacked: int) -> Callable[[Float[Array, "*s d o"]], Solution]:
    """Returns the compiled `Factored.factor` of a method, for one matrix or a stack."""

    def one(matrix: Array) -> Solution:
        return method.factor({"": wide(matrix)})

    return jax.jit(partial(jax.lax.map, one) if stacked else one)


def _formed(method: Factored, layer: AnyLinear | nnx.Embed, solution: Solution) -> LinearForm:
    (arrays,) = solution.parts.values()
    if not isinstance(layer, nnx.Embed):
        return method.formed(layer, arrays)
    form = MpoEmbed.abstract(layer, **method.spec(layer.num_embeddings, layer.features))
    form.load(arrays, None)
    return form
