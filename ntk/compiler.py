"""Warns about a version of jaxlib whose programs return wrong numbers."""

from __future__ import annotations

import os
import warnings

import jaxlib

_WITHOUT = "--xla_cpu_experimental_ynn_fusion_type="


def warn_of_wrong_numbers(version: str | None = None) -> None:
    """Warns if programs for CPUs may return wrong numbers, as those of jaxlib 0.10.2 do.

    It computes some sums of products wrongly, among them gradients of layer norms
    (https://github.com/jax-ml/jax/issues/39103).

    Args:
        version: The version of jaxlib; None for the one that is installed.

    Example:
        >>> warn_of_wrong_numbers("0.10.1")
    """
    version = jaxlib.__version__ if version is None else version
    if version == "0.10.2" and _WITHOUT not in os.environ.get("XLA_FLAGS", ""):
        warnings.warn(
            "jaxlib 0.10.2 returns wrong numbers on CPUs, in silence (jax issue 39103): install "
            f"another version, or set XLA_FLAGS={_WITHOUT} before Python starts",
            stacklevel=3,
        )
