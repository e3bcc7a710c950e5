"""Fused MLPs: one sub-MLP per cluster, and the size of each cluster.

Axis letters in shapes: p width before fusing, c clusters, d inputs, o outputs.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.nn.mlp import GatedMlp, Mlp
from fusion_jax.nn.submlps import SubMLPs, activation
from ntk.activations import outside

Scaling = Literal["adam", "sgd", "folded"]


class Factors(NamedTuple):
    """The fixed factors around the parameters of a fused MLP, which hold its cluster sizes.

    Plain:  ``f(x) = sum_c outer v s(inner (w . x + b)) + b_out``
    Gated:  ``f(x) = sum_c outer v (middle (u . x + a)) s(inner (g . x + c)) + b_out``

    The function depends only on the effective weights (inner w, outer v, ...), and not on how they
    are split into factor and parameter. The gradients by the parameters do depend on the split.

    Args:
        outer: (c,) between activation and output weights.
        inner: (c,) on the pre-activations.
        middle: (c,) on the linear factor of a gated MLP; 1 and unused in a plain one.
    """

    outer: Float[Array, "*s c"]
    inner: Float[Array, "*s c"]
    middle: Float[Array, "*s c"]


def factors(sizes: Float[Array, "*s c"], scaling: Scaling) -> Factors:
    """Returns the factors of a scaling for cluster sizes n_c, see `FusedMlp`.

    Returns:
        ``"adam"``: outer n; ``"sgd"``: outer sqrt(n), inner and middle 1 / sqrt(n);
        ``"folded"``: all 1.
    """
    one = jnp.ones_like(sizes)
    sizes = jnp.where(sizes > 0, sizes, one)  # the output weights of an empty cluster are 0
    if scaling == "adam":
        return Factors(outer=sizes, inner=one, middle=one)
    if scaling == "sgd":
        return Factors(outer=sizes**0.5, inner=sizes**-0.5, middle=sizes**-0.5)
    return Factors(outer=one, inner=one, middle=one)


def stored_rows(effective: SubMLPs, factors: Factors) -> SubMLPs:
    """Returns the parameters, in float32 or float64, of given effective weights within factors."""
    gated = effective.gate is not None
    return effective.scaled(
        down=1 / factors.outer,
        up=1 / (factors.middle if gated else factors.inner),
        gate=1 / factors.inner,
    )


def _times(x: Array, factor: Array) -> Array:
    """Returns ``x * factor`` along the last axis in x's dtype, computed in at least float32."""
    y = wide(x)
    return (y * jnp.expand_dims(factor.astype(y.dtype), range(x.ndim - 1))).astype(x.dtype)


class _Fused(Mlp):
    """Base of fused plain and gated MLPs: cluster sizes and how they are applied."""

    def __init__(self, *args: Any, original_width: int, scaling: Scaling, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.original_width = original_width
        self.scaling: Scaling = scaling
        # At least float32: bfloat16 would round sizes above 256.
        one = jnp.ones(self.width, wide(jnp.zeros(0, self.dtype)).dtype)
        self.sizes = Frozen(one)
        self.labels = Frozen(jnp.zeros(original_width, jnp.int32))
        self.outer, self.inner, self.middle = Frozen(one), Frozen(one), Frozen(one)

    def factors(self) -> Factors:
        """Returns the fixed factors around the parameters."""
        return Factors(self.outer[...], self.inner[...], self.middle[...])

    def factor(self, name: str) -> Float[Array, "*s c"]:
        """Returns the fixed factors of the units at a linear layer, see `Mlp.factor`."""
        f = self.factors()
        up = f.middle if isinstance(self, GatedMlp) else f.inner
        return {"down": f.outer, "up": up, "gate": f.inner}[name]

    def _effective(self) -> SubMLPs:
        scales = {name: self.factor(name) for name in ("down", "up", "gate")}
        return self.sub_mlps().scaled(**scales)

    def centroids(self) -> SubMLPs:
        """Returns the centroids of the clusters for any scaling, in float32 or float64."""
        effective = self._effective()
        sizes = self.sizes[...]
        one = jnp.ones_like(sizes)
        return effective.scaled(down=1 / jnp.maximum(sizes, one), up=one, gate=one)

    def _plain_class(self) -> type[Mlp]:
        return GatedMlp if isinstance(self, GatedMlp) else Mlp

    def plain(self) -> Mlp:
        """Returns the same function as a plain module: factors are folded into the weights."""
        new = self.abstract(self._plain_class(), self.width)
        new.load_sub_mlps(self._effective(), self.out_bias())
        return new

    def wide_copy(self) -> Mlp:
        """Returns the MLP of the original width in which centroids replace all sub-MLPs.

        As a function it equals the fused MLP. With the scalings ``"adam"`` and ``"sgd"``, both have
        the same kernel of that optimizer.
        """
        new = self.abstract(self._plain_class(), self.original_width)

        def copies(x: Array, labels: Array) -> Array:
            return x[labels]

        for _ in self.stack:
            copies = jax.vmap(copies)
        rows = jax.tree.map(lambda x: copies(x, self.labels[...]), self.centroids())
        new.load_sub_mlps(rows, self.out_bias())
        return new

    def load_fused(
        self,
        rows: SubMLPs,
        factors: Factors,
        sizes: Float[Array, "*s c"],
        labels: Int[Array, "*s p"],
        out_bias: Float[Array, "*s o"] | None,
    ) -> None:
        """Overwrites parameters and Frozen variables.

        Args:
            rows: The c rows to store, as `stored_rows` gives them.
            factors: The factors around them.
            sizes: Cluster sizes.
            labels: The cluster of each of the p original sub-MLPs.
            out_bias: The output bias b_out, or None if the module has none.
        """
        values = {"sizes": sizes, "labels": labels, **factors._asdict()}
        for name, value in values.items():
            variable = getattr(self, name)
            variable.set_value(value.astype(variable.get_value().dtype))
        self.load_sub_mlps(rows, out_bias)

    def spec(self) -> dict[str, object]:
        """Returns how to build this module from the original one, as JSON values."""
        fused = {"original_width": self.original_width, "scaling": self.scaling}
        return {**super().spec(), **fused}


class FusedMlp(_Fused):
    """The fused MLP: one sub-MLP per cluster, with the cluster sizes n_c Frozen.

    With centroids (w_c, b_c, v_c), the function is ``sum_c n_c v_c s(w_c . x + b_c) + b_out`` for
    any scaling: the original with every sub-MLP replaced by its centroid (the wide copy). `scaling`
    says where the sizes are, and so which neural tangent kernel is kept:

    - ``"adam"`` (the paper, eq. 5): ``n_c`` between activation and output weights; for upstream
      gradients at one position, the Adam kernel <g(x), sign g(z)> equals the wide copy's.
    - ``"sgd"`` (balanced): stores ``w = sqrt(n_c) w_c`` and so on, and computes
      ``sum_c sqrt(n_c) v s((w . x + b) / sqrt(n_c)) + b_out``; the SGD kernel <g(x), g(z)> equals
      the wide copy's, for any activation.
    - ``"folded"``: ``n_c v_c`` stored as output weights; a plain MLP, which keeps neither kernel.

    Why ``"sgd"`` keeps the kernel: a gradient by a stored sqrt(n) w_c is n / sqrt(n) times that of
    one copy, so that the product of two gradients counts each of the n copies once. Why ``"adam"``
    keeps it: the gradient is n times that of one copy, and its sign is the sign of that copy.

    The factors (`Factors`) can also be fitted on calibration text, so that the kernel is nearer to
    the original's than the wide copy's is: averaging rows makes kernels smaller, and factors can
    undo it without changing the function. See `fusion_jax.Fusion`.

    Args:
        *args: As for `Mlp`.
        original_width: The width p before fusing.
        scaling: Where the sizes are.
        **kwargs: As for `Mlp`.

    References:
        MLP Fusion (arXiv 2307.08941), section 4.2 and equation 5.

    Example:
        >>> from flax import nnx
        >>> mlp = FusedMlp(4, 8, act="gelu", original_width=32, scaling="adam", rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape, mlp.sizes.shape, mlp.labels.shape
        ((2, 4), (8,), (32,))
    """

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Returns the hidden values with cluster sizes, which the output weights multiply."""
        h = activation(self.act)(_times(self.up(x), self.inner[...]))
        return _times(h, self.outer[...])


class FusedGatedMlp(_Fused, GatedMlp):
    """The fused gated MLP: `FusedMlp` for ``sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out``.

    The scalings keep the same kernels as in `FusedMlp`, for the same reasons: ``"sgd"`` stores
    sqrt(n) times every centroid, and `Factors` correct the function.
    """

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Returns the hidden values with cluster sizes, which the output weights multiply."""
        h = activation(self.act)(_times(self.gate(x), self.inner[...]))
        of_linear = outside(self.act)
        if of_linear is None:
            return _times(h * self.up(x), self.outer[...] * self.middle[...])
        return _times(h * of_linear(_times(self.up(x), self.middle[...])), self.outer[...])
