"""Compresses sub-MLPs, which may come from a model of any library."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.compression.batching import Problems, solve_stacked
from fusion_jax.compression.checks import all_finite, checked_key
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import Method, Solution, check_method
from fusion_jax.nn.submlps import SubMLPs, activation


@on_auto_axes
def compress_mlp(
    subs: SubMLPs,
    method: Method,
    *,
    key: Key[Array, ""],
    act: str | None = None,
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
        act: The activation's name, such as ``"gelu"``; needed with calibration.
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
