"""Can a bound for a whole model be had from those of its MLPs? To first order, and how far off.

Every MLP of all-MiniLM-L6-v2 is fused. At given texts each fused MLP is wrong by e_l, which a
certificate bounds. To first order the embedding of a text changes by sum_l J_l e_l, where J_l is
the derivative of the embedding by what MLP l adds to the hidden states, so by at most
sum_l |J_l| |e_l|, with spectral norms by power iteration. The benchmark compares this bound and the
first order itself with the real change.

    python -m benchmarks.whole_model [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import fusion_jax as fj
from benchmarks.common import finish, parser
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.cli.demo import find_model
from fusion_jax.models.tokens import TokenBatch, everyday_sentences, load_tokenizer, tokenize
from fusion_jax.nn.surgery import replaced

KEY = jax.random.key(0)
Shifts = dict[str, Float[Array, "n t d"]]


class Shift(nnx.Variable):
    """An array that is added to the output of an MLP."""


class Shifted(nnx.Module):
    """An MLP and what is added to its output."""

    def __init__(self, mlp: nnx.Module, shift: Array):
        self.mlp, self.shift = mlp, Shift(shift)

    def __call__(self, x: Array) -> Array:
        """Returns the shifted output."""
        return self.mlp(x) + self.shift[...]  # type: ignore[operator]


def embeddings(model: Any, batch: TokenBatch) -> Float[Array, "n d"]:
    """Returns the normalized means of the hidden states."""
    hidden = model(*batch).last_hidden_state
    real = batch.attention_mask[..., None].astype(hidden.dtype)
    vectors = (hidden * real).sum(1) / real.sum(1)
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def shifted(model: Any, batch: TokenBatch, zero: Shifts) -> Callable[[Shifts], Array]:
    """Returns the embeddings as a function of what is added to the MLPs."""
    model = nnx.clone(model)
    for path, shift in zero.items():
        mlp = next(site.mlp for site in fj.sites(model) if site.path == path)
        model = replaced(model, path, Shifted(mlp, shift))
    graph, state, rest = nnx.split(model, Shift, ...)
    flat = dict(nnx.to_flat_state(state))

    def function(shifts: Shifts) -> Array:
        new = {
            path: variable.replace(shifts[".".join(map(str, path[:-1]))])
            for path, variable in flat.items()
        }
        return embeddings(nnx.merge(graph, nnx.from_flat_state(new), rest), batch)

    return function


def norms(function: Callable[[Shifts], Array], zero: Shifts, path: str, steps: int) -> Any:
    """Returns the spectral norms of the derivative by one MLP's output, for each text."""

    def of_one(shift: Array) -> Array:
        return function({**zero, path: shift})

    @jax.jit
    def step(v: Array) -> tuple[Array, Array]:
        v = v / jnp.sqrt(jnp.square(v).sum((1, 2), keepdims=True))
        u, back = jax.vjp(of_one, zero[path])
        u = jax.jvp(of_one, (zero[path],), (v,))[1]
        return back(u)[0], jnp.linalg.norm(u, axis=-1)

    v = jax.random.normal(KEY, zero[path].shape)
    for _ in range(steps):
        v, size = step(v)
    return np.asarray(size)


def main() -> int:
    arguments = parser(__doc__).parse_args()
    model = fj.load(find_model())
    texts = everyday_sentences()[: 4 if arguments.quick else 16]
    batch = tokenize(load_tokenizer(model.provenance.folder), texts, 32)
    real = np.asarray(batch.attention_mask)[..., None]
    before = np.asarray(embeddings(model, batch))
    seen = jax.jit(mlp_inputs)(model, *batch)
    rows = []
    for width in (0.5,) if arguments.quick else (0.25, 0.5, 0.75):
        smaller, _ = fj.compress(
            model, fj.Fusion(width=width), key=KEY, calibration="random", progress=False
        )
        wrong = {
            a.path: jnp.asarray(np.asarray(b.mlp(seen[a.path]) - a.mlp(seen[a.path])) * real)
            for a, b in zip(fj.sites(model), fj.sites(smaller), strict=True)
        }
        zero = jax.tree.map(jnp.zeros_like, wrong)
        function = shifted(model, batch, zero)
        linear = np.asarray(jax.jvp(function, (zero,), (wrong,))[1])
        change = np.asarray(embeddings(smaller, batch)) - before
        size = np.linalg.norm(change, axis=-1)
        bound = sum(
            norms(function, zero, path, 4 if arguments.quick else 20)
            * np.sqrt(np.square(np.asarray(e)).sum((1, 2)))
            for path, e in wrong.items()
        )
        rows.append(
            {
                "width": width,
                "change": float(size.mean()),
                "first_order_missed": float(
                    np.median(np.linalg.norm(change - linear, axis=-1) / size)
                ),
                "bound_over_change": float(np.median(bound / size)),
            }
        )
    finish(arguments, rows, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
