"""Compiles the training step of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from fusion_jax.nn.surgery import ModuleT
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss, Total, bound
from fusion_jax.training.engine.optimizer import Multipliers, find_multipliers, make_optimizer
from fusion_jax.training.engine.partition import Partition, Trains
from fusion_jax.training.engine.sharding import Placement, copied

VariableUpdate = Callable[[dict[str, Array], dict[str, Array], Array], dict[str, Array]]
"""Sets non-trainable variables before each step: (params, rest, step) -> values by path. ``step``
is the number of steps done before. Compiled into the step."""


class TrainState(NamedTuple):
    """The arrays that a training step changes.

    Args:
        params: The parameters that train, by path.
        rest: All other variables of the model, by path.
        opt_state: The state of the optimizer.
    """

    params: dict[str, Array]
    rest: dict[str, Array]
    opt_state: PyTree


def partition_of(
    model: ModuleT, config: TrainConfig, trains: Trains | None = None
) -> Partition[ModuleT]:
    """Returns the partition of a model for training by these settings; see `CompiledStep`."""
    return Partition(
        model,
        config.train if trains is None else trains,
        compute_dtype=config.compute_dtype and jnp.dtype(config.compute_dtype),
        remat=config.remat,
    )


class CompiledStep(Generic[ModuleT]):
    """The compiled training step of a model.

    Args:
        model: The model; not changed.
        loss: The loss to minimize.
        config: The settings of training.
        steps: The number of steps of the whole run.
        key: Random key of dropout.
        trains: Which parameters train; None for ``config.train``.
        multipliers: Learning-rate multipliers by path.
        update: Sets non-trainable variables before each step.
        cohorts: Which parameters were added together, see `make_optimizer`.

    Raises:
        InputError: The arguments do not fit together.
    """

    def __init__(
        self,
        model: ModuleT,
        *,
        loss: Loss,
        config: TrainConfig,
        steps: int,
        key: Array,
        trains: Trains | None = None,
        multipliers: Multipliers | None = None,
        update: VariableUpdate | None = None,
        cohorts: Mapping[str, int] | None = None,
    ):
        self.partition = partition_of(model, config, trains)
        self.placement = placement = Placement(self.partition.widths)
        placement.check_batch(config.batch_size, config.accumulate)
        shapes = self.partition.shapes
        self.multipliers = find_multipliers(
            config, multipliers, {path: shapes[path] for path in self.partition.training}
        )
        self._config, self._update_variables = config, update
        self._optimizer = make_optimizer(config, steps, self.multipliers, cohorts)
        self._loss = placement.everywhere(bound(loss))
        self._key = placement.everywhere(jax.random.key_data(key))
        self._impl = jax.random.key_impl(key)

    def start(self, model: nnx.Module, unrounded: nnx.Module | None = None) -> TrainState:
        """Returns the state before the first step.

        Args:
            model: The model.
            unrounded: The same model with the parameters before they were rounded to the model's
                dtype, or None.

        Returns:
            The state.
        """
        params, rest = self.partition.split(model)
        if unrounded is not None:
            params, _ = self.partition.split(unrounded)
        params, rest = self.placement.own(params), self.placement.own(rest)
        shardings = None
        if self.placement.mesh is not None:
            moments = optax.tree.map_params(
                self._optimizer,
                lambda _, sharding: sharding,
                jax.eval_shape(self._optimizer.init, params),
                self.placement.shardings(params),
                transform_non_params=lambda _: self.placement.replicated,
            )
            shardings = TrainState(
                self.placement.shardings(params), self.placement.shardings(rest), moments
            )
        init = jax.jit(self._optimizer.init, out_shardings=shardings and shardings.opt_state)
        out = None if shardings is None else (shardings, self.placement.replicated)
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return TrainState(params, rest, init(params))

    def __call__(
        self, state: TrainState, batch: dict[str, Array], step: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes a step.

        Args:
            state: The state; its arrays are donated.
            batch: The batch, on the devices (``placement.batch``).
            step: The number of steps done before.

        Returns:
            The next state, and ``loss`` and ``gradient_norm``.
        """
        return self._step(state, batch, self._loss, self._key, np.int32(step))

    def compute_model(self, state: TrainState) -> ModuleT:
        """Returns the model of a state as the step computes it; it shares the state's arrays."""
        return self.partition.compute(state.params, state.rest)

    def model(self, state: TrainState) -> ModuleT:
        """Returns the model of a state in its own dtypes, with arrays of its own."""
        arrays = self.placement.gathered({**state.params, **state.rest})
        own = {
            # Merging copies the arrays that it casts.
            path: copied(x) if x.dtype == self.partition.shapes[path].dtype else x
            for path, x in arrays.items()
        }
        return self.partition.merge(own, {})

    def unrounded_model(self, state: TrainState) -> ModuleT | None:
        """Returns the model of a state in the state's dtypes, or None if `model` rounds nothing."""
        shapes = self.partition.shapes
        if all(x.dtype == shapes[path].dtype for path, x in state.params.items()):
            return None
        arrays = self.placement.gathered({**state.params, **state.rest})
        return self.partition.precise({path: copied(x) for path, x in arrays.items()}, {})

    def _update(
        self, state: TrainState, batch: dict[str, Array], loss: Loss, key: Array, step: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=self._impl), step)
        rest = dict(state.rest)
        if self._update_variables is not None:
            rest |= self._update_variables(state.params, rest, step)

        def total(params: dict[str, Array], batch: dict[str, Array], key: Array) -> Total:
            model = self.partition.compute(params, {**rest, **self.partition.new_keys(rest, key)})
            return loss(model, batch, key if self._config.dropout else None)

        (value, count), grads = self._gradient(total, state.params, batch, key)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
            params: PyTree = optax.apply_updates(state.params, updates)
        numbers = {"loss": value / count, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(params, rest, opt_state), numbers

    def _gradient(
        self,
        total: Callable[..., Total],
        params: dict[str, Array],
        batch: dict[str, Array],
        key: Array,
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Returns the totals of a batch and their gradients, added up over accumulated parts."""
        gradient = jax.value_and_grad(total, has_aux=True)
        n = self._config.accumulate
        if n == 1:
            return gradient(params, batch, key)
        # Part i is every n-th row, so that each device keeps its own rows.
        pieces = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(sums: PyTree, piece: tuple[dict[str, Array], Array]) -> tuple[PyTree, None]:
            result = gradient(params, piece[0], piece[1])
            return jax.tree.map(jnp.add, sums, result), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces), key),
        )
        sums, _ = jax.lax.scan(add, zeros, (pieces, jax.random.split(key, n)))
        return sums
