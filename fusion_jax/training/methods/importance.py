"""Which parameters a loss depends on: gradients, and how important each matrix is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.compression.matrices import select_matrices
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.linear_forms import check_plain
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.partition import Parts
from fusion_jax.training.engine.sharding import Layout
from fusion_jax.training.engine.trainer import Source
from ntk.selection import Selection

Score = Callable[[Any, Source, Loss], Mapping[str, float]]
"""How important each matrix is, by path."""


class _Passes:
    """A loss over batches, and its gradients, by path of a parameter."""

    def __init__(self, model: Any, source: Source, loss: Loss, batches: int | None):
        if not (isinstance(source, Source) and callable(loss)):
            raise InputError("give batches and a loss, as fusion_jax.training.task_source does")
        count = len(source) if batches is None else min(batches, len(source))
        if count < 1:
            raise InputError("there are no batches to measure on")
        self._source, self._count, self._layout = source, count, Layout({})
        self._parts = Parts(model)
        bound = loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)
        self.params, self._rest, self._loss = self._layout.placed(
            (*self._parts.split(model), bound)
        )

        def total(params: Any, rest: Any, batch: Any, loss: Any) -> tuple[Array, Array]:
            return loss(self._parts.compute(params, rest), batch, None)

        self._total = jax.jit(total)
        self._grad = jax.jit(jax.value_and_grad(total, has_aux=True))

    def _batch(self, step: int) -> Mapping[str, Array]:
        """A batch, split over the mesh if it can be."""
        batch, layout = self._source(step), self._layout
        if any(len(x) % layout.batch_shards for x in batch.values()):
            return layout.everywhere(batch)
        return layout.batch(batch)

    def loss(self, params: Mapping[str, Array]) -> float:
        """The mean loss."""
        totals = [
            self._total(params, self._rest, self._batch(i), self._loss) for i in range(self._count)
        ]
        total, count = (sum(float(t[k]) for t in totals) for k in (0, 1))
        return total / count

    def gradients(self) -> dict[str, Array]:
        """The gradients of the mean loss."""
        sums: Any = jax.tree.map(jnp.zeros_like, self.params)
        whole = 0.0
        for i in range(self._count):
            (_, count), grads = self._grad(self.params, self._rest, self._batch(i), self._loss)
            sums = jax.tree.map(jnp.add, sums, grads)
            whole += float(count)
        return jax.tree.map(lambda g: g / whole, sums)


@on_auto_axes
def mean_loss(model: Any, source: Source, loss: Loss, *, batches: int | None = None) -> float:
    """The mean of a loss, without dropout.

    Args:
        model: The model.
        source: The batches.
        loss: What is measured.
        batches: How many batches; None for an epoch.

    Returns:
        The mean.
    """
    passes = _Passes(model, source, loss, batches)
    return passes.loss(passes.params)


@on_auto_axes
def mean_gradients(
    model: Any, source: Source, loss: Loss, *, batches: int | None = None
) -> dict[str, Float[Array, ...]]:
    """The gradients of the mean of a loss, without dropout.

    Args:
        model: The model.
        source: The batches, such as those of `task_source`.
        loss: The loss, such as that of `task_source`.
        batches: How many batches; None for an epoch.

    Returns:
        By path of a parameter, for `fusion_jax.compress` and the methods that look at a loss.

    Example:
        >>> source, loss = task_source(model, data, config, key=key)  # doctest: +SKIP
        >>> gradients = mean_gradients(model, source, loss, batches=50)  # doctest: +SKIP
    """
    return _Passes(model, source, loss, batches).gradients()


def _kernels(model: Any, matrices: Selection) -> dict[str, str]:
    """The parameter that is the matrix of each chosen layer, by path of the layer."""
    names = {}
    for path, layer in select_matrices(model, matrices).items():
        check_plain(layer, path)
        names[path] = f"{path}.{'embedding' if isinstance(layer, nnx.Embed) else 'kernel'}"
    return names


@on_auto_axes
def importance_by_removal(
    model: Any,
    source: Source,
    loss: Loss,
    *,
    matrices: Selection,
    batches: int | None = None,
) -> dict[str, float]:
    """How much the loss changes when a matrix becomes zero, |L - L_{W=0}|, one after the other.

    Args:
        model: The model, fine-tuned.
        source: The batches.
        loss: The loss.
        matrices: Which plain layers.
        batches: How many batches; None for an epoch.

    Returns:
        The change by path of the layer.

    Raises:
        InputError: No layer was chosen, or one is not plain.

    References:
        OPF (Gao et al., ACL 2023), equation 5.
    """
    kernels = _kernels(model, matrices)
    passes = _Passes(model, source, loss, batches)
    whole = passes.loss(passes.params)
    return {
        path: abs(whole - passes.loss({**passes.params, name: jnp.zeros_like(passes.params[name])}))
        for path, name in kernels.items()
    }


@on_auto_axes
def importance_by_gradient(
    model: Any,
    source: Source,
    loss: Loss,
    *,
    matrices: Selection,
    batches: int | None = None,
) -> dict[str, float]:
    """The first-order estimate of `importance_by_removal`, |<dL/dW, W>|: one backward pass for all.

    The arguments and what is returned are those of `importance_by_removal`.

    References:
        OPF (Gao et al., ACL 2023), equation 6.
    """
    kernels = _kernels(model, matrices)
    passes = _Passes(model, source, loss, batches)
    grads = passes.gradients()
    return {
        path: abs(float(jnp.vdot(grads[name], passes.params[name], precision="highest")))
        for path, name in kernels.items()
    }


def type_of(path: str) -> str:
    """The type of a matrix, which it shares with those in the same place of other layers.

    Example:
        >>> type_of("encoder.layers.11.attention.query")
        'encoder.layers.#.attention.query'
    """
    return ".".join("#" if name.isdigit() else name for name in path.split("."))


def top_of_each_type(scores: Mapping[str, float], count: int) -> list[str]:
    """The most important matrices of each type, see `type_of`.

    Args:
        scores: Importance by path.
        count: How many of each type.

    Returns:
        Paths, in the order of the scores' keys.

    Raises:
        InputError: The count is below 1.

    Example:
        >>> top_of_each_type({"0.up": 1.0, "1.up": 3.0, "0.down": 2.0, "1.down": 1.0}, 1)
        ['1.up', '0.down']
    """
    if count < 1:
        raise InputError(f"count must be at least 1; got {count}")
    types: dict[str, list[str]] = {}
    for path in sorted(scores, key=lambda path: -scores[path]):
        types.setdefault(type_of(path), []).append(path)
    chosen = {path for paths in types.values() for path in paths[:count]}
    return [path for path in scores if path in chosen]
