"""The training loop: any loss, any model, resumable at every step."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.progress import show_progress
from fusion_jax.training.engine.checkpoints import Checkpoints
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.log import Log
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import Multipliers, schedule
from fusion_jax.training.engine.partition import Parts, Trains
from fusion_jax.training.engine.preemption import listening
from fusion_jax.training.engine.step import Loop, Rule, TrainState, carried

CHECKPOINTS = "checkpoints"
_HARMLESS = {"log_every", "keep_checkpoints", "checkpoint_every", "tensorboard"}
"""Fields of the configuration that a run may change when it goes on."""


@runtime_checkable
class Source(Protocol):
    """Batches by step, such as `Batches`."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, counted over all epochs."""
        ...

    def names(self, step: int) -> list[str]:
        """Where the examples of a batch come from, for error messages."""
        ...


OnStep = Callable[[int, TrainState], TrainState | None]
"""Called after every step with the steps done; what it returns takes the place of the state."""
Evaluate = Callable[[Any], dict[str, float]]


@runtime_checkable
class Growth(Protocol):
    """Changes a model's structure while it trains.

    What trained before and still does keeps its place in the optimiser; what is new starts there
    with nothing. Parameters in the place of one of their layer that is gone train if that did, by
    its learning rate. Changes are kept with checkpoints, so that a run can go on.
    """

    every: int
    """Steps between changes."""

    def replaceable(self, model: Any) -> Collection[str]:
        """The paths of all parameters that changes may replace by others, before training."""
        ...

    def choose(self, model: Any, step: int) -> Any:
        """What to change after so many steps: a JSON value, or None for nothing."""
        ...

    def apply(self, model: Any, change: Any) -> Any:
        """The model with a change made: the same, however often it is asked."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What a run that is gone on with must have had the same, as JSON values by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What training gave.

    Args:
        model: The model after the last step.
        step: The steps done.
        finished: False if the run was told to stop; the same call goes on with it.
        history: One entry per evaluation: its step, and the metrics.
    """

    model: Any
    step: int
    finished: bool
    history: list[dict[str, Any]]


@on_auto_axes
def fit(
    model: Any,
    batches: Source,
    loss: Loss,
    config: TrainConfig,
    *,
    key: Key[Array, ""],
    trains: Trains | None = None,
    multipliers: Multipliers | None = None,
    folder: Path | None = None,
    evaluate: Evaluate | None = None,
    on_evaluation: Callable[[Any, list[dict[str, Any]]], None] | None = None,
    on_step: OnStep | None = None,
    rule: Rule | None = None,
    growth: Growth | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Trains a model; the model itself is not changed.

    On the mesh that the caller has set, if any: see `Layout`.

    Args:
        model: Any NNX module that the loss can run.
        batches: The batches.
        loss: What is minimised, see `fusion_jax.training.engine.losses`.
        config: How; the loss itself brings those of routers, see `losses.with_routers`.
        key: Random key of dropout. The same key gives the same bits on the same devices.
        trains: What trains, if not what ``config.train`` says.
        multipliers: What multiplies the learning rate of some parameters: by path, a number or an
            array that broadcasts to the parameter.
        folder: Where checkpoints and ``metrics.jsonl`` go; a run found there is gone on with. None
            keeps nothing.
        evaluate: Measures a model; called every ``config.eval_every`` steps and at the end.
        on_evaluation: Called after an evaluation, with the model and all results.
        on_step: Called after each step and may change the state.
        rule: What variables that do not train are in each step, such as a schedule's.
        growth: What changes the model's structure now and then.
        about: What else the run is about, as JSON values by name: a run that is gone on with must
            have had the same.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The trained model and how it went.

    Raises:
        InputError: The arguments do not fit together, or the folder holds another run.
        FloatingPointError: The loss or the gradient was NaN or infinite.
    """
    steps = config.steps(len(batches))
    if growth is not None and growth.every >= steps:
        raise InputError(f"growth every {growth.every} steps does nothing in a run of {steps}")

    cohorts = None if growth is None else {}
    loop = Loop(model, trains, loss, config, steps, multipliers, rule, key, cohorts)
    factors, params, all_params = loop.factors, loop.parts.trained, loop.parts.trainable
    if growth is not None and cohorts is not None:
        _check_numbers(factors, growth.replaceable(model))
        cohorts.update(dict.fromkeys(all_params, 0))

    def grown(model: Any) -> Loop:
        """The loop of a changed model: patterns were for the paths that the first one has."""
        now = Parts(model).trainable
        old = _origins(all_params, now)
        rates = {path: factors[old[path]] for path in now if old.get(path) in factors}
        return Loop(
            model,
            lambda path: path not in old or old[path] in params,
            loss,
            dataclasses.replace(config, multipliers=()),
            steps,
            {path: math.prod(each) for path, each in rates.items()},
            rule,
            key,
            cohorts,
        )

    def changed(model: Any, number: int, change: Any) -> Any:
        assert growth is not None and cohorts is not None
        model = growth.apply(model, change)
        for path in Parts(model).trainable:
            cohorts.setdefault(path, number)
        return model

    run = {
        "config": {k: v for k, v in config.to_json().items() if k not in _HARMLESS},
        "steps": steps,
        "batches per epoch": len(batches),
        "key": jax.random.key_data(key).tolist(),
        "what trains": sorted(params),
        "growth": None if growth is None else type(growth).__name__,
        **({} if growth is None else {f"growth's {k}": v for k, v in growth.to_json().items()}),
        **(about or {}),
    }
    with loop.layout.active(), listening() as stop:
        saved, done, history, changes = None, 0, [], []
        if folder is not None:
            saved = Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints)
            if saved.latest is not None:
                meta = saved.meta()
                check_same(folder, meta["run"], json.loads(json.dumps(run)))
                history, done, changes = meta["history"], saved.latest, meta.get("changes", [])
        if changes:
            for i, change in enumerate(changes):
                model = changed(model, i + 1, change)
            loop = grown(model)
        state = loop.start(model)
        if done:
            assert saved is not None
            state = saved.restore(state)

        def meta_of() -> dict[str, Any]:
            # Copies, as Orbax writes in the background.
            return {"run": run, "history": list(history), "changes": list(changes)}

        first = jax.process_index() == 0
        log = Log(folder if first else None, tensorboard=config.tensorboard, after=done)
        try:
            with show_progress("Training", steps, progress if first else False) as advance:
                if done:
                    advance("resumed", done)
                watch = _Watch(log, advance, batches, schedule(config, steps), saved, done)
                while done < steps and not stop.agreed(done, config.log_every):
                    batch = batches(done)
                    state, numbers = loop.step(state, batch, done)
                    watch.add(numbers, _tokens(batch))
                    done += 1
                    if on_step is not None:
                        state = on_step(done, state) or state
                    every = config.eval_every or len(batches)
                    evaluates = evaluate is not None and (done % every == 0 or done == steps)
                    every = config.checkpoint_every or len(batches)
                    saves = saved is not None and (done % every == 0 or done == steps)
                    if evaluates or saves or done % config.log_every == 0 or done == steps:
                        watch.flush(done)
                    if evaluates:
                        assert evaluate is not None
                        results = evaluate(loop.parts.compute(state.params, state.rest))
                        history.append({"step": done, **results})
                        log.write(done, **results)
                        if on_evaluation is not None:
                            on_evaluation(loop.model(state), history)
                        watch.restart()
                    if growth is not None and done % growth.every == 0 and done < steps:
                        model = loop.model(state)
                        change = growth.choose(model, done)
                        if change is not None:
                            changes.append(change)
                            precise = loop.precise(state)
                            if precise is not None:
                                precise = growth.apply(precise, change)
                            model = changed(model, len(changes), change)
                            loop = grown(model)
                            state = carried(state, loop.start(model, precise))
                        watch.restart()
                    if saves:
                        assert saved is not None
                        saved.save(done, state, meta_of())
                watch.flush(done)
                if saved is not None:
                    if done < steps and saved.latest != done:
                        saved.save(done, state, meta_of())
                    saved.wait()
        finally:
            log.close()
            if saved is not None:
                saved.close()
        return Fit(model=loop.model(state), step=done, finished=done == steps, history=history)


def _tokens(batch: Mapping[str, np.ndarray]) -> int:
    """The tokens of a batch; its rows if it has none."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].size if "input_ids" in batch else len(next(iter(batch.values())))


def _origins(before: Collection[str], now: Collection[str]) -> dict[str, str]:
    """In whose place parameters of a changed model are: themselves, or what their layer had."""
    same = set(before) & set(now)
    gone = {path.rpartition(".")[0]: path for path in before if path not in same}
    result = {path: path for path in same}
    for path in set(now) - same:
        layer = path.rpartition(".")[0]
        while layer and layer not in gone:
            layer = layer.rpartition(".")[0]
        if layer in gone:
            result[path] = gone[layer]
    return result


def _check_numbers(factors: Mapping[str, Collection[Any]], replaceable: Collection[str]) -> None:
    for path, each in factors.items():
        if path in replaceable and any(np.ndim(factor) for factor in each):
            raise InputError(
                f"multipliers: {path} has an array, but growth may replace it by parameters of "
                "other shapes; give a number"
            )


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises `InputError` if what a folder was begun with is not what it is gone on with.

    Args:
        folder: The folder.
        old: JSON values by name; those under ``config`` count one by one.
        new: The same of now.
    """
    fields = {**old.get("config", {}), **old}, {**new.get("config", {}), **new}
    different = [
        f"{name} {fields[0].get(name)!r}, now {fields[1].get(name)!r}"
        for name in fields[1]
        if name != "config" and fields[0].get(name) != fields[1].get(name)
    ]
    if different:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(different)[:500]}); give those, "
            "or another folder"
        )


class _Watch:
    """Looks at losses now and then, since each look waits for the device."""

    def __init__(
        self,
        log: Log,
        advance: Callable[..., None],
        batches: Source,
        rate: optax.Schedule,
        saved: Checkpoints | None,
        done: int,
    ):
        self._log, self._advance, self._batches = log, advance, batches
        self._rate, self._saved, self._flushed = rate, saved, done
        self._numbers: list[dict[str, Array]] = []
        self.restart()

    def restart(self) -> None:
        """Starts the clock for tokens per second."""
        self._tokens, self._start = 0, time.perf_counter()

    def add(self, numbers: dict[str, Array], tokens: int) -> None:
        """Remembers a step's numbers."""
        self._numbers.append(numbers)
        self._tokens += tokens

    def flush(self, done: int) -> None:
        """Writes and checks what has been remembered.

        Raises:
            FloatingPointError: A loss or gradient was not finite.
        """
        if not self._numbers:
            return
        rows = jax.device_get(self._numbers)
        for i, row in enumerate(rows):
            if not all(math.isfinite(x) for x in row.values()):
                self._stop(self._flushed + i, row)
        mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        rate = np.asarray(self._rate(done - 1)).item()
        speed = self._tokens / (time.perf_counter() - self._start)
        self._log.write(done, **mean, learning_rate=rate, tokens_per_second=round(speed, 1))
        text = f"loss {mean['loss']:.4f}, learning rate {rate:.2e}, {speed:,.0f} tokens/s"
        self._advance(text, done - self._flushed)
        self._flushed = done
        self._numbers.clear()
        self.restart()

    def _stop(self, step: int, row: dict[str, Any]) -> None:
        what = "loss" if not math.isfinite(row["loss"]) else "gradient"
        last = None if self._saved is None else self._saved.latest
        good = (
            "there is no checkpoint yet" if last is None else f"step {last} is the last checkpoint"
        )
        names = self._batches.names(step)
        shown = ", ".join(names[:64]) + (", ..." if len(names) > 64 else "")
        raise FloatingPointError(
            f"{what} {row['loss' if what == 'loss' else 'gradient_norm']} at step {step + 1}; "
            f"{good}; its batch: {shown}"
        )
