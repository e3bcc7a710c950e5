"""Runs a model on a sample of positions of text, and gathers what its MLPs see there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from fusion_jax.calibration.capture import Routed, routed_inputs
from fusion_jax.calibration.sources import generator
from fusion_jax.calibration.upstream import output_gradients
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.nn.adopted import adopted_sites
from fusion_jax.nn.programs import ByValue
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import at
from fusion_jax.progress import show_progress

UPSTREAM_POSITIONS = 1024
"""The number of positions whose gradients are computed in one call: a backward pass keeps the
hidden values of all layers."""
UPSTREAM_LOGITS = 2**27
"""The number of logits of such a call, half a GiB in float32."""
OWN_POSITIONS = 256
"""An expert with fewer positions of its own also gets this number of other experts' positions."""


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
        self.of_tokens = isinstance(model, Model) and model.takes == "text"
        if isinstance(model, Model) and self.of_tokens:
            self._vocabulary: int = model.config.vocab_size
            masks = [_masks(batch) for batch in batches]
            # An encoder and a decoder that reads other text each have their own positions.
            self._parts = {side: self._chosen([m[side] for m in masks]) for side in masks[0]}
            decoder = "decoder" in self._parts
            self._sides = {p: "decoder" * (decoder and p.startswith("decoder.")) for p in paths}
            self.count = self._count("")
            return
        # Sites with as many positions as each other, and one mask, have the same ones.
        shapes = [self._positions(model, i, paths) for i in range(len(batches))]
        names = {path: _mask_name(model, path) for path in paths}
        self._sides = {path: str([names[path], *(each[path] for each in shapes)]) for path in paths}
        self._parts = {
            side: self._chosen(
                [
                    _mask(batch, names[path], each[path])
                    for batch, each in zip(batches, shapes, strict=True)
                ]
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
                parts.append(jax.device_get(_gradients(call, state, arrays, own, mask)))
            return {path: np.concatenate([part[path] for part in parts]) for path in paths}

        return self.gathered(run, (), progress, verb="Upstream gradients")[0]

    def _pieces(self, i: int) -> list[tuple[Any, np.ndarray | None]]:
        """Returns a batch in pieces of some rows, and the mask of what each piece predicts."""
        batch = self.batches[i]
        if not self.of_tokens:
            return [(batch, None)]
        side = "decoder" if "decoder" in self._parts else ""
        mask = self._parts[side][i][0]
        rows, length = mask.shape
        most = max(1, min(UPSTREAM_POSITIONS, UPSTREAM_LOGITS // self._vocabulary) // length)
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
        rows, chosen = np.asarray(x.inputs)[mask], np.asarray(x.chosen)[mask].T
        if x.weights is None:
            return [rows[used] for used in chosen]
        weights = np.asarray(x.weights)[mask].T
        return [
            (rows[used].astype(own.dtype) * own[used, None]).astype(rows.dtype)
            for used, own in zip(chosen, weights, strict=True)
        ]
    # Experts without a `Moe` around them: rows of zeros are not positions.
    return [rows[(rows != 0).any(-1)] for rows in np.asarray(x)]


@partial(jax.jit, static_argnums=0)
def _run(fixed: ByValue, state: Any, arrays: list[Any]) -> dict[str, Any]:
    graph, rest, paths = fixed.value
    args, kwargs = _call(rest, arrays)
    model = nnx.merge(graph, state)
    uncalled = {site.path for site in sites(model)} - {*paths, *adopted_sites(model)}
    seen = routed_inputs(model, *args, uncalled=uncalled, **kwargs)
    return {path: seen[path] for path in paths}


@partial(jax.jit, static_argnums=0)
def _gradients(
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


def _mask_name(model: nnx.Module, path: str) -> str:
    """Returns the name of the mask of a site's positions."""
    if isinstance(model, Model) and model.takes != "text":
        return model.masks.get(path.partition(".")[0], "")
    return "attention_mask"


def _mask(batch: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns where positions of this shape are not padding."""
    given = batch.get(name) if isinstance(batch, Mapping) else None
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
