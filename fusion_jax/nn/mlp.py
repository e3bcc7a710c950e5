"""MLPs as Flax modules, as models hold them; `fusion_jax.nn.fused` has the fused ones.

The experts of a mixture are one module whose arrays have a leading axis: see `experts`.

Axis letters in shapes: p width, d inputs, o outputs, e experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fusion_jax.nn.linear_forms import (
    AnyLinear,
    dtype_of,
    flops_of,
    matrix_of,
    stack_of,
    take_settings,
)
from fusion_jax.nn.submlps import SubMLPs, activation
from ntk.activations import Activation, outside

MlpT = TypeVar("MlpT", bound="Mlp")

_lecun = nnx.initializers.lecun_normal()


class AnyMlp(nnx.Module):
    """Base of the modules at the sites of a model: MLPs, and experts of different widths.

    Attributes:
        act: The activation, a key of `ACTIVATIONS` or a function.
        d_in: The number d of inputs.
        d_out: The number o of outputs.
        width: The number p of hidden units; of the widest expert where experts differ.
        widths: The width of each expert where experts differ, else None.
        dtype: The dtype of the parameters.
        stack: (e,) for e experts, () for a single MLP.
        flops: Operations (two a multiply-add) of the matrix products for one position; of experts,
            those that one position is routed to count.
    """

    act: Activation
    d_in: int
    d_out: int
    width: int
    widths: tuple[int, ...] | None = None
    dtype: jnp.dtype
    stack: tuple[int, ...]
    flops: int

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Returns the outputs f(x); experts take (e, n, d), the inputs of each."""
        raise NotImplementedError

    def linears(self) -> dict[str, AnyLinear]:
        """Returns the linear layers by name."""
        raise NotImplementedError

    def sub_mlps(self) -> SubMLPs:
        """Returns the sub-MLPs as rows, in the module's dtype; the output bias is not in them."""
        return self.plain().sub_mlps()

    def out_bias(self) -> Float[Array, "*s o"] | None:
        """Returns the output bias b_out, or None if there is none."""
        return self.plain().out_bias()

    def plain(self) -> Mlp:
        """Returns the same function as a module that any framework has."""
        return self.padded(self.width)

    def padded(self, width: int) -> Mlp:
        """Returns the same function with all-zero units added up to a width, in a plain module.

        Outputs are equal to the bit: units of zeros have output weights of zero.
        """
        raise NotImplementedError

    def spec(self) -> dict[str, object]:
        """Returns how to build this module from the original one, as JSON values.

        They are the name of its class under ``"module"``, and the arguments for `Mlp.abstract`.
        """
        raise NotImplementedError


class Mlp(AnyMlp):
    """A plain MLP, ``f(x) = sum_i v_i s(w_i . x + b_i) + b_out``.

    Args:
        d_in: Inputs d.
        width: Hidden units p.
        d_out: Outputs o; None for d.
        act: Activation: a key of `ACTIVATIONS`, such as ``"gelu"``, or a function of arrays that
            works on each number alone, such as ``jax.nn.softplus``.
        use_bias: Whether there are biases.
        param_dtype: The dtype of the parameters, in which the module also computes.
        kernel_init: Initializer of both matrices.
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
        act: Activation,
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
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
        """Returns the outputs f(x); experts take (e, n, d), the inputs of each."""
        if self.stack:
            return jax.vmap(lambda expert, x: expert(x))(self, x)
        return self.down(self.hidden(x))

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """Returns the hidden values, which the output weights multiply."""
        return activation(self.act)(self.up(x))

    def linears(self) -> dict[str, AnyLinear]:
        """Returns the linear layers by name."""
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
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters."""
        return dtype_of(self.up)

    @property
    def stack(self) -> tuple[int, ...]:
        """(e,) for e experts, () for a single MLP."""
        return stack_of(self.up)

    @property
    def flops(self) -> int:
        """Operations of the matrix products for one position, see `AnyMlp`."""
        return self.top_k * sum(flops_of(linear) for linear in self.linears().values())

    def factor(self, name: str) -> Float[Array, "*s p"] | None:
        """Returns the fixed factors of the units at a linear layer; None for 1.

        The function is that of the plain MLP whose ``up`` and ``gate`` have their outputs, and
        ``down`` its inputs, multiplied by them.
        """
        return None

    def sub_mlps(self) -> SubMLPs:
        """Returns the sub-MLPs as rows, in the module's dtype; the output bias is not in them."""
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
        """Returns the output bias b_out, or None if there is none."""
        return None if self.down.bias is None else self.down.bias[...]

    def abstract(self, cls: type[MlpT], width: int, **fields: Any) -> MlpT:
        """Returns a module of another class with this one's sizes, activation, dtype and experts.

        Its plain layers have biases where this one's have, and compute in the same dtype.

        Args:
            cls: The class of the new module.
            width: Its width.
            **fields: Further arguments of its constructor.

        Returns:
            The module, with shapes in place of parameters: nothing is allocated.
        """
        make = partial(
            cls,
            self.d_in,
            width,
            self.d_out,
            act=self.act,
            use_bias=any(linear.bias is not None for linear in self.linears().values()),
            param_dtype=self.dtype,
            **fields,
        )
        count = self.stack[0] if self.stack else None
        new = nnx.eval_shape(
            lambda: (
                experts(make, count, top_k=self.top_k, rngs=nnx.Rngs(0))
                if count
                else make(rngs=nnx.Rngs(0))
            )
        )
        for name, linear in self.linears().items():
            take_settings(new.linears()[name], linear)
        return new

    def spec(self) -> dict[str, object]:
        """Returns how to build this module from the original one, see `AnyMlp.spec`."""
        return {"module": type(self).__name__, "width": self.width}

    def plain(self) -> Mlp:
        """Returns itself."""
        return self

    def padded(self, width: int) -> Mlp:
        """Returns the same function with all-zero units added up to a width."""
        plain = self.plain()
        if width == plain.width:
            return plain
        rows = plain.sub_mlps().rows()
        new = plain.abstract(type(plain), width)
        rows = jnp.pad(rows, (*[(0, 0)] * len(self.stack), (0, width - plain.width), (0, 0)))
        new.load_sub_mlps(plain.sub_mlps().with_rows(rows), plain.out_bias())
        return new


def experts(
    make: Callable[..., MlpT], count: int, *, top_k: int = 1, rngs: nnx.Rngs, **fields: object
) -> MlpT:
    """Returns the experts of a mixture as one module, in whose arrays axis 0 counts the experts.

    Each expert is an MLP on its own, and methods compress the experts of a layer in one call.

    Args:
        make: Makes one expert, such as the class `Mlp`.
        count: The number of experts.
        top_k: The number of experts that the model routes one position to.
        rngs: Random keys of the initial parameters.
        **fields: Further arguments for ``make``.

    Returns:
        A module of the class that ``make`` returns; it maps (e, n, d) to (e, n, o).

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
    If the activation is a function with an attribute ``outside``, a function too, that one is
    applied to the other factor, as in `ClampedSwish`.

    Example:
        >>> mlp = GatedMlp(4, 16, act="silu", use_bias=False, rngs=nnx.Rngs(0))
        >>> mlp(jnp.ones((2, 4))).shape
        (2, 4)
    """

    def _add_inputs(self, linear: Callable[[int, int], nnx.Linear], d_in: int, width: int) -> None:
        self.gate = linear(d_in, width)
        self.up = linear(d_in, width)

    def hidden(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """Returns the hidden values, which the output weights multiply."""
        h, of_linear = self.up(x), outside(self.act)
        return activation(self.act)(self.gate(x)) * (h if of_linear is None else of_linear(h))

    def linears(self) -> dict[str, AnyLinear]:
        """Returns the linear layers by name."""
        return {"gate": self.gate, **super().linears()}

    def sub_mlps(self) -> SubMLPs:
        """Returns the sub-MLPs as rows, in the module's dtype; the output bias is not in them."""
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
