"""Geometries of sub-MLPs: the points that k-means clusters.

Axis letters in shapes: p width, d inputs, o outputs, t positions.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fusion_jax.calibration.data import POSITIONS, Calibration
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.submlps import SubMLPs, responses
from ntk.activations import Activation

Metric = Literal["raw", "sensitivity", "function"]


@partial(jax.jit, static_argnames=("metric", "act"))
def points(
    metric: Metric, subs: SubMLPs, calibration: Calibration | None, act: Activation
) -> Float[Array, "p _"]:
    r"""Returns the sub-MLPs as points of a geometry, one row each.

    ``"raw"`` is the paper's geometry: all weights in one row, without calibration. The others
    measure the effect of a displacement on outputs and kernel at calibration inputs.

    ``"sensitivity"`` measures it to first order, from second moments. With ``w^ = (w, b)``,
    ``M = E x^ x^T`` and s' the slope of the activation, the row of unit i is
    ``[M^(1/2) w^_i |v_i| rms s'_i ; v_i rms h_i]``.

    ``"function"`` compares the behavior of units. The kernel is
    ``sum_i h_i(x) h_i(z) + (x^ . z^) |v_i|^2 s'_i(x) s'_i(z)``, and the row of unit i is

        ``[rms(h_i) v_i ; |x^_t| |v_i| s'_i(x_t) for all t ; h_i(x_t) for all t]``,

    each block centered and divided by its norm, so that all blocks weigh the same: the first block
    stands for outputs, the others for the two terms of the kernel.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)))
        >>> points("function", subs, Calibration(jnp.ones((5, 3))), "gelu").shape
        (8, 12)
    """
    if metric == "raw":
        return subs.rows()
    assert calibration is not None
    sample = calibration.head(POSITIONS)
    root = sample.root_weights()[:, None]
    x, down = wide(sample.inputs), wide(subs.down)
    bias = subs.up_bias is not None
    x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], 1) if bias else x
    unit = responses(subs, sample.inputs, act)
    size = jnp.linalg.norm(down, axis=1)[:, None]
    hidden = root * unit.hidden
    outputs = jnp.linalg.norm(hidden, axis=0)[:, None] * down
    if metric == "function":
        long = root * jnp.linalg.norm(x, axis=1)[:, None]
        slopes = [(long * slope).T * size for slope in unit.slopes]
        return jnp.concatenate([_unit_block(b) for b in (outputs, *slopes, hidden.T)], 1)
    moment = jnp.matmul((root * x).T, root * x, precision="highest")
    values, vectors = jnp.linalg.eigh(moment)
    half = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
    inputs = [(subs.up, subs.up_bias)]
    if subs.gate is not None:
        inputs.insert(0, (subs.gate, subs.gate_bias))
    blocks = []
    for (weights, biases), slope in zip(inputs, unit.slopes, strict=True):
        rows = wide(weights)
        rows = rows if biases is None else jnp.concatenate([rows, wide(biases)[:, None]], 1)
        rms = jnp.linalg.norm(root * slope, axis=0)[:, None]
        blocks.append(jnp.matmul(rows, half, precision="highest") * size * rms)
    return jnp.concatenate([*blocks, outputs], 1)


def _unit_block(block: Array) -> Array:
    block = block - block.mean(0, keepdims=True)
    norm = jnp.linalg.norm(block)
    return block / jnp.where(norm > 0, norm, 1)
