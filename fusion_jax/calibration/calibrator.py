"""What the MLPs of a model see on calibration text, for methods that fit to it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.calibration.capture import Routed, routed_inputs
from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model, max_positions
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.tokens import MAX_LENGTH, TokenBatch, batches, length_for, load_tokenizer
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.site import Layers, Site, select, sites

Source = (
    Sequence[str]
    | Sequence[TokenBatch]
    | Sequence[Mapping[str, Any]]
    | Mapping[str, Any]
    | os.PathLike
) | str
"""What calibration can come from, see `fusion_jax.compress`."""

MAX_POSITIONS = 16384
"""Positions of text that are kept of each site, unless the caller says otherwise."""
_FEWEST = 256
"""Positions of its own with which an expert needs no others'."""
_RANDOM = (512, 32)
"""Sequences, and tokens of each, where there is no text."""


@on_auto_axes
def calibrate(
    model: nnx.Module,
    texts: Source,
    *,
    key: Key[Array, ""],
    layers: Layers = None,
    max_positions: int = MAX_POSITIONS,
) -> dict[str, Float[np.ndarray, "*e t d"]]:
    """The inputs of a model's MLPs on text, to be used, or saved and used, as calibration.

    Args:
        model: The model.
        texts: A few hundred sentences, or token batches; see `fusion_jax.compress`.
        key: Random key of the choice of positions.
        layers: Which sites, as for `fusion_jax.compress`.
        max_positions: How many positions to keep; padding is left out.

    Returns:
        Inputs by site path, (t, d), in random order, the same for all sites of one stack of layers;
        of experts (e, t, d), each expert's at the positions that the router sends to it, with zeros
        behind those that have fewer. Save them with ``safetensors.numpy.save_file``.

    Raises:
        InputError: There is no text, or the model has no tokenizer.

    Example:
        >>> mlp = Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
        >>> seen = calibrate(mlp, [{"x": jnp.ones((2, 3, 4))}], key=jax.random.key(0))
        >>> {path: x.shape for path, x in seen.items()}
        {'': (6, 4)}
    """
    chosen = [site.path for site in select(sites(model), layers)]
    sample = _Sample(_batches_of(model, texts, key), key, max_positions)
    return sample.inputs(nnx.split(model), tuple(chosen))[0]


class Calibrator:
    """Gives every site its calibration, in the order of compression.

    Args:
        model: The model before compression.
        chosen: The sites that will be compressed.
        source: See `fusion_jax.compress`.
        sequential: Whether any site sees what the compressed sites before it lead to.
        key: Random key of the choice of positions.

    Raises:
        InputError: The source is empty, unknown, does not fit the sites, or has no tokenizer.
    """

    def __init__(
        self,
        model: nnx.Module,
        chosen: Sequence[Site],
        source: Source,
        *,
        sequential: bool,
        key: Key[Array, ""],
    ):
        self._paths = tuple(site.path for site in chosen)
        self._sample: _Sample | None = None
        self._use: dict[str, np.ndarray] = {}
        self.sequential = False
        """Whether `of` depends on what was compressed before."""
        if source != "random" and isinstance(source, str | os.PathLike):
            source = _read(Path(source))
        if isinstance(source, Mapping):
            self._inputs = {s.path: _given(source, s) for s in chosen}
            self.description = f"given, {len(self._inputs[self._paths[0]]):,} positions"
            return
        sample = _Sample(_batches_of(model, source, key), key, MAX_POSITIONS)
        self._inputs, self._use = sample.inputs(nnx.split(model), self._paths)
        kind = "random tokens" if source == "random" else "text"
        self.description = f"{sample.count:,} positions of {kind}"
        self.sequential = sequential
        if sequential:
            self._sample = sample
            # Compressed sites are padded back to their width, so that one program serves all.
            self._model: Any = nnx.clone(model)
            self._mlps = {site.path: site.mlp for site in sites(self._model)}
            self._replaced = False

    def of(self, site: Site, sequential: bool = False) -> Calibration:
        """The calibration of a site, with positions in random order.

        Args:
            site: The site.
            sequential: Whether it sees what the compressed sites before it lead to.

        Returns:
            The calibration.
        """
        inputs = jnp.asarray(self._inputs[site.path])
        if site.mlp.stack:
            # Slots that no position was routed to are zero.
            return Calibration(inputs, weights=(inputs != 0).any(-1).astype(jnp.float32))
        if self._sample is None or not (sequential and self._replaced):
            return Calibration(inputs)
        moved = self._sample.inputs(nnx.split(self._model), self._paths)[0][site.path]
        return Calibration(jnp.asarray(moved), _outputs(site.mlp, inputs))

    def abstract(self, site: Site) -> jax.ShapeDtypeStruct:
        """The shape and dtype of a site's inputs."""
        inputs = self._inputs[site.path]
        return jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)

    def use(self, site: Site) -> tuple[float, ...] | None:
        """The share of the routed positions that each expert of a site gets on the text.

        Positions dropped for lack of capacity, and padding, do not count.

        Args:
            site: The site.

        Returns:
            The shares, which add up to 1; None if the site has no experts or inputs were given.
        """
        counts = self._use.get(site.path)
        return None if counts is None else tuple((counts / max(1, counts.sum())).tolist())

    def compressed(self, site: Site, new: Mlp) -> None:
        """Takes note that a site was compressed."""
        if self._sample is not None:
            same = new.padded(site.mlp.width)
            self._mlps[site.path].load_sub_mlps(same.sub_mlps(), same.out_bias())
            self._replaced = True


@nnx.jit
def _outputs(mlp: Mlp, x: Array) -> Array:
    y = mlp(x.astype(mlp.dtype))
    bias = mlp.out_bias()
    return y if bias is None else y - bias[None]


class _Sample:
    """Random positions of batches of text."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], key: Array, max_positions: int):
        self._key, self._max_positions = key, max_positions
        self._batches = batches
        masks = [_masks(batch) for batch in batches]
        # An encoder and a decoder that reads other text each have their own positions.
        self._parts = {side: self._chosen([m[side] for m in masks]) for side in masks[0]}
        self.count = self._count("")

    def _chosen(self, masks: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each batch the mask, the chosen positions, and where they go in the sample."""
        total = sum(int(mask.sum()) for mask in masks)
        if not total:
            raise InputError("calibration has no text")
        chosen = _generator(self._key).permutation(total)[: self._max_positions]
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
        return sum(len(slots) for _, _, slots in self._parts.get(side, self._parts[""]))

    def inputs(
        self, split: tuple[Any, Any], paths: tuple[str, ...]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The inputs of sites at these positions, (t, d), or (e, t, d) of experts.

        Args:
            split: The model's graph and state.
            paths: The sites.

        Returns:
            The inputs; and for sites with experts, how many real positions each expert gets.
        """
        result: dict[str, np.ndarray] = {}
        routed: dict[str, list[list[np.ndarray]]] = {}
        experts = {site.path for site in sites(nnx.merge(*split)) if site.mlp.stack}
        for i, batch in enumerate(self._batches):
            for path, x in _inputs(*split, batch, paths).items():
                side = "decoder" if path.startswith("decoder.") else ""
                mask, flat, slots = self._parts.get(side, self._parts[""])[i]
                if path in experts:
                    routed.setdefault(path, []).append(_by_expert(x, mask))
                    continue
                x = np.asarray(x).reshape(-1, x.shape[-1])[flat]
                if path not in result:
                    result[path] = np.empty((self._count(side), x.shape[-1]), x.dtype)
                result[path][slots] = x
        use: dict[str, np.ndarray] = {}
        for path, parts in routed.items():
            each = [np.concatenate(rows) for rows in zip(*parts, strict=True)]
            use[path] = np.array([len(rows) for rows in each])
            result[path] = self._of_experts(each)
        return result, use

    def _of_experts(self, each: list[np.ndarray]) -> np.ndarray:
        """Positions that were routed to each expert, (e, t, d): zeros where it has fewer."""
        generator = _generator(self._key)
        rows = [generator.permutation(x)[: self._max_positions] for x in each]
        every = generator.permutation(np.concatenate(each))
        # An expert that this text hardly uses is fitted to what the others get.
        rows = [x if len(x) >= _FEWEST else np.concatenate([x, every[:_FEWEST]]) for x in rows]
        return padded(rows)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Inputs of several experts as one array (e, t, d), zeros behind those that have fewer."""
    most = max(map(len, rows))
    return np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in rows])


def _by_expert(x: Any, mask: np.ndarray) -> list[np.ndarray]:
    """The inputs of each expert at real positions."""
    if isinstance(x, Routed):
        rows = np.asarray(x.inputs)[mask]
        return [rows[used] for used in np.asarray(x.chosen)[mask].T]
    # Experts without a router of ours: slots that no position was routed to are zero.
    return [rows[(rows != 0).any(-1)] for rows in np.asarray(x)]


@partial(jax.jit, static_argnums=(0, 3))
def _inputs(graph: Any, state: Any, batch: Mapping[str, Array], paths: tuple[str, ...]) -> Any:
    seen = routed_inputs(nnx.merge(graph, state), **batch)
    return {path: seen[path] for path in paths}


def _masks(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Which positions are not padding: of the encoder or the only stack, and of a decoder."""

    def mask(name: str, like: Any) -> np.ndarray:
        if batch.get(name) is not None:
            return np.asarray(batch[name]).astype(bool)
        return np.ones(np.shape(like)[:2], bool)

    result = {"": mask("attention_mask", next(iter(batch.values())))}
    if "decoder_input_ids" in batch:
        result["decoder"] = mask("decoder_attention_mask", batch["decoder_input_ids"])
    return result


def _batches_of(model: nnx.Module, source: Any, key: Array) -> Sequence[Mapping[str, Any]]:
    """Token batches as keyword arguments of the model."""
    items: list[Any]
    ours = isinstance(model, Model)
    most = max_positions(model) if ours else None
    longest = length_for(model) if ours else MAX_LENGTH
    if isinstance(source, str):
        tokenizer = _tokenizer(model)
        # Through text, so that the tokenizer puts its special tokens around them.
        texts = tokenizer.batch_decode(_drawn(tokenizer, _RANDOM, key))
        items = batches(tokenizer, texts, max_length=longest)
    elif all(isinstance(item, str) for item in source):
        texts = [text for text in source if text.strip()]
        if not texts:
            raise InputError("calibration has no text")
        tokenizer = _tokenizer(model)
        items = batches(tokenizer, texts, max_length=longest)
        items += [scrambled(b, tokenizer, jax.random.fold_in(key, i)) for i, b in enumerate(items)]
    else:
        items = list(source)
    made = [_arguments(model, item) if isinstance(item, TokenBatch) else item for item in items]
    if not all(isinstance(item, Mapping) for item in made):
        raise InputError(
            "calibration must be strings, batches of tokens, inputs by site, a file, or 'random'"
        )
    for item in made:
        length = np.shape(item["input_ids"])[-1] if "input_ids" in item else 0
        if most is not None and length > most:
            raise InputError(f"a batch has {length} tokens a row; the model has {most} positions")
    return made


def _arguments(model: nnx.Module, batch: TokenBatch) -> Mapping[str, Any]:
    """A batch as arguments; a decoder beside an encoder reads the same text."""
    fields = batch._asdict()
    if "decoder_input_ids" not in inspect.signature(type(model).__call__).parameters:
        return fields
    return {**fields, **{f"decoder_{name}": value for name, value in fields.items()}}


def _tokenizer(model: nnx.Module) -> Any:
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Provenance):
        raise InputError(
            "calibration with text needs the tokenizer of a model from fusion_jax.load; give token "
            "batches or inputs"
        )
    return load_tokenizer(provenance.folder)


def scrambled(batch: TokenBatch, tokenizer: Any, key: Key[Array, ""]) -> TokenBatch:
    """A batch with every word's token replaced by a random one of the vocabulary.

    Text of one kind shows a model a small part of what it can see; with as many random tokens
    beside it, what is fitted to the text holds on text of other kinds, too.

    Args:
        batch: The batch.
        tokenizer: Its tokenizer; special tokens stay and are not drawn.
        key: Random key.

    Returns:
        The new batch.
    """
    ids = np.asarray(batch.input_ids)
    drawn = _drawn(tokenizer, ids.shape, key)
    ids = np.where(np.isin(ids, tokenizer.all_special_ids), ids, drawn)
    return batch._replace(input_ids=jnp.asarray(ids))


def _drawn(tokenizer: Any, shape: tuple[int, ...], key: Array) -> np.ndarray:
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids).astype(np.int32)
    return _generator(key).choice(words, shape)


def _generator(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))


def _read(path: Path) -> Any:
    """Calibration from a file: saved inputs, or text with a sentence per line."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"cannot read calibration from {path}: {error}") from None
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read calibration from {path}: {error}") from None


def _given(source: Mapping[str, Any], site: Site) -> np.ndarray:
    x = source.get(site.path)
    if x is None:
        raise InputError(f"calibration has no inputs for {site.path or 'the model'}")
    want = (*site.mlp.stack, x.shape[-2], site.mlp.d_in) if x.ndim > 1 else ()
    if x.shape != want or not x.size:
        shape = ", ".join(map(str, (*site.mlp.stack, "t", site.mlp.d_in)))
        raise InputError(
            f"calibration of {site.path or 'the model'} must be ({shape}); got {x.shape}"
        )
    return np.asarray(x)
