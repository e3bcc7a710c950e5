"""Mixtures of experts: a router, experts on the positions routed to them, and auxiliary losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, Shaped

from fusion_jax.errors import InputError
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Frozen, check_plain, matrix_of
from fusion_jax.nn.mlp import Mlp, experts
from fusion_jax.nn.surgery import find_modules
from fusion_jax.nn.uneven_experts import take_experts

MANY_POSITIONS = 256
"""From this number of positions on, the number of slots adapts to the use of the experts."""


class Correction(Frozen):
    """What is added to the scores of a router for the choice of experts; checkpoints have it."""


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How a router chooses experts and weighs their outputs; the defaults are Mixtral's.

    Args:
        bias: Whether the logits have a bias.
        scores: How logits become scores: their softmax, or the sigmoid of each.
        correction: Whether the choice, but not the weights, is by scores with a fixed number added
            for each expert.
        groups: The number of groups of experts, of equal size.
        used_groups: The number of groups whose experts can be chosen: those where the two best
            experts have the largest sums of scores.
        scale: What the weights are multiplied by.
        weighs: Whether the weights multiply the outputs of experts, or their inputs.
        shared_gated: Whether the outputs of a shared expert are multiplied by a sigmoid of a linear
            map of its inputs.

    References:
        DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """

    bias: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction: bool = False
    groups: int = 1
    used_groups: int = 1
    scale: float = 1.0
    weighs: Literal["outputs", "inputs"] = "outputs"
    shared_gated: bool = True

    def check(self, count: int, top_k: int) -> None:
        """Raises `InputError` if a position cannot be routed to ``top_k`` of ``count`` experts."""
        if not 1 <= top_k <= count:
            raise InputError(f"each position uses {top_k} experts, of which there are {count}")
        size = count // self.groups
        if self.groups > 1 and (count % self.groups or size < 2):
            raise InputError(
                f"{count} experts are not {self.groups} groups of one size that is above 1"
            )
        if not 1 <= self.used_groups <= self.groups or self.used_groups * size < top_k:
            raise InputError(
                f"each position uses {top_k} experts, but chooses them among {self.used_groups} of "
                f"{self.groups} groups of {size}"
            )


class Moe(nnx.Module):
    """A router and its experts, in place of an MLP.

    The router computes in float32. Every expert computes on the same number of slots; an empty
    slot costs as much as a full one. Without a capacity no position is dropped: an expert has twice
    as many slots as it would need if the router used all experts equally, or four times as many if
    some expert needs more than that, and so on. With a capacity, an expert takes the first
    positions of a sequence that are routed to it and drops the rest; the layer returns zero there.

    Args:
        make: Makes one expert; see `fusion_jax.experts`.
        d: The number of inputs and outputs.
        count: The number of experts.
        top_k: The number of experts that each position is routed to.
        normalized: Whether the weights of a position's experts are scaled to add up to 1.
        capacity: The largest number of positions of one sequence that an expert takes; None for
            no limit.
        jitter: In training, the inputs of the router are multiplied by random factors from
            1 - jitter to 1 + jitter.
        shared: Makes an expert that computes at every position; None for no shared expert.
        rule: How the router chooses experts.
        kernel_init: The initializer of the router.
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
        normalized: bool,
        capacity: int | None = None,
        jitter: float = 0.0,
        shared: Callable[..., Mlp] | None = None,
        rule: RouterRule | None = None,
        kernel_init: nnx.Initializer,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.top_k, self.normalized, self.rule = top_k, normalized, rule or RouterRule()
        self.capacity, self.jitter = capacity, jitter
        linear = partial(nnx.Linear, kernel_init=kernel_init, param_dtype=param_dtype, rngs=rngs)
        self.router = linear(d, count, use_bias=self.rule.bias)
        self.experts = experts(make, count, top_k=top_k, rngs=rngs)
        self.shared = None if shared is None else shared(rngs=rngs)
        gated = shared is not None and self.rule.shared_gated
        self.shared_gate = linear(d, 1, use_bias=False) if gated else None
        none = jnp.zeros(count, wide(jnp.zeros(0, param_dtype)).dtype)
        self.correction = Correction(none) if self.rule.correction else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        key: Key[Array, ""] | None,
        real: Bool[Array, "b t"] | None = None,
        seen: Float[Array, "b t d"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t e"]]:
        """Returns the weighted sum of the chosen experts' outputs, and the router's logits.

        No expert computes where ``real`` is False: all padding is alike and would overload a few
        experts. The router reads ``seen`` if it is given, and otherwise the experts' input.
        """
        logits = self.router_logits(x if seen is None else seen, key)
        weights, chosen = self.routes(logits)
        if real is not None:
            chosen &= real[..., None]
        rows, flat = (a.reshape(-1, a.shape[-1]).T for a in (chosen, weights))
        # Chosen positions first, in their order.
        order = jnp.argsort(~rows, axis=1, stable=True)
        flat = jnp.where(rows, flat, 0)

        def with_slots(count: int) -> Callable[[Array], Array]:
            def run(x: Array) -> Array:
                first = order[:, :count]
                taken = jnp.take_along_axis(rows, first, axis=1)[..., None]
                inputs = jnp.where(taken, x[first], 0)
                weight = jnp.take_along_axis(flat, first, axis=1)[..., None]
                if self.rule.weighs == "inputs":
                    inputs, weight = (
                        (wide(inputs) * weight).astype(x.dtype),
                        taken.astype(weight.dtype),
                    )
                outputs = wide(self.experts(inputs)) * weight
                return jnp.zeros(x.shape, outputs.dtype).at[first].add(outputs)

            return run

        slots = self.slot_counts(*x.shape[:2])
        branches = [with_slots(count) for count in slots]
        if len(slots) > 1:
            # A conditional stores the intermediate results of all branches for the backward pass.
            # With checkpoints, the branches store none.
            branches = [jax.checkpoint(run) for run in branches]
        most = rows.sum(axis=1, dtype=jnp.int32).max()
        too_few = most > jnp.array(slots[:-1], jnp.int32)
        total = jax.lax.switch(too_few.sum(dtype=jnp.int32), branches, x.reshape(-1, x.shape[-1]))
        y = total.reshape(x.shape).astype(x.dtype)
        if self.shared is not None:
            own = self.shared(x)
            gate = self.shared_gate
            y = y + (own if gate is None else jax.nn.sigmoid(gate(x)) * own)
        return y, logits

    def slot_counts(self, b: int, t: int) -> list[int]:
        """Returns possible numbers of slots of an expert; the first that suffices is used."""
        if self.capacity is not None:
            return [b * min(t, self.capacity)]
        size = -(-2 * b * t * self.top_k // self.router.out_features)
        found = []
        # For a few positions, several programs would cost more than empty slots.
        while b * t >= MANY_POSITIONS and size < b * t:
            found.append(size)
            size *= 2
        return [*found, b * t]

    def normed(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Returns what the experts read, where a layer leaves its norm to the mixture."""
        return x

    def router_inputs(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Returns what the router reads, from what the experts read."""
        return x

    def router_logits(
        self, x: Float[Array, "b t d"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t e"]:
        """Returns the router's logits in float32 or wider, with jitter if there is a key."""
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
        """Returns the weight of each expert at each position, and which experts compute there."""
        scores = self._scores(logits)
        _, index = jax.lax.top_k(self._choice(scores, logits), self.top_k)
        top = jnp.take_along_axis(scores, index, axis=-1)
        if self.normalized:
            top = top / (top.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
        top = top if self.rule.scale == 1 else top * self.rule.scale
        one_hot = jax.nn.one_hot(index, logits.shape[-1], dtype=top.dtype)
        weights = (one_hot * top[..., None]).sum(-2)
        chosen = one_hot.sum(-2) > 0
        if self.capacity is not None:
            chosen &= jnp.cumsum(chosen, axis=1, dtype=jnp.int32) <= self.capacity
        return weights, chosen

    def _scores(self, logits: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        if self.rule.scores == "sigmoid":
            return jax.nn.sigmoid(logits)
        return jax.nn.softmax(logits, axis=-1)

    def _choice(
        self, scores: Float[Array, "b t e"], logits: Float[Array, "b t e"]
    ) -> Float[Array, "b t e"]:
        """Returns by what experts are chosen; -inf in groups that are not used."""
        rule = self.rule
        if rule.scores == "sigmoid" and self.correction is None:
            scores = logits  # several sigmoids may be rounded to 1
        if self.correction is not None:
            scores = scores + self.correction[...].astype(scores.dtype)[None, None]
        if rule.groups == rule.used_groups:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], rule.groups, -1)
        _, best = jax.lax.top_k(jax.lax.top_k(grouped, 2)[0].sum(-1), rule.used_groups)
        used = jax.nn.one_hot(best, rule.groups, dtype=jnp.int32).sum(-2) > 0
        return jnp.where(used[..., None], grouped, -jnp.inf).reshape(scores.shape)

    def with_experts(self, members: Sequence[int]) -> Moe:
        """Returns the mixture of some of its experts, whose router knows no others.

        Args:
            members: The experts to keep, by their numbers in order; ``top_k`` or more, and equally
                many of each group.

        Raises:
            InputError: The router is not a plain linear layer.
        """
        check_plain(self.router, "the router")
        new = nnx.clone(self)
        new.router.out_features = len(members)
        for variable in (new.router.kernel, new.router.bias, new.correction):
            if variable is not None:
                variable.set_value(variable.get_value()[..., jnp.asarray(members)])
        new.experts = take_experts(self.experts, members)
        return new


def mixtures(model: nnx.Module) -> dict[str, Moe]:
    """Returns the mixtures of a model by the paths of their experts, which are sites."""
    return {f"{path}.experts".lstrip("."): moe for path, moe in find_modules(model, Moe).items()}


def load_balancing_loss(
    router_logits: Sequence[Float[Array, "b t e"]],
    top_k: int,
    real: Shaped[Array, "b t"] | None = None,
    *,
    per_sequence: bool = False,
) -> Float[Array, ""]:
    """Returns the auxiliary loss that makes a router use its experts equally.

    Args:
        router_logits: (b, t, e) of each layer with experts, as models return them.
        top_k: The number of experts of each position.
        real: (b, t), 0 or False at padding, which does not count; None without padding.
        per_sequence: Whether the shares are computed in each sequence and then averaged, as in
            Switch, or over all positions, as in Mixtral.

    Returns:
        ``e sum_e f_e P_e`` with f_e the share of positions that are routed to expert e and P_e its
        mean probability; ``top_k`` if all experts are used equally.

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
    # A sequence may consist of padding, and so may all sequences of a part of a batch.
    positive = jnp.maximum(count, 1)
    share, probability = (total(x * weight[..., None]) / positive for x in (used, probabilities))
    sequences = (count > 0).sum(dtype=count.dtype)
    return e * (share * probability).sum() / jnp.maximum(sequences, 1)


def router_z_loss(
    router_logits: Sequence[Float[Array, "b t e"]], real: Shaped[Array, "b t"] | None = None
) -> Float[Array, ""]:
    """Returns the auxiliary loss that keeps router logits small.

    Args:
        router_logits: (b, t, e) of each layer with experts.
        real: (b, t), 0 or False at padding, which does not count; None without padding.

    Returns:
        The mean over positions of the squared logsumexp of the logits.

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
