"""Upstream gradients: those of a model's loss with respect to the outputs of its MLPs.

No labels are needed. For a model with logits, labels are drawn from its own predictions; the mean
of the products of such gradients is the Fisher information. For a model without logits, the loss is
a random linear function of its final hidden states; products of its gradients measure how far the
states move.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, Shaped

from fusion_jax.calibration.capture import Tap
from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.surgery import at, replaced


def output_gradients(
    model: nnx.Module,
    paths: Collection[str],
    key: Key[Array, ""],
    mask: Shaped[Array, "b t"] | None,
    *args: PyTree,
    **kwargs: PyTree,
) -> dict[str, Float[Array, "*n o"]]:
    """Returns the gradients of a loss of a model with respect to the outputs of its MLPs.

    Args:
        model: The model; not changed.
        paths: The sites, which the model calls as a whole: no experts.
        key: Random key of the labels, or of the direction.
        mask: (b, t), 0 at positions whose predictions do not count; None if all count.
        *args: The arguments of the call.
        **kwargs: The keyword arguments of the call.

    Returns:
        The gradients by site path. Works under ``jit``.
    """
    plain = nnx.clone(model)
    plain.eval()
    graph, state = nnx.split(plain)
    provenance = getattr(model, "provenance", None)
    answers = isinstance(provenance, Provenance) and provenance.head == "question-answering"

    times: dict[str, int] = {}

    def tapped(offsets: dict[str, Array]) -> nnx.Module:
        made = nnx.merge(graph, state)
        for path in paths:
            tap = Tap(at(made, path), offsets.get(path), times.get(path, 1))
            made = replaced(made, path, tap)
        return made

    def inputs() -> dict[str, Array]:
        made: Any = tapped({})
        made(*args, **kwargs)
        times.update({path: len(at(made, path).inputs) for path in paths})
        return {path: at(made, path).seen for path in paths}

    offsets = {
        path: jnp.zeros((*x.shape[:-1], at(plain, path).d_out), x.dtype)
        for path, x in jax.eval_shape(inputs).items()
    }

    def loss(offsets: dict[str, Array]) -> Array:
        made: Any = tapped(offsets)
        return drawn_loss(made(*args, **kwargs), key, mask, answers=answers)

    return jax.grad(loss)(offsets)


def drawn_loss(
    output: PyTree,
    key: Key[Array, ""],
    mask: Shaped[Array, "b t"] | None = None,
    *,
    answers: bool = False,
) -> Float[Array, ""]:
    """Returns the loss of a model's output for labels that are drawn from the model itself.

    Args:
        output: The output, with ``logits``, with ``last_hidden_state``, or any arrays.
        key: Random key.
        mask: (b, t), 0 at positions that do not count; None if all count, or if the output has
            other axes.
        answers: Whether logits (b, t, 2) are those of the start and the end of an answer, so that
            the labels are positions.

    Raises:
        InputError: There are no numbers in the output.
    """
    logits = getattr(output, "logits", None)
    x = getattr(output, "last_hidden_state", None) if logits is None else logits
    found = jax.tree.leaves(output if x is None else x)
    found = [wide(y) for y in found if jnp.issubdtype(y.dtype, jnp.floating)]
    if not found:
        raise InputError("the model's output holds no numbers that a loss could be made of")
    if answers:
        y = found[0].swapaxes(1, 2)
        y = y if mask is None else jnp.where(mask.astype(bool)[:, None], y, -jnp.inf)
        found, mask = [y], None
    total = jnp.zeros(())
    for i, y in enumerate(found):
        own = jax.random.fold_in(key, i)
        counts = jnp.ones(y.shape[:-1], y.dtype)
        if mask is not None and y.ndim > 2 and mask.shape == y.shape[:2]:
            counts = counts * mask.reshape(*mask.shape, *[1] * (y.ndim - 3)).astype(y.dtype)
        if logits is not None and y.shape[-1] > 1:
            labels = jax.random.categorical(own, jax.lax.stop_gradient(y))
            y = -jnp.take_along_axis(jax.nn.log_softmax(y), labels[..., None], axis=-1)
        else:
            y = y * jax.random.normal(own, y.shape, y.dtype)
        total += (counts[..., None] * y).sum()
    return total
