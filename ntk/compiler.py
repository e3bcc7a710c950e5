"""Keeps a version of jaxlib from returning wrong numbers."""

from __future__ import annotations

import os
import warnings

from jaxlib.version import __version__ as INSTALLED

_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def avoid_wrong_numbers(version: str | None = None) -> None:
    """Switches off a part of jaxlib 0.10.2 that computes some sums of products wrongly on CPUs.

    Among them are Jacobians of layer norms (https://github.com/jax-ml/jax/issues/39103). XLA_FLAGS
    switches it off, which XLA reads when it is first used; if that was before, there is a warning.
    Other versions, and a flag that the user set, stay as they are.

    Args:
        version: The version of jaxlib; None for the one that is installed.

    Example:
        >>> avoid_wrong_numbers("0.10.1")
    """
    version = INSTALLED if version is None else version
    flags = os.environ.get("XLA_FLAGS", "")
    if version != "0.10.2" or _FLAG in flags:
        return
    from jax._src import xla_bridge  # of this version, in which it is there

    if xla_bridge.backends_are_initialized():
        warnings.warn(
            "jaxlib 0.10.2 returns wrong numbers on CPUs, in silence (jax issue 39103): import "
            f"fusion_jax or ntk before JAX computes, or set XLA_FLAGS=--{_FLAG}=",
            stacklevel=3,
        )
    else:
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()
