"""Saves models that did not come from `load`, and restores them in a model that the caller builds.

Such an artefact is a folder with ``model.safetensors``, whose names are the paths of variables, and
``fusion.json``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.reading import module_of
from fusion_jax.checkpoint.tensor_files import TensorFiles
from fusion_jax.errors import InputError
from fusion_jax.methods.registry import LINEAR_FORMS
from fusion_jax.nn.adopted import Adoption, adopted_modules
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import sites
from fusion_jax.nn.surgery import at, path_name, replaced, value_of, with_value
from fusion_jax.report import Report
from ntk.activations import describe

ModelT = TypeVar("ModelT", bound=nnx.Module)

_KIND = "module"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The dtypes that can be saved, by their names in safetensors."""


def write_module(model: nnx.Module, folder: str | os.PathLike[str], report: Report | None) -> Path:
    """Writes any module as an artefact, see `fusion_jax.save`."""
    values = _values(model)
    bad = [f"{name} ({x.dtype})" for name, x in values.items() if not _can_be_saved(x)]
    if bad:
        raise InputError(f"cannot save variables of these dtypes: {', '.join(bad[:20])}")
    fields = {
        "format": files.FORMAT,
        "kind": _KIND,
        "class": type(model).__qualname__,
        "sites": {site.path: site.mlp.spec() for site in sites(model)},
        "activations": {site.path: describe(site.mlp.act) for site in sites(model)},
        "forms": {path: form.spec() for path, form in find_forms(model).items()},
        "adopted": _adopted(model),
        "keys": {name: _key_kind(x) for name, x in values.items() if _is_key(x)},
        "versions": files.versions(),
    }
    with files.new_folder(folder) as new:
        files.write_tensors(new, ((name, np.asarray(_data(x))) for name, x in values.items()))
        files.write_json(new / files.FUSION, fields)
        if report is not None:
            files.write_json(new / files.REPORT, report.to_json())
    return Path(folder)


def load_into(model: ModelT, folder: str | os.PathLike[str]) -> ModelT:
    """Returns a model as it was saved by `save`, for models that did not come from `load`.

    The caller builds the model, as its own library does, and adopts it if it was adopted when it
    was saved. Its weights do not matter and may be abstract (``nnx.eval_shape``). The widths, forms
    and values are those of the saved model, equal to the bit.

    Args:
        model: The model, compressed or not; not changed.
        folder: The folder that `save` wrote.

    Returns:
        The model with the saved values. Where a variable has the same shape, its value is put on
        the devices where the one before is.

    Raises:
        InputError: The folder does not hold a saved module, or the model is another one; the
            message lists what differs.

    Example:
        >>> import tempfile
        >>> import fusion_jax as fj
        >>> build = lambda: fj.Mlp(4, 64, act=jax.nn.softplus, rngs=nnx.Rngs(0))
        >>> smaller, _ = fj.compress(build(), fj.Fusion(width=16), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fj.save(smaller, f"{folder}/fused")
        ...     restored = load_into(build(), f"{folder}/fused")
        >>> x = jnp.ones((2, 4))
        >>> bool((restored(x) == smaller(x)).all())
        True
    """
    if not isinstance(model, nnx.Module):
        raise InputError(f"model must be a Flax NNX module; got {type(model).__name__}")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"no such folder: {folder}")
    fields = _read(path)
    tensors = TensorFiles(path)
    new = _with_structure(nnx.clone(model), fields, path)
    graph, state = nnx.split(new)
    flat = dict(nnx.to_flat_state(state))
    _check_variables(flat, tensors, fields["keys"], path)
    for place, variable in flat.items():
        name = path_name(place)
        old = value_of(variable)
        value: Any = tensors.read(name)
        if name in fields["keys"]:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=fields["keys"][name])
        sharding = getattr(old, "sharding", None)
        if isinstance(old, jax.Array) and isinstance(sharding, NamedSharding):
            value = jax.device_put(value, sharding)
        flat[place] = with_value(variable, jnp.asarray(value))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def check_not_module(folder: Path) -> None:
    """Raises `InputError` if a folder holds a module that only `load_into` can read."""
    if not (folder / files.FUSION).is_file() or (folder / files.CONFIG).is_file():
        return
    _, fields = files.read_json(folder / files.FUSION)
    if fields.get("kind") == _KIND:
        raise InputError(
            f"{folder} holds a {str(fields.get('class'))[:100]} that did not come from "
            "fusion_jax.load; build the model and use fusion_jax.load_into(model, folder)"
        )


def _read(folder: Path) -> dict[str, Any]:
    """Returns the fields of ``fusion.json``."""
    where, objects = folder / files.FUSION, ("sites", "activations", "forms", "adopted", "keys")
    _, fields = files.read_json(where)
    if fields.get("kind") != _KIND:
        raise InputError(f"{folder} holds a model for fusion_jax.load, not for load_into")
    version = fields.get("format")
    if not isinstance(version, int) or version > files.FORMAT:
        raise InputError(
            f"{folder} was written by a newer version of fusion-jax; update fusion-jax to read it"
        )
    for name in objects:
        if not isinstance(fields.get(name), dict):
            raise InputError(f"{where}: {name} is missing or of a wrong type")
    return fields


def _with_structure(model: Any, fields: Mapping[str, Any], folder: Path) -> Any:
    """Returns a model with the MLPs and forms of the saved one, without their values."""
    _check_same(_adopted(model), fields["adopted"], "is adopted as", folder)
    found = {site.path: site for site in sites(model)}
    acts = {path: describe(site.mlp.act) for path, site in found.items()}
    _check_same(acts, fields["activations"], "has the activation", folder)
    if set(found) != set(fields["sites"]):
        raise InputError(f"{folder / files.FUSION}: sites and activations do not fit together")
    forms = {path: form.spec() for path, form in find_forms(model).items()}
    for path, site in found.items():
        spec, inside = fields["sites"][path], tuple(f"{path}.{n}" for n in site.mlp.linears())
        mine, saved = ({p: f[p] for p in inside if p in f} for f in (forms, fields["forms"]))
        if site.mlp.spec() != spec or mine != saved:
            with _reading(f"site {path or '(the model)'}", folder):
                model = replaced(model, path, _rebuilt(site.mlp, spec))
    now = {path: form.spec() for path, form in find_forms(model).items()}
    for path, spec in fields["forms"].items():
        if now.get(path) == spec:
            continue
        with _reading(f"form {path}", folder):
            options = dict(spec)
            form = LINEAR_FORMS[options.pop("form")].abstract(at(model, path), **options)
            model = replaced(model, path, form)
    _check_same(
        {path: form.spec() for path, form in find_forms(model).items()},
        fields["forms"],
        "has the form",
        folder,
    )
    return model


def _rebuilt(mlp: AnyMlp, spec: Mapping[str, Any]) -> AnyMlp:
    """Returns an MLP with the structure of the saved one, without values."""
    return module_of(mlp if hasattr(mlp, "abstract") else mlp.plain(), spec)


def _check_same(
    mine: Mapping[str, object], saved: Mapping[str, object], verb: str, folder: Path
) -> None:
    """Raises `InputError` that lists the modules in which the model and the file differ."""
    differ = [path for path in {**saved, **mine} if mine.get(path) != saved.get(path)]
    if not differ:
        return
    lines = [
        f"{path or '(the model)'} {verb} {_shown(saved.get(path))} in the file, "
        f"{_shown(mine.get(path))} in the model"
        for path in differ[:20]
    ]
    hint = " (build and adopt the model as it was before it was compressed)"
    more = [f"and {len(differ) - 20} more"] * (len(differ) > 20)
    raise InputError("\n  ".join([f"{folder} does not fit the model{hint}:", *lines, *more]))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}: {x}" for name, x in value.items()) + ")"
    return "nothing" if value is None else str(value)


@contextmanager
def _reading(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{folder / files.FUSION}: cannot read {what} ({error})") from None


def _check_variables(
    flat: Mapping, tensors: TensorFiles, keys: Mapping[str, object], folder: Path
) -> None:
    """Raises `InputError` that lists the variables that the file does not have so."""
    problems, names = [], set()
    for place, variable in flat.items():
        name, value = path_name(place), value_of(variable)
        names.add(name)
        if name not in tensors.shapes:
            problems.append(f"{name} is not in the file")
            continue
        if _is_key(value) != (name in keys):
            problems.append(f"{name} is a random key in only one of file and model")
            continue
        if _is_key(value):
            value = jax.eval_shape(jax.random.key_data, value)
        shape, dtype = tensors.shapes[name], _DTYPES.get(tensors.dtypes[name])
        if shape != value.shape:
            problems.append(f"{name} is {shape} in the file, {value.shape} in the model")
        elif dtype != str(value.dtype):
            problems.append(f"{name} is {dtype} in the file, {value.dtype} in the model")
    problems += [f"{name} is not in the model" for name in tensors.shapes if name not in names]
    if problems:
        more = [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise InputError("\n  ".join([f"{folder} does not fit the model:", *problems[:20], *more]))


def _adopted(model: nnx.Module) -> dict[str, dict[str, str]]:
    """Returns the layers of adopted modules by role, by the path of the module."""

    def layers(adoption: Adoption) -> dict[str, str]:
        return {role: part.name for part in adoption.parts for role in part.roles}

    return {path: layers(adoption) for path, (_, adoption, _) in adopted_modules(model).items()}


def _values(model: nnx.Module) -> dict[str, Any]:
    """Returns the arrays of a model by the paths of their variables."""
    flat = nnx.to_flat_state(nnx.state(model))
    found = {path_name(path): value_of(variable) for path, variable in flat}
    for name, value in found.items():
        if not hasattr(value, "dtype"):
            raise InputError(f"{name} holds a {type(value).__name__}; only arrays can be saved")
    return found


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_kind(x: Any) -> str:
    return str(jax.random.key_impl(x))


def _data(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _can_be_saved(x: Any) -> bool:
    return _is_key(x) or str(x.dtype) in _DTYPES.values()
