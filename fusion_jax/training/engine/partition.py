"""A model taken apart for training: what trains, what does not, and the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.fused import FusedGatedMlp, FusedMlp
from fusion_jax.nn.linear_forms import Precise
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.site import sites
from fusion_jax.nn.uneven_experts import UnevenExperts

Trains = str | Callable[[str], bool]
"""What trains: ``"all"``, ``"mlp"``, ``"head"``, a regular expression for whole paths of
parameters, or a function of a path. Only `nnx.Param` can train."""


class Parts:
    """A model's structure, and how its variables split into those that train and the others.

    Args:
        model: The model; neither changed nor kept.
        trains: What trains.
        compute_dtype: The dtype to compute in, or None for the model's own.
        remat: Whether layers are computed again in the backward pass.

    Raises:
        InputError: ``trains`` matches no parameter.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> mlp = Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
        >>> parts = Parts(mlp, "up.*")
        >>> params, rest = parts.split(mlp)
        >>> sorted(params), sorted(rest)
        (['up.bias', 'up.kernel'], ['down.bias', 'down.kernel'])
    """

    def __init__(
        self,
        model: nnx.Module,
        trains: Trains = "all",
        *,
        compute_dtype: Any = None,
        remat: bool = False,
    ):
        abstract = jax.eval_shape(lambda m: m, nnx.clone(model))
        self._own = nnx.graphdef(abstract)
        if compute_dtype is not None:
            for _, module in nnx.iter_modules(abstract):
                if isinstance(module, nnx.Embed):  # others follow their parameters' dtype
                    module.dtype = jnp.dtype(compute_dtype)
        self._graph, state = nnx.split(abstract)
        self._flat = {_join(path): (path, v) for path, v in nnx.to_flat_state(state)}
        self.shapes = {path: v.get_value() for path, (_, v) in self._flat.items()}
        """Shape and dtype of every variable."""
        self._compute_dtype = compute_dtype
        self._remat = remat
        self.widths = _width_axes(abstract)
        self.trainable = [p for p, (_, v) in self._flat.items() if isinstance(v, nnx.Param)]
        """All parameters, whether they train or not."""
        self.trained = _select(abstract, self.trainable, trains)

    def split(self, model: nnx.Module) -> tuple[dict[str, Array], dict[str, Array]]:
        """The arrays of a model with this structure, by path.

        Args:
            model: The model.

        Returns:
            What trains, in float32 at least, and everything else.
        """
        flat = {_join(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
        params = {path: wide(flat[path]) for path in self.trained}
        return params, {path: x for path, x in flat.items() if path not in params}

    def merge(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> Any:
        """The model with given arrays, each in its variable's own dtype."""
        return self._merged(self._own, {**params, **rest}, None)

    def precise(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> Any:
        """The model with given arrays as they are."""
        arrays = {**params, **rest}
        flat = {path: v.replace(arrays[name]) for name, (path, v) in self._flat.items()}
        return nnx.merge(self._own, nnx.from_flat_state(flat))

    def compute(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> Any:
        """The model as it is computed: in the dtype to compute in; layers under remat."""
        model = self._merged(self._graph, {**params, **rest}, self._compute_dtype)
        return _remat(model) if self._remat else model

    def _merged(self, graph: Any, arrays: Mapping[str, Array], dtype: Any) -> Any:
        flat = {}
        for name, (path, variable) in self._flat.items():
            # These keep their own dtype: bfloat16 would round the sizes of clusters, and make
            # scores equal.
            exact = isinstance(variable, Precise) or not isinstance(variable, nnx.Param)
            own = dtype is None or exact
            flat[path] = variable.replace(
                arrays[name].astype(variable.get_value().dtype if own else dtype)
            )
        return nnx.merge(graph, nnx.from_flat_state(flat))


def _join(path: tuple) -> str:
    return ".".join(map(str, path))


def _select(model: nnx.Module, params: list[str], trains: Trains) -> tuple[str, ...]:
    if callable(trains):
        chosen = [path for path in params if trains(path)]
    elif trains == "all":
        chosen = params
    elif trains == "mlp":
        places = [f"{site.path}." if site.path else "" for site in sites(model)]
        chosen = [path for path in params if path.startswith(tuple(places))]
    elif trains == "head":
        chosen = [path for path in params if path.startswith(("head.", "pooler."))]
    else:
        try:
            pattern = re.compile(trains)
        except re.error as error:
            raise InputError(f"train {trains!r} is no regular expression: {error}") from None
        chosen = [path for path in params if pattern.fullmatch(path)]
    if not chosen:
        some = ", ".join(params[:3] + ["..."] * (len(params) > 3))
        raise InputError(
            f"train {trains!r} matches no parameter; give all, mlp, head, or a regular expression "
            f"for whole paths of parameters, which are {some}"
        )
    return tuple(chosen)


def _width_axes(model: nnx.Module) -> dict[str, int]:
    """The axis of the width in the variables of MLPs, by path."""
    axes = {}
    mlps = [m for m in nnx.iter_modules(model) if isinstance(m[1], Mlp)]
    for path, mlp in mlps:
        prefix = "".join(f"{name}." for name in path)
        leaves = {"up.kernel": -1, "up.bias": -1, "gate.kernel": -1, "gate.bias": -1}
        leaves["down.kernel"] = -2
        if isinstance(mlp, FusedMlp | FusedGatedMlp):
            leaves |= dict.fromkeys(("sizes", "outer", "inner", "middle"), -1)
        axes |= {prefix + leaf: axis for leaf, axis in leaves.items()}
    return axes


class _Remat(nnx.Module):
    """A layer whose activations are not kept for the backward pass."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, *args: Any) -> Any:
        graph, state = nnx.split(self.layer)
        # A decoder's memory is no array; training has no cache, so that nothing is written to it.
        arrays = {
            i: a
            for i, a in enumerate(args)
            if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a))
        }

        def run(state: Any, arrays: Any) -> Any:
            return nnx.merge(graph, state)(*(arrays.get(i, a) for i, a in enumerate(args)))

        return jax.checkpoint(run)(state, arrays)


def _remat(model: Any) -> Any:
    modules = [m for _, m in nnx.iter_modules(model)]
    inner = {id(m.groups) for m in modules if isinstance(m, UnevenExperts)}
    for layers in modules:
        if not isinstance(layers, nnx.List) or id(layers) in inner:
            continue
        for i, layer in enumerate(layers):
            if isinstance(layer, nnx.Module):  # and not the tensors of a chain
                layers[i] = _Remat(layer)
    return model
