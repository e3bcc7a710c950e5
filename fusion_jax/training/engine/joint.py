"""Trains several models of one structure at once, in one compiled program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Key, PyTree

from fusion_jax.errors import InputError
from fusion_jax.nn.surgery import ModuleT, path_name, value_of
from fusion_jax.progress import show_progress
from fusion_jax.training.engine.batches import Batches, BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss, bound
from fusion_jax.training.engine.preemption import catch_stops
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.run_folder import RunFolder
from fusion_jax.training.engine.step import CompiledStep, TrainState, partition_of
from fusion_jax.training.engine.trainer import Evaluate, Fit, Run


def fit_jointly(
    models: Sequence[ModuleT],
    sources: Sequence[BatchSource],
    losses: Sequence[Loss],
    config: TrainConfig,
    *,
    keys: Sequence[Key[Array, ""]],
    evaluates: Sequence[Evaluate[ModuleT] | None] = (),
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    progress: bool | None = None,
) -> list[Fit[ModuleT]]:
    """Trains models of one structure at once; the models themselves are not changed.

    Args:
        models: The models.
        sources: The batches of each run. Those that are `Batches` are taken as ``aligned``.
        losses: The loss of each run; they share their arrays, such as a teacher.
        config: The settings of training.
        keys: The random key of dropout of each run.
        evaluates: Measures the model of each run; empty for none.
        recipe: What a method customizes: ``trains``, ``loss``, ``multipliers``, ``update`` and
            ``on_step``, whose state has an axis of runs in front of every array.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The result of each run.

    Raises:
        InputError: The runs do not fit together. Raised before training starts.
        FloatingPointError: The loss or the gradient of a run was NaN or infinite.
    """
    recipe.check_only(
        "trains", "loss", "multipliers", "update", "on_step", "about", method="runs in one program"
    )
    if not jax.sharding.get_mesh().empty:
        raise InputError("runs in one program train on one device; leave the mesh out")
    check_alike(models)
    sources = [each.aligned() if isinstance(each, Batches) else each for each in sources]
    joint = JointBatches(sources)
    joint(0)  # raises if the shapes differ
    shared = [id(x) for x in jax.tree.leaves(bound(losses[0]))]
    for i, each in enumerate(losses):
        if [id(x) for x in jax.tree.leaves(bound(each))] != shared:
            raise InputError(
                f"the losses of run 0 and run {i} hold different arrays; train these one by one"
            )
    run = _JointRun(models, joint, losses[0], config, keys, evaluates, recipe)
    with catch_stops(interrupts=False) as stop, RunFolder(None, config, {}) as kept:
        run.resume(models[0], kept)
        with show_progress("Training", run.steps, progress) as advance:
            run.train(stop, advance)
    return [
        Fit(
            model=run.joint.model_of(run.state, i),
            step=run.done,
            finished=run.done == run.steps,
            history=run.histories[i],
        )
        for i in range(len(models))
    ]


def check_alike(models: Sequence[nnx.Module]) -> None:
    """Checks that models have one structure, whatever their weights and where they come from.

    Raises:
        InputError: They do not; names the first difference.
    """
    first = _abstract(models[0])
    for i, model in enumerate(models[1:], 1):
        if _abstract(model) == first:
            continue
        a, b = _structure(models[0]), _structure(model)
        where = next((path for path in [*a, *b] if a.get(path) != b.get(path)), None)
        nothing = "nothing"
        what = (
            "their graph definitions differ"
            if where is None
            else f"at {where}, one has {a.get(where, nothing)}, the other {b.get(where, nothing)}"
        )
        raise InputError(f"model 0 and model {i} cannot train in one program: {what}")


def _abstract(model: nnx.Module) -> tuple[nnx.GraphDef, list[tuple[object, ...]]]:
    """Returns all of a model but its weights and where it comes from."""
    abstract = jax.eval_shape(lambda m: m, nnx.clone(model))
    if hasattr(abstract, "provenance"):
        abstract.provenance = None
    graph, state = nnx.split(abstract)
    values = [(path, value_of(leaf)) for path, leaf in nnx.to_flat_state(state)]
    return graph, [(path, value.shape, value.dtype) for path, value in values]


def _structure(model: nnx.Module) -> dict[str, str]:
    """Returns texts on the variables, modules and settings of a model, by path."""
    state = nnx.to_flat_state(nnx.state(model))
    found = {}
    for path, leaf in state:
        value = value_of(leaf)
        found[path_name(path)] = f"{type(leaf).__name__} {value.dtype}{list(value.shape)}"
    for path, module in nnx.iter_modules(model):
        prefix = f"{path_name(path)}." if path else ""
        found[f"{prefix}(class)"] = type(module).__name__
        for name, value in vars(module).items():
            # Where a model comes from has no part in training.
            if name != "provenance" and not name.startswith("_") and _is_setting(value):
                found[prefix + name] = repr(value)
    return found


def _is_setting(value: Any) -> bool:
    return all(
        not isinstance(leaf, nnx.Variable | nnx.Module | jax.Array | np.ndarray)
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nnx.Pytree))
    )


class JointBatches:
    """The batches of several runs: every array has an axis of runs in front.

    Args:
        sources: The batches of each run.

    Raises:
        InputError: The sources have different numbers of batches.
    """

    def __init__(self, sources: Sequence[BatchSource]):
        self.sources = sources
        counts = [len(source) for source in sources]
        if len(set(counts)) > 1:
            raise InputError(f"all runs need as many batches in an epoch; got {counts}")

    def __len__(self) -> int:
        return len(self.sources[0])

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batches of a step.

        Raises:
            InputError: Two runs have batches of different shapes.
        """
        parts = [source(step) for source in self.sources]
        shapes = [{name: np.shape(part[name]) for name in sorted(part)} for part in parts]
        for i, each in enumerate(shapes):
            if each != shapes[0]:
                raise InputError(
                    f"all runs need batches of the same shapes at a step; at step {step + 1}, run "
                    f"0 has {shapes[0]} and run {i} has {each}"
                )
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def names(self, step: int) -> list[str]:
        """Returns where the examples of all runs come from."""
        return [name for source in self.sources for name in source.names(step)]


class _JointStep(CompiledStep[ModuleT]):
    """The compiled step of several models: that of one, mapped over an axis of runs in front."""

    def __init__(self, model: ModuleT, *, models: Sequence[ModuleT], **options: Any):
        super().__init__(model, **options)
        # Each model keeps its own description of where it comes from.
        others = [partition_of(each, self._config, options["trains"]) for each in models[1:]]
        self._partitions, self._models = [self.partition, *others], models

    def start(self, model: nnx.Module, unrounded: nnx.Module | None = None) -> TrainState:
        """Returns the state of all models before the first step."""
        assert unrounded is None
        parts = [self.partition.split(each) for each in self._models]
        self._models = ()  # not in memory while they train
        params, rest = (
            {path: jnp.stack([each[i][path] for each in parts]) for path in parts[0][i]}
            for i in (0, 1)
        )
        run = jax.vmap(self._update, in_axes=(0, 0, None, 0, None))
        self._step = jax.jit(run, donate_argnums=0)
        return TrainState(params, rest, jax.jit(jax.vmap(self._optimizer.init))(params))

    def compute_model_of(self, state: TrainState, i: int) -> ModuleT:
        """Returns the model of a run as the step computes it."""
        return self._partitions[i].compute(*_part(state, i))

    def model_of(self, state: TrainState, i: int) -> ModuleT:
        """Returns the model of a run in its own dtypes."""
        return self._partitions[i].merge(*_part(state, i))


def _part(state: TrainState, i: int) -> tuple[dict[str, Array], dict[str, Array]]:
    return _taken((state.params, state.rest), np.int32(i))


@jax.jit
def _taken(tree: PyTree, i: Array) -> PyTree:
    return jax.tree.map(lambda x: x[i], tree)


class _JointRun(Run):
    """Several runs of `fit` at once."""

    def __init__(
        self,
        models: Sequence[nnx.Module],
        batches: JointBatches,
        loss: Loss,
        config: TrainConfig,
        keys: Sequence[Array],
        evaluates: Sequence[Evaluate | None],
        recipe: Recipe,
    ):
        self._sources, self._evaluates = batches.sources, evaluates
        self.histories: list[list[dict[str, int | float]]] = [[] for _ in models]
        evaluates_any = next((each for each in evaluates if each is not None), None)
        kind = partial(_JointStep, models=models)
        key = jnp.stack(list(keys))
        super().__init__(models[0], batches, loss, config, key, evaluates_any, False, recipe, kind)
        assert isinstance(self.step, _JointStep)
        self.joint = self.step

    def where(self, step: int, row: Mapping[str, np.ndarray]) -> tuple[str, list[str]]:
        """Returns which run has numbers that are not finite, and its batch."""
        bad = ~np.all([np.isfinite(x) for x in row.values()], axis=0)
        i = int(np.flatnonzero(bad)[0])
        return f" of run {i}", self._sources[i].names(step)

    def _evaluate(self) -> None:
        for i, evaluate in enumerate(self._evaluates):
            if evaluate is not None:
                results = evaluate(self.joint.compute_model_of(self.state, i))
                self.histories[i].append({"step": self.done, **results})
