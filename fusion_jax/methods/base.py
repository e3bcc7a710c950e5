"""Defines what a compression method is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from jaxtyping import Array, Key, PyTree

from fusion_jax.calibration.data import Calibration, Routing
from fusion_jax.errors import InputError, nearest
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs
from ntk.activations import Activation


class Solution(NamedTuple):
    """The result of a method for one MLP, or for several of one shape along leading axes.

    Args:
        parts: Arrays that `Method.build` turns into a module, as any pytree.
        facts: Scalars for the report, as a NamedTuple whose field names head the columns.
    """

    parts: PyTree
    facts: PyTree


class ModelNeeds(NamedTuple):
    """The needs of a method beyond one MLP: the names of the options that cause them.

    Args:
        earlier_sites: The option by which each site is fitted in a model whose earlier sites are
            already compressed; None if every site is fitted in the original model.
        expert_use: The option by which the widths of a layer's experts depend on how often the
            router uses each expert, see `Method.expert_groups`; None if it has no influence.
        router: What in the method changes the router of a mixture together with its experts, see
            `Method.kept_experts`; None if it compresses each MLP on its own.
    """

    earlier_sites: str | None = None
    expert_use: str | None = None
    router: str | None = None


class Method:
    """Base of the methods: frozen, keyword-only dataclasses whose fields are the configuration.

    A method has two halves, so that the costly one runs under ``jit`` and ``vmap``: `solve` maps
    arrays to arrays, `build` makes the module.
    """

    name: ClassVar[str] = ""
    """The name in JSON and of the subcommand; if empty, the name of the class."""
    modules: ClassVar[tuple[type[Mlp], ...]] = ()
    """The modules that `build` makes, besides `Mlp` and `GatedMlp`."""
    accepts_compressed: ClassVar[bool] = False
    """Whether it accepts already compressed MLPs."""
    scales_units: ClassVar[bool] = False
    """Whether it scales units as if they were linear in what is outside the activation."""

    def __new__(cls, *args: object, **kwargs: object):  # noqa: D102
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise InputError(f"{cls.__name__} has no option {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    @property
    def takes_calibration(self) -> bool:
        """Whether `solve` takes calibration."""
        return False

    @property
    def takes_upstream(self) -> bool:
        """Whether `solve` needs calibration with upstream gradients, see `Calibration`."""
        return False

    @property
    def takes_gradients(self) -> bool:
        """Whether `solve` needs the gradients of a loss, as its argument ``gradients``."""
        return False

    @property
    def model_needs(self) -> ModelNeeds:
        """The method's needs beyond one MLP."""
        return ModelNeeds()

    def expert_groups(self, width: int, use: Sequence[float]) -> list[tuple[Method, list[int]]]:
        """Splits the experts of a layer into groups, each with the method that compresses it.

        Args:
            width: The width of the experts.
            use: How often the router uses each expert, as shares.
        """
        return [(self, list(range(len(use))))]

    def kept_count(self, count: int) -> int:
        """Returns how many of the experts of a mixture stay; all, unless it changes the router."""
        return count

    def kept_experts(
        self, subs: SubMLPs, routing: Routing | None, groups: int = 1
    ) -> tuple[list[int], PyTree]:
        """Returns the experts of a mixture that stay, by number, and the facts for the report.

        For methods that change the router; the others go with their outputs of the router.

        Args:
            subs: The sub-MLPs of the experts, stacked.
            routing: How the router uses the experts on calibration text; None without it.
            groups: The number of groups of experts that the router chooses among; equally many
                stay in each.
        """
        raise NotImplementedError

    def within(self, subs: SubMLPs, share: float) -> Method:
        """Returns the method with the largest size that keeps at most a share of the parameters.

        Args:
            subs: The sub-MLPs of an MLP, perhaps abstract.
            share: The share of the MLP's parameters, in (0, 1]. The output bias does not count.

        Raises:
            InputError: No size is small enough, or the method has no size.
        """
        raise InputError(f"{type(self).__name__} cannot be given a budget")

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the method cannot compress an MLP; only shapes matter.

        Args:
            subs: The sub-MLPs of the MLP, perhaps abstract.
            calibrated: Whether there is calibration.
        """

    def check_given(self, *, calibration: bool, gradients: bool) -> None:
        """Raises `InputError` for a given argument that is not used, and for a missing one."""
        score = getattr(self, "score", None)
        name = type(self).__name__ + ("" if score is None else f" with score {score!r}")
        if calibration and not self.takes_calibration:
            raise InputError(f"{name} takes no calibration")
        if gradients and not self.takes_gradients:
            raise InputError(f"{name} takes no gradients")
        if self.takes_gradients and not gradients:
            raise InputError(f"{name} needs gradients; fusion_jax.mean_gradients gives them")

    def solve(
        self,
        subs: SubMLPs,
        *,
        key: Key[Array, ""],
        act: Activation | None = None,
        calibration: Calibration | None = None,
        gradients: SubMLPs | None = None,
    ) -> Solution:
        """Returns the solution for one MLP; pure, for use under ``jit`` and ``vmap``.

        Args:
            subs: The sub-MLPs.
            key: Random key.
            act: The activation, for methods that take calibration; given together with it.
            calibration: The inputs of the MLP, for methods that take calibration.
            gradients: The gradients of a loss, for methods that take gradients.
        """
        raise NotImplementedError

    def verify(self, solution: Solution) -> None:
        """Raises an error if a solution misses a guarantee of the method; outside ``jit``."""

    def build(self, mlp: Mlp, solution: Solution) -> Mlp:
        """Returns the module that replaces an MLP, which is not changed."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """Returns the configuration as JSON values, with the name under ``"method"``."""
        return {"method": type(self).name or type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def check_method(method: object) -> None:
    """Raises `InputError` unless an argument is a method."""
    if not isinstance(method, Method):
        raise InputError(f"a method is an object such as fusion_jax.Svd(); got {method!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises `InputError` unless the value of an option is one of its choices."""
    if value not in choices:
        hint = nearest(str(value), choices)
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}{hint}")


def check_width(width: int | float) -> None:
    """Raises `InputError` unless the width is an int of at least 1 or a fraction in (0, 1]."""
    check_size("width", width, 1)


def check_size(name: str, size: int | float, most: int) -> None:
    """Raises `InputError` unless a size is an int of at least 1 or a fraction in (0, most]."""
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise InputError(f"{name} must be an int or a fraction; got {size!r}")
    if isinstance(size, int) and size < 1:
        raise InputError(f"{name} must be at least 1; got {size}")
    if isinstance(size, float) and not 0 < size <= most:
        hint = f"; for a {name} of {size:g} give an int" if size > most > 1 else ""
        raise InputError(f"a {name} given as a fraction must be in (0, {most}]; got {size}{hint}")


def width_within(subs: SubMLPs, share: float, round_to: int = 1) -> int:
    """Returns the largest number of hidden units with at most a share of an MLP's parameters.

    It is a multiple of ``round_to``, or the MLP's own width.

    Raises:
        InputError: Not even the smallest width has so few parameters.
    """
    width = int(share * subs.width + 1e-9)
    if width < subs.width:
        width -= width % round_to
    if width < 1:
        steps = "" if round_to == 1 else f" in steps of {round_to}"
        raise InputError(f"a budget of {share:g} leaves none of {subs.width} hidden units{steps}")
    return width


def kept_width(width: int | float, original: int, round_to: int = 1) -> int:
    """Returns the width for an int, or for a fraction of the original width in (0, 1].

    Fractions are rounded up to a multiple of ``round_to``, but not above the original width.

    Raises:
        InputError: The width is out of its range.

    Example:
        >>> kept_width(0.25, 3072), kept_width(100, 3072), kept_width(0.1, 3072, 128)
        (768, 100, 384)
    """
    check_width(width)
    if isinstance(width, int):
        if width > original:
            raise InputError(f"width {width} is above the MLP's own, {original}")
        return width
    exact = max(1, round(width * original))
    return min(original, -(-exact // round_to) * round_to)
