"""Checks that compressing models, MLPs and matrices have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from fusion_jax.errors import InputError


def checked_key(key: Any) -> Key[Array, ""]:
    """Returns a random key, also for one of the old kind; raises `InputError` for anything else."""
    array = isinstance(key, jax.Array)
    if array and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key)
    if not array or key.shape or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError(f"key must be one random key, such as jax.random.key(0); got {key!r}")
    return key


@jax.jit
def all_finite(tree: object) -> Bool[Array, ""]:
    """Returns whether all floating-point numbers of a tree are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
