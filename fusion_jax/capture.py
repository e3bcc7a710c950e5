"""What the MLPs of a model see: their inputs on given text."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.mlp import Mlp
from fusion_jax.sites import replaced, sites


class _Seen(nnx.Variable):
    """The input of one call."""


class _Tap(nnx.Module):
    """Stands in for an MLP and keeps its input."""

    def __init__(self, mlp: Mlp):
        self.mlp = mlp
        self.seen = nnx.data(None)

    def __call__(self, x: Array) -> Array:
        self.seen = _Seen(x)
        return self.mlp(x)


def mlp_inputs(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, Float[Array, "*n d"]]:
    """Runs a model and returns what each of its MLPs got as input.

    Args:
        model: Any NNX module that holds its MLPs as `Mlp` or `GatedMlp`; not changed.
        *args: What it is called with.
        **kwargs: Likewise.

    Returns:
        The inputs by site path, (b, t, d) in encoders. Works under ``jit``.

    Example:
        >>> import jax.numpy as jnp
        >>> layers = nnx.Sequential(*[Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> {path: x.shape for path, x in mlp_inputs(layers, jnp.ones((3, 4))).items()}
        {'layers.0': (3, 4), 'layers.1': (3, 4)}
    """
    tapped = nnx.clone(model)
    taps = {}
    for site in sites(tapped):
        taps[site.path] = _Tap(site.mlp)
        tapped = replaced(tapped, site.path, taps[site.path])
    tapped(*args, **kwargs)  # type: ignore[operator]
    return {path: tap.seen[...] for path, tap in taps.items()}
