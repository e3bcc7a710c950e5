"""Rotary position embeddings and their variants for long texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fusion_jax.errors import InputError, nearest
from fusion_jax.models.base import config_from_fields

RopeType = Literal["default", "linear", "llama3", "yarn"]
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
        attention_factor: For ``yarn``: a factor of both rotated vectors; None for the paper's.
        mscale: For ``yarn``, together with ``mscale_all_dim``: another formula for that factor.
        mscale_all_dim: See ``mscale``.
        truncate: For ``yarn``: whether the first and last feature between the two limits are
            rounded to whole numbers.

    References:
        RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); Llama 3 (arXiv 2407.21783).
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

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Rope:
        """Reads ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

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
        name = given["rope_type"]
        if name not in TYPES:
            raise InputError(f"rope_type {name!r} is not implemented{nearest(str(name), TYPES)}")
        if (
            given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        ) != 1.0:
            raise InputError("a partial_rotary_factor is not implemented")
        if name != "default" and given.get("factor") is None:
            if name != "yarn" or not positions:
                raise InputError(f"rope_type {name} needs a factor")
            given["factor"] = positions / given[original]
        return config_from_fields(cls, given)

    def frequencies(self, features: int) -> np.ndarray:
        """Returns the frequency of each pair of features, in radians per position.

        Args:
            features: The number of features of a head.

        Returns:
            (features / 2,) in float64.

        Example:
            >>> Rope().frequencies(4)
            array([1.  , 0.01])
        """
        plain = self.rope_theta ** -(np.arange(0, features, 2) / features)
        if self.rope_type == "default":
            return plain
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
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def stretch(m: float) -> float:
            return 0.1 * m * math.log(self.factor) + 1 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return stretch(self.mscale) / stretch(self.mscale_all_dim)
        return stretch(1.0)

    def angles(self, positions: Int[Array, "b t"], features: int) -> Float[Array, "b t half"]:
        """Returns the angle of each pair of features at each position, in float32."""
        frequencies = jnp.asarray(self.frequencies(features).astype(np.float32))
        return positions.astype(jnp.float32)[..., None] * frequencies[None, None]

    def rotated(
        self, x: Float[Array, "b t h f"], angles: Float[Array, "b t half"]
    ) -> Float[Array, "b t h f"]:
        """Rotates feature i with feature i + f/2, in the layout of Hugging Face."""
        cos, sin = (
            (self.scale * f(angles)).astype(x.dtype)[:, :, None] for f in (jnp.cos, jnp.sin)
        )
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
