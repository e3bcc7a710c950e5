"""Over-parameterised fine-tuning: important matrices train as chains, and become plain again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from fusion_jax import mpo
from fusion_jax.compression.matrices import LAYERS, select_matrices
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import LinearForm, check_plain, matrix_of, stack_of
from fusion_jax.nn.surgery import at, replaced
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.trainer import Source
from fusion_jax.training.methods.importance import importance_by_gradient, top_of_each_type, type_of
from ntk.selection import Selection

ModelT = TypeVar("ModelT", bound=nnx.Module)


@on_auto_axes
def overparameterise(model: ModelT, paths: Sequence[str], *, cores: int = 11) -> ModelT:
    """The same function with matrices as chains of cores, all of which train.

    A chain has an outer factor at either end and square matrices between, the identity at first.
    `fusion_jax.plain` makes plain layers of the chains again: inference costs what it did.

    Args:
        model: The model; not changed.
        paths: The plain linear layers.
        cores: Cores of a chain, at least 2.

    Returns:
        The model, which shares all other arrays with the original.

    Raises:
        InputError: There is no path, or one is no plain linear layer.
        ArithmeticError: A chain is not its matrix, by more than rounding.

    References:
        OPF (Gao et al., ACL 2023), section 4.1, with 11 cores.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = Mlp(4, 16, act="relu", rngs=nnx.Rngs(0))
        >>> wide_mlp = overparameterise(mlp, ["up"], cores=3)
        >>> [core.shape for core in wide_mlp.up.cores]
        [(1, 2, 4, 8), (8, 1, 1, 8), (8, 2, 4, 1)]
    """
    if cores < 2:
        raise InputError(f"a chain has at least 2 cores; got {cores}")
    if isinstance(paths, str) or not paths:
        raise InputError(f"paths must be a list of paths of linear layers; got {paths!r}")
    new: Any = nnx.clone(model)
    for path in paths:
        try:
            layer = at(new, path)
        except (AttributeError, KeyError, IndexError, TypeError):
            layer = None
        if not isinstance(layer, nnx.Linear | LinearForm):
            raise InputError(f"{path} is no linear layer")
        check_plain(layer, path)
        layout = mpo.chain(layer.in_features, layer.out_features, cores)
        form = mpo.Mpo.abstract(layer, **layout._asdict())
        kernel = wide(matrix_of(layer))
        arrays, excess = _chain(kernel, layout, len(stack_of(layer)))
        mpo.check_bound(excess)
        form.load(arrays, None if layer.bias is None else layer.bias[...])
        new = replaced(new, path, form)
    return new


@partial(jax.jit, static_argnames=("layout", "stacked"))
def _chain(kernel: Array, layout: mpo.Layout, stacked: int) -> tuple[tuple[Array, ...], Array]:
    def one(matrix: Array) -> tuple[tuple[Array, ...], Array]:
        train = mpo.decompose(matrix, layout)
        return train.cores, mpo.excess(matrix, train)

    return jax.lax.map(one, kernel) if stacked else one(kernel)


@dataclass(kw_only=True)
class Chains:
    """Dynamic over-parameterisation: every so many steps, the most important matrices grow.

    For the argument ``growth`` of `fusion_jax.finetune`.

    Args:
        source: The batches that importance is measured on.
        loss: The loss that it is measured by.
        every: Steps between rounds.
        per_round: Matrices of each type, see `type_of`, that grow in a round.
        total: Matrices of each type that grow at all.
        matrices: Which may grow: linear layers. By default those of all layers, but no routers.
        cores: Cores of a chain.
        batches: How many batches importance is measured on; None for an epoch.

    References:
        OPF (Gao et al., ACL 2023), section 4.2 and equation 6.
    """

    source: Source
    loss: Loss
    every: int
    per_round: int = 2
    total: int = 8
    matrices: Selection = LAYERS
    cores: int = 11
    batches: int | None = 32
    scores: list[dict[str, float]] = field(default_factory=list, init=False)
    """What this object measured, round by round: after going on, without the earlier ones."""

    def __post_init__(self):
        for name, least in (("every", 1), ("per_round", 1), ("total", 1), ("cores", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.batches is not None and self.batches < 1:
            raise InputError(f"batches must be at least 1; got {self.batches}")

    def replaceable(self, model: Any) -> list[str]:
        """The matrices that may grow: parameters, in the place of which cores come."""
        return [
            f"{path}.kernel"
            for path, layer in self._found(model).items()
            if isinstance(layer, nnx.Linear)
        ]

    def _found(self, model: Any) -> dict[str, Any]:
        found = select_matrices(model, self.matrices)
        for path, layer in found.items():
            if isinstance(layer, nnx.Embed | mpo.MpoEmbed):
                raise InputError(f"{path} is an embedding; only linear layers become chains")
            if not isinstance(layer, mpo.Mpo):
                check_plain(layer, path)
        return found

    def _grew(self, layer: Any) -> bool:
        """Whether a layer is a chain as these grow, and not one of another kind from the start."""
        if not isinstance(layer, mpo.Mpo):
            return False
        return layer.layout == mpo.chain(layer.in_features, layer.out_features, self.cores)

    def choose(self, model: Any, step: int) -> list[str] | None:
        """The paths of the matrices that grow now, or None if all have."""
        found = self._found(model)
        grown: dict[str, int] = {}
        for path, layer in found.items():
            if self._grew(layer):
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

    def apply(self, model: Any, change: Sequence[str]) -> Any:
        """The model with these matrices as chains."""
        return overparameterise(model, change, cores=self.cores)

    def to_json(self) -> dict[str, Any]:
        """The settings that can be compared: ``matrices`` only if it is no function."""
        names = ("every", "per_round", "total", "cores", "batches")
        given = {} if callable(self.matrices) else {"matrices": self.matrices}
        return {**{name: getattr(self, name) for name in names}, **given}


def added_params(d: int, o: int, cores: int) -> int:
    """The parameters that a chain has more than its matrix.

    Example:
        >>> added_params(768, 3072, 11)
        13271040
    """
    return mpo.chain(d, o, cores).params - d * o
