"""Captures the inputs of a model's MLPs while the model runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from fusion_jax.errors import InputError
from fusion_jax.models.moe import Moe
from fusion_jax.nn.adopted import adopted_modules, adopted_sites
from fusion_jax.nn.linear_forms import multiplied_out
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import at, find_modules, path_name, replaced
from fusion_jax.nn.watching import products


class _Seen(nnx.Variable):
    """The input of one call."""


class Tap(nnx.Module):
    """Stands in for an MLP, keeps its input, and adds an offset to its output if there is one.

    A model may apply an MLP several times, as ALBERT does. Then, at each position, one of the calls
    counts: its input is kept, and its output is moved.

    Args:
        mlp: The MLP.
        offset: The offset.
        times: How many times the model applies the MLP; the offset needs it.
    """

    def __init__(self, mlp: AnyMlp, offset: Array | None = None, times: int = 1):
        self.mlp, self.times = mlp, times
        self.inputs: Any = nnx.data(())
        self.offset: Any = nnx.data(None if offset is None else _Seen(offset))

    def __call__(self, x: Array) -> Array:
        """Returns the output of the MLP, moved by the offset."""
        index = len(self.inputs)
        self.inputs = nnx.data((*self.inputs, _Seen(x)))
        y = self.mlp(x)
        if self.offset is None:
            return y
        return y + jnp.where(_counts(index, self.times, x), self.offset[...], 0)

    @property
    def seen(self) -> Array:
        """The input at each position, of the call that counts there."""
        if not self.inputs:
            raise InputError(
                "the model does not call one of its MLPs with these arguments, so it cannot be "
                "calibrated; leave it out with layers="
            )
        *earlier, last = (seen[...] for seen in self.inputs)
        times = len(self.inputs)
        if any(x.shape != last.shape for x in earlier):
            return last
        for index, x in enumerate(earlier):
            last = jnp.where(_counts(index, times, x), x, last)
        return last


def _counts(index: int, times: int, x: Array) -> Array:
    """Returns at which positions of x a call of several counts."""
    chosen = np.random.RandomState(0).randint(times, size=x.shape[:-1])
    return jnp.asarray(chosen == index)[..., None]


class Routed(NamedTuple):
    """The inputs of a mixture of experts, and the routes.

    Args:
        inputs: The input at every position, padding included.
        chosen: The experts that the router chose there, at padding too.
        weights: What the inputs are multiplied by for each expert; None where they are not.
    """

    inputs: Float[Array, "b t d"]
    chosen: Bool[Array, "b t e"]
    weights: Float[Array, "b t e"] | None = None


class _RouterTap(Moe):
    """Stands in for a mixture of experts and keeps its input and its routes."""

    def __init__(self, moe: Moe):
        self.moe = moe
        self.inputs: Any = nnx.data(None)
        self.chosen: Any = nnx.data(None)
        self.weights: Any = nnx.data(None)

    def normed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        return self.moe.normed(x)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        key: Key[Array, ""] | None,
        real: Bool[Array, "b t"] | None = None,
        seen: Float[Array, "b t d"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"]]:
        y, logits = self.moe(x, key, real, seen)
        weights, chosen = self.moe.routes(logits)
        self.inputs, self.chosen = _Seen(x), _Seen(chosen)
        if self.moe.rule.weighs == "inputs":
            self.weights = _Seen(weights)
        return y, logits

    def routed(self) -> Routed:
        """Returns what was seen."""
        weights = None if self.weights is None else self.weights[...]
        return Routed(self.inputs[...], self.chosen[...], weights)


def mlp_inputs(
    model: nnx.Module, *args: PyTree, **kwargs: PyTree
) -> dict[str, Float[Array, "*n d"]]:
    """Runs a model and returns the input of each MLP, except for the experts of a `Moe`.

    Args:
        model: An NNX module that holds its MLPs as `Mlp` or `GatedMlp`; not changed.
        *args: The arguments of the call.
        **kwargs: The keyword arguments of the call.

    Returns:
        The inputs by site path, (b, t, d) in encoders. Works under ``jit``.

    Example:
        >>> import jax.numpy as jnp
        >>> from fusion_jax import Mlp
        >>> layers = nnx.Sequential(*[Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> {path: x.shape for path, x in mlp_inputs(layers, jnp.ones((3, 4))).items()}
        {'layers.0': (3, 4), 'layers.1': (3, 4)}
    """
    seen = routed_inputs(model, *args, **kwargs)
    return {path: x for path, x in seen.items() if not isinstance(x, Routed)}


def routed_inputs(
    model: nnx.Module, *args: PyTree, uncalled: Collection[str] = (), **kwargs: PyTree
) -> dict[str, Float[Array, "*n d"] | Routed]:
    """Runs a model and returns the input of each MLP, and inputs and routes of each `Moe`.

    The model need not call the sites that are ``uncalled``; they are left out.

    Returns:
        By site path the inputs, and `Routed` for the experts of a `Moe`.
    """
    tapped = nnx.clone(model)
    tapped.eval()
    adopted: dict[str, Any] = {}
    if adopted_modules(tapped):
        adopted = _adopted_inputs(tapped, *args, **kwargs)
    if adopted and len(adopted) == len(sites(tapped)):
        return adopted
    skipped = {*adopted, *uncalled}
    return {**routed_call(tapped, *args, skipped=skipped, **kwargs)[1], **adopted}


def routed_call(
    model: nnx.Module, *args: PyTree, skipped: Collection[str] = (), **kwargs: PyTree
) -> tuple[PyTree, dict[str, Float[Array, "*n d"] | Routed]]:
    """Runs a model, and returns its output and what `routed_inputs` returns.

    Sites that are ``skipped`` are left out: adopted modules never call their MLP as a whole.
    """
    tapped = nnx.clone(model)
    routers = {path: _RouterTap(module) for path, module in find_modules(tapped, Moe).items()}
    experts = {f"{path}.experts".lstrip("."): tap for path, tap in routers.items()}
    taps = {
        site.path: Tap(site.mlp) for site in sites(tapped) if site.path not in {*experts, *skipped}
    }
    # The MLPs first: inside a tapped mixture, their paths would be others.
    for path, tap in (*taps.items(), *routers.items()):
        tapped = replaced(tapped, path, tap)
    output = tapped(*args, **kwargs)
    routed = {path: tap.routed() for path, tap in experts.items()}
    return output, {**{path: tap.seen for path, tap in taps.items()}, **routed}


def _adopted_inputs(model: nnx.Module, *args: PyTree, **kwargs: PyTree) -> dict[str, Array]:
    """Runs a model and returns the inputs of its adopted MLPs, (l, ..., d) for stacks of layers.

    Their modules never call the MLP as a whole, so that the product with its matrix is watched.
    """
    plain = nnx.clone(model)
    paths = list(adopted_sites(plain))
    for path in paths:
        plain = replaced(plain, path, multiplied_out(at(plain, path)).plain())
    graph, state = nnx.split(plain)
    flat = dict(nnx.to_flat_state(state))
    places = {path_name(place): place for place in flat}
    kernels = {path: places[f"{path}.up.kernel"] for path in paths}

    def call(weights: dict[str, Array]) -> list[Array]:
        new = {**flat, **{kernels[p]: flat[kernels[p]].replace(w) for p, w in weights.items()}}
        made = nnx.merge(graph, nnx.from_flat_state(new), copy=True)
        return [x for x in jax.tree.leaves(made(*args, **kwargs)) if isinstance(x, jax.Array)]

    weights = {path: flat[place].get_value() for path, place in kernels.items()}
    seen = products(call, weights)[1]
    for path in paths:
        if path not in seen:
            raise InputError(f"{path}: the model does not use it for these arguments")
    return {path: seen[path][-1].inputs for path in paths}
