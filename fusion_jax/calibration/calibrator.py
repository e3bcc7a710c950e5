"""Collects the inputs of MLPs on calibration text, for methods that fit to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fusion_jax.calibration.data import Calibration, Routing
from fusion_jax.calibration.sample import Sample
from fusion_jax.calibration.sources import (
    CalibrationSource,
    model_arguments,
    read_source,
    site_arrays,
)
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.moe import Moe, mixtures
from fusion_jax.nn.adopted import adopted_sites
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import Site, select_sites, sites
from ntk.selection import Selection

MAX_POSITIONS = 32768
"""The number of positions of text that are kept for each site, by default."""
BLOCK = 1024
"""The number of positions at which all experts compute at a time."""


@overload
def calibrate(
    model: nnx.Module,
    texts: CalibrationSource,
    *,
    key: Key[Array, ""],
    layers: Selection = None,
    max_positions: int = MAX_POSITIONS,
    upstream: Literal[False] = False,
) -> dict[str, np.ndarray]: ...
@overload
def calibrate(
    model: nnx.Module,
    texts: CalibrationSource,
    *,
    key: Key[Array, ""],
    layers: Selection = None,
    max_positions: int = MAX_POSITIONS,
    upstream: Literal[True],
) -> dict[str, Calibration]: ...
@overload
def calibrate(
    model: nnx.Module,
    texts: CalibrationSource,
    *,
    key: Key[Array, ""],
    layers: Selection = None,
    max_positions: int = MAX_POSITIONS,
    upstream: bool,
) -> dict[str, Any]: ...
@on_auto_axes
def calibrate(
    model: nnx.Module,
    texts: CalibrationSource,
    *,
    key: Key[Array, ""],
    layers: Selection = None,
    max_positions: int = MAX_POSITIONS,
    upstream: bool = False,
) -> dict[str, Any]:
    """Returns the inputs of a model's MLPs on text, for use as calibration, now or later.

    Args:
        model: The model.
        texts: A few hundred sentences, a file of them, or a list of batches of the model's
            arguments (tokens, images, or whatever it takes); see `fusion_jax.compress`.
        key: Random key of the choice of positions.
        layers: Which sites, as for `fusion_jax.compress`.
        max_positions: The largest number of positions to keep; padding is left out.
        upstream: Whether to return the gradients of the model's loss at the outputs of the MLPs
            too, for methods that weigh units by them. That takes a backward pass and no labels,
            which are drawn from the model's own predictions.

    Returns:
        Inputs by site path, (t, d), in random order, the same for all sites of one stack of layers.
        For experts (e, t, d): each expert has the positions that the router sends to it, and zeros
        behind them. Save the inputs with ``safetensors.numpy.save_file``. With ``upstream``, a
        `Calibration` by site path, with (t, o) gradients besides the inputs.

    Raises:
        InputError: There is no text, or the model has no tokenizer.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
        >>> seen = calibrate(mlp, [{"x": jnp.ones((2, 3, 4))}], key=jax.random.key(0))
        >>> {path: x.shape for path, x in seen.items()}
        {'': (6, 4)}
    """
    found = select_sites(sites(model), layers)
    if upstream:
        check_called_whole(model, found, "upstream")
    chosen = tuple(site.path for site in found)
    source = read_source(texts)
    if isinstance(source, Mapping):
        raise InputError(
            "texts must be text or a list of batches; these are inputs by site already"
        )
    sample = Sample(model, model_arguments(model, source, key), chosen, key, max_positions)
    split = nnx.split(model)
    inputs = sample.inputs(split, chosen)[0]
    if not upstream:
        return inputs
    gradients = sample.upstream(split, chosen)
    return {
        path: Calibration(jnp.asarray(x), upstream=jnp.asarray(gradients[path]))
        for path, x in inputs.items()
    }


def check_called_whole(model: nnx.Module, chosen: Sequence[Site], option: str) -> None:
    """Raises `InputError` for sites whose upstream gradients cannot be computed."""
    adopted = adopted_sites(model)
    for site in chosen:
        if site.mlp.stack or site.path in adopted:
            raise InputError(
                f"{site.path}: {option} is for single MLPs that a model calls as a whole, not for "
                "experts or adopted modules"
            )


class Calibrator:
    """Gives every site its calibration, in the order of compression.

    Args:
        model: The model before compression.
        chosen: The sites that will be compressed.
        source: See `fusion_jax.compress`.
        sequential: Whether any site is calibrated in the model whose earlier sites are compressed.
        upstream: Whether gradients at the outputs of the sites are wanted, see `Calibration`.
        text_alone: Whether text is taken as it is, for how a router uses experts on it; fits hold
            more widely with random tokens beside it.
        key: Random key of the choice of positions.

    Raises:
        InputError: The source is empty, unknown, does not fit the sites, or has no tokenizer.
    """

    def __init__(
        self,
        model: nnx.Module,
        chosen: Sequence[Site],
        source: CalibrationSource,
        *,
        sequential: bool,
        upstream: bool = False,
        text_alone: bool = False,
        key: Key[Array, ""],
    ):
        self._paths = tuple(site.path for site in chosen)
        self._use: dict[str, np.ndarray] = {}
        self._mixtures = mixtures(model)
        self._upstream: dict[str, np.ndarray] = {}
        self._wants_upstream = upstream
        source = read_source(source)
        self.on_text = not isinstance(source, Mapping)
        """Whether the model runs on text or tokens; else the inputs of the sites are given."""
        self.sequential = sequential and self.on_text
        """Whether `of` depends on the sites that were compressed before."""
        if isinstance(source, Mapping):
            given = {site.path: site_arrays(source, site) for site in chosen}
            self._inputs = {path: x for path, (x, _) in given.items()}
            self._upstream = {path: g for path, (_, g) in given.items() if g is not None}
            self.description = f"given, {len(self._inputs[self._paths[0]]):,} positions"
            return
        if upstream:
            check_called_whole(model, chosen, "a score by upstream gradients")
        batches = model_arguments(model, source, key, scramble=not text_alone)
        self._sample = Sample(model, batches, self._paths, key, MAX_POSITIONS)
        self._model: Any = model
        kind = "text" if self._sample.of_tokens else "the given batches"
        kind = "random tokens" if isinstance(source, str) else kind
        self.description = f"{self._sample.count:,} positions of {kind}"

    def capture(self, progress: bool | None = None) -> Calibrator:
        """Runs the model on the text, which `of` needs; returns itself."""
        if self.on_text:
            split = nnx.split(self._model)
            self._inputs, self._use = self._sample.inputs(split, self._paths, progress)
            if self._wants_upstream:
                self._upstream = self._sample.upstream(split, self._paths, progress)
        if self.sequential:
            # Compressed sites are padded back to their width, so that one program serves all.
            self._model = nnx.clone(self._model)
            self._mlps: dict[str, Any] = {site.path: site.mlp for site in sites(self._model)}
            self._changed = False
        return self

    def of(self, site: Site, sequential: bool = False) -> Calibration:
        """Returns the calibration of a site, with positions in random order.

        With ``sequential``, the inputs come from the model whose earlier sites are compressed.
        """
        inputs = jnp.asarray(self._inputs[site.path])
        upstream = self._upstream.get(site.path)
        upstream = None if upstream is None else jnp.asarray(upstream)
        if site.mlp.stack:
            # Rows of zeros are not positions.
            real = (inputs != 0).any(-1).astype(jnp.float32)
            return Calibration(inputs, weights=real, upstream=upstream)
        if not (sequential and self.sequential and self._changed):
            return Calibration(inputs, upstream=upstream)
        moved = self._sample.inputs(nnx.split(self._model), self._paths)[0][site.path]
        return Calibration(jnp.asarray(moved), _outputs(site.mlp, inputs), upstream=upstream)

    def has_upstream(self, site: Site) -> bool:
        """Returns whether the calibration of a site will have upstream gradients."""
        return site.path in self._upstream or (self.on_text and self._wants_upstream)

    def abstract(self, site: Site) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of a site's inputs."""
        inputs = self._inputs[site.path]
        return jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)

    def use(self, site: Site) -> tuple[float, ...] | None:
        """Returns the share of the routed positions that each expert of a site gets on the text.

        Positions dropped for lack of capacity, and padding, do not count.

        Returns:
            The shares, which add up to 1; None if the site has no experts or inputs were given.
        """
        counts = self._use.get(site.path)
        return None if counts is None else tuple((counts / max(1, counts.sum())).tolist())

    def routing(self, site: Site) -> Routing:
        """Returns how the router around a site uses its experts on the text."""
        counts = jnp.asarray(self._use[site.path], jnp.int32)
        inputs = jnp.asarray(self._inputs[site.path])
        return Routing(counts, _sizes(self._mixtures[site.path], inputs, counts))

    def compressed(self, site: Site, new: AnyMlp) -> None:
        """Records that a site was compressed."""
        if self.sequential:
            same = new.padded(site.mlp.width)
            self._mlps[site.path].load_sub_mlps(same.sub_mlps(), same.out_bias())
            self._changed = True


@nnx.jit
def _outputs(mlp: AnyMlp, x: Array) -> Array:
    y = mlp(x.astype(mlp.dtype))
    bias = mlp.out_bias()
    return y if bias is None else y - bias[None]


@jax.jit
def _sizes(moe: Moe, inputs: Float[Array, "e t d"], counts: Int[Array, " e"]) -> Float[Array, " e"]:
    """Returns `Routing.sizes`; the inputs of each expert start with those routed to it."""
    e, t, d = inputs.shape
    size = min(BLOCK, t)
    blocks = -(-t // size)
    x = jnp.pad(inputs, ((0, 0), (0, blocks * size - t), (0, 0)))

    def added(x: Float[Array, "e n d"]) -> Float[Array, "e n"]:
        lengths = jnp.linalg.norm(wide(moe.experts(x)), axis=-1)
        if moe.rule.weighs == "inputs":  # which are weighted already
            return lengths
        # As texts of one position each, which exceed no capacity.
        read = moe.router_inputs(x.reshape(-1, 1, d))
        weights, _ = moe.routes(moe.router_logits(read, None))
        own = jnp.diagonal(weights.reshape(e, size, e), axis1=0, axis2=2).T
        return own * lengths

    parts = jax.lax.map(added, x.reshape(e, blocks, size, d).swapaxes(0, 1))
    each = parts.swapaxes(0, 1).reshape(e, -1)
    counted = jnp.arange(each.shape[1])[None] < counts[:, None]
    total = jnp.where(counted, each, 0).sum(1)
    return total / jnp.maximum(counted.sum(1, dtype=each.dtype), 1)
