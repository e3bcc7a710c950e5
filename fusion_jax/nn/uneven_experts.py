"""Experts of one mixture that have different widths, and how the widths are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.nn.linear_forms import AnyLinear
from fusion_jax.nn.mlp import AnyMlp, Mlp

TreeT = TypeVar("TreeT")

MAX_GROUPS = 4
"""The largest number of different widths in one layer: each is one batched product."""
SMALLEST_SHARE = 0.25
"""The smallest width of an expert, relative to the mean width: other text may well use it."""


class UnevenExperts(AnyMlp):
    """The experts of a mixture in groups; each group is one module of experts of one width.

    No expert is padded: the parameters are as many as in experts of the mean width, and so are the
    operations where each expert computes on the same number of slots, as in `Moe`. The operations
    per routed position are more, as the experts that are used most are the wide ones. A Hugging
    Face checkpoint has one width for all experts: exporting pads to the widest expert with zeros
    and loses what was saved.

    Args:
        groups: The modules, each of which has stacked experts.
        members: The experts of each group, by their numbers in the mixture.

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
        self.act, self.d_in, self.d_out = groups[0].act, groups[0].d_in, groups[0].d_out

    def __call__(self, x: Float[Array, "e n d"]) -> Float[Array, "e n o"]:
        """Returns the outputs of each expert at its own inputs."""
        pairs = zip(self.groups, self.members, strict=True)
        return self._in_order([group(x[np.array(members)]) for group, members in pairs])

    def _in_order(self, parts: Sequence[Array]) -> Array:
        order = np.argsort(np.concatenate(self.members))
        return jnp.concatenate(parts)[order]

    def linears(self) -> dict[str, AnyLinear]:
        """Returns the linear layers of all groups by name."""
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
    def dtype(self) -> jnp.dtype:
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

    def padded(self, width: int) -> Mlp:
        """Returns the same function as plain experts, padded with zeros to one width."""
        return jax.tree.map(
            lambda *x: self._in_order(x), *(group.padded(width) for group in self.groups)
        )

    def spec(self) -> dict[str, object]:
        """Returns how to build this module from the original experts, as JSON values."""
        pairs = zip(self.groups, self.members, strict=True)
        groups = [{**group.spec(), "members": list(members)} for group, members in pairs]
        return {"module": type(self).__name__, "groups": groups}


def take_experts(stacked: TreeT, members: Sequence[int]) -> TreeT:
    """Returns some of stacked experts, or of any stacked arrays that belong to them.

    Example:
        >>> take_experts({"a": jnp.arange(4)}, [2, 0])["a"].tolist()
        [2, 0]
    """
    return jax.tree.map(lambda x: x[jnp.asarray(members)], stacked)


def widths_by_use(
    use: Sequence[float], width: int, power: float, *, original: int, round_to: int = 1
) -> dict[int, list[int]]:
    """Returns widths for a layer's experts that grow with how often the router uses each expert.

    The experts, ordered by use, are cut into at most `MAX_GROUPS` groups. The width of a group is
    proportional to the mean of ``use ** power`` over its experts, within bounds.

    Args:
        use: The share of positions that each expert gets.
        width: The mean width, which is not exceeded.
        power: 0 for equal widths, 1 for widths in proportion to use. If the loss of an expert falls
            as its width to the power of -a, the total loss is smallest at 1 / (1 + a).
        original: The original width, which no expert exceeds.
        round_to: Widths are multiples of this, or the original width; the mean may fall short of
            ``width`` by as much.

    Returns:
        The experts of each width.

    Example:
        >>> widths_by_use([0.1, 0.4, 0.3, 0.2], 8, 1.0, original=64)
        {13: [1], 10: [2], 6: [3], 3: [0]}
    """
    shares = np.asarray(use, np.float64)
    order = np.argsort(-shares, kind="stable")
    groups = np.array_split(order, min(MAX_GROUPS, len(order)))
    counts = np.array([len(group) for group in groups])
    wanted = np.array([(shares[group] ** power).mean() for group in groups])
    smallest = min(original, max(1, round_to, int(SMALLEST_SHARE * width) // round_to * round_to))
    budget = width * len(shares)

    def widths(factor: float) -> np.ndarray:
        exact = np.clip(factor * wanted, smallest, original)
        rounded = np.maximum(exact // round_to * round_to, smallest)
        return np.where(exact == original, original, rounded)

    low, high = 0.0, original / max(wanted.min(), 1e-9)
    for _ in range(100):
        middle = (low + high) / 2
        fits = (counts * widths(middle)).sum() <= budget
        low, high = (middle, high) if fits else (low, middle)
    chosen = widths(low).astype(int)
    # Rounding left some units: they go to the experts that are used most, but no group gets wider
    # than the group before it.
    for i in range(len(chosen)):
        limit = original if i == 0 else chosen[i - 1]
        more = min((budget - (counts * chosen).sum()) // counts[i], limit - chosen[i])
        chosen[i] += more // round_to * round_to
    result: dict[int, list[int]] = {}
    for size, group in zip(chosen.tolist(), groups, strict=True):
        result[size] = sorted([*result.get(size, []), *group.tolist()])
    return result
