"""Layers whose weights are fixed and whose scores learn which weights to keep."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.compression.matrices import LAYERS, select_matrices
from fusion_jax.errors import InputError
from fusion_jax.meshes import auto_mesh, on_auto_axes
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Masked, Scored, check_plain, find_forms, matrix_of
from fusion_jax.nn.surgery import replaced
from fusion_jax.training.engine.losses import Batch, Loss, Total, bound
from ntk.selection import Selection

ModelT = TypeVar("ModelT", bound=nnx.Module)
PenaltyOf = Literal["mean", "sum"]


def scored_layers(model: nnx.Module) -> dict[str, Scored]:
    """Returns the `Scored` layers of a model by path; raises `InputError` if there are none."""
    found = {path: form for path, form in find_forms(model).items() if isinstance(form, Scored)}
    if not found:
        raise InputError("the model has no scores; see fusion_jax.training.with_scores")
    return found


@on_auto_axes
def with_scores(model: ModelT, *, matrices: Selection = LAYERS) -> ModelT:
    """Returns the same function with matrices as `Scored` layers, whose weights are Frozen.

    Args:
        model: The model; not changed.
        matrices: Which plain linear layers: a regular expression for whole paths, or a function of
            a path.

    Returns:
        The model with all scores 0, which shares its arrays with the original.

    Raises:
        InputError: No layer was chosen, or a layer is not plain.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = with_scores(Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)), matrices="up")
        >>> type(mlp.up).__name__, type(mlp.up.kernel).__name__, type(mlp.down).__name__
        ('Scored', 'Frozen', 'Linear')
    """
    new = nnx.clone(model)
    for path, layer in select_matrices(model, matrices).items():
        if isinstance(layer, nnx.Embed):
            raise InputError(f"{path} is an embedding; only linear layers have scores")
        check_plain(layer, path)
        kernel = matrix_of(layer)
        one = jnp.ones(kernel.shape[:-2], jnp.float32)
        values = [kernel, wide(jnp.zeros_like(kernel)), one, jnp.zeros_like(one)]
        new = replaced(new, path, Scored.replacing(layer, values))
    return new


@on_auto_axes
def with_masks(model: ModelT) -> ModelT:
    """Returns the same function with fixed masks in place of scores.

    Args:
        model: A model with `Scored` layers; not changed.

    Returns:
        The model with `Masked` layers, whose pruned weights are 0.

    Raises:
        InputError: The model has no scores.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = with_scores(Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)), matrices="up")
        >>> type(with_masks(mlp).up).__name__
        'Masked'
    """
    new = nnx.clone(model)
    for path, form in scored_layers(model).items():
        mask, kernel = _mask(form), np.asarray(form.kernel[...])
        kept = np.where(mask, kernel, np.zeros((), kernel.dtype))
        arrays = [jnp.asarray(kept), jnp.asarray(mask)]
        new = replaced(new, path, Masked.replacing(form, arrays))
    return new


def _mask(form: Scored) -> np.ndarray:
    """Returns the mask, computed on one device, since only one process of a mesh saves models."""
    one = jax.make_mesh((1,), ("one",), devices=jax.local_devices()[:1])
    with jax.set_mesh(auto_mesh(one)):
        return np.asarray(_jitted_mask(jax.tree.map(np.asarray, form)))


@jax.jit
def _jitted_mask(form: Scored) -> Array:
    return form.mask()


def penalized(loss: Loss, *, of: PenaltyOf = "mean") -> jax.tree_util.Partial:
    """Returns a loss plus the penalty of the scores.

    Args:
        loss: The loss without the penalty.
        of: "mean" for the mean over matrices of the mean sigmoid of their scores; "sum" for the sum
            of the sigmoids of all scores.

    Returns:
        The loss. The factor of the penalty is the variable ``penalty`` of `Scored` layers, which
        `StaticPruning` sets.
    """
    return jax.tree_util.Partial(partial(_penalized, of), bound(loss))


def _penalized(
    of: PenaltyOf, loss: Loss, model: nnx.Module, batch: Batch, key: Key[Array, ""] | None
) -> Total:
    own = loss(model, batch, key)
    add = jnp.sum if of == "sum" else jnp.mean
    parts = []
    for form in scored_layers(model).values():
        scores = add(jax.nn.sigmoid(form.scores[...]), (-1, -2)).astype(own.total.dtype)
        parts.append(jnp.ravel(form.penalty[...].astype(scores.dtype) * scores))
    return Total(own.total + add(jnp.concatenate(parts)) * own.count, own.count)
