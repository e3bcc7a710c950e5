"""Collects the inputs of MLPs on calibration text, for methods that fit to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.calibration.capture import Routed, routed_inputs
from fusion_jax.calibration.data import Calibration
from fusion_jax.calibration.felt import output_gradients
from fusion_jax.calibration.sources import (
    CalibrationSource,
    generator,
    model_arguments,
    read_source,
    site_arrays,
)
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.nn.adopted import adopted_sites
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.programs import ByValue
from fusion_jax.nn.site import Site, select_sites, sites
from fusion_jax.nn.surgery import at
from fusion_jax.progress import show_progress
from ntk.selection import Selection

MAX_POSITIONS = 16384
"""The number of positions of text that are kept for each site, by default."""
FELT_POSITIONS = 1024
"""The number of positions whose gradients are computed in one call: a backward pass keeps the
hidden values of all layers."""
FELT_LOGITS = 2**27
"""The number of logits of such a call, half a GiB in float32."""
OWN_POSITIONS = 256
"""An expert with fewer positions of its own also gets this number of other experts' positions."""


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
        upstream: Whether to run the model backward too, for methods that weigh units by what its
            loss feels. No labels are needed: they are drawn from the model's own predictions.

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
    chosen = tuple(site.path for site in select_sites(sites(model), layers))
    source = read_source(texts)
    if isinstance(source, Mapping):
        raise InputError(
            "texts must be text or a list of batches; these are inputs by site already"
        )
    sample = Sample(model, model_arguments(model, source, key), chosen, key, max_positions)
    split = nnx.split(model)
    if upstream:
        check_called_whole(model, select_sites(sites(model), layers), "upstream")
    inputs = sample.inputs(split, chosen)[0]
    if not upstream:
        return inputs
    felt = sample.upstream(split, chosen)
    return {
        path: Calibration(jnp.asarray(x), upstream=jnp.asarray(felt[path]))
        for path, x in inputs.items()
    }


def check_called_whole(model: nnx.Module, chosen: Sequence[Site], option: str) -> None:
    """Raises `InputError` for sites whose gradients at the output cannot be had."""
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
        key: Key[Array, ""],
    ):
        self._paths = tuple(site.path for site in chosen)
        self._use: dict[str, np.ndarray] = {}
        self._upstream: dict[str, np.ndarray] = {}
        self._felt = upstream
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
            check_called_whole(model, chosen, "a score by what the loss feels")
        batches = model_arguments(model, source, key)
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
            if self._felt:
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
        if site.mlp.stack:
            # Rows of zeros are not positions.
            return Calibration(inputs, weights=(inputs != 0).any(-1).astype(jnp.float32))
        upstream = self._upstream.get(site.path)
        upstream = None if upstream is None else jnp.asarray(upstream)
        if not (sequential and self.sequential and self._changed):
            return Calibration(inputs, upstream=upstream)
        moved = self._sample.inputs(nnx.split(self._model), self._paths)[0][site.path]
        return Calibration(jnp.asarray(moved), _outputs(site.mlp, inputs), upstream=upstream)

    def has_upstream(self, site: Site) -> bool:
        """Returns whether the calibration of a site will have upstream gradients."""
        return site.path in self._upstream or (self.on_text and self._felt)

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


class Sample:
    """Random positions of batches of text, or of other inputs of a model.

    Args:
        model: The model.
        batches: Its arguments; for a model of this library keywords.
        paths: The sites whose inputs are wanted.
        key: Random key of the choice of positions.
        max_positions: The largest number of positions to choose.
    """

    def __init__(
        self,
        model: nnx.Module,
        batches: Sequence[Any],
        paths: tuple[str, ...],
        key: Array,
        max_positions: int,
    ):
        self._key, self._max_positions = key, max_positions
        self.batches = batches
        self._stacks = {p for p in adopted_sites(model) if at(model, p).stack}
        self.of_tokens = isinstance(model, Model)
        self._vocabulary = max(1, getattr(getattr(model, "config", None), "vocab_size", 1) or 1)
        if isinstance(model, Model):
            masks = [_masks(batch) for batch in batches]
            # An encoder and a decoder that reads other text each have their own positions.
            self._parts = {side: self._chosen([m[side] for m in masks]) for side in masks[0]}
            decoder = "decoder" in self._parts
            self._sides = {p: "decoder" * (decoder and p.startswith("decoder.")) for p in paths}
            self.count = self._count("")
            return
        # Sites with as many positions as each other have the same ones.
        shapes = [self._positions(model, i, paths) for i in range(len(batches))]
        self._sides = {path: str([each[path] for each in shapes]) for path in paths}
        self._parts = {
            side: self._chosen(
                [_mask(batch, each[path]) for batch, each in zip(batches, shapes, strict=True)]
            )
            for path, side in self._sides.items()
        }
        self.count = self._count(self._sides[paths[0]])

    def _positions(
        self, model: nnx.Module, i: int, paths: tuple[str, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the positions at which each site gets inputs from a batch."""
        try:
            seen = self._seen(_run.eval_shape, nnx.split(model), i, paths)
        except InputError:
            raise
        except Exception as error:  # the model may be other people's code
            reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
            raise InputError(
                f"the model does not run on batch {i} of the calibration ({reason}); a batch is an "
                "array, a tuple of the model's arguments, or a mapping of its keyword arguments"
            ) from error
        found = {p: x.inputs if isinstance(x, Routed) else x for p, x in seen.items()}
        return {p: x.shape[:-1][1 if p in self._stacks else 0 :] for p, x in found.items()}

    def _seen(
        self, run: Callable[..., dict[str, Any]], split: tuple[Any, Any], i: int, paths: Any
    ) -> dict[str, Any]:
        """Returns the inputs of sites on a batch."""
        graph, state = split
        arrays, fixed = _arguments(self.batches[i])
        return run(ByValue((graph, fixed, paths)), state, arrays)

    def _chosen(self, masks: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Returns each batch's mask, its chosen positions, and their places in the sample."""
        total = sum(int(mask.sum()) for mask in masks)
        if not total:
            raise InputError("calibration has no text")
        chosen = generator(self._key).permutation(total)[: self._max_positions]
        slots = np.full(total, -1)
        slots[chosen] = np.arange(len(chosen))
        parts, start = [], 0
        for mask in masks:
            flat = np.flatnonzero(mask)
            here = slots[start : start + len(flat)]
            start += len(flat)
            parts.append((mask, flat[here >= 0], here[here >= 0]))
        return parts

    def _count(self, side: str) -> int:
        return sum(len(slots) for _, _, slots in self._parts[side])

    def inputs(
        self, split: tuple[Any, Any], paths: tuple[str, ...], progress: bool | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Returns the inputs of sites at these positions, (t, d), or (e, t, d) for experts.

        Returns:
            The inputs; and for sites with experts, the number of real positions of each expert.
        """
        experts = {site.path for site in sites(nnx.merge(*split)) if site.mlp.stack}
        experts -= self._stacks
        return self.gathered(lambda i: self._seen(_run, split, i, paths), experts, progress)

    def upstream(
        self, split: tuple[Any, Any], paths: tuple[str, ...], progress: bool | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the gradients at the outputs of sites at these positions, (t, o)."""
        graph, state = split

        def run(i: int) -> dict[str, np.ndarray]:
            key = jax.random.fold_in(self._key, i)
            parts = []
            for batch, mask in self._pieces(i):
                arrays, fixed = _arguments(batch)
                call = ByValue((graph, fixed, paths))
                key, own = jax.random.split(key)
                parts.append(jax.device_get(_felt(call, state, arrays, own, mask)))
            return {path: np.concatenate([part[path] for part in parts]) for path in paths}

        return self.gathered(run, (), progress, verb="Measuring what the loss feels")[0]

    def _pieces(self, i: int) -> list[tuple[Any, np.ndarray | None]]:
        """Returns a batch in pieces of some rows, and the mask of what each piece predicts."""
        batch = self.batches[i]
        if not self.of_tokens:
            return [(batch, None)]
        side = "decoder" if "decoder" in self._parts else ""
        mask = self._parts[side][i][0]
        rows, length = mask.shape
        most = max(1, min(FELT_POSITIONS, FELT_LOGITS // self._vocabulary) // length)
        most = max(n for n in range(1, most + 1) if rows % n == 0)
        # One program for all pieces of a batch.
        return [
            ({name: x[j : j + most] for name, x in batch.items()}, mask[j : j + most])
            for j in range(0, rows, most)
        ]

    def gathered(
        self,
        run: Callable[[int], Mapping[str, Any]],
        experts: Collection[str],
        progress: bool | None = None,
        verb: str = "Calibrating",
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Returns what `inputs` returns, from what a function sees in each batch.

        Args:
            run: Returns the inputs of sites by path, for the number of a batch.
            experts: The paths of the sites that have experts.
            progress: See `fusion_jax.compress`.
            verb: What the progress says.
        """
        result: dict[str, np.ndarray] = {}
        routed: dict[str, list[list[np.ndarray]]] = {}
        count = len(self.batches)
        with show_progress(verb, count, progress, first="compiling") as advance:
            for i in range(count):
                for path, x in run(i).items():
                    side = self._sides[path]
                    mask, flat, slots = self._parts[side][i]
                    if path in experts:
                        routed.setdefault(path, []).append(_by_expert(x, mask))
                        continue
                    stack = x.shape[:1] if path in self._stacks else ()
                    x = np.asarray(x).reshape(*stack, -1, x.shape[-1])[..., flat, :]
                    if path not in result:
                        shape = (*stack, self._count(side), x.shape[-1])
                        result[path] = np.empty(shape, x.dtype)
                    result[path][..., slots, :] = x
                advance("batches")
        use: dict[str, np.ndarray] = {}
        for path, parts in routed.items():
            each = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
            use[path] = np.array([len(rows) for rows in each])
            result[path] = self._of_experts(each)
        return result, use

    def _of_experts(self, each: list[np.ndarray]) -> np.ndarray:
        """Returns (e, t, d) from the positions that were routed to each expert."""
        draw = generator(self._key)
        rows = [draw.permutation(x)[: self._max_positions] for x in each]
        every = draw.permutation(np.concatenate(each))
        # An expert that this text hardly uses is also fitted to the inputs of others.
        few = every[:OWN_POSITIONS]
        rows = [x if len(x) >= OWN_POSITIONS else np.concatenate([x, few]) for x in rows]
        return stack_padded(rows)


def stack_padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks the inputs of several experts into (e, t, d), padded with zeros to the longest."""
    most = max(map(len, rows))
    return np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in rows])


def _by_expert(x: Any, mask: np.ndarray) -> list[np.ndarray]:
    """Returns the inputs of each expert at positions that are not padding."""
    if isinstance(x, Routed):
        rows = np.asarray(x.inputs)[mask]
        return [rows[used] for used in np.asarray(x.chosen)[mask].T]
    # Experts without a `Moe` around them: rows of zeros are not positions.
    return [rows[(rows != 0).any(-1)] for rows in np.asarray(x)]


@partial(jax.jit, static_argnums=0)
def _run(fixed: ByValue, state: Any, arrays: list[Any]) -> dict[str, Any]:
    graph, rest, paths = fixed.value
    args, kwargs = _call(rest, arrays)
    seen = routed_inputs(nnx.merge(graph, state), *args, **kwargs)
    return {path: seen[path] for path in paths}


@partial(jax.jit, static_argnums=0)
def _felt(
    fixed: ByValue, state: Any, arrays: list[Any], key: Array, mask: Array | None
) -> dict[str, Any]:
    graph, rest, paths = fixed.value
    args, kwargs = _call(rest, arrays)
    return output_gradients(nnx.merge(graph, state), paths, key, mask, *args, **kwargs)


def _call(rest: tuple[Any, Any], arrays: list[Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Returns the arguments and keyword arguments of a batch that `_arguments` took apart."""
    tree, others = rest
    leaves = list(arrays)
    for i, value in others:
        leaves.insert(i, value)
    batch = jax.tree.unflatten(tree, leaves)
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, tuple | list) else (batch,)), {}


def _arguments(batch: Any) -> tuple[list[Any], Any]:
    """Returns the arrays of a batch, and the rest: its structure, and values such as a flag."""
    leaves, tree = jax.tree.flatten(batch)
    arrays = [x for x in leaves if hasattr(x, "shape")]
    others = tuple((i, x) for i, x in enumerate(leaves) if not hasattr(x, "shape"))
    return arrays, (tree, others)


def _mask(batch: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns where positions of this shape are not padding."""
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if given is not None and np.shape(given) == shape:
        return np.asarray(given).astype(bool)
    return np.ones(shape, bool)


def _masks(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns where positions are not padding, for the encoder or only stack, and the decoder."""

    def mask(name: str, like: Any) -> np.ndarray:
        if batch.get(name) is not None:
            return np.asarray(batch[name]).astype(bool)
        return np.ones(np.shape(like)[:2], bool)

    result = {"": mask("attention_mask", next(iter(batch.values())))}
    if "decoder_input_ids" in batch:
        result["decoder"] = mask("decoder_attention_mask", batch["decoder_input_ids"])
    return result
