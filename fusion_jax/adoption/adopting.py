"""Adopts the MLPs of models of other people, and releases them again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, PyTree

from fusion_jax.adoption.layers import MlpSpec, layers_of, usual_specs
from fusion_jax.adoption.observing import Candidate, Observed, Run, observe, outputs
from fusion_jax.adoption.verifying import check_outputs, take_over, verified_alone
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.adopted import adopted_modules, adoption_of, take_out
from fusion_jax.nn.linear_forms import multiplied_out
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.programs import ByValue
from fusion_jax.nn.surgery import at, find_modules
from ntk.activations import describe
from ntk.selection import Selection, select
from ntk.tables import table

ModelT = TypeVar("ModelT", bound=nnx.Module)
_log = logging.getLogger("fusion_jax")

_HELP = (
    'say which layers they are: fusion_jax.adopt(model, {"blocks.*.ffn": '
    'fusion_jax.MlpSpec(up="fc1", down="fc2")})'
)


@on_auto_axes
def adopt(
    model: ModelT, specs: Mapping[Any, MlpSpec] | None = None, *, batch: PyTree = None
) -> ModelT:
    """Returns a model whose MLPs this library can compress, whoever wrote the model.

    Each module that has an MLP keeps its class and all of its code, with dropout, sharding and
    whatever else it does. It holds a `Mlp` or `GatedMlp` as its attribute ``adopted``, and gives
    that MLP's arrays to its code under the names of its own layers. So the outputs are those of the
    model, equal to the bit, and after `compress` the same code runs on fewer hidden units.

    What the modules do is not guessed: each is run with random weights, and its hidden values must
    be those of the MLP. The outputs of the adopted module must be the same, and its code must also
    run with one hidden unit less. Stacks of layers by `nnx.vmap` and `nnx.scan` are adopted as one
    MLP for each layer, all of one width; where `nnx.StateAxes` names kinds of variables, cluster
    sizes are `Frozen`. The paths of parameters change (``ffn.fc1`` is ``ffn.adopted.up``), so load
    weights before adopting, and release before saving for other code.

    Args:
        model: A Flax NNX model; not changed.
        specs: Which modules have MLPs, and the layers of these. A key chooses modules by their
            paths as ``layers=`` of `compress` does, such as ``"blocks.*.ffn"``, a regular
            expression. None looks for the usual names, such as ``fc1`` and ``fc2`` or ``up_proj``,
            ``gate_proj`` and ``down_proj``; print `adoptions` to see what was found.
        batch: The model's arguments (an array, a tuple, or a mapping of keyword arguments), for
            modules that cannot be called with one array alone: then the whole model runs. This
            needs memory for a few copies of the MLPs.

    Returns:
        The model, which shares all arrays with the given one.

    Raises:
        InputError: No module has such layers, or a module is not the MLP that it is said to be; the
            message names the module and says what to give.

    Example:
        >>> import fusion_jax as fj
        >>> class Ffn(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.fc1 = nnx.Linear(4, 32, rngs=rngs)
        ...         self.dropout = nnx.Dropout(0.1, rngs=rngs)
        ...         self.fc2 = nnx.Linear(32, 4, rngs=rngs)
        ...
        ...     def __call__(self, x):
        ...         return self.fc2(self.dropout(nnx.gelu(self.fc1(x))))
        >>> model = adopt(Ffn(nnx.Rngs(0)), {"": MlpSpec(up="fc1", down="fc2", act="gelu_new")})
        >>> smaller, _ = fj.compress(model, fj.Fusion(width=8), key=jax.random.key(0))
        >>> smaller.eval()
        >>> smaller(jax.numpy.ones((2, 4))).shape, smaller.fc1.kernel.shape
        ((2, 4), (4, 8))
    """
    if not isinstance(model, nnx.Module):
        raise InputError(
            f"model must be a Flax NNX module; got {type(model).__name__} "
            "(fusion_jax.from_linen makes one of a Linen module and its variables)"
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model))):
        raise InputError("the model has no arrays yet, which adopt needs to run its modules")
    new = nnx.clone(model)
    groups = _usual(new) if specs is None else _given(new, specs)
    run = None if batch is None else _run_whole(new, groups, batch)
    known: dict[Hashable, tuple[MlpSpec, Observed]] = {}
    found: dict[str, tuple[MlpSpec, Observed]] = {}
    for path, candidates in groups.items():
        key = path if run is not None else _kind(candidates)
        if key not in known:
            known[key] = _first_that_fits(candidates, run)
        found[path] = known[key]
    if run is not None:
        check_outputs(run, found)
    for path, (spec, observed) in found.items():
        take_over(at(new, path), spec, observed)
    _log.info("%s", adoptions(new))
    return new


@on_auto_axes
def release(model: ModelT) -> ModelT:
    """Returns a model in which adopted modules are again of their own classes, with plain layers.

    The layers are as narrow as they have become; cluster sizes are folded into the output weights,
    and matrices in other forms are multiplied out. The model's own code runs without this library.
    Attributes that state the old width, such as those of a configuration, are not changed.

    Args:
        model: A model that `adopt` returned, compressed and trained or not; not changed.

    Returns:
        The model.

    Raises:
        InputError: No module of the model is adopted.

    Example:
        >>> import fusion_jax as fj
        >>> ffn = nnx.Sequential(
        ...     nnx.Linear(4, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 4, rngs=nnx.Rngs(1))
        ... )
        >>> smaller, _ = fj.compress(adopt(ffn), fj.Fusion(width=8), key=jax.random.key(0))
        >>> release(smaller).layers[2].kernel.shape
        (8, 4)
    """
    new = nnx.clone(model)
    found = adopted_modules(new)
    if not found:
        raise InputError(f"{type(model).__name__} has no module that fusion_jax.adopt adopted")
    for module, adoption, mlp in found.values():
        take_out(module, adoption, multiplied_out(mlp).plain())
    return new


@dataclass(frozen=True)
class AdoptedModule:
    """A module that `adopt` adopted.

    Args:
        path: Its path in the model.
        cls: The name of its class.
        layers: Its layers by role, such as ``{"up": "fc1", "down": "fc2"}``.
        act: The name of the activation.
        sizes: The numbers of inputs, hidden units and outputs.
        stack: (l,) for a stack of l layers, else ().
    """

    path: str
    cls: str
    layers: dict[str, str]
    act: str
    sizes: tuple[int, int, int]
    stack: tuple[int, ...]


class Adoptions(tuple[AdoptedModule, ...]):
    """The adopted modules of a model; ``str()`` gives a table."""

    def __str__(self) -> str:
        rows = [
            [
                each.path or "(the model)",
                each.cls,
                *(each.layers.get(role, "") for role in ("gate", "up", "down")),
                each.act,
                " -> ".join(map(str, each.sizes)),
                *map(str, each.stack or ("",)),
            ]
            for each in self
        ]
        header = ["module", "class", "gate", "up", "down", "activation", "sizes", "layers"]
        return table([header, *rows])


def adoptions(model: nnx.Module) -> Adoptions:
    """Returns what `adopt` took the modules of a model for.

    Example:
        >>> ffn = nnx.Sequential(
        ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 4, rngs=nnx.Rngs(1))
        ... )
        >>> adoptions(adopt(ffn))[0].layers, adoptions(adopt(ffn))[0].act
        ({'up': '0', 'down': '2'}, 'relu')
    """
    return Adoptions(
        AdoptedModule(
            path=path,
            cls=adoption.original.__name__,
            layers={role: part.name for part in adoption.parts for role in part.roles},
            act=describe(mlp.act),
            sizes=(mlp.d_in, mlp.width, mlp.d_out),
            stack=mlp.stack,
        )
        for path, (_, adoption, mlp) in adopted_modules(model).items()
    )


def _foreign(model: nnx.Module) -> dict[str, nnx.Module]:
    """Returns the modules of a model that are neither ours nor inside of one of ours, by path."""
    found = find_modules(model, nnx.Module)
    ours = [p for p, module in found.items() if isinstance(module, AnyMlp) or adoption_of(module)]
    if "" in ours:
        return {}
    inside = tuple(f"{path}." for path in ours)
    return {p: m for p, m in found.items() if p not in ours and not p.startswith(inside)}


def _usual(model: nnx.Module) -> dict[str, list[Candidate]]:
    """Returns the modules that have layers of usual names, with the specs that may fit."""
    modules = _foreign(model)
    found = {path: usual_specs(module) for path, module in modules.items()}
    groups = {
        path: [_candidate(path, modules[path], spec) for spec in specs]
        for path, specs in found.items()
        if specs
    }
    if not groups:
        kinds = {
            type(module).__name__: ", ".join(_layer_names(module))
            for module in modules.values()
            if len(_layer_names(module)) > 1
        }
        hint = "; ".join(f"{name} has {layers}" for name, layers in kinds.items())
        raise InputError(
            f"no module of {type(model).__name__} has layers of names that are known; {_HELP}"
            f"{hint and f' ({hint})'}"
        )
    return groups


def _layer_names(module: nnx.Module) -> list[str]:
    kinds = (nnx.Linear, nnx.Einsum)
    return [name for name, value in vars(module).items() if isinstance(value, kinds)]


def _given(model: nnx.Module, specs: Any) -> dict[str, list[Candidate]]:
    """Returns the modules that specs choose."""
    if not isinstance(specs, Mapping) or not specs:
        raise InputError(f"specs must map paths to MlpSpec, and not be empty; {_HELP}")
    modules = _foreign(model)
    groups: dict[str, list[Candidate]] = {}
    for selection, spec in specs.items():
        if not isinstance(spec, MlpSpec):
            raise InputError(f"specs[{selection!r}] must be a fusion_jax.MlpSpec; got {spec!r}")
        paths = [path for path, module in modules.items() if layers_of(module, spec) is not None]
        names = ", ".join(spec.names)
        if not paths:
            raise InputError(
                f"no module has the layers {names}, each of them a matrix; the modules are "
                f"{_some(list(modules))}"
            )
        chosen = select(_pattern(selection), paths, argument="specs", noun=f"module with {names}")
        for path in (paths[i] for i in chosen):
            if path in groups:
                raise InputError(f"two specs choose {path or 'the model'}")
            groups[path] = [_candidate(path, modules[path], spec)]
    return groups


def _pattern(selection: Any) -> Selection:
    """Returns a selection, in which a leading ``*`` stands for any text."""
    return re.sub(r"^\*", ".*", selection) if isinstance(selection, str) else selection


def _some(names: list[str]) -> str:
    shown = [name or "(the model)" for name in names[:20]]
    return ", ".join(shown + ["..."] * (len(names) > 20))


def _candidate(path: str, module: nnx.Module, spec: MlpSpec) -> Candidate:
    layers = layers_of(module, spec)
    assert layers is not None
    stacks = {layer.stack for layer in layers.values()}
    where = path or "the model"
    if len(stacks) > 1 or len(next(iter(stacks))) > 1:
        shapes = ", ".join(
            f"{layer.name} {layer.kernel.get_value().shape}" for layer in layers.values()
        )
        raise InputError(
            f"{where}: the layers must be matrices, with at most one axis in front for a stack of "
            f"layers; got {shapes}"
        )
    if spec.gate is not None and spec.gate == spec.up and not layers["up"].plain:
        raise InputError(f"{where}: only an nnx.Linear can have the gate and up side by side")
    return Candidate(path, module, spec, layers)


def _kind(candidates: list[Candidate]) -> ByValue:
    """Returns what is the same for modules of the same code and shapes."""
    module = candidates[0].module
    graph, state = nnx.split(module)
    shapes = [(path, v.shape, str(v.dtype)) for path, v in nnx.to_flat_state(state)]
    return ByValue((type(module), graph, shapes, [each.spec for each in candidates]))


def _leaves(state: PyTree) -> list[tuple[Hashable, Array]]:
    return [(path, v.get_value()) for path, v in nnx.to_flat_state(state)]


def _first_that_fits(candidates: list[Candidate], run: Run | None) -> tuple[MlpSpec, Observed]:
    """Returns the first spec that a module fits; raises the error of the first if none fits."""
    errors = []
    for candidate in candidates:
        try:
            if run is None:
                return candidate.spec, verified_alone(candidate)
            return candidate.spec, observe(candidate, run.seen(candidate.layers))
        except InputError as error:
            errors.append(error)
    raise InputError(f"{candidates[0].path or 'the model'}: {errors[0]}") from None


def _run_whole(model: nnx.Module, groups: Mapping[str, list[Candidate]], batch: PyTree) -> Run:
    """Returns a run of the whole model, which watches the layers of all candidates."""
    layers = [x for group in groups.values() for each in group for x in each.layers.values()]
    try:
        return Run(model, layers, lambda model: outputs(_called(model, batch)))
    except InputError:
        raise
    except Exception as error:  # the model is other people's code: anything can happen
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise InputError(
            "the model does not run on the batch, which must be its arguments: an array, a tuple, "
            f"or a mapping of keyword arguments ({reason})"
        ) from error


def _called(model: Callable[..., PyTree], batch: PyTree) -> PyTree:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
