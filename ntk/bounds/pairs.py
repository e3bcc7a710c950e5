"""Pairs of an MLP and a smaller MLP whose units stand for clusters of its units."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from ntk.activations import canonical
from ntk.arrays import require_finite
from ntk.errors import InputError
from ntk.mlp import prepare
from ntk.units import MlpWeights, mlp_weights


class Pair(NamedTuple):
    """An MLP before and after fusing, or any smaller MLP whose units stand for clusters of units.

    Args:
        original: The weights of the MLP, p units, without factors.
        fused: The weights of the fused MLP, c units.
        labels: The cluster of each of the p units.
    """

    original: MlpWeights
    fused: MlpWeights
    labels: Int[Array, " p"]

    @property
    def sizes(self) -> Float[Array, " c"]:
        """Cluster sizes n_c."""
        ones = jnp.ones_like(self.original.up[:, 0])
        return jax.ops.segment_sum(ones, self.labels, self.fused.width)


class Inputs(NamedTuple):
    """Inputs, (n, d), and their upstream gradients, (n, o), or None for the traced kernel."""

    x: Float[Array, "n d"]
    g: Float[Array, "n o"] | None


def pair(original: nnx.Module, fused: nnx.Module) -> Pair:
    """Returns an MLP and its fused version, read from Flax NNX modules.

    Args:
        original: A module that `ntk.mlp.mlp_weights` can read.
        fused: Another such module, with the ``labels`` of the original's units.

    Raises:
        InputError: The two do not fit together.
    """
    labels = getattr(fused, "labels", None)
    if labels is None:
        raise InputError(f"{type(fused).__name__} has no labels of the original's units")
    return check_pair(Pair(mlp_weights(original), mlp_weights(fused), labels[...]))


def check_pair(pair: Pair) -> Pair:
    """Returns the pair if its parts fit together, with at least one unit in every cluster.

    An empty cluster gets a unit of zero weights, which adds nothing to the original's outputs and
    kernels, as s(0) = 0.

    Raises:
        InputError: The parts do not fit together, or the activation is a function without a name.
    """
    a, b, labels = pair.original.check(), pair.fused.check(), pair.labels
    canonical(a.act)
    if any(factor is not None for factor in (a.outer, a.inner, a.middle)):
        raise InputError("the original has factors: it is a fused MLP itself")
    for name, x, y in (
        ("inputs", a.up.shape[1], b.up.shape[1]),
        ("outputs", a.down.shape[1], b.down.shape[1]),
        ("activation", a.act, b.act),
        ("having a gate", a.gate is not None, b.gate is not None),
        ("having input biases", a.up_bias is not None, b.up_bias is not None),
        ("having gate biases", a.gate_bias is not None, b.gate_bias is not None),
        ("having an output bias", a.out_bias, b.out_bias),
    ):
        if x != y:
            raise InputError(f"the two MLPs differ in {name}: {x} and {y}")
    if labels.shape != (a.width,):
        raise InputError(f"labels must be ({a.width},); got {labels.shape}")
    if isinstance(labels, Tracer):
        return pair
    known = np.asarray(labels)
    if (known < 0).any() or (known >= b.width).any():
        raise InputError(f"labels must be in [0, {b.width}), the units of the smaller MLP")
    empty = np.setdiff1d(np.arange(b.width), known)
    if not empty.size:
        return pair

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, empty.size), *[(0, 0)] * (x.ndim - 1)])

    more = jnp.concatenate([labels, jnp.asarray(empty, labels.dtype)])
    return Pair(jax.tree.map(padded, a), b, more)


def prepare_pair(
    pair: Pair,
    x: Array,
    z: Array | None = None,
    gx: Array | None = None,
    gz: Array | None = None,
) -> tuple[Pair, Inputs, Inputs]:
    """Returns a checked pair and its left and right inputs, all in one dtype."""
    pair = check_pair(pair)
    if x.ndim != 2:
        raise InputError(f"x must be (n, d), single positions; got {x.shape}")
    if gx is None and gz is not None:
        raise InputError("gz is given, but gx is not")
    if z is not None and (gx is None) != (gz is None):
        raise InputError("with z, upstream gradients gx and gz go together")
    for leaf in jax.tree.leaves((pair, x, z, gx, gz)):
        require_finite(leaf)
    # If one of the two MLPs is in float64, all becomes float64.
    fused, x, z, gx, gz = prepare(pair.fused, x, z, gx, gz)
    original, x, z, gx, gz = prepare(pair.original, x, z, gx, gz)
    fused = jax.tree.map(lambda a: a.astype(x.dtype), fused)
    left = Inputs(x, gx)
    return Pair(original, fused, pair.labels), left, left if z is None else Inputs(z, gz)
