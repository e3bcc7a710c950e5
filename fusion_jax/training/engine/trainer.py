"""Trains any model on any loss; a run can resume after any step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.surgery import ModuleT
from fusion_jax.progress import show_progress, show_stage
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.fingerprints import (
    fingerprint_of_all_bits,
    fingerprint_of_batches,
)
from fusion_jax.training.engine.growth import GrowingStep
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import schedule
from fusion_jax.training.engine.preemption import StopSignal, agreed, catch_stops
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.run_folder import (
    BEST,
    DATA_SETTINGS,
    LAST,
    RunFolder,
    last_is_best,
    replace_artefact,
)
from fusion_jax.training.engine.step import CompiledStep, TrainState

Evaluate = Callable[[ModuleT], dict[str, float]]
"""Measures a model: metrics by name, of which the first chooses the best model."""
_Ahead = tuple[dict[str, np.ndarray], dict[str, Array]]
"""The next batch, as the source gave it and on the devices."""
_FREE_ON_RESUME = {
    "log_every",
    "keep_checkpoints",
    "checkpoint_every",
    "checkpoint_minutes",
    "tensorboard",
    "resume_with",
}
"""Fields of the configuration that may change when a run resumes."""


@dataclass(frozen=True, kw_only=True)
class Fit(Generic[ModuleT]):
    """The result of training.

    Args:
        model: The model after the last step.
        step: The steps done.
        finished: False if the run was told to stop; the same call resumes it.
        history: One entry for each evaluation: its step, and metrics by name.
        data: Fingerprints of the data, by name; empty without a folder.
    """

    model: ModuleT = field(repr=False)
    step: int
    finished: bool
    history: list[dict[str, int | float]]
    data: Mapping[str, object] = field(default_factory=dict)


@on_auto_axes
def fit(
    model: ModuleT,
    batches: BatchSource,
    loss: Loss,
    config: TrainConfig,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    evaluate: Evaluate[ModuleT] | None = None,
    lowest: bool = False,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    progress: bool | None = None,
) -> Fit[ModuleT]:
    """Trains a model on any loss; the model itself is not changed.

    Runs on the mesh that the caller has set, if any: batches are split over its axes "data" and
    "fsdp", parameters and moments over "fsdp", the widths of MLPs over "model".

    Args:
        model: An NNX module that the loss can run.
        batches: The batches.
        loss: The loss to minimize, see `fusion_jax.training.losses`. The routers' losses of the
            configuration are not added, see `losses.with_routers`.
        config: The settings of training.
        key: Random key of dropout. The same key gives the same bits on the same devices.
        folder: Where checkpoints and ``metrics.jsonl`` go, and the artefacts ``best`` and ``last``
            if the recipe saves them. A run found there is resumed. None keeps nothing.
        evaluate: Measures a model; called every ``config.eval_every`` steps and at the end.
        lowest: Whether the lowest value of the first metric is the best.
        recipe: What a method customizes.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The trained model, and the metrics of all evaluations.

    Raises:
        InputError: The arguments do not fit together, the folder holds another run, or another
            process trains in it.
        FloatingPointError: The loss or the gradient was NaN or infinite.
        OSError: A file cannot be written, for example because the disk is full; the same call
            resumes the run later.
        KeyboardInterrupt: Ctrl-C was pressed; with a folder, after a checkpoint is written.

    Example:
        >>> from flax import nnx
        >>> from fusion_jax.training import Windows, losses
        >>> def length(model, batch, key):
        ...     return losses.Total((model(batch["input_ids"]) ** 2).sum(), jax.numpy.float32(6))
        >>> windows = Windows(np.arange(9), context=3, batch_size=2)
        >>> config = TrainConfig(epochs=5, batch_size=2)
        >>> embed = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
        >>> fit(embed, windows, length, config, key=jax.random.key(0)).step
        10
    """
    if folder is None and recipe.save is not None:
        raise InputError("save of a recipe is for runs with a folder; give one, or leave save out")
    if recipe.save is None and recipe.best_from:
        raise InputError("best_from of a recipe is for runs with a folder that save artefacts")
    folder = None if folder is None else Path(folder)
    run = Run(model, batches, loss, config, key, evaluate, lowest, recipe)
    shown = progress if jax.process_index() == 0 else False
    with show_stage("Comparing the run with its folder", False if folder is None else shown):
        settings = {} if folder is None else run.settings(model, key)
    with (
        run.step.placement.active(),
        catch_stops(interrupts=folder is not None) as stop,
        RunFolder(folder, config, settings) as kept,
    ):
        run.resume(model, kept)
        begins = "resumed" if run.done else ""
        with show_progress("Training", run.steps, shown, done=run.done, first=begins) as advance:
            run.train(stop, advance)
        result = Fit(
            model=run.step.model(run.state),
            step=run.done,
            finished=run.done == run.steps,
            history=kept.history,
            data={name: settings[name] for name in DATA_SETTINGS if name in settings},
        )
    if folder is not None and recipe.save is not None and result.finished:
        replace_artefact(result.model, folder / LAST, recipe.save)
    if stop.interrupted:
        raise KeyboardInterrupt(f"stopped after step {result.step} of {run.steps}")
    return result


class Run:
    """A run of `fit`, whose arguments these are: its compiled step, its state, the steps done.

    ``kind`` makes the compiled step.
    """

    state: TrainState
    kept: RunFolder

    def __init__(
        self,
        model: nnx.Module,
        batches: BatchSource,
        loss: Loss,
        config: TrainConfig,
        key: Array,
        evaluate: Evaluate | None,
        lowest: bool,
        recipe: Recipe,
        kind: Callable[..., CompiledStep] = CompiledStep,
    ):
        self.batches, self.config, self.recipe = batches, config, recipe
        self._ahead: _Ahead | None = None
        self.evaluate, self.lowest = evaluate, lowest
        self.steps, self.done = config.steps(len(batches)), 0
        loss = loss if recipe.loss is None else recipe.loss(loss)
        make = partial(kind, loss=loss, steps=self.steps, key=key, update=recipe.update)
        trains, multipliers, growth = recipe.trains, recipe.multipliers, recipe.growth
        self.growing = None
        if growth is None:
            self.step = make(model, config=config, trains=trains, multipliers=multipliers)
            return
        if growth.every >= self.steps:
            raise InputError(
                f"growth every {growth.every} steps does nothing in a run of {self.steps}"
            )
        self._growing = partial(GrowingStep, make, model, growth, config, trains, multipliers)
        self.growing = self._growing()
        self.step = self.growing.compiled

    def settings(self, model: nnx.Module, key: Array) -> dict[str, object]:
        """Returns the settings that must match on resume, as JSON values by name."""
        fields = self.config.to_json()
        growth = self.recipe.growth
        grown = {} if growth is None else growth.to_json()
        return {
            "config": {k: v for k, v in fields.items() if k not in _FREE_ON_RESUME},
            "steps": self.steps,
            "batches per epoch": len(self.batches),
            "key": jax.random.key_data(key).tolist(),
            "what trains": sorted(self.step.partition.training),
            "growth": None if growth is None else type(growth).__name__,
            **{f"growth's {name}": value for name, value in grown.items()},
            **self.recipe.about,
            "starting model": fingerprint_of_all_bits(model),
            "training data": fingerprint_of_batches(self.batches),
        }

    def resume(self, model: nnx.Module, kept: RunFolder) -> None:
        """Starts from a model, or from the newest checkpoint in a folder."""
        self.kept = kept

        def start(changes: Sequence[object]) -> TrainState:
            if self.growing is None:
                return self.step.start(model)
            if self.growing.changes:  # of a checkpoint that turned out to be damaged
                self.growing = self._growing()
            state = self.growing.resume(model, changes)
            self.step = self.growing.compiled
            return state

        self.state = kept.restore(start)
        self.done = kept.done
        if self.done > self.steps:
            raise InputError(
                f"{kept.path} holds a run of {self.done} steps, more than the {self.steps} of this "
                "call; give at least as many, or another folder"
            )

    def train(self, stop: StopSignal, advance: Callable[..., None]) -> None:
        """Trains until the last step, or until the process is told to stop."""
        config, epoch = self.config, len(self.batches)
        self.monitor = _Monitor(self, advance)
        self._saved_at = time.monotonic()
        while self.done < self.steps and not stop.agreed(self.done, config.log_every):
            self._take_step()
            last = self.done == self.steps
            evaluates = last or self.done % (config.eval_every or epoch) == 0
            evaluates = evaluates and self.evaluate is not None
            saves = last or self.done % (config.checkpoint_every or epoch) == 0 or self._is_due()
            saves = saves and self.kept.path is not None
            if evaluates or saves or last or self.done % config.log_every == 0:
                self.monitor.flush(self.done)
            if evaluates:
                self.monitor.announce("evaluating")
                self._evaluate()
                self.monitor.restart()
            if self.growing is not None and not last:
                self._grow(self.growing)
            if saves:
                self._write_checkpoint()
        self.monitor.flush(self.done)
        if self.done < self.steps and self.kept.latest != self.done:
            self._write_checkpoint()
        self.kept.wait()

    def _is_due(self) -> bool:
        """Returns whether the last checkpoint is old, the same answer in all processes."""
        minutes = self.config.checkpoint_minutes
        if minutes is None:
            return False
        old = time.monotonic() - self._saved_at >= 60 * minutes
        return agreed(old, self.done, self.config.log_every)

    def _take_step(self) -> None:
        batch, placed = self._ahead or self._next_batch()
        compiles = self.monitor.is_new(batch)
        self.state, numbers = self.step(self.state, placed, self.done)
        self.monitor.add(numbers, batch, compiles=compiles)
        self.done += 1
        # While the device computes, so that it does not wait for the batch after a look at losses.
        self._ahead = self._next_batch() if self.done < self.steps else None
        if self.recipe.on_step is not None:
            self.state = self.recipe.on_step(self.done, self.state) or self.state

    def _next_batch(self) -> _Ahead:
        batch = self.batches(self.done)
        return batch, self.step.placement.batch(batch)

    def where(self, step: int, row: Mapping[str, np.ndarray]) -> tuple[str, list[str]]:
        """Returns where a step's numbers are not finite: in which run, if there are several.

        Args:
            step: The number of steps done before.
            row: The numbers of the step.

        Returns:
            A clause for a message, and the names of the batch's examples.
        """
        return "", self.batches.names(step)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        results = self.evaluate(self.step.compute_model(self.state))
        history = self.kept.history
        history.append({"step": self.done, **results})
        self.kept.metrics.write(self.done, **results)
        save, best_from = self.recipe.save, self.recipe.best_from
        if save is not None and last_is_best(history, lowest=self.lowest, best_from=best_from):
            assert self.kept.path is not None
            replace_artefact(self.step.model(self.state), self.kept.path / BEST, save)

    def _grow(self, growing: GrowingStep) -> None:
        if self.done % growing.every == 0:
            self.state = growing.grow(self.state, self.done)
            self.step = growing.compiled
            self.monitor.restart(compiled=False)

    def _write_checkpoint(self) -> None:
        self.monitor.announce("writing a checkpoint")
        changes = [] if self.growing is None else self.growing.changes
        self.kept.write_checkpoint(self.done, self.state, changes)
        self._saved_at = time.monotonic()


class _Monitor:
    """Writes and checks losses from time to time, since each look waits for the device."""

    def __init__(self, run: Run, advance: Callable[..., None]):
        self._kept, self._where, self._advance = run.kept, run.where, advance
        self._rate, self._flushed = schedule(run.config, run.steps), run.done
        self._numbers: list[dict[str, Array]] = []
        self.restart(compiled=False)

    def announce(self, what: str) -> None:
        """Says what begins."""
        self._advance(what, 0, begins=True)

    def restart(self, *, compiled: bool = True) -> None:
        """Restarts the clock for tokens per second; without ``compiled``, steps compile again."""
        self._tokens, self._seconds, self._start = 0, 0.0, time.perf_counter()
        if not compiled:
            self._shapes: set[Hashable] = set()

    def is_new(self, batch: Mapping[str, np.ndarray]) -> bool:
        """Returns whether a step on this batch compiles first; stops the clock if it does."""
        shapes = tuple((name, np.shape(batch[name])) for name in sorted(batch))
        if shapes in self._shapes:
            return False
        self._shapes.add(shapes)
        jax.block_until_ready(self._numbers)
        self._seconds += time.perf_counter() - self._start
        widest = max((np.shape(x) for x in batch.values()), key=math.prod)
        self.announce(f"compiling for batches of {' x '.join(map(str, widest))}")
        return True

    def add(
        self, numbers: dict[str, Array], batch: Mapping[str, np.ndarray], *, compiles: bool
    ) -> None:
        """Remembers the numbers of a step, and its tokens unless it compiled."""
        self._numbers.append(numbers)
        if compiles:
            jax.block_until_ready(numbers)
            self._start = time.perf_counter()
        else:
            self._tokens += _count_tokens(batch)

    def flush(self, done: int) -> None:
        """Writes and checks the numbers of the steps since the last flush.

        Raises:
            FloatingPointError: A loss or gradient was not finite.
        """
        if not self._numbers:
            return
        rows = jax.device_get(self._numbers)
        for i, row in enumerate(rows):
            if not all(np.isfinite(x).all() for x in row.values()):
                self._fail(self._flushed + i, row)
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        rate = np.asarray(self._rate(done - 1)).item()
        text = f"loss {mean['loss']:.4f}, learning rate {rate:.2e}"
        speed = {}
        if self._tokens:  # of steps that did not compile
            seconds = self._seconds + time.perf_counter() - self._start
            speed = {"tokens_per_second": round(self._tokens / seconds, 1)}
            text += f", {speed['tokens_per_second']:,.0f} tokens/s"
        self._kept.metrics.write(done, **mean, learning_rate=rate, **speed)
        self._advance(text, done - self._flushed)
        self._flushed = done
        self._numbers.clear()
        self.restart()

    def _fail(self, step: int, row: dict[str, np.ndarray]) -> None:
        name = "loss" if not np.isfinite(row["loss"]).all() else "gradient"
        numbers = row["loss" if name == "loss" else "gradient_norm"]
        where, names = self._where(step, row)
        shown = ", ".join(names[:64]) + (", ..." if len(names) > 64 else "")
        raise FloatingPointError(
            f"{name} {numbers} at step {step + 1}{where}; "
            f"{self._kept.last_checkpoint}; its batch: {shown}"
        )


def _count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Returns the number of tokens of a batch, or of its rows if it has no tokens."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].size if "input_ids" in batch else len(next(iter(batch.values())))
