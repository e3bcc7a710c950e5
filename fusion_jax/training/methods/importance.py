"""Measures how much a loss depends on parameters: gradients, and the importance of matrices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.compression.matrices import select_matrices
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.linear_forms import check_plain
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.losses import Batch, Loss, Total, bound
from fusion_jax.training.engine.partition import Partition
from fusion_jax.training.engine.sharding import Placement
from ntk.selection import Selection


class _MeanLoss:
    """The mean of a loss over batches, and its gradients, by path of a parameter."""

    def __init__(self, model: nnx.Module, source: BatchSource, loss: Loss, batches: int | None):
        if not (isinstance(source, BatchSource) and callable(loss)):
            raise InputError("give batches and a loss, such as those of a task's prepare()")
        count = len(source) if batches is None else min(batches, len(source))
        if count < 1:
            raise InputError("there are no batches to measure on")
        self._source, self._count, self._placement = source, count, Placement()
        partition = Partition(model)
        self.params, self._rest, self._loss = self._placement.placed(
            (*partition.split(model), bound(loss))
        )

        def total(
            params: dict[str, Array], rest: dict[str, Array], batch: Batch, loss: Loss
        ) -> Total:
            return loss(partition.compute(params, rest), batch, None)

        self._total = jax.jit(total)
        self._grad = jax.jit(jax.value_and_grad(total, has_aux=True))

    def _batch(self, step: int) -> Batch:
        """Returns a batch, split over the mesh if its rows can be split evenly."""
        batch, placement = self._source(step), self._placement
        if any(len(x) % placement.batch_shards for x in batch.values()):
            return placement.everywhere(batch)
        return placement.batch(batch)

    def loss(self, params: Mapping[str, Array]) -> float:
        """Returns the mean loss."""
        totals = [
            self._total(params, self._rest, self._batch(i), self._loss) for i in range(self._count)
        ]
        total, count = (sum(float(t[k]) for t in totals) for k in (0, 1))
        return total / count

    def gradients(self) -> dict[str, Array]:
        """Returns the gradients of the mean loss."""
        sums = jax.tree.map(jnp.zeros_like, self.params)
        divisor = 0.0
        for i in range(self._count):
            (_, count), grads = self._grad(self.params, self._rest, self._batch(i), self._loss)
            sums = jax.tree.map(jnp.add, sums, grads)
            divisor += float(count)
        return jax.tree.map(lambda g: g / divisor, sums)


@on_auto_axes
def mean_loss(
    model: nnx.Module, source: BatchSource, loss: Loss, *, batches: int | None = None
) -> float:
    """Returns the mean of a loss, without dropout.

    Args:
        model: The model.
        source: The batches.
        loss: The loss.
        batches: The number of batches to measure on; None for an epoch.

    Returns:
        The mean.

    Raises:
        InputError: The source has no batches.
    """
    mean = _MeanLoss(model, source, loss, batches)
    return mean.loss(mean.params)


@on_auto_axes
def mean_gradients(
    model: nnx.Module, source: BatchSource, loss: Loss, *, batches: int | None = None
) -> dict[str, Float[Array, ...]]:
    """Returns the gradients of the mean of a loss, without dropout.

    Args:
        model: The model.
        source: The batches, such as those of a task.
        loss: The loss, such as that of a task.
        batches: The number of batches to measure on; None for an epoch.

    Returns:
        Gradients by path of a parameter, for methods of `fusion_jax.compress` that need them.

    Raises:
        InputError: The source has no batches.

    Example:
        >>> source, loss, *_ = data.prepare(model, config, key=key)  # doctest: +SKIP
        >>> gradients = mean_gradients(model, source, loss, batches=50)  # doctest: +SKIP
    """
    return _MeanLoss(model, source, loss, batches).gradients()


def _kernels(model: nnx.Module, matrices: Selection) -> dict[str, str]:
    """Returns the path of each chosen layer's matrix, by path of the layer."""
    names = {}
    for path, layer in select_matrices(model, matrices).items():
        check_plain(layer, path)
        names[path] = f"{path}.{'embedding' if isinstance(layer, nnx.Embed) else 'kernel'}"
    return names


@on_auto_axes
def importance_by_removal(
    model: nnx.Module,
    source: BatchSource,
    loss: Loss,
    *,
    matrices: Selection,
    batches: int | None = None,
) -> dict[str, float]:
    """Returns how much the loss changes when one matrix becomes zero, |L - L_{W=0}|.

    Args:
        model: The model, fine-tuned.
        source: The batches.
        loss: The loss.
        matrices: Which plain layers: a regular expression for whole paths, or a function of a path.
        batches: The number of batches to measure on; None for an epoch.

    Returns:
        The change by path of the layer.

    Raises:
        InputError: No layer was chosen, a layer is not plain, or the source has no batches.

    References:
        OPF (Gao et al., ACL 2023), equation 5.
    """
    kernels = _kernels(model, matrices)
    mean = _MeanLoss(model, source, loss, batches)
    before = mean.loss(mean.params)
    return {
        path: abs(before - mean.loss({**mean.params, name: jnp.zeros_like(mean.params[name])}))
        for path, name in kernels.items()
    }


@on_auto_axes
def importance_by_gradient(
    model: nnx.Module,
    source: BatchSource,
    loss: Loss,
    *,
    matrices: Selection,
    batches: int | None = None,
) -> dict[str, float]:
    """Returns the first-order estimate of `importance_by_removal`, |<dL/dW, W>|.

    One backward pass per batch measures all matrices. Arguments, returns and errors are those of
    `importance_by_removal`.

    References:
        OPF (Gao et al., ACL 2023), equation 6.
    """
    kernels = _kernels(model, matrices)
    mean = _MeanLoss(model, source, loss, batches)
    grads = mean.gradients()
    return {
        path: abs(float(jnp.vdot(grads[name], mean.params[name], precision="highest")))
        for path, name in kernels.items()
    }


def type_of(path: str) -> str:
    """Returns the type of a matrix, which is the same for matrices at the same place of each layer.

    Example:
        >>> type_of("encoder.layers.11.attention.query")
        'encoder.layers.#.attention.query'
    """
    return ".".join("#" if name.isdigit() else name for name in path.split("."))


def top_of_each_type(scores: Mapping[str, float], count: int) -> list[str]:
    """Returns the most important matrices of each type, such as all query projections.

    Args:
        scores: Importance by path.
        count: The number of matrices of each type.

    Returns:
        Paths, in the order of the keys of ``scores``.

    Raises:
        InputError: The count is below 1.

    Example:
        >>> top_of_each_type({"0.up": 1.0, "1.up": 3.0, "0.down": 2.0, "1.down": 1.0}, 1)
        ['1.up', '0.down']
    """
    check_at_least(1, count=count)
    types: dict[str, list[str]] = {}
    for path in sorted(scores, key=lambda path: -scores[path]):
        types.setdefault(type_of(path), []).append(path)
    chosen = {path for paths in types.values() for path in paths[:count]}
    return [path for path in scores if path in chosen]
