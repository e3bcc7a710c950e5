"""The two kinds of kernels: SGD's, and Adam's, whose second gradient is replaced by its sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from ntk.errors import check_choice

KernelKind = Literal["sgd", "adam"]


def second_transform(kind: KernelKind) -> Callable[[Array], Array]:
    """Returns what is applied to a kernel's second gradient: nothing for SGD, the sign for Adam.

    Raises:
        InputError: The kind is unknown.

    Example:
        >>> second_transform("adam")(jnp.array([-2.0, 0.5])).tolist()
        [-1.0, 1.0]
    """
    check_choice("kind", kind, KernelKind)
    return jnp.sign if kind == "adam" else lambda x: x
