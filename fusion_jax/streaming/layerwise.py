"""Compresses a model layer by layer, from disk to disk, so that it can be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from fusion_jax.calibration.calibrator import MAX_POSITIONS
from fusion_jax.calibration.capture import routed_call
from fusion_jax.calibration.sample import Sample
from fusion_jax.calibration.sources import CalibrationSource, model_arguments, read_source
from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.opening import open_checkpoint
from fusion_jax.checkpoint.reading import Checkpoint
from fusion_jax.checkpoint.writing import write_description
from fusion_jax.compression.checks import checked_key
from fusion_jax.compression.mlps import compress
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.methods.base import Method
from fusion_jax.models.base import Model
from fusion_jax.models.cache import CacheUpdate
from fusion_jax.models.causal import CausalLm
from fusion_jax.models.provenance import Head
from fusion_jax.nn.programs import ByValue
from fusion_jax.nn.site import Site, select_sites, sites
from fusion_jax.nn.surgery import at, path_name, replaced
from fusion_jax.progress import show_progress
from fusion_jax.report import Report, SiteReport, size_of
from ntk.selection import Selection

SHARD_BYTES = 1_000_000_000
"""The largest size of a file of weights, which is in memory until it is written."""


@on_auto_axes
def compress_files(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    method: Method,
    *,
    key: Key[Array, ""],
    head: Head | None = None,
    layers: Selection = None,
    budget: float | None = None,
    calibration: CalibrationSource | None = None,
    dtype: DTypeLike | None = None,
    progress: bool | None = None,
) -> Report:
    """Compresses a model from its files into an artefact, with one layer in memory at a time.

    The result is that of `fusion_jax.load`, `fusion_jax.compress` and `fusion_jax.save`. With
    calibration, each layer of a decoder also runs on the text, whose hidden states stay in memory.

    Args:
        name: The model, as for `fusion_jax.load`.
        folder: The folder of the artefact; it must not exist or be empty. Writing is atomic.
        method: The method.
        key: Random key, as for `fusion_jax.compress`.
        head: The head, as for `fusion_jax.load`; one that the files have.
        layers: Which sites.
        budget: The share of each MLP's parameters to keep, in place of the method's own size.
        calibration: Text, a file of text, batches of tokens, or inputs by site; text and tokens
            are for decoders.
        dtype: The dtype of the parameters; None for that of the files.
        progress: As for `fusion_jax.compress`.

    Returns:
        The report.

    Raises:
        InputError: As for `fusion_jax.load` and `fusion_jax.compress`; the model is not a decoder,
            but the calibration is text; or the method needs the whole model.
        OSError: Writing failed; nothing is left behind.

    Example:
        >>> compress_files("huge", "huge-fused", Fusion(width=0.5), key=key)  # doctest: +SKIP
        >>> smaller = fusion_jax.load("huge-fused", head="causal-lm")  # doctest: +SKIP
    """
    files.check_new_folder(folder)
    key = checked_key(key)
    if method.model_needs.router:
        raise InputError(
            f"{method.model_needs.router} needs the whole model in memory: load it and use "
            "fusion_jax.compress (on the command line, without --stream)"
        )
    opened = open_checkpoint(name, head=head, dtype=dtype)
    opened.check_all()
    work = _Work(opened, method, key, layers, budget, calibration, progress)
    with files.new_folder(folder) as new:
        files.write_tensors(new, work.tensors(), shard_bytes=SHARD_BYTES)
        report = work.report()
        write_description(new, work.smaller, report=report)
    return report


class _Work:
    """The layers of one model, read, compressed and given on one after the other."""

    def __init__(
        self,
        opened: Checkpoint,
        method: Method,
        key: Key[Array, ""],
        layers: Selection,
        budget: float | None,
        calibration: CalibrationSource | None,
        progress: bool | None,
    ):
        self.opened, self.method, self.key = opened, method, key
        self.budget, self.progress = budget, progress
        self.abstract: Model = opened.abstract
        self.chosen = select_sites(sites(self.abstract), layers)
        self.smaller: Any = nnx.clone(self.abstract)
        self.rows: list[SiteReport] = []
        self.described: dict[str, object] = {}
        self.source: str | None = None
        self.given: Mapping[str, PyTree] | None = None
        self.sample: Sample | None = None
        self.states: list[np.ndarray] = []
        if calibration is not None:
            self._calibrated(calibration)

        def layer(static: ByValue, state: PyTree, x: Array, batch: Mapping[str, PyTree]) -> PyTree:
            graph, size = static.value
            decoder: Any = self.abstract
            start = decoder.start(batch["input_ids"], batch.get("attention_mask"))
            seen, context = start.seen[size], start.context
            return routed_call(nnx.merge(graph, state), x, seen, CacheUpdate(None), context, None)

        self._layer = jax.jit(layer, static_argnums=0)

    def _calibrated(self, calibration: CalibrationSource) -> None:
        source = read_source(calibration)
        if isinstance(source, Mapping):
            self.given = source
            return
        if not isinstance(self.abstract, CausalLm) or not self.abstract.layers_apart:
            raise InputError(
                "only decoders are calibrated on text layer by layer, and only if layers share "
                "nothing; for another model, load it and use fusion_jax.compress, or give inputs "
                "by site"
            )
        # The key is that of `compress`.
        key = jax.random.fold_in(self.key, 2**31 - 1)
        batches = model_arguments(self.abstract, source, key)
        paths = tuple(site.path for site in self.chosen)
        self.sample = Sample(self.abstract, batches, paths, key, MAX_POSITIONS)
        kind = "random tokens" if isinstance(source, str) else "text"
        self.source = f"{self.sample.count:,} positions of {kind}"

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the variables of the smaller model, layer by layer."""
        groups = self._groups()
        rest = self._read(lambda path: not any(_inside(g, path) for g in groups))
        with show_progress("Compressing", len(groups), self.progress, first="reading") as advance:
            self._embed(rest)
            for group, chosen in groups.items():
                own = self._read(partial(_inside, group))
                seen = self._run(group, own)
                if chosen:
                    own = self._compressed(own, chosen, seen)
                yield from own.items()
                advance(group)
        yield from rest.items()

    def _groups(self) -> dict[str, list[Site]]:
        """Returns the sites to compress of each part of the model that is read at once."""
        if isinstance(self.abstract, CausalLm):
            parts = [f"layers.{i}" for i in range(len(self.abstract.layers))]
        else:
            parts = [site.path for site in sites(self.abstract)]
        return {
            part: [s for s in self.chosen if s.path == part or s.path.startswith(f"{part}.")]
            for part in parts
        }

    def _read(self, wanted: Callable[[str], bool]) -> dict[str, np.ndarray]:
        flat = nnx.to_flat_state(nnx.state(self.abstract))
        found = {path_name(path): variable for path, variable in flat}
        return {
            path: np.asarray(self.opened.value(self.opened.find(path, v.get_value().shape), v))
            for path, v in found.items()
            if wanted(path)
        }

    def _embed(self, rest: Mapping[str, np.ndarray]) -> None:
        """Keeps the input of the first layer for each batch of the calibration."""
        if self.sample is None:
            return
        model: Any = _filled(self.abstract, rest)
        for batch in self.sample.batches:
            start = model.start(batch["input_ids"], batch.get("attention_mask"))
            self.states.append(np.asarray(model.embed(start.ids, start.positions, None)))

    def _run(self, group: str, own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Runs one layer on the hidden states, and returns the inputs of its sites."""
        sample = self.sample
        if sample is None:
            return None
        decoder: Any = self.abstract
        index, prefix = int(group.rpartition(".")[2]), f"{group}."
        inside = {path.removeprefix(prefix): x for path, x in own.items()}
        graph, state = nnx.split(_filled(decoder.layers[index], inside))
        static = ByValue((graph, decoder.sliding_windows[index]))
        here = [site for site in self.chosen if site.path.startswith(prefix)]
        wanted = {site.path for site in here}

        def run(i: int) -> dict[str, PyTree]:
            (x, _), seen = self._layer(static, state, self.states[i], sample.batches[i])
            self.states[i] = np.asarray(x)
            found = {prefix + path: each for path, each in seen.items()}
            return {path: each for path, each in found.items() if path in wanted}

        if here:
            return sample.gathered(run, {s.path for s in here if s.mlp.stack}, False)[0]
        for i in range(len(self.states)):
            run(i)
        return {}

    def _compressed(
        self,
        own: Mapping[str, np.ndarray],
        chosen: list[Site],
        seen: Mapping[str, Float[np.ndarray, ...]] | None,
    ) -> dict[str, np.ndarray]:
        """Returns the variables of a part with its MLPs compressed."""
        paths = [site.path for site in chosen]
        given = seen
        if self.given is not None:
            given = {path: x for path, x in self.given.items() if path in paths}
        smaller, report = compress(
            _filled(self.abstract, own),
            self.method,
            key=self.key,
            layers=lambda site: site.path in paths,
            budget=self.budget,
            calibration=given,
            progress=False,
        )
        self.rows += report.rows
        self.described = dict(report.method)
        self.source = self.source or report.calibration
        for path in paths:
            new = at(smaller, path)
            graph, state = nnx.split(new)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
            self.smaller = replaced(self.smaller, path, nnx.merge(graph, shapes))
        flat = nnx.to_flat_state(nnx.state(smaller))
        found = {path_name(path): variable.get_value() for path, variable in flat}
        return {
            path: np.asarray(x)
            for path, x in found.items()
            if not isinstance(x, jax.ShapeDtypeStruct)
        }

    def report(self) -> Report:
        """Returns the report of all layers, and records the compression in the smaller model."""
        provenance = self.smaller.provenance
        self.smaller.provenance = provenance.after(
            {
                "compress": self.described,
                "sites": [site.path for site in self.chosen],
                "calibration": self.source,
            }
        )
        return Report(
            method=self.described,
            calibration=self.source,
            new_head=provenance.new_head,
            rows=tuple(self.rows),
            before=size_of(self.abstract, (site.mlp for site in sites(self.abstract))),
            after=size_of(self.smaller, (site.mlp for site in sites(self.smaller))),
        )


def _inside(part: str, path: str) -> bool:
    return path.startswith(f"{part}.")


def _filled(model: Any, values: Mapping[str, PyTree]) -> PyTree:
    """Returns an abstract module with arrays in place of some of its shapes."""
    graph, state = nnx.split(model)
    flat = {
        path: variable.replace(jax.device_put(values[path_name(path)]))
        if path_name(path) in values
        else variable
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))
