"""A model taken apart for training, and its compiled step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss, Total
from fusion_jax.training.engine.optimizer import Multipliers, optimiser, resolved
from fusion_jax.training.engine.partition import Parts, Trains
from fusion_jax.training.engine.sharding import Layout

Rule = Callable[[dict[str, Array], dict[str, Array], Array], dict[str, Array]]
"""What variables that do not train are in a step, by path: a function of what trains, of all other
variables, and of the steps done before. Compiled into the step."""


class TrainState(NamedTuple):
    """What a step changes.

    Args:
        params: What trains, by path.
        rest: All other variables of the model, by path.
        opt_state: The state of the optimiser.
    """

    params: dict[str, Array]
    rest: dict[str, Array]
    opt_state: Any


class Loop:
    """A model taken apart, and its compiled step.

    Args:
        model: The model; not changed.
        trains: What trains, if not what the configuration says.
        loss: What is minimised.
        config: How.
        steps: The steps of the whole run.
        multipliers: Of the learning rate, by path.
        rule: What variables that do not train are in each step.
        key: Random key of dropout.
        cohorts: Which parameters began together, see `optimiser`.

    Raises:
        InputError: The arguments do not fit together.
    """

    def __init__(
        self,
        model: Any,
        trains: Trains | None,
        loss: Loss,
        config: TrainConfig,
        steps: int,
        multipliers: Multipliers | None,
        rule: Rule | None,
        key: Array,
        cohorts: Mapping[str, int] | None = None,
    ):
        self.parts = Parts(
            model,
            config.train if trains is None else trains,
            compute_dtype=config.compute_dtype and jnp.dtype(config.compute_dtype),
            remat=config.remat,
        )
        self.layout = layout = Layout(self.parts.widths)
        layout.check_batch(config.batch_size, config.accumulate)
        self.factors = resolved(
            config, multipliers, {path: self.parts.shapes[path] for path in self.parts.trained}
        )
        self._config, self._rule = config, rule
        self._tx = optimiser(config, steps, self.factors, cohorts)
        # A Partial is a pytree: what is bound to it is an argument of the step, not a constant.
        bound = loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)
        self._loss = layout.everywhere(bound)
        self._key = layout.everywhere(jax.random.key_data(key))
        self._impl = jax.random.key_impl(key)

    def start(self, model: Any, precise: Any = None) -> TrainState:
        """The state before the first step.

        Args:
            model: The model.
            precise: The same before what trains was rounded to its dtype, if it was.

        Returns:
            The state.
        """
        params, rest = self.parts.split(model)
        if precise is not None:
            params, _ = self.parts.split(precise)
        params, rest = self.layout.own(params), self.layout.own(rest)
        shardings = None
        if self.layout.mesh is not None:
            abstract = jax.eval_shape(self._tx.init, params)
            moments = optax.tree.map_params(
                self._tx,
                lambda _, sharding: sharding,
                abstract,
                self.layout.shardings(params),
                transform_non_params=lambda _: self.layout.replicated,
            )
            shardings = TrainState(
                self.layout.shardings(params), self.layout.shardings(rest), moments
            )
        opt_state = jax.jit(self._tx.init, out_shardings=shardings and shardings.opt_state)(params)
        out = None if shardings is None else (shardings, self.layout.replicated)
        self._step = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return TrainState(params, rest, opt_state)

    def step(self, state: TrainState, batch: dict[str, np.ndarray], step: int) -> Any:
        """The state after one more batch, and its loss and gradient norm; the old state is gone."""
        return self._step(state, self.layout.batch(batch), self._loss, self._key, np.int32(step))

    def model(self, state: TrainState) -> Any:
        """The model of a state, with arrays of its own."""
        arrays = self.layout.gathered({**state.params, **state.rest})
        own = {
            # What merging casts is new already.
            path: jnp.array(x) if x.dtype == self.parts.shapes[path].dtype else x
            for path, x in arrays.items()
        }
        return self.parts.merge(own, {})

    def precise(self, state: TrainState) -> Any:
        """The model of a state with what trains as it is there, or None if `model` rounds none."""
        if all(x.dtype == self.parts.shapes[path].dtype for path, x in state.params.items()):
            return None
        arrays = self.layout.gathered({**state.params, **state.rest})
        return self.parts.precise({path: jnp.array(x) for path, x in arrays.items()}, {})

    def _update(self, state: TrainState, batch: Any, loss: Any, key: Array, step: Array) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=self._impl), step)
        rest = dict(state.rest)
        if self._rule is not None:
            rest |= self._rule(state.params, rest, step)

        def total(params: Any, batch: Any, key: Array) -> tuple[Array, Array]:
            model = self.parts.compute(params, rest)
            result: Total = loss(model, batch, key if self._config.dropout else None)
            return result

        gradient = jax.value_and_grad(total, has_aux=True)
        n = self._config.accumulate
        if n == 1:
            (value, count), grads = gradient(state.params, batch, key)
        else:
            # Part i is every n-th row, so that each device keeps its own rows.
            pieces = jax.tree.map(
                lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def add(sums: Any, piece: Any) -> Any:
                result = gradient(state.params, piece[0], piece[1])
                return jax.tree.map(jnp.add, sums, result), None

            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], pieces), key),
            )
            ((value, count), grads), _ = jax.lax.scan(
                add, zeros, (pieces, jax.random.split(key, n))
            )
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        numbers = {"loss": value / count, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(params, rest, opt_state), numbers  # type: ignore[arg-type]


def carried(old: TrainState, new: TrainState) -> TrainState:
    """A new state in which whatever was in the old one, in the same shape, goes on from there."""
    known = dict(jax.tree_util.tree_leaves_with_path(old))

    def leaf(path: Any, x: Array) -> Array:
        # Weights too: the model between the two has them in its own dtype, perhaps rounded.
        return known[path] if path in known and known[path].shape == x.shape else x

    return jax.tree_util.tree_map_with_path(leaf, new)
