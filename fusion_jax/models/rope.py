"""Rotary position embeddings and their variants for long texts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusion_jax.errors import InputError, nearest
from fusion_jax.models.base import Fields, config_from_fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
TYPES: tuple[RopeType, ...] = get_args(RopeType)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary position embedding; the arguments have the names that ``config.json`` gives them.

    Args:
        rope_type: One of `TYPES`.
        rope_theta: The base of the wavelengths.
        factor: How many times longer than the original texts may be.
        original_max_position_embeddings: The number of positions of the original.
        low_freq_factor: For ``llama3``: features that rotate fewer times than this over the
            original positions are stretched by ``factor``.
        high_freq_factor: For ``llama3``: features that rotate more often than this stay unchanged.
        beta_fast: For ``yarn``: features that rotate more often than this over the original
            positions stay unchanged.
        beta_slow: For ``yarn``: features that rotate fewer times than this are stretched by
            ``factor``.
        attention_factor: For ``yarn`` and ``longrope``: a factor of both rotated vectors; None for
            the papers'.
        mscale: For ``yarn``, together with ``mscale_all_dim``: another formula for that factor.
        mscale_all_dim: See ``mscale``.
        truncate: For ``yarn``: whether the first and last feature between the two limits are
            rounded to whole numbers.
        short_factor: For ``longrope``: what the wavelength of each pair of features is multiplied
            by in texts of at most ``original_max_position_embeddings`` tokens.
        long_factor: The same for longer texts.
        max_position_embeddings: For ``dynamic``: from this number of tokens on the base grows.
        partial_rotary_factor: The part of the features that is rotated, the first ones.
        rotary_dim: The number of features that are rotated; 0 for what ``partial_rotary_factor``
            says.
        turned: The part of all pairs of features that turns with the position, the first ones.
        interleaved: Whether features 2i and 2i + 1 are a pair, instead of i and i + f/2.

    References:
        RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); Llama 3 (arXiv 2407.21783); LongRoPE
        (arXiv 2402.13753).
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    max_position_embeddings: int = 0
    partial_rotary_factor: float = 1.0
    rotary_dim: int = 0
    turned: float = 1.0
    interleaved: bool = False

    @classmethod
    def from_json(
        cls, config: Fields, *, partial_rotary: bool = False, interleaved: bool = False
    ) -> Rope:
        """Reads ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

        Args:
            config: The fields of a ``config.json``.
            partial_rotary: Whether a ``partial_rotary_factor`` is possible.
            interleaved: Whether features 2i and 2i + 1 are a pair.

        Raises:
            InputError: The type of the embedding is not implemented.

        Example:
            >>> Rope.from_json({"rope_theta": 5e5, "rope_scaling": None}).rope_theta
            500000.0
        """
        # The order of precedence is that of transformers.
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        given.setdefault("rope_type", given.get("type", "default"))
        given.setdefault("rope_theta", config.get("rope_theta"))
        positions, original = (
            config.get("max_position_embeddings"),
            "original_max_position_embeddings",
        )
        given[original] = config.get(original) or given.get(original) or positions
        given["max_position_embeddings"] = positions
        given |= {"interleaved": interleaved, "rotary_dim": None, "turned": None}
        name = given["rope_type"]
        if name not in TYPES:
            raise InputError(f"rope_type {name!r} is not implemented{nearest(str(name), TYPES)}")
        part = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        given["partial_rotary_factor"] = part
        if part != 1.0 and not partial_rotary:
            raise InputError("a partial_rotary_factor is not implemented")
        if name != "default" and given.get("factor") is None:
            if name not in ("yarn", "longrope") or not positions:
                raise InputError(f"rope_type {name} needs a factor")
            given["factor"] = positions / given[original]
        if name == "dynamic" and not positions:
            raise InputError("rope_type dynamic needs max_position_embeddings")
        return config_from_fields(cls, given)

    def rotary(self, features: int) -> int:
        """Returns how many features of a head are rotated, the first ones."""
        return self.rotary_dim or int(features * self.partial_rotary_factor)

    def check(self, features: int) -> None:
        """Raises `InputError` if the embedding does not fit heads with this many features."""
        rotary = self.rotary(features)
        if rotary < 2 or rotary % 2 or rotary > features:
            raise InputError(
                "the number of features of a head that are rotated, rotary_dim or head_dim times "
                f"partial_rotary_factor, must be even, above 0, and at most {features}; got "
                f"{rotary}"
            )
        if self.rope_type == "dynamic" and rotary < 4:
            raise InputError(f"rope_type dynamic needs at least 4 rotated features; got {rotary}")
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name)
                if len(factors) != rotary // 2 or not all(factor > 0 for factor in factors):
                    raise InputError(
                        f"{name} must be {rotary // 2} numbers above 0, one for each pair of "
                        f"rotated features; got {len(factors)}"
                    )

    def frequencies(self, features: int, *, long: bool = False) -> np.ndarray:
        """Returns the frequency of each pair of features, in radians per position.

        Those of ``dynamic`` are for texts of at most ``max_position_embeddings`` tokens.

        Args:
            features: The number of features that are rotated.
            long: Whether a text has more than ``original_max_position_embeddings`` tokens, which
                counts for ``longrope``.

        Returns:
            (features / 2,) in float64.

        Example:
            >>> Rope().frequencies(4)
            array([1.  , 0.01])
        """
        plain = self.rope_theta ** -(np.arange(0, features, 2) / features)
        plain[int(self.turned * features // 2) :] = 0
        if self.rope_type in ("default", "dynamic"):
            return plain
        if self.rope_type == "longrope":
            return plain / np.array(self.long_factor if long else self.short_factor)
        stretched = plain / self.factor
        if self.rope_type == "linear":
            return stretched
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * plain / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        else:
            low, high = (self._feature(b, features) for b in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, features - 1)
            keep = 1 - (np.arange(features // 2) - low) / (high - low if high != low else 0.001)
        keep = np.clip(keep, 0, 1)
        return keep * plain + (1 - keep) * stretched

    def _feature(self, rotations: float, features: int) -> float:
        """Returns the pair of features that rotates this often over the original positions."""
        wavelength = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return features * math.log(wavelength) / (2 * math.log(self.rope_theta))

    @property
    def scale(self) -> float:
        """The factor of both rotated vectors."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "longrope":
            grown, original = max(self.factor, 1.0), self.original_max_position_embeddings
            return math.sqrt(1 + math.log(grown) / math.log(original)) if grown > 1 else 1.0

        def stretch(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return stretch(self.mscale) / stretch(self.mscale_all_dim)
        return stretch(1.0)

    def angles(
        self, positions: Int[Array, "b t"], features: int, slots: int | None = None
    ) -> Float[Array, "b t half"]:
        """Returns the angle of each pair of features at each position, in float32.

        The frequencies of ``dynamic`` and ``longrope`` depend on the length of the longest text.
        With a cache, ``longrope`` takes its size for the length, so that keys from before and after
        the limit fit together; `transformers` reads a text again once it comes to the limit.

        Args:
            positions: (b, t) the position of each token in its text.
            features: The number of features of a head.
            slots: The number of slots of the cache; None without a cache.
        """
        rotary = self.rotary(features)
        frequencies = jnp.asarray(self.frequencies(rotary).astype(np.float32))
        length = positions.max() + 1
        if self.rope_type == "longrope":
            long = jnp.asarray(self.frequencies(rotary, long=True).astype(np.float32))
            limit = self.original_max_position_embeddings
            frequencies = jnp.where((length if slots is None else slots) > limit, long, frequencies)
        if self.rope_type == "dynamic":
            longest = self.max_position_embeddings
            over = jnp.maximum(length, longest).astype(jnp.float32) / longest - 1
            # The base times `growth` to the power of rotary / (rotary - 2).
            growth = jnp.arange(0, -rotary, -2) / (rotary - 2)
            frequencies = frequencies * (1 + self.factor * over) ** growth.astype(jnp.float32)
        return positions.astype(jnp.float32)[..., None] * frequencies[None, None]

    def rotated(
        self, x: Float[Array, "b t h f"], angles: Float[Array, "b t half"]
    ) -> Float[Array, "b t h f"]:
        """Rotates pairs of features, i and i + f/2 unless they are interleaved."""
        cos, sin = (
            (self.scale * f(angles)).astype(x.dtype)[:, :, None] for f in (jnp.cos, jnp.sin)
        )
        x, rest = jnp.split(x, [2 * angles.shape[-1]], axis=-1)
        a, b = (x[..., ::2], x[..., 1::2]) if self.interleaved else jnp.split(x, 2, axis=-1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = (jnp.stack([a, b], -1).reshape(x.shape),) if self.interleaved else (a, b)
        return jnp.concatenate([*turned, rest], axis=-1)
