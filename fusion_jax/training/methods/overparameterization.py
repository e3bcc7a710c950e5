"""Over-parameterized fine-tuning: important matrices train as chains of cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from fusion_jax import mpo
from fusion_jax.compression.matrices import LAYERS, select_matrices
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import AnyLinear, LinearForm, check_plain, matrix_of, stack_of
from fusion_jax.nn.surgery import at, replaced
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.methods.importance import importance_by_gradient, top_of_each_type, type_of
from ntk.selection import Selection

ModelT = TypeVar("ModelT", bound=nnx.Module)


@on_auto_axes
def overparameterize(model: ModelT, paths: Sequence[str], *, cores: int = 11) -> ModelT:
    """Returns the same function with matrices as chains of cores, all of which train.

    A chain has an outer factor at each end and square matrices between them, which start as the
    identity. After training, `fusion_jax.plain` turns the chains into plain layers again, so that
    inference costs the same as before.

    Args:
        model: The model; not changed.
        paths: The paths of plain linear layers.
        cores: The number of cores of a chain, at least 2.

    Returns:
        The model, which shares all other arrays with the original.

    Raises:
        InputError: There are no paths, or one of them is not a plain linear layer.
        ArithmeticError: A chain differs from its matrix by more than rounding.

    References:
        OPF (Gao et al., ACL 2023), section 4.1, with 11 cores.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
        >>> wide_mlp = overparameterize(mlp, ["up"], cores=3)
        >>> [core.shape for core in wide_mlp.up.cores]
        [(1, 2, 4, 8), (8, 1, 1, 8), (8, 2, 4, 1)]
    """
    if cores < 2:
        raise InputError(f"a chain has at least 2 cores; got {cores}")
    if isinstance(paths, str) or not paths:
        raise InputError(f"paths must be a list of paths of linear layers; got {paths!r}")
    new = nnx.clone(model)
    for path in paths:
        try:
            layer = at(new, path)
        except (AttributeError, KeyError, IndexError, TypeError):
            layer = None
        if not isinstance(layer, nnx.Linear | LinearForm):
            raise InputError(f"{path} is not a linear layer")
        check_plain(layer, path)
        layout = mpo.chain(layer.in_features, layer.out_features, cores)
        kernel = wide(matrix_of(layer))
        arrays, excess = _chain(kernel, layout, len(stack_of(layer)))
        mpo.check_bound(excess)
        new = replaced(new, path, mpo.Mpo.replacing(layer, arrays, **layout._asdict()))
    return new


@partial(jax.jit, static_argnames=("layout", "stacked"))
def _chain(kernel: Array, layout: mpo.Layout, stacked: int) -> tuple[tuple[Array, ...], Array]:
    def one(matrix: Array) -> tuple[tuple[Array, ...], Array]:
        train = mpo.decompose(matrix, layout)
        return train.cores, mpo.excess(matrix, train)

    return jax.lax.map(one, kernel) if stacked else one(kernel)


@dataclass(kw_only=True)
class Chains:
    """Dynamic over-parameterization: the most important matrices become chains during training.

    Args:
        source: The batches on which importance is measured.
        loss: The loss by which importance is measured.
        every: Steps between rounds.
        per_round: The number of matrices of each type, such as all query projections, that become
            chains in a round.
        total: The number of matrices of each type that become chains in all rounds.
        matrices: Which linear layers may become chains; by default those of all layers except
            routers.
        cores: The number of cores of a chain.
        batches: The number of batches on which importance is measured; None for an epoch.

    Raises:
        InputError: A number is out of range.

    References:
        OPF (Gao et al., ACL 2023), section 4.2 and equation 6.

    Example:
        >>> source, loss, *_ = data.prepare(model, config, key=key)  # doctest: +SKIP
        >>> recipe = Recipe(growth=Chains(source=source, loss=loss, every=500))  # doctest: +SKIP
        >>> fit = finetune(model, data, config, key=key, recipe=recipe)  # doctest: +SKIP
    """

    source: BatchSource
    loss: Loss
    every: int
    per_round: int = 2
    total: int = 8
    matrices: Selection = LAYERS
    cores: int = 11
    batches: int | None = 32
    scores: list[dict[str, float]] = field(default_factory=list, init=False)
    """The importance measured in each round, by path; a resumed run has its own rounds only."""

    def __post_init__(self):
        check_at_least(1, every=self.every, per_round=self.per_round, total=self.total)
        check_at_least(2, cores=self.cores)
        check_at_least(1, batches=self.batches)

    def replaceable(self, model: nnx.Module) -> list[str]:
        """Returns the paths of the matrices that may become chains."""
        return [
            f"{path}.kernel"
            for path, layer in self._found(model).items()
            if isinstance(layer, nnx.Linear)
        ]

    def _found(self, model: nnx.Module) -> dict[str, AnyLinear]:
        found = {}
        for path, layer in select_matrices(model, self.matrices).items():
            if isinstance(layer, nnx.Embed | mpo.MpoEmbed):
                raise InputError(f"{path} is an embedding; only linear layers become chains")
            if not isinstance(layer, mpo.Mpo):
                check_plain(layer, path)
            found[path] = layer
        return found

    def _is_chain(self, layer: nnx.Module) -> bool:
        """Returns whether a layer is a chain of this growth, not of another kind."""
        if not isinstance(layer, mpo.Mpo):
            return False
        return layer.layout == mpo.chain(layer.in_features, layer.out_features, self.cores)

    def choose(self, model: nnx.Module, step: int) -> list[str] | None:
        """Returns the paths of the matrices to change now, or None if none is left."""
        found = self._found(model)
        grown: dict[str, int] = {}
        for path, layer in found.items():
            if self._is_chain(layer):
                grown[type_of(path)] = grown.get(type_of(path), 0) + 1
        plain = {path for path, layer in found.items() if not isinstance(layer, LinearForm)}
        open_paths = {path for path in plain if grown.get(type_of(path), 0) < self.total}
        if not open_paths:
            return None
        scores = importance_by_gradient(
            model,
            self.source,
            self.loss,
            matrices=lambda path: path in open_paths,
            batches=self.batches,
        )
        self.scores.append(scores)
        chosen = []
        for kind in sorted({type_of(path) for path in scores}):
            room = min(self.per_round, self.total - grown.get(kind, 0))
            each = {path: score for path, score in scores.items() if type_of(path) == kind}
            chosen += top_of_each_type(each, room)
        return chosen

    def apply(self, model: ModelT, change: Sequence[str]) -> ModelT:
        """Returns the model with these matrices as chains."""
        return overparameterize(model, change, cores=self.cores)

    def to_json(self) -> dict[str, object]:
        """Returns the settings that must match on resume; ``matrices`` unless it is a function."""
        names = ("every", "per_round", "total", "cores", "batches")
        given = {} if callable(self.matrices) else {"matrices": self.matrices}
        return {**{name: getattr(self, name) for name in names}, **given}
