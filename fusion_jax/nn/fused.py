"""MLPs as fusing leaves them: one sub-MLP per cluster, and how large each cluster is.

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

Scaling = Literal["adam", "sgd", "folded"]


class Factors(NamedTuple):
    """Where a fused MLP keeps the sizes of its clusters: fixed factors around stored parameters.

    Plain:  ``f(x) = sum_c outer v s(inner (w . x + b)) + b_out``
    Gated:  ``f(x) = sum_c outer v (middle (u . x + a)) s(inner (g . x + c)) + b_out``

    A function of x and what it computes from effective weights (inner w, outer v, ...) does not
    depend on how these are split into factor and parameter; gradients by the parameters do.

    Args:
        outer: (c,) between activation and output weights.
        inner: (c,) between the activation's pre-activation and the activation.
        middle: (c,) on the linear factor of a gated MLP; 1 and unused in a plain one.
    """

    outer: Float[Array, "*s c"]
    inner: Float[Array, "*s c"]
    middle: Float[Array, "*s c"]


def factors(sizes: Float[Array, "*s c"], scaling: Scaling) -> Factors:
    """The factors of a scaling.

    Args:
        sizes: Cluster sizes n_c.
        scaling: See `FusedMlp`.

    Returns:
        ``"adam"``: outer n; ``"sgd"``: outer sqrt(n), inner and middle 1 / sqrt(n);
        ``"folded"``: all 1.
    """
    one = jnp.ones_like(sizes)
    sizes = jnp.where(sizes > 0, sizes, one)  # an empty cluster has output weights 0 instead
    if scaling == "adam":
        return Factors(outer=sizes, inner=one, middle=one)
    if scaling == "sgd":
        return Factors(outer=sizes**0.5, inner=sizes**-0.5, middle=sizes**-0.5)
    return Factors(outer=one, inner=one, middle=one)


def stored_rows(effective: SubMLPs, factors: Factors) -> SubMLPs:
    """The parameters that, within their factors, compute with given weights.

    Args:
        effective: c units as the function has them, possibly stacked.
        factors: The factors.

    Returns:
        The rows to store, in float32 or float64.
    """
    gated = effective.gate is not None
    return effective.scaled(
        down=1 / factors.outer,
        up=1 / (factors.middle if gated else factors.inner),
        gate=1 / factors.inner,
    )


def _times(x: Array, factor: Array) -> Array:
    """``x * factor`` along the last axis, computed in float32 at least, in x's dtype."""
    y = wide(x)
    return (y * jnp.expand_dims(factor.astype(y.dtype), range(x.ndim - 1))).astype(x.dtype)


class _Fused(Mlp):
    """What the fused forms of both kinds of MLP share: cluster sizes and how they are applied."""

    def __init__(self, *args: Any, original_width: int, scaling: Scaling, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.original_width = original_width
        self.scaling: Scaling = scaling
        # At least float32 whatever the model's dtype: bfloat16 would round sizes above 256.
        one = jnp.ones(self.width, wide(jnp.zeros(0, self.dtype)).dtype)
        self.sizes = Frozen(one)
        self.labels = Frozen(jnp.zeros(original_width, jnp.int32))
        self.outer, self.inner, self.middle = Frozen(one), Frozen(one), Frozen(one)

    def factors(self) -> Factors:
        """The fixed factors around the parameters."""
        return Factors(self.outer[...], self.inner[...], self.middle[...])

    def _effective(self) -> SubMLPs:
        f = self.factors()
        up = f.middle if isinstance(self, GatedMlp) else f.inner
        return self.sub_mlps().scaled(down=f.outer, up=up, gate=f.inner)

    def centroids(self) -> SubMLPs:
        """The clusters' centroids, whatever the scaling stores, in float32 or float64."""
        effective = self._effective()
        sizes = self.sizes[...]
        one = jnp.ones_like(sizes)
        return effective.scaled(down=1 / jnp.maximum(sizes, one), up=one, gate=one)

    def _plain_class(self) -> type[Mlp]:
        return GatedMlp if isinstance(self, GatedMlp) else Mlp

    def plain(self) -> Mlp:
        """The same function as a plain module of this width: factors folded into the weights."""
        new = self.abstract(self._plain_class(), self.width)
        new.load_sub_mlps(self._effective(), self.out_bias())
        return new

    def wide_copy(self) -> Mlp:
        """The MLP of the original width in which every sub-MLP is replaced by its centroid.

        As a function it equals the fused MLP; with the scalings ``"adam"`` and ``"sgd"``, the fused
        MLP's kernel of that optimiser is this one's.
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

    def spec(self) -> dict[str, Any]:
        """What, besides the original module, says how to build this one: JSON values."""
        fused = {"original_width": self.original_width, "scaling": self.scaling}
        return {**super().spec(), **fused}


class FusedMlp(_Fused):
    """The fused MLP: one sub-MLP per cluster, with the cluster sizes n_c Frozen.

    With centroids (w_c, b_c, v_c), as a function always ``sum_c n_c v_c s(w_c . x + b_c) + b_out``,
    which is the original with every sub-MLP replaced by its centroid (the wide copy). `scaling`
    says where the sizes are, and so which neural tangent kernel is kept:

    - ``"adam"`` (the paper, eq. 5): ``n_c`` between activation and output weights; for upstream
      gradients at one position, the Adam kernel <g(x), sign g(z)> equals the wide copy's.
    - ``"sgd"`` (balanced): stores ``w = sqrt(n_c) w_c`` and so on, and computes
      ``sum_c sqrt(n_c) v s((w . x + b) / sqrt(n_c)) + b_out``; the SGD kernel <g(x), g(z)> equals
      the wide copy's, for any activation.
    - ``"folded"``: ``n_c v_c`` stored as output weights; a plain MLP, which keeps neither kernel.

    Why ``"sgd"`` keeps the kernel: a gradient with respect to a stored sqrt(n) w_c is n / sqrt(n)
    times that of one copy, so that products of two gradients count each copy once, n in all.
    Why ``"adam"`` does: the gradient is n times one copy's and its sign is that copy's sign.

    The factors (`Factors`) can also be fitted on calibration text, so that the kernel is nearer to
    the original's than the wide copy's is: averaging rows makes kernels smaller, and factors can
    undo that without touching the function. See `fusion_jax.Fusion`.

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
        """What each sub-MLP hands to its output weights, cluster sizes included."""
        h = activation(self.act)(_times(self.up(x), self.inner[...]))
        return _times(h, self.outer[...])


class FusedGatedMlp(_Fused, GatedMlp):
    """The fused gated MLP: `FusedMlp` for ``sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out``.

    Its scalings keep what those of `FusedMlp` keep, for the same reasons: ``"sgd"`` stores sqrt(n)
    times every centroid, and `Factors` make the function right again.
    """

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """What each sub-MLP hands to its output weights, cluster sizes included."""
        h = activation(self.act)(_times(self.gate(x), self.inner[...]))
        return _times(h * self.up(x), self.outer[...] * self.middle[...])
