"""Linear layers and embeddings whose matrix is a chain of cores.

Axis letters in shapes: d inputs, o outputs, n positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fusion_jax.mpo.layouts import Layout
from fusion_jax.mpo.products import contract, plan, product, rows
from fusion_jax.nn.linear_forms import Frozen, LinearForm, dtype_of


class Mpo(LinearForm):
    """A linear layer whose matrix is a chain of cores.

    Args:
        d_in: The number d of inputs.
        d_out: The number o of outputs.
        inputs: The factors of the inputs; see `Layout`.
        outputs: The factors of the outputs; see `Layout`.
        bonds: See `Layout`.
        frozen: The indices of the cores that do not train.
        use_bias: Whether there is a bias.
        param_dtype: The dtype of the parameters.

    Example:
        >>> sizes = dict(inputs=(2, 3), outputs=(2, 2), bonds=(2,))
        >>> layer = Mpo(6, 4, use_bias=True, param_dtype=jnp.float32, **sizes)
        >>> layer(jnp.ones((3, 6))).shape
        (3, 4)
    """

    kind = "mpo"
    _axes = 4

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        inputs: Sequence[int],
        outputs: Sequence[int],
        bonds: Sequence[int],
        frozen: Sequence[int] = (),
        use_bias: bool,
        param_dtype: DTypeLike,
    ):
        super().__init__(d_in, d_out, use_bias=use_bias, param_dtype=param_dtype)
        self.layout = Layout(tuple(inputs), tuple(outputs), tuple(bonds))
        self.frozen = tuple(frozen)
        self.cores = nnx.List(
            [
                (Frozen if k in self.frozen else nnx.Param)(jnp.zeros(shape, param_dtype))
                for k, shape in enumerate(self.layout.shapes)
            ]
        )

    def arrays(self) -> list[nnx.Variable]:
        """The cores."""
        return list(self.cores)

    def _values(self) -> list[Array]:
        return [core[...] for core in self.cores]

    def _matrix(self) -> Array:
        return contract(self._values(), (self.in_features, self.out_features))

    def times(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Returns ``x W``, computed in the cheapest order for this number of positions."""
        y = product(_rows(x), self._values(), self.out_features)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def flops(self) -> int:
        """Operations (two for each multiply-add) for one position, in batches of 1,024."""
        return round(plan(1024, self.layout).flops / 1024)

    def spec(self) -> dict[str, object]:
        """Returns the form and its layout."""
        fields = {name: list(sizes) for name, sizes in self.layout._asdict().items()}
        return {"form": self.kind, **fields, "frozen": list(self.frozen)}


class MpoEmbed(Mpo):
    """An embedding whose matrix, with a row for each token, is a chain of cores.

    The arguments are those of `Mpo`; the inputs are tokens, the outputs features.
    """

    kind = "mpo-embedding"

    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n o"]:  # type: ignore[override]
        """Returns the rows of tokens; see `rows`."""
        trained = [core.dtype for core in self.cores if isinstance(core, nnx.Param)]
        cores = [core.astype((trained or [self.dtype])[0]) for core in self._values()]
        found = rows(ids.reshape(-1), cores, (self.in_features, self.out_features))
        return found.reshape(*ids.shape, self.out_features)

    def attend(self, x: Float[Array, "*n o"]) -> Float[Array, "*n d"]:
        """Returns the products of states with all rows: the logits of a tied head."""
        y = product(_rows(x), self._values(), self.in_features, transposed=True)
        return y.reshape(*x.shape[:-1], self.in_features)

    def plain(self) -> nnx.Embed:
        """Returns a plain embedding that computes the same function."""
        make = partial(nnx.Embed, self.in_features, self.out_features, param_dtype=self.dtype)
        new = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        new.embedding.set_value(self.matrix())
        return new

    @classmethod
    def abstract(cls, linear: nnx.Embed, **spec: Any) -> MpoEmbed:  # type: ignore[override]
        """Returns the form of an embedding, with shapes in place of arrays."""
        d, o, dtype = linear.num_embeddings, linear.features, dtype_of(linear)
        return nnx.eval_shape(lambda: cls(d, o, use_bias=False, param_dtype=dtype, **spec))


def _rows(x: Float[Array, "*n d"]) -> Float[Array, "m d"]:
    """Returns the input as a matrix; unlike reshape(-1, d), also if it has no rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


AnyEmbed = nnx.Embed | MpoEmbed
