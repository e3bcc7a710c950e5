"""Mixtures of experts: routers, and experts on the positions that are routed to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, Shaped

from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import matrix_of
from fusion_jax.nn.mlp import Mlp, experts

MANY = 256
"""Positions from which on the number of slots follows their use."""


class Moe(nnx.Module):
    """A router and its experts, in place of an MLP.

    The router computes in float32. Experts compute on slots, as many for each, of which empty ones
    cost as much as full ones. Without a capacity no position is dropped: there are twice as many
    slots as a router that uses all experts alike would fill, or, where that is too few for some
    expert, four times as many, and so on. With a capacity, a sequence's positions beyond it are
    dropped, first come first served, and the layer gives zero for them.

    Args:
        make: Makes one expert; see `fusion_jax.experts`.
        d: Inputs and outputs.
        count: Number of experts.
        top_k: How many of them each position is routed to.
        normalised: Whether the weights of a position's experts are made to add up to 1.
        capacity: Most positions of one sequence that one expert takes, or None.
        jitter: The router's inputs are multiplied by up to 1 +- this in training.
        router_bias: Whether the router has a bias.
        shared: Makes an expert that computes at every position and whose outputs are multiplied by
            a sigmoid of a linear map of its inputs; None for none.
        kernel_init: Initialiser of the router.
        param_dtype: The dtype of the parameters.
        rngs: Random keys of the initial parameters.

    References:
        Switch Transformers (arXiv 2101.03961); Mixtral of Experts (arXiv 2401.04088); for the
        shared expert Qwen2 (arXiv 2407.10671), section 2.2.2.
    """

    def __init__(
        self,
        make: Callable[..., Mlp],
        d: int,
        count: int,
        *,
        top_k: int,
        normalised: bool,
        capacity: int | None = None,
        jitter: float = 0.0,
        router_bias: bool = False,
        shared: Callable[..., Mlp] | None = None,
        kernel_init: nnx.Initializer,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.top_k, self.normalised = top_k, normalised
        self.capacity, self.jitter = capacity, jitter
        linear = partial(nnx.Linear, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)
        self.router = linear(d, count, use_bias=router_bias)
        self.experts = experts(make, count, top_k=top_k, rngs=rngs)
        self.shared = None if shared is None else shared(rngs=rngs)
        self.shared_gate = None if shared is None else linear(d, 1, use_bias=False)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        key: Key[Array, ""] | None,
        real: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"]]:
        """The weighted sum of the chosen experts' outputs, and the router's logits in float32.

        Where ``real`` is False no expert computes: padding is alike, and would crowd a few.
        """
        logits = self.router_logits(x, key)
        weights, chosen = self.routes(logits)
        if real is not None:
            chosen &= real[..., None]
        rows, flat = (a.reshape(-1, a.shape[-1]).T for a in (chosen, weights))
        # Chosen positions first; a sort of booleans that keeps their order.
        order = jnp.argsort(~rows, axis=1, stable=True)
        flat = jnp.where(rows, flat, 0)

        def with_slots(count: int) -> Callable[[Array], Array]:
            def run(x: Array) -> Array:
                first = order[:, :count]
                taken = jnp.take_along_axis(rows, first, axis=1)[..., None]
                outputs = wide(self.experts(jnp.where(taken, x[first], 0)))
                outputs = outputs * jnp.take_along_axis(flat, first, axis=1)[..., None]
                return jnp.zeros(x.shape, outputs.dtype).at[first].add(outputs)

            return run

        slots = self.slots(*x.shape[:2])
        branches = [with_slots(count) for count in slots]
        if len(slots) > 1:
            # For the backward pass, a conditional keeps what any branch would; so none keeps any.
            branches = [jax.checkpoint(run) for run in branches]
        most = rows.sum(axis=1, dtype=jnp.int32).max()
        too_few = most > jnp.array(slots[:-1], jnp.int32)
        total = jax.lax.switch(too_few.sum(dtype=jnp.int32), branches, x.reshape(-1, x.shape[-1]))
        y = total.reshape(x.shape).astype(x.dtype)
        if self.shared is not None and self.shared_gate is not None:
            y = y + jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)
        return y, logits

    def slots(self, b: int, t: int) -> list[int]:
        """The numbers of slots of an expert, of which the smallest that is enough is computed."""
        if self.capacity is not None:
            return [b * min(t, self.capacity)]
        size = -(-2 * b * t * self.top_k // self.router.out_features)
        found = []
        # Of a few positions, the programs' number would cost more than empty slots.
        while b * t >= MANY and size < b * t:
            found.append(size)
            size *= 2
        return [*found, b * t]

    def router_logits(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t e"]:
        """The router's logits, with jitter if there is a key."""
        x = wide(x)
        if key is not None and self.jitter > 0:
            low, high = 1 - self.jitter, 1 + self.jitter
            x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
        logits = jnp.matmul(x, wide(matrix_of(self.router)), precision="highest")
        if self.router.bias is None:
            return logits
        return logits + wide(self.router.bias[...])[None, None]

    def routes(
        self, logits: Float[Array, "b t e"]
    ) -> tuple[Float[Array, "b t e"], Bool[Array, "b t e"]]:
        """The weight of each expert at each position, and which ones compute there."""
        top, index = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), self.top_k)
        if self.normalised:
            top = top / top.sum(-1, keepdims=True)
        one_hot = jax.nn.one_hot(index, logits.shape[-1], dtype=top.dtype)
        weights = (one_hot * top[..., None]).sum(-2)
        chosen = one_hot.sum(-2) > 0
        if self.capacity is not None:
            chosen &= jnp.cumsum(chosen, axis=1, dtype=jnp.int32) <= self.capacity
        return weights, chosen


def load_balancing_loss(
    router_logits: Sequence[Float[Array, "b t e"]],
    top_k: int,
    real: Shaped[Array, "b t"] | None = None,
    *,
    per_sequence: bool = False,
) -> Float[Array, ""]:
    """The auxiliary loss that makes a router use its experts equally: 1 if it does, for top-1.

    Args:
        router_logits: Of every layer with experts, as models return them.
        top_k: Experts per position.
        real: 0 or False at padding, which does not count; None for none.
        per_sequence: Whether shares are taken in each sequence and then averaged, as in Switch, or
            over all positions, as in Mixtral.

    Returns:
        ``e sum_e f_e P_e`` with f_e the share of positions that are routed to expert e and P_e the
        mean of its probability.

    References:
        Switch Transformers (arXiv 2101.03961), equations 4 to 6.

    Example:
        >>> float(load_balancing_loss([jnp.zeros((2, 3, 4))], top_k=4))
        4.0
    """
    logits = jnp.concatenate([wide(x) for x in router_logits], axis=1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    e = logits.shape[-1]
    _, index = jax.lax.top_k(probabilities, top_k)
    used = jax.nn.one_hot(index, e, dtype=logits.dtype).sum(-2)
    if real is None:
        weight = jnp.ones(logits.shape[:2], logits.dtype)
    else:
        weight = jnp.tile(real.astype(logits.dtype), (1, len(router_logits)))
    axes = (1,) if per_sequence else (0, 1)
    total = partial(jnp.sum, axis=axes, keepdims=True)
    count = total(weight[..., None])
    # A sequence of padding alone has no shares.
    some = jnp.maximum(count, 1)
    share, probability = (total(x * weight[..., None]) / some for x in (used, probabilities))
    filled = (count > 0).sum(dtype=count.dtype)  # 0 in a part of a batch that only fills up
    return e * (share * probability).sum() / jnp.maximum(filled, 1)


def router_z_loss(
    router_logits: Sequence[Float[Array, "b t e"]], real: Shaped[Array, "b t"] | None = None
) -> Float[Array, ""]:
    """The auxiliary loss that keeps router logits small: the mean of logsumexp squared.

    Args:
        router_logits: Of every layer with experts.
        real: 0 or False at padding, which does not count; None for none.

    Returns:
        The loss.

    References:
        ST-MoE (arXiv 2202.08906), equation 5.

    Example:
        >>> round(float(router_z_loss([jnp.zeros((2, 3, 4))])), 3)
        1.922
    """
    logits = jnp.concatenate([wide(x) for x in router_logits], axis=1)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    if real is None:
        return squares.mean()
    weight = jnp.tile(real.astype(logits.dtype), (1, len(router_logits)))
    return (squares * weight).sum() / jnp.maximum(weight.sum(), 1)
