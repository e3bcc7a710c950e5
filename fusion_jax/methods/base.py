"""What a compression method is."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError, nearest
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs


class Solution(NamedTuple):
    """What a method finds for one MLP, or for several of one shape along leading axes.

    Args:
        parts: Arrays that `Method.build` turns into a module; a pytree of the method's own.
        facts: Scalars for the report: a NamedTuple, whose field names head the columns.
    """

    parts: Any
    facts: Any


class Method:
    """Base of the methods: frozen, keyword-only dataclasses whose fields are the configuration.

    A method splits in two, so that the costly half runs under ``jit`` and ``vmap``: `solve` maps
    arrays to arrays, `build` makes the module.
    """

    name: ClassVar[str] = ""
    """Its name in JSON, and of its subcommand; the class's if empty."""
    modules: ClassVar[tuple[type[Mlp], ...]] = ()
    """The modules that `build` makes, besides `Mlp` and `GatedMlp`."""

    def __new__(cls, *args: Any, **kwargs: Any):  # noqa: D102
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in known:
                raise InputError(f"{cls.__name__} has no option {name!r}{nearest(name, known)}")
        return super().__new__(cls)

    @property
    def calibrated(self) -> bool:
        """Whether `solve` takes calibration."""
        return False

    @property
    def graded(self) -> bool:
        """Whether `solve` needs the gradients of a loss, as its argument ``gradients``."""
        return False

    any_mlp: ClassVar[bool] = False
    """Whether it takes MLPs that another method has been at, too."""
    sequential: bool = False
    """Whether a site's calibration comes from the model with the sites before it compressed."""
    by_use: float = 0.0
    """Power of the router's use of an expert that its width grows with; 0 for equal widths."""

    def within(self, subs: SubMLPs, share: float) -> Method:
        """The method with the size at which at most so much of an MLP's parameters is left.

        Args:
            subs: Its sub-MLPs, perhaps abstract.
            share: The share of the parameters, in (0, 1]. The output bias does not count.

        Returns:
            The method, otherwise the same.

        Raises:
            InputError: No size is small enough, or the method has none.
        """
        raise InputError(f"{type(self).__name__} cannot be given a budget")

    def check(self, subs: SubMLPs, *, calibrated: bool = False) -> None:
        """Raises `InputError` if the method cannot compress these (looks at shapes only).

        Args:
            subs: Sub-MLPs, perhaps abstract.
            calibrated: Whether there will be calibration.
        """

    def check_given(self, *, calibration: bool, gradients: bool) -> None:
        """Raises `InputError` for what is given without use, or missing.

        Args:
            calibration: Whether there is calibration.
            gradients: Whether there are gradients.
        """
        score = getattr(self, "score", None)
        name = type(self).__name__ + ("" if score is None else f" with score {score!r}")
        if calibration and not self.calibrated:
            raise InputError(f"{name} takes no calibration")
        if gradients and not self.graded:
            raise InputError(f"{name} takes no gradients")
        if self.graded and not gradients:
            raise InputError(f"{name} needs gradients; fusion_jax.mean_gradients gives them")

    def solve(
        self,
        subs: SubMLPs,
        *,
        key: Key[Array, ""],
        act: str | None = None,
        calibration: Calibration | None = None,
    ) -> Solution:
        """Compresses one MLP's sub-MLPs: pure, for use under ``jit`` and ``vmap``.

        Args:
            subs: The sub-MLPs.
            key: Random key.
            act: The activation's name, where it is known.
            calibration: What the MLP saw, or None; with it, ``act`` is given.

        Returns:
            The solution.
        """
        raise NotImplementedError

    def verify(self, solution: Solution) -> None:
        """Raises an error if a solution is not as good as it must be; outside ``jit``."""

    def build(self, mlp: Mlp, solution: Solution) -> Any:
        """The module that takes the place of an MLP; the MLP is left as it is."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values, with the method's name under ``"method"``."""
        return {"method": type(self).name or type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


def check_method(method: Any) -> None:
    """Raises `InputError` unless it is a method."""
    if not isinstance(method, Method):
        raise InputError(f"a method is an object such as fusion_jax.Svd(); got {method!r}")


def check_width(width: int | float) -> None:
    """Raises `InputError` unless the width is an int of at least 1 or a fraction in (0, 1]."""
    if isinstance(width, bool) or not isinstance(width, int | float):
        raise InputError(f"width must be an int or a fraction; got {width!r}")
    if isinstance(width, int) and width < 1:
        raise InputError(f"width must be at least 1; got {width}")
    if isinstance(width, float) and not 0 < width <= 1:
        raise InputError(f"a width given as a fraction must be in (0, 1]; got {width}")


def width_within(subs: SubMLPs, share: float, round_to: int = 1) -> int:
    """The most hidden units that have at most this share of an MLP's parameters.

    Args:
        subs: The MLP's sub-MLPs, perhaps abstract.
        share: The share, in (0, 1].
        round_to: The width is a multiple of this, or the MLP's own.

    Returns:
        The width.

    Raises:
        InputError: Not even the smallest width is within it.
    """
    width = int(share * subs.width + 1e-9)
    if width < subs.width:
        width -= width % round_to
    if width < 1:
        steps = "" if round_to == 1 else f" in steps of {round_to}"
        raise InputError(f"a budget of {share:g} leaves none of {subs.width} hidden units{steps}")
    return width


def kept_width(width: int | float, original: int, round_to: int = 1) -> int:
    """The width that an int or a fraction of the original means.

    Args:
        width: An int, 1 to ``original``, or a float, a fraction in (0, 1].
        original: The width of the MLP.
        round_to: Fractions are rounded up to a multiple of this, but not above ``original``.

    Returns:
        The width.

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
