"""MLPs as Flax modules, as models hold them and as fusing leaves them.

`Mlp` and `GatedMlp` are the modules of a model; `FusedMlp` and `FusedGatedMlp` have one sub-MLP per
cluster and know how large each cluster is. The experts of a mixture are one module whose arrays
have a leading axis: see `experts`.

Axis letters in shapes: p width, c clusters, d inputs, o outputs, e experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fusion_jax.forms import Frozen as Frozen
from fusion_jax.forms import dtype_of, flops_of, matrix_of, stack_of
from fusion_jax.submlps import SubMLPs, activation, wide

Scaling = Literal["adam", "sgd", "folded"]

MlpT = TypeVar("MlpT", bound="Mlp")

_lecun = nnx.initializers.lecun_normal()


class Mlp(nnx.Module):
    """A plain MLP, ``f(x) = sum_i v_i s(w_i . x + b_i) + b_out``.

    Args:
        d_in: Inputs d.
        width: Hidden units p.
        d_out: Outputs o; None for d.
        act: Activation, a key of `ACTIVATIONS`.
        use_bias: Whether there are biases.
        param_dtype: The dtype of the parameters, in which the module also computes.
        kernel_init: Initialiser of both matrices.
        rngs: Random keys of the initial parameters.

    Example:
        >>> mlp = Mlp(4, 16, act="gelu", rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape, mlp.width
        ((2, 4), 16)
    """

    def __init__(
        self,
        d_in: int,
        width: int,
        d_out: int | None = None,
        *,
        act: str,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _lecun,
        rngs: nnx.Rngs,
    ):
        activation(act)
        self.act = act
        self.top_k = 1
        linear = partial(
            nnx.Linear,
            use_bias=use_bias,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self._add_inputs(linear, d_in, width)
        self.down = linear(width, d_in if d_out is None else d_out)

    def _add_inputs(self, linear: Callable[[int, int], nnx.Linear], d_in: int, width: int) -> None:
        self.up = linear(d_in, width)

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """The outputs f(x); experts take (e, n, d), the inputs of each."""
        if self.stack:
            return jax.vmap(lambda expert, x: expert(x))(self, x)
        return self.down(self.hidden(x))

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """What each sub-MLP hands to its output weights."""
        return activation(self.act)(self.up(x))

    def linears(self) -> dict[str, Any]:
        """The linear layers by name."""
        return {"up": self.up, "down": self.down}

    @property
    def d_in(self) -> int:
        """The number d of inputs."""
        return self.up.in_features

    @property
    def d_out(self) -> int:
        """The number o of outputs."""
        return self.down.out_features

    @property
    def width(self) -> int:
        """The number p of sub-MLPs."""
        return self.up.out_features

    @property
    def use_bias(self) -> bool:
        """Whether the MLP has biases."""
        return self.up.bias is not None

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters."""
        return dtype_of(self.up)

    @property
    def stack(self) -> tuple[int, ...]:
        """(e,) for e experts, () for a single MLP."""
        return stack_of(self.up)

    @property
    def flops(self) -> int:
        """Operations (two a multiply-add) of the matrix products for one position.

        Of experts, those that one position is routed to count.
        """
        return self.top_k * sum(flops_of(linear) for linear in self.linears().values())

    def sub_mlps(self) -> SubMLPs:
        """The sub-MLPs as rows, in the module's dtype; the output bias stays with the module."""
        bias = self.up.bias
        return SubMLPs(
            up=matrix_of(self.up).mT,
            up_bias=None if bias is None else bias[...],
            down=matrix_of(self.down),
        )

    def load_sub_mlps(self, subs: SubMLPs, out_bias: Float[Array, "*s o"] | None) -> None:
        """Overwrites the parameters, casting them to the module's dtype.

        Args:
            subs: As many sub-MLPs as the module is wide.
            out_bias: The output bias b_out, or None if the module has none.
        """
        _load(self.up, subs.up.mT, subs.up_bias)
        _load(self.down, subs.down, out_bias)

    def out_bias(self) -> Float[Array, "*s o"] | None:
        """The output bias b_out."""
        return None if self.down.bias is None else self.down.bias[...]

    def abstract(self, cls: type[Mlp], width: int, **fields: Any) -> Any:
        """A module of class ``cls`` with this one's inputs, outputs, activation, dtype and experts.

        Args:
            cls: The class of the new module.
            width: Its width.
            **fields: What else its constructor takes.

        Returns:
            The module, with shapes in place of parameters: nothing is allocated.
        """
        make = partial(
            cls,
            self.d_in,
            width,
            self.d_out,
            act=self.act,
            use_bias=self.use_bias,
            param_dtype=self.dtype,
            **fields,
        )
        count = self.stack[0] if self.stack else None
        return nnx.eval_shape(
            lambda: (
                experts(make, count, top_k=self.top_k, rngs=nnx.Rngs(0))
                if count
                else make(rngs=nnx.Rngs(0))
            )
        )

    def spec(self) -> dict[str, Any]:
        """What, besides the original module, says how to build this one: JSON values.

        Returns:
            The name of its class under ``"module"``, and the arguments for `abstract`.
        """
        return {"module": type(self).__name__, "width": self.width}

    def plain(self) -> Mlp:
        """The same function as a module that any framework has: itself."""
        return self

    def padded(self, width: int) -> Mlp:
        """The same function with units that are all zero added up to a width.

        Every activation here is 0 at 0 or meets a zero output weight, so that the outputs are
        equal to the bit.

        Args:
            width: At least the module's width.

        Returns:
            A module of the class that `plain` gives.
        """
        plain = self.plain()
        if width == plain.width:
            return plain
        rows = plain.sub_mlps().rows()
        new = plain.abstract(type(plain), width)
        rows = jnp.pad(rows, (*[(0, 0)] * len(self.stack), (0, width - plain.width), (0, 0)))
        new.load_sub_mlps(plain.sub_mlps().with_rows(rows), plain.out_bias())
        return new


def experts(
    make: Callable[..., MlpT], count: int, *, top_k: int = 1, rngs: nnx.Rngs, **fields: Any
) -> MlpT:
    """The experts of a mixture as one module, in whose arrays expert e has index e of axis 0.

    All that is said of one MLP holds for each expert on its own, and methods compress the experts
    of a layer in one call.

    Args:
        make: Makes one expert, such as the class `Mlp`.
        count: How many.
        top_k: To how many of them the model routes one position.
        rngs: Random keys of the initial parameters.
        **fields: Further arguments for ``make``.

    Returns:
        A module of the class that ``make`` gives, which maps (e, n, d) to (e, n, o).

    Example:
        >>> from functools import partial
        >>> both = experts(partial(Mlp, 4, 16, act="relu"), 2, rngs=nnx.Rngs(0))
        >>> both.stack, both(jnp.ones((2, 5, 4))).shape
        ((2,), (2, 5, 4))
    """
    keys = jax.random.split(rngs.params(), count)
    stacked = jax.vmap(lambda key: make(rngs=nnx.Rngs(key), **fields))(keys)
    stacked.top_k = top_k
    return stacked


def _load(linear: nnx.Linear, kernel: Array, bias: Array | None) -> None:
    dtype = linear.kernel.get_value().dtype
    linear.kernel.set_value(kernel.astype(dtype))
    if linear.bias is not None:
        assert bias is not None
        linear.bias.set_value(bias.astype(dtype))


class GatedMlp(Mlp):
    """A gated MLP, ``f(x) = sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out``.

    The arguments are those of `Mlp`. The activation is on the gate, as in Llama and T5 v1.1.

    Example:
        >>> mlp = GatedMlp(4, 16, act="silu", use_bias=False, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape
        (2, 4)
    """

    def _add_inputs(self, linear: Callable[[int, int], nnx.Linear], d_in: int, width: int) -> None:
        self.gate = linear(d_in, width)
        self.up = linear(d_in, width)

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """What each sub-MLP hands to its output weights."""
        return activation(self.act)(self.gate(x)) * self.up(x)

    def linears(self) -> dict[str, Any]:
        """The linear layers by name."""
        return {"gate": self.gate, **super().linears()}

    def sub_mlps(self) -> SubMLPs:
        """The sub-MLPs as rows, in the module's dtype; the output bias stays with the module."""
        bias = self.gate.bias
        return (
            super()
            .sub_mlps()
            ._replace(
                gate=matrix_of(self.gate).mT,
                gate_bias=None if bias is None else bias[...],
            )
        )

    def load_sub_mlps(self, subs: SubMLPs, out_bias: Float[Array, "*s o"] | None) -> None:
        """Overwrites the parameters, casting them to the module's dtype."""
        super().load_sub_mlps(subs, out_bias)
        assert subs.gate is not None
        _load(self.gate, subs.gate.mT, subs.gate_bias)


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
