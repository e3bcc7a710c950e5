"""What an MLP is: rows of sub-MLPs, and the Flax modules that hold them.

An MLP of width p is a sum of p one-unit sub-MLPs, one per hidden unit,

    plain:  f(x) = sum_i v_i s(w_i . x + b_i) + b_out
    gated:  f(x) = sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out

`SubMLPs` holds them as rows. `Mlp` and `GatedMlp` are the modules of a model; `FusedMlp` and
`FusedGatedMlp` have one row per cluster and know how large each cluster is.

Axis letters in shapes: p width, c clusters, d inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fusion_jax.errors import InputError, nearest

Scaling = Literal["adam", "sgd", "folded"]

_lecun = nnx.initializers.lecun_normal()
_gelu_exact = partial(jax.nn.gelu, approximate=False)
_gelu_tanh = partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": _gelu_exact,
        "gelu_new": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "tanh": jnp.tanh,
    }
)
"""Activations by their Hugging Face names."""


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function of a Hugging Face name.

    Args:
        name: A key of `ACTIVATIONS`, such as ``"gelu"`` (exact) or ``"gelu_new"`` (tanh form).

    Returns:
        An elementwise function of arrays.

    Raises:
        InputError: The name is unknown.

    Example:
        >>> float(activation("relu")(jnp.array(-1.0)))
        0.0
    """
    if name not in ACTIVATIONS:
        raise InputError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Frozen(nnx.Variable):
    """A variable that neither trains nor enters an NTK, such as the sizes of clusters."""


class SubMLPs(NamedTuple):
    """The sub-MLPs of one MLP as rows, or of several MLPs of one shape along leading axes.

    Args:
        up: Input weights, (..., p, d).
        down: Output weights, (..., p, o).
        up_bias: Input biases, (..., p), or None.
        gate: Weights inside the activation of a gated MLP, (..., p, d), or None if not gated.
        gate_bias: Their biases, (..., p), or None.

    Example:
        >>> subs = SubMLPs(up=jnp.ones((8, 3)), down=jnp.ones((8, 2)), up_bias=jnp.zeros(8))
        >>> subs.width, subs.rows().shape
        (8, (8, 6))
    """

    up: Float[Array, "*s p d"]
    down: Float[Array, "*s p o"]
    up_bias: Float[Array, "*s p"] | None = None
    gate: Float[Array, "*s p d"] | None = None
    gate_bias: Float[Array, "*s p"] | None = None

    @property
    def width(self) -> int:
        """The number p of sub-MLPs."""
        return self.up.shape[-2]

    def _blocks(self) -> dict[str, Array]:
        # A bias joins the row as one more coordinate. The order is that of the paper's rows.
        blocks = {
            "gate": self.gate,
            "gate_bias": self.gate_bias,
            "up": self.up,
            "up_bias": self.up_bias,
            "down": self.down,
        }
        return {
            name: x[..., None] if name.endswith("bias") else x
            for name, x in blocks.items()
            if x is not None
        }

    def rows(self) -> Float[Array, "*s p row"]:
        """The points to cluster: each sub-MLP's numbers in one row, [g, c, u, a, v] or [w, b, v].

        Returns:
            Rows in float32, or in float64 if the weights are.

        References:
            MLP Fusion (arXiv 2307.08941), section 4.2.
        """
        blocks = [wide(x) for x in self._blocks().values()]
        return jnp.concatenate(blocks, axis=-1)

    def with_rows(self, rows: Float[Array, "*s c row"]) -> SubMLPs:
        """Sub-MLPs of the same layout, read from rows as `rows` writes them.

        Args:
            rows: (..., c, row) for any number c of rows.

        Returns:
            The sub-MLPs, in the dtype of the rows.
        """
        fields, start = {}, 0
        for name, block in self._blocks().items():
            size = block.shape[-1]
            part = rows[..., start : start + size]
            fields[name] = part[..., 0] if name.endswith("bias") else part
            start += size
        return self._replace(**fields)

    def scaled(self, sizes: Float[Array, "*s p"], power: float) -> SubMLPs:
        """Every number of sub-MLP i times ``sizes[i] ** power``."""
        return self.with_rows(_by_size(self.rows(), sizes, power))

    def check(self) -> SubMLPs:
        """Returns itself if the shapes fit together.

        Raises:
            InputError: They do not; the message names the field.
        """
        if self.up.ndim < 2 or 0 in self.up.shape:
            raise InputError(f"up must be (..., p, d) and not empty; got {self.up.shape}")
        stack, width = self.up.shape[:-2], self.up.shape[-2]
        if self.gate is None and self.gate_bias is not None:
            raise InputError("gate_bias is given, gate is not")
        for name in ("down", "gate", "up_bias", "gate_bias"):
            x = getattr(self, name)
            if x is None:
                continue
            want = (*stack, width) if name.endswith("bias") else (*stack, width, x.shape[-1])
            if x.shape != want or (name == "gate" and x.shape != self.up.shape):
                raise InputError(f"{name} has shape {x.shape}, which does not fit {self.up.shape}")
        return self


def wide(x: Array) -> Array:
    """The array in float32, or unchanged if it is float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


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
        """The outputs f(x)."""
        return self.down(self.hidden(x))

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """What each sub-MLP hands to its output weights."""
        return activation(self.act)(self.up(x))

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
        return self.up.kernel.get_value().dtype

    @property
    def flops(self) -> int:
        """Operations (two a multiply-add) of the matrix products for one position."""
        return 2 * self.width * (self.d_in + self.d_out)

    def sub_mlps(self) -> SubMLPs:
        """The sub-MLPs as rows, in the module's dtype; the output bias stays with the module."""
        bias = self.up.bias
        return SubMLPs(
            up=self.up.kernel[...].T,
            up_bias=None if bias is None else bias[...],
            down=self.down.kernel[...],
        )

    def load_sub_mlps(self, subs: SubMLPs, out_bias: Float[Array, " o"] | None) -> None:
        """Overwrites the parameters, casting them to the module's dtype.

        Args:
            subs: As many sub-MLPs as the module is wide.
            out_bias: The output bias b_out, or None if the module has none.
        """
        _load(self.up, subs.up.T, subs.up_bias)
        _load(self.down, subs.down, out_bias)

    def out_bias(self) -> Float[Array, " o"] | None:
        """The output bias b_out."""
        return None if self.down.bias is None else self.down.bias[...]

    def abstract(self, cls: type[Mlp], width: int, **fields: Any) -> Any:
        """A module of class ``cls`` with this one's inputs, outputs, activation and dtype.

        Args:
            cls: The class of the new module.
            width: Its width.
            **fields: What else its constructor takes.

        Returns:
            The module, with shapes in place of parameters: nothing is allocated.
        """
        return nnx.eval_shape(
            lambda: cls(
                self.d_in,
                width,
                self.d_out,
                act=self.act,
                use_bias=self.use_bias,
                param_dtype=self.dtype,
                rngs=nnx.Rngs(0),
                **fields,
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
        rows = jnp.pad(rows, ((0, width - plain.width), (0, 0)))
        new.load_sub_mlps(plain.sub_mlps().with_rows(rows), plain.out_bias())
        return new


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

    @property
    def flops(self) -> int:
        """Operations (two a multiply-add) of the matrix products for one position."""
        return 2 * self.width * (2 * self.d_in + self.d_out)

    def sub_mlps(self) -> SubMLPs:
        """The sub-MLPs as rows, in the module's dtype; the output bias stays with the module."""
        bias = self.gate.bias
        return (
            super()
            .sub_mlps()
            ._replace(
                gate=self.gate.kernel[...].T,
                gate_bias=None if bias is None else bias[...],
            )
        )

    def load_sub_mlps(self, subs: SubMLPs, out_bias: Float[Array, " o"] | None) -> None:
        """Overwrites the parameters, casting them to the module's dtype."""
        super().load_sub_mlps(subs, out_bias)
        assert subs.gate is not None
        _load(self.gate, subs.gate.T, subs.gate_bias)


class _Fused(Mlp):
    """What the fused forms of both kinds of MLP share: cluster sizes and how they are applied."""

    def __init__(self, *args: Any, original_width: int, scaling: Scaling, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.original_width = original_width
        self.scaling: Scaling = scaling
        # float32 whatever the model's dtype: bfloat16 would round sizes above 256.
        self.sizes = Frozen(jnp.ones(self.width, jnp.float32))
        self.labels = Frozen(jnp.zeros(original_width, jnp.int32))

    def _inside(self, z: Array) -> Array:
        """What enters the activation: a pre-activation, over sqrt(n) where weights carry it."""
        return _times(z, self.sizes[...], -0.5) if self.scaling == "sgd" else z

    def centroids(self) -> SubMLPs:
        """The clusters' centroids, whatever the scaling stores, in the module's dtype."""
        stored = self.sub_mlps()
        if self.scaling == "adam":
            return stored
        sizes = self.sizes[...]
        if self.scaling == "sgd":
            scaled = stored.scaled(sizes, -0.5)
        else:
            scaled = stored._replace(down=_by_size(stored.down, sizes, -1.0))
        return jax.tree.map(lambda x: x.astype(self.dtype), scaled)

    def _plain_class(self) -> type[Mlp]:
        return GatedMlp if isinstance(self, GatedMlp) else Mlp

    def plain(self) -> Mlp:
        """The same function as a plain module of this width: sizes folded into output weights."""
        subs = self.centroids()
        new = self.abstract(self._plain_class(), self.width)
        down = _by_size(subs.down, self.sizes[...], 1.0)
        new.load_sub_mlps(subs._replace(down=down), self.out_bias())
        return new

    def wide_copy(self) -> Mlp:
        """The MLP of the original width in which every sub-MLP is replaced by its centroid.

        As a function it equals the fused MLP; it is what the fused MLP's kernel is compared with.
        """
        new = self.abstract(self._plain_class(), self.original_width)
        labels = self.labels[...]
        new.load_sub_mlps(jax.tree.map(lambda x: x[labels], self.centroids()), self.out_bias())
        return new

    def load_fused(
        self,
        rows: SubMLPs,
        sizes: Float[Array, " c"],
        labels: Int[Array, " p"],
        out_bias: Float[Array, " o"] | None,
    ) -> None:
        """Overwrites parameters and Frozen variables.

        Args:
            rows: The c rows to store, as `scale_centroids` gives them.
            sizes: Cluster sizes.
            labels: The cluster of each of the p original sub-MLPs.
            out_bias: The output bias b_out, or None if the module has none.
        """
        self.sizes.set_value(sizes.astype(jnp.float32))
        self.labels.set_value(labels.astype(jnp.int32))
        self.load_sub_mlps(rows, out_bias)

    def spec(self) -> dict[str, Any]:
        """What, besides the original module, says how to build this one: JSON values."""
        fused = {"original_width": self.original_width, "scaling": self.scaling}
        return {**super().spec(), **fused}


def scale_centroids(centroids: SubMLPs, sizes: Float[Array, "*s c"], scaling: Scaling) -> SubMLPs:
    """The rows that a fused MLP stores for given centroids.

    Args:
        centroids: c centroids, possibly stacked.
        sizes: Cluster sizes n_c.
        scaling: ``"adam"`` stores the centroids, ``"sgd"`` sqrt(n_c) times all of them,
            ``"folded"`` n_c times their output weights.

    Returns:
        The rows to store.
    """
    if scaling == "adam":
        return centroids
    if scaling == "sgd":
        return centroids.scaled(sizes, 0.5)
    return centroids._replace(down=_by_size(centroids.down, sizes, 1.0))


def _by_size(rows: Array, sizes: Array, power: float) -> Array:
    """Row i of (..., c, o) times ``sizes[i] ** power``, in float32 at least."""
    rows = wide(rows)
    return rows * (sizes.astype(rows.dtype) ** power)[..., None]


def _times(x: Array, sizes: Array, power: float) -> Array:
    """``x * sizes**power`` along the last axis, computed in float32 at least, in x's dtype."""
    y = wide(x)
    factor = sizes.astype(y.dtype) ** power
    return (y * jnp.expand_dims(factor, range(x.ndim - 1))).astype(x.dtype)


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
        h = activation(self.act)(self._inside(self.up(x)))
        if self.scaling == "folded":
            return h
        return _times(h, self.sizes[...], 1.0 if self.scaling == "adam" else 0.5)


class FusedGatedMlp(_Fused, GatedMlp):
    """The fused gated MLP: `FusedMlp` for ``sum_i v_i (u_i . x + a_i) s(g_i . x + c_i) + b_out``.

    ``"sgd"`` again stores sqrt(n_c) times every centroid. Of the three factors in a term only the
    gate's pre-activation is divided by sqrt(n_c): v and u together bring the n_c that is due.
    """

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """What each sub-MLP hands to its output weights, cluster sizes included."""
        h = activation(self.act)(self._inside(self.gate(x))) * self.up(x)
        return _times(h, self.sizes[...], 1.0) if self.scaling == "adam" else h
