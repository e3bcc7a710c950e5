"""Experts of one mixture that are not all of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs

TreeT = TypeVar("TreeT")

GROUPS = 4
"""Most widths that the experts of one layer have: each is one batched product."""
LEAST = 0.25
"""The least width of an expert, as a share of the mean: other text may well use it."""


class UnevenExperts(Mlp):
    """The experts of a mixture in groups, each group one module of experts of one width.

    No unit is there to fill up: there are as many parameters as in experts of the mean width, and
    as many operations where each expert computes on as many slots, as in `Moe`. Per position that
    is really routed there are more, as the experts that are used most are the wide ones. A Hugging
    Face checkpoint has one width for all, so that exporting fills up to the widest with zeros, and
    loses what was saved.

    Args:
        groups: The modules, each of which has stacked experts.
        members: The numbers, in the mixture, of the experts of each group.

    Example:
        >>> from functools import partial
        >>> from fusion_jax.nn.mlp import experts
        >>> make = lambda n, width: experts(partial(Mlp, 4, width, act="relu"), n, rngs=nnx.Rngs(0))
        >>> uneven = UnevenExperts([make(1, 12), make(2, 6)], [[1], [0, 2]])
        >>> uneven.widths, uneven(jnp.ones((3, 5, 4))).shape
        ((6, 12, 6), (3, 5, 4))
    """

    def __init__(self, groups: Sequence[Mlp], members: Sequence[Sequence[int]]):
        self.groups = nnx.List(groups)
        self.members = tuple(map(tuple, members))
        self.act, self.top_k = groups[0].act, groups[0].top_k

    def __call__(self, x: Float[Array, "e n d"]) -> Float[Array, "e n o"]:  # type: ignore[override]
        """The outputs of each expert at its own inputs."""
        pairs = zip(self.groups, self.members, strict=True)
        return self._in_order([group(x[np.array(members)]) for group, members in pairs])

    def _in_order(self, parts: Sequence[Array]) -> Array:
        order = np.argsort(np.concatenate(self.members))
        return jnp.concatenate(parts)[order]

    def linears(self) -> dict[str, Any]:
        """The linear layers of all groups by name."""
        return {
            f"groups.{i}.{name}": linear
            for i, group in enumerate(self.groups)
            for name, linear in group.linears().items()
        }

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each expert."""
        pairs = zip(self.groups, self.members, strict=True)
        found = {e: group.width for group, members in pairs for e in members}
        return tuple(found[e] for e in range(len(found)))

    @property
    def width(self) -> int:
        """The width of the widest expert."""
        return max(self.widths)

    @property
    def d_in(self) -> int:
        """The number d of inputs."""
        return self.groups[0].d_in

    @property
    def d_out(self) -> int:
        """The number o of outputs."""
        return self.groups[0].d_out

    @property
    def use_bias(self) -> bool:
        """Whether the experts have biases."""
        return self.groups[0].use_bias

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters."""
        return self.groups[0].dtype

    @property
    def stack(self) -> tuple[int, ...]:
        """(e,) for e experts."""
        return (sum(map(len, self.members)),)

    @property
    def flops(self) -> int:
        """Operations for one position, if the router used all experts equally."""
        pairs = zip(self.groups, self.members, strict=True)
        return sum(group.flops * len(members) for group, members in pairs) // self.stack[0]

    def sub_mlps(self) -> SubMLPs:
        """The sub-MLPs of all experts, with zeros up to the widest."""
        return self.plain().sub_mlps()

    def out_bias(self) -> Float[Array, "*s o"] | None:
        """The output bias of each expert."""
        return self.plain().out_bias()

    def plain(self) -> Mlp:
        """The same function as plain experts of one width, the widest's."""
        return self.padded(self.width)

    def padded(self, width: int) -> Mlp:
        """The same function as plain experts of one width, filled up with zeros."""
        return jax.tree.map(
            lambda *x: self._in_order(x), *(group.padded(width) for group in self.groups)
        )

    def spec(self) -> dict[str, Any]:
        """What, besides the original experts, says how to build these: JSON values."""
        pairs = zip(self.groups, self.members, strict=True)
        groups = [{**group.spec(), "members": list(members)} for group, members in pairs]
        return {"module": type(self).__name__, "groups": groups}


def some(stacked: TreeT, members: Sequence[int]) -> TreeT:
    """Some experts, or what belongs to them: leading axes reduced to these indices.

    Example:
        >>> some({"a": jnp.arange(4)}, [2, 0])["a"].tolist()
        [2, 0]
    """
    return jax.tree.map(lambda x: x[jnp.asarray(members)], stacked)


def by_use(
    use: Sequence[float], width: int, power: float, *, most: int, round_to: int = 1
) -> dict[int, list[int]]:
    """Widths of a layer's experts that grow with how often the router uses each.

    The experts, ordered by use, are cut into at most `GROUPS` groups, whose widths are in
    proportion to the members' mean of use to a power, within bounds.

    Args:
        use: The share of positions that each expert gets.
        width: The mean width, which is not exceeded.
        power: 0 for all the same, 1 in proportion to use. The least loss, if an expert's grows as
            its width to the power of -a, is at 1 / (1 + a).
        most: The original width.
        round_to: Widths are multiples of it, or ``most``; the mean may fall short by as much.

    Returns:
        The experts of each width.

    Example:
        >>> by_use([0.1, 0.4, 0.3, 0.2], 8, 1.0, most=64)
        {13: [1], 10: [2], 6: [3], 3: [0]}
    """
    shares = np.asarray(use, np.float64)
    order = np.argsort(-shares, kind="stable")
    groups = np.array_split(order, min(GROUPS, len(order)))
    counts = np.array([len(group) for group in groups])
    wanted = np.array([(shares[group] ** power).mean() for group in groups])
    least = min(most, max(1, round_to, int(LEAST * width) // round_to * round_to))
    budget = width * len(shares)

    def widths(factor: float) -> np.ndarray:
        exact = np.clip(factor * wanted, least, most)
        return np.where(exact == most, most, np.maximum(exact // round_to * round_to, least))

    low, high = 0.0, most / max(wanted.min(), 1e-9)
    for _ in range(100):
        middle = (low + high) / 2
        fits = (counts * widths(middle)).sum() <= budget
        low, high = (middle, high) if fits else (low, middle)
    chosen = widths(low).astype(int)
    # What rounding left, for those that are used most, none above a group before it.
    for i in range(len(chosen)):
        limit = most if i == 0 else chosen[i - 1]
        more = min((budget - (counts * chosen).sum()) // counts[i], limit - chosen[i])
        chosen[i] += more // round_to * round_to
    result: dict[int, list[int]] = {}
    for size, group in zip(chosen.tolist(), groups, strict=True):
        result[size] = sorted([*result.get(size, []), *group.tolist()])
    return result
