"""Forms of a linear layer: modules whose matrix is made of other arrays.

Axis letters in shapes: d inputs, o outputs, r rank, n positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fusion_jax.errors import InputError
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.masking import top_mask_of_share
from fusion_jax.nn.surgery import ModuleT, find_modules, replaced

FormT = TypeVar("FormT", bound="LinearForm")


class Frozen(nnx.Variable):
    """A variable that neither trains nor enters an NTK, such as the sizes of clusters."""


class Precise(nnx.Param):
    """A parameter in at least float32, whatever dtype the model has or computes in."""


class LinearForm(nnx.Module):
    """Base of the forms of a linear layer ``x W + b``.

    The arrays of W may have leading axes, for the experts of a mixture; a call is then under
    ``vmap``.

    Args:
        d_in: The number d of inputs.
        d_out: The number o of outputs.
        use_bias: Whether there is a bias b, which every form keeps unchanged.
        param_dtype: The dtype of the parameters, in which the module also computes.
    """

    kind: ClassVar[str]
    """The name of the form in files."""
    _axes: ClassVar[int] = 2
    """The number of axes of the first array, without those of experts."""

    def __init__(self, d_in: int, d_out: int, *, use_bias: bool, param_dtype: DTypeLike):
        self.in_features, self.out_features = d_in, d_out
        self.bias = nnx.Param(jnp.zeros(d_out, param_dtype)) if use_bias else None

    def arrays(self) -> list[nnx.Variable]:
        """Returns the variables that the matrix is made of."""
        raise NotImplementedError

    def matrix(self) -> Float[Array, "*s d o"]:
        """Returns the matrix W, computed."""
        return self._each(lambda form: form._matrix())

    def _each(self: FormT, make: Callable[[FormT], Array]) -> Array:
        return jax.vmap(make)(self) if self.stack else make(self)

    def _matrix(self) -> Array:
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Returns the outputs ``x W + b``."""
        return self.with_bias(self.times(x))

    def times(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Returns ``x W``."""
        return x @ self._matrix().astype(x.dtype)

    def with_bias(self, y: Array) -> Array:
        """Returns an output with the bias added, if there is a bias."""
        if self.bias is None:
            return y
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,)).astype(y.dtype)

    @property
    def stack(self) -> tuple[int, ...]:
        """(e,) for the layers of e experts, () for one layer."""
        return self.arrays()[0].get_value().shape[: -self._axes]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters."""
        return self.arrays()[0].get_value().dtype

    @property
    def flops(self) -> int:
        """Operations (two a multiply-add) for one position; by default of the dense product."""
        return 2 * self.in_features * self.out_features

    def spec(self) -> dict[str, object]:
        """Returns how to build this form from the plain layer, as JSON values."""
        return {"form": self.kind}

    @classmethod
    def abstract(cls: type[FormT], linear: AnyLinear, **spec: Any) -> FormT:
        """Returns an abstract form with the sizes, dtype, bias and experts of a layer."""
        sizes = linear.in_features, linear.out_features
        fixed = {"use_bias": linear.bias is not None, "param_dtype": dtype_of(linear)}
        return abstract_stack(lambda: cls(*sizes, **fixed, **spec), stack_of(linear))

    def load(self, arrays: Sequence[Array], bias: Float[Array, "*s o"] | None) -> None:
        """Overwrites the variables, casting to their dtypes.

        Args:
            arrays: The arrays of the matrix, in the order of `arrays`.
            bias: The bias, or None if there is none.
        """
        for variable, value in zip(self.arrays(), arrays, strict=True):
            variable.set_value(value.astype(variable.get_value().dtype))
        if self.bias is not None:
            assert bias is not None
            self.bias.set_value(bias.astype(self.bias.get_value().dtype))

    @classmethod
    def replacing(
        cls: type[FormT], linear: AnyLinear, arrays: Sequence[Array], **spec: Any
    ) -> FormT:
        """Returns a form with given arrays, and with the dtype and the bias of a layer."""
        new = cls.abstract(linear, **spec)
        new.load(arrays, None if linear.bias is None else linear.bias[...])
        return new

    def plain(self) -> nnx.Module:
        """Returns the same function as a plain layer."""
        return plain_linear(self.matrix(), None if self.bias is None else self.bias[...])


class LowRank(LinearForm):
    """A matrix of low rank, ``W = A B``.

    Args:
        d_in: The number d of inputs.
        d_out: The number o of outputs.
        rank: The number r of columns of A.
        use_bias: Whether there is a bias.
        param_dtype: The dtype of the parameters.

    Example:
        >>> layer = LowRank(6, 4, rank=2, use_bias=True, param_dtype=jnp.float32)
        >>> layer(jnp.ones((3, 6))).shape, layer.flops
        ((3, 4), 40)
    """

    kind = "low-rank"

    def __init__(self, d_in: int, d_out: int, *, rank: int, use_bias: bool, param_dtype: DTypeLike):
        super().__init__(d_in, d_out, use_bias=use_bias, param_dtype=param_dtype)
        self.first = nnx.Param(jnp.zeros((d_in, rank), param_dtype))
        self.second = nnx.Param(jnp.zeros((rank, d_out), param_dtype))

    def arrays(self) -> list[nnx.Variable]:
        """Returns A (d, r) and B (r, o)."""
        return [self.first, self.second]

    def _matrix(self) -> Array:
        return jnp.matmul(self.first[...], self.second[...], precision="highest")

    def times(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Returns ``x A B``."""
        return (x @ self.first[...].astype(x.dtype)) @ self.second[...].astype(x.dtype)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.first.get_value().shape[-1]

    @property
    def flops(self) -> int:
        """Operations of both products for one position."""
        return 2 * self.rank * (self.in_features + self.out_features)

    def spec(self) -> dict[str, object]:
        """Returns the form and its rank."""
        return {**super().spec(), "rank": self.rank}


class Masked(LinearForm):
    """A matrix in which single weights are 0 and stay 0, ``W = K * M``.

    Example:
        >>> layer = Masked(6, 4, use_bias=False, param_dtype=jnp.float32)
        >>> layer.load([jnp.ones((6, 4)), jnp.eye(6, 4, dtype=bool)], None)
        >>> layer(jnp.ones((1, 6))).tolist()
        [[1.0, 1.0, 1.0, 1.0]]
    """

    kind = "masked"

    def __init__(self, d_in: int, d_out: int, *, use_bias: bool, param_dtype: DTypeLike):
        super().__init__(d_in, d_out, use_bias=use_bias, param_dtype=param_dtype)
        self.kernel = nnx.Param(jnp.zeros((d_in, d_out), param_dtype))
        self.mask = Frozen(jnp.ones((d_in, d_out), bool))

    def arrays(self) -> list[nnx.Variable]:
        """Returns K (d, o) and M (d, o), true where weights are kept."""
        return [self.kernel, self.mask]

    def _matrix(self) -> Array:
        kernel = self.kernel[...]
        return jnp.where(self.mask[...], kernel, jnp.zeros((), kernel.dtype))


class Scored(LinearForm):
    """A matrix in which only the weights with the largest scores count, ``W = K * M``.

    The kernel K is Frozen, the scores S train. The mask M has the ``keep * size`` largest scores,
    rounded down. Gradients pass straight through the mask, dL/dS = dL/dW * K with the whole of K,
    so that a weight that does not count now may count again later.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning.

    Example:
        >>> layer = Scored(2, 2, use_bias=False, param_dtype=jnp.float32)
        >>> kernel, scores = jnp.ones((2, 2)), jnp.array([[3.0, 1.0], [0.0, 2.0]])
        >>> layer.load([kernel, scores, jnp.array(0.5), jnp.array(0.0)], None)
        >>> layer(jnp.ones((1, 2))).tolist()
        [[1.0, 1.0]]
    """

    kind = "scored"

    def __init__(self, d_in: int, d_out: int, *, use_bias: bool, param_dtype: DTypeLike):
        super().__init__(d_in, d_out, use_bias=use_bias, param_dtype=param_dtype)
        zeros = jnp.zeros((d_in, d_out), param_dtype)
        self.kernel = Frozen(zeros)
        self.scores = Precise(wide(zeros))
        self.keep = Frozen(jnp.ones((), jnp.float32))
        self.penalty = Frozen(jnp.zeros((), jnp.float32))

    def arrays(self) -> list[nnx.Variable]:
        """Returns K and S (d, o), the share to keep, and the weight of the scores in the loss."""
        return [self.kernel, self.scores, self.keep, self.penalty]

    def mask(self) -> Bool[Array, "*s d o"]:
        """Returns M, true where weights count."""
        return self._each(lambda form: form._mask())

    def _mask(self) -> Array:
        return top_mask_of_share(lax.stop_gradient(self.scores[...]), self.keep[...])

    def _matrix(self) -> Array:
        kernel, scores = self.kernel[...], self.scores[...]
        kept = jnp.where(self._mask(), kernel, jnp.zeros((), kernel.dtype))
        # This is 0, but its derivative by the scores is the kernel.
        straight = kernel.astype(scores.dtype) * (scores - lax.stop_gradient(scores))
        return kept + straight.astype(kernel.dtype)


AnyLinear = nnx.Linear | LinearForm


def abstract_stack(make: Callable[[], ModuleT], stack: tuple[int, ...]) -> ModuleT:
    """Returns what a function makes, with shapes in place of arrays, stacked for experts."""
    made = jax.vmap(lambda _: make()) if stack else lambda _: make()
    return nnx.eval_shape(made, jax.ShapeDtypeStruct(stack, jnp.int32))


def matrix_of(linear: AnyLinear) -> Float[Array, "*s d o"]:
    """Returns the matrix of a layer, plain or not."""
    return linear.matrix() if isinstance(linear, LinearForm) else linear.kernel[...]


def dtype_of(layer: AnyLinear | nnx.Embed) -> jnp.dtype:
    """Returns the dtype of the parameters of a layer or an embedding."""
    if isinstance(layer, LinearForm):
        return layer.dtype
    weights = layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel
    return weights.dtype


def params_dtype(model: nnx.Module) -> jnp.dtype:
    """Returns the dtype of a model's first parameter that is not `Precise`."""
    state = nnx.state(model, lambda _, v: isinstance(v, nnx.Param) and not isinstance(v, Precise))
    plain = jax.tree.leaves(state)
    return plain[0].dtype if plain else next(iter(find_forms(model).values())).dtype


def stack_of(linear: AnyLinear) -> tuple[int, ...]:
    """Returns (e,) for the layers of e experts, () for one layer."""
    return linear.stack if isinstance(linear, LinearForm) else linear.kernel.shape[:-2]


def flops_of(linear: AnyLinear) -> int:
    """Returns the operations (two a multiply-add) of a layer's products for one position."""
    if isinstance(linear, LinearForm):
        return linear.flops
    return 2 * linear.in_features * linear.out_features


def plain_linear(kernel: Float[Array, "*s d o"], bias: Float[Array, "*s o"] | None) -> nnx.Linear:
    """Returns a plain layer with a given matrix and bias."""
    make = partial(
        nnx.Linear, *kernel.shape[-2:], use_bias=bias is not None, param_dtype=kernel.dtype
    )
    new = abstract_stack(lambda: make(rngs=nnx.Rngs(0)), kernel.shape[:-2])
    new.kernel.set_value(kernel)
    if bias is not None:
        assert new.bias is not None
        new.bias.set_value(bias)
    return new


def take_settings(new: AnyLinear, old: AnyLinear) -> None:
    """Gives a new layer the other settings of an old one: its dtype, precision and so on.

    Its variables get what the old ones state besides their values, such as how to shard them. The
    bias goes if the old layer has none. Nothing happens where a layer is not plain.
    """
    if not (isinstance(new, nnx.Linear) and isinstance(old, nnx.Linear)):
        return
    for name in _SETTINGS:
        setattr(new, name, getattr(old, name))
    new.kernel.set_metadata(old.kernel.get_metadata())
    if old.bias is None:
        new.bias, new.use_bias = nnx.data(None), False
    elif new.bias is not None:
        new.bias.set_metadata(old.bias.get_metadata())


_SETTINGS = ("dtype", "precision", "dot_general", "promote_dtype", "preferred_element_type")


def with_matrix(
    linear: AnyLinear, kernel: Float[Array, "*s d o"], bias: Float[Array, "*s o"] | None
) -> nnx.Linear:
    """Returns a plain layer with given arrays, and with the other settings of a layer.

    There is a bias if the layer has one.
    """
    if not isinstance(linear, nnx.Linear):
        return plain_linear(kernel, bias)
    new: Any = nnx.clone(linear)
    new.kernel.set_value(kernel)
    if new.bias is not None:
        new.bias.set_value(bias)
    new.in_features, new.out_features = kernel.shape[-2:]
    return new


def find_linears(model: nnx.Module) -> dict[str, AnyLinear]:
    """Returns the linear layers of a model by path, plain or not, in the order of its layers.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> sorted(find_linears(Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))))
        ['down', 'up']
    """
    return find_modules(model, nnx.Linear, LinearForm)


def find_forms(model: nnx.Module) -> dict[str, LinearForm]:
    """Returns the layers of a model that have another form than the plain one, by path."""
    return find_modules(model, LinearForm)


def multiplied_out(model: ModuleT) -> ModuleT:
    """Returns a clone of a model with plain layers in place of all forms: the same function.

    The clone shares all other arrays with the model.
    """
    model = nnx.clone(model)
    for path, form in find_forms(model).items():
        model = replaced(model, path, form.plain())
    return model


def check_plain(linear: AnyLinear | nnx.Embed, path: str) -> None:
    """Raises `InputError` if a layer is not plain."""
    if isinstance(linear, LinearForm):
        raise InputError(
            f"{path or 'the layer'} is {linear.kind} already; start from a plain one "
            "(fusion_jax.plain makes everything plain)"
        )
