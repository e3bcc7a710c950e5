"""Splits a model's variables into those that train and the others, and puts it together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from fusion_jax.errors import InputError
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.fused import FusedGatedMlp, FusedMlp
from fusion_jax.nn.linear_forms import Precise
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import ModuleT, path_name, value_of, with_value
from fusion_jax.nn.uneven_experts import UnevenExperts
from fusion_jax.training.engine.config import TrainConfig
from ntk.selection import select

Trains = str | Callable[[str], bool]
"""Which parameters train: ``"all"``, ``"mlp"``, ``"head"``, a regular expression for whole paths,
or a function of a path. Only `nnx.Param` can train."""


class Partition(Generic[ModuleT]):
    """A model's structure, and the split of its variables into those that train and the others.

    Args:
        model: The model; neither changed nor kept.
        trains: Which parameters train.
        compute_dtype: The dtype to compute in, or None for the model's own.
        remat: Whether layers are computed again in the backward pass.

    Raises:
        InputError: ``trains`` matches no parameter.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> mlp = Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
        >>> partition = Partition(mlp, "up.*")
        >>> params, rest = partition.split(mlp)
        >>> sorted(params), sorted(rest)
        (['up.bias', 'up.kernel'], ['down.bias', 'down.kernel'])
    """

    def __init__(
        self,
        model: ModuleT,
        trains: Trains = "all",
        *,
        compute_dtype: DTypeLike | None = None,
        remat: bool = False,
    ):
        abstract = jax.eval_shape(lambda m: m, nnx.clone(model))
        self._own = nnx.graphdef(abstract)
        if compute_dtype is not None:
            for _, module in nnx.iter_modules(abstract):
                if isinstance(module, nnx.Embed):  # others follow their parameters' dtype
                    module.dtype = jnp.dtype(compute_dtype)
        self._graph, state = nnx.split(abstract)
        self._flat = {path_name(path): (path, v) for path, v in nnx.to_flat_state(state)}
        self.shapes = {path: value_of(v) for path, (_, v) in self._flat.items()}
        """Shape and dtype of every variable."""
        self._compute_dtype = compute_dtype
        self._remat = remat
        self.widths = _width_axes(abstract)
        self.parameters = [p for p, (_, v) in self._flat.items() if isinstance(v, nnx.Param)]
        """The paths of all parameters, whether they train or not."""
        self.training = _select(abstract, self.parameters, trains)
        """The paths of the parameters that train."""
        self._random = [p for p, (_, v) in self._flat.items() if isinstance(v, nnx.RngKey)]

    def split(self, model: nnx.Module) -> tuple[dict[str, Array], dict[str, Array]]:
        """Splits the arrays of a model with this structure.

        Args:
            model: The model.

        Returns:
            By path, the parameters that train, in float32 or a wider dtype, and all other arrays.
        """
        flat = {path_name(path): value_of(v) for path, v in nnx.to_flat_state(nnx.state(model))}
        params = {path: wide(flat[path]) for path in self.training}
        return params, {path: x for path, x in flat.items() if path not in params}

    def new_keys(self, rest: Mapping[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        """Returns new keys for the modules that keep random keys of their own, by path.

        With the same keys, their dropout would have the same mask in every step.
        """
        number = jax.random.bits(key, dtype=jnp.uint32)
        keys = {}
        for path in self._random:
            flat = rest[path].reshape(-1)
            keys[path] = jax.vmap(jax.random.fold_in, (0, None))(flat, number).reshape(
                rest[path].shape
            )
        return keys

    def merge(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> ModuleT:
        """Returns the model with these arrays, each in the own dtype of its variable."""
        return self._merged(self._own, {**params, **rest}, None)

    def precise(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> ModuleT:
        """Returns the model with these arrays, each in the dtype it has now."""
        arrays = {**params, **rest}
        flat = {path: with_value(v, arrays[name]) for name, (path, v) in self._flat.items()}
        return nnx.merge(self._own, nnx.from_flat_state(flat))

    def compute(self, params: Mapping[str, Array], rest: Mapping[str, Array]) -> ModuleT:
        """Returns the model for a training step: in the dtype to compute in, and with remat."""
        model = self._merged(self._graph, {**params, **rest}, self._compute_dtype)
        return _remat(model) if self._remat else model

    def _merged(
        self, graph: nnx.GraphDef, arrays: Mapping[str, Array], dtype: DTypeLike | None
    ) -> ModuleT:
        flat = {}
        for name, (path, variable) in self._flat.items():
            # These keep their dtype: bfloat16 would round cluster sizes and make scores equal.
            exact = isinstance(variable, Precise) or not isinstance(variable, nnx.Param)
            want = value_of(variable).dtype if dtype is None or exact else dtype
            value = arrays[name]
            # Random keys have no astype.
            value = value if value.dtype == want else value.astype(want)
            flat[path] = with_value(variable, value)
        return nnx.merge(graph, nnx.from_flat_state(flat))


def in_compute_dtype(model: ModuleT, config: TrainConfig) -> ModuleT:
    """Returns a model in the dtype that a training step computes in, such as a teacher."""
    dtype = config.compute_dtype and jnp.dtype(config.compute_dtype)
    partition = Partition(model, compute_dtype=dtype)
    return partition.compute(*partition.split(model))


def _select(model: nnx.Module, params: list[str], trains: Trains) -> tuple[str, ...]:
    prefixes: tuple[str, ...] | None = None
    if trains == "all":
        prefixes = ("",)
    elif trains == "mlp":
        prefixes = tuple(f"{site.path}." if site.path else "" for site in sites(model))
    elif trains == "head":
        prefixes = ("head.", "pooler.")
    if prefixes is None:
        chosen = select(trains, params, argument="train", noun="parameter")
        return tuple(params[i] for i in chosen)
    found = tuple(path for path in params if path.startswith(prefixes))
    if not found:
        raise InputError(f"train {trains!r} matches no parameter of the model")
    return found


def _width_axes(model: nnx.Module) -> dict[str, int]:
    """Returns the axis of the width in the variables of MLPs, by path."""
    axes = {}
    mlps = [m for m in nnx.iter_modules(model) if isinstance(m[1], Mlp)]
    for path, mlp in mlps:
        prefix = f"{path_name(path)}." if path else ""
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

    def __getattr__(self, name: str) -> Any:
        """Returns a part of the layer, such as the attention of T5's decoder to the encoder."""
        if name.startswith("_") or name == "layer":
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __call__(self, *args: PyTree) -> PyTree:
        graph, state = nnx.split(self.layer)
        # A decoder's cache is not an array; there is no cache in training, so none is written.
        arrays = {
            i: a
            for i, a in enumerate(args)
            if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(a))
        }

        def run(state: PyTree, arrays: dict[int, PyTree]) -> PyTree:
            return nnx.merge(graph, state)(*(arrays.get(i, a) for i, a in enumerate(args)))

        return jax.checkpoint(run)(state, arrays)


def _remat(model: ModuleT) -> ModuleT:
    modules = [m for _, m in nnx.iter_modules(model)]
    inner = {id(m.groups) for m in modules if isinstance(m, UnevenExperts)}
    for layers in modules:
        if not isinstance(layers, nnx.List) or id(layers) in inner:
            continue
        for i, layer in enumerate(layers):
            if isinstance(layer, nnx.Module):  # not the cores of a chain
                layers[i] = _Remat(layer)
    return model
