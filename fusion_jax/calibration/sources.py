"""Reads calibration from text, token batches, files and saved inputs."""

from __future__ import annotations

import inspect
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.calibration.data import Calibration
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model, max_positions
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.tokens import (
    MAX_LENGTH,
    TokenBatch,
    batches,
    check_takes_text,
    check_tokens,
    length_for,
    load_tokenizer,
)
from fusion_jax.nn.site import Site

CalibrationSource = Sequence[Any] | Mapping[str, Any] | os.PathLike | str
"""Possible sources of calibration, see `fusion_jax.compress`."""

ROWS = 32
"""The number of rows of a file of arrays that a model reads at a time."""
RANDOM_SHAPE = (512, 32)
"""The number of random sequences that replace text, and of tokens in each."""


def read_source(source: Any) -> Any:
    """Returns the contents of a file: inputs by site, batches, or sentences; others unchanged.

    A file ``.npz`` holds arguments of the model by their names, a file ``.npy`` its first argument,
    and a folder several such files.

    Raises:
        InputError: The file cannot be read.
    """
    if not isinstance(source, str | os.PathLike) or source == "random":
        return source
    path = Path(source)
    if path.is_dir() or path.suffix in (".npy", ".npz"):
        return [batch for file in _array_files(path) for batch in _batches_of(file)]
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read calibration from {path}: {error}") from None


def _array_files(path: Path) -> list[Path]:
    """Returns the files of arrays in a folder, or the file itself."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix in (".npy", ".npz"))
    if not found:
        raise InputError(
            f"{path} has no .npy or .npz files; np.savez(FILE, pixel_values=images) writes one of "
            "what an image processor returns"
        )
    return found


def _batches_of(file: Path) -> list[Any]:
    """Returns the arrays of a file in batches of `ROWS` rows."""
    try:
        if file.suffix == ".npy":
            # Not read as a whole, as there may be many images.
            arrays = {"": np.lib.format.open_memmap(file, mode="r")}
        else:
            with open(file, "rb") as opened, zipfile.ZipFile(opened):
                opened.seek(0)
                arrays = dict(np.load(opened, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read calibration from {file}: {error}") from None
    sizes = {name or "the array": len(x) if x.ndim else 0 for name, x in arrays.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise InputError(f"{file} must have arrays with the same number of rows; {found or 'none'}")
    (rows,) = set(sizes.values())
    parts = [{name: x[i : i + ROWS] for name, x in arrays.items()} for i in range(0, rows, ROWS)]
    return [part.get("", part) for part in parts]


def site_arrays(source: Mapping[str, Any], site: Site) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the inputs given for a site, (t, d) or (e, t, d), and its upstream gradients.

    Raises:
        InputError: There are none, or they have another shape.
    """
    given = source.get(site.path)
    if isinstance(given, Calibration) and (given.outputs, given.weights) != (None, None):
        raise InputError(
            f"calibration of {site.path or 'the model'} may have inputs and upstream; outputs and "
            "weights are for compress_mlp"
        )
    x, upstream = (
        (given.inputs, given.upstream) if isinstance(given, Calibration) else (given, None)
    )
    if x is None:
        raise InputError(
            f"calibration has no inputs for {site.path or 'the model'}; a mapping holds inputs by "
            "site path, and batches of the model's arguments go into a list: [batch, ...]"
        )
    want = (*site.mlp.stack, x.shape[-2], site.mlp.d_in) if x.ndim > 1 else ()
    if x.shape != want or not x.size:
        shape = ", ".join(map(str, (*site.mlp.stack, "t", site.mlp.d_in)))
        raise InputError(
            f"calibration of {site.path or 'the model'} must be ({shape}); got {x.shape}"
        )
    want = (*x.shape[:-1], site.mlp.d_out)
    if upstream is not None and upstream.shape != want:
        raise InputError(
            f"upstream of {site.path or 'the model'} must be {want}; got {upstream.shape}"
        )
    return np.asarray(x), None if upstream is None else np.asarray(upstream)


def model_arguments(
    model: nnx.Module, source: Any, key: Array, *, scramble: bool = True
) -> Sequence[Any]:
    """Returns the batches of a source as arguments of a model.

    The source is strings, token batches, any arguments, or ``"random"`` for random tokens. For the
    models of this library the arguments are keywords. Beside strings there are as many random
    tokens, see `scrambled`, unless ``scramble`` is False.

    Raises:
        InputError: There is no text or no tokenizer, or a batch is unknown or too long.
    """
    items: list[Any]
    ours = isinstance(model, Model)
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    most = max_positions(model) if ours else None
    longest = length_for(model) if ours else MAX_LENGTH
    if isinstance(source, TokenBatch):
        source = [source]
    if not isinstance(source, Iterable) or hasattr(source, "shape"):
        raise InputError(_FORMS)
    source = source if isinstance(source, str) else list(source)
    if isinstance(source, str):
        tokenizer = _tokenizer(model)
        # Through text, so that the tokenizer adds its special tokens.
        texts = tokenizer.batch_decode(_random_words(tokenizer, RANDOM_SHAPE, key, rows))
        items = batches(tokenizer, texts, max_length=longest)
    elif all(isinstance(item, str) for item in source):
        texts = [text for text in source if text.strip()]
        if not texts:
            raise InputError("calibration has no text")
        tokenizer = _tokenizer(model)
        items = batches(tokenizer, texts, max_length=longest)
        keys = (jax.random.fold_in(key, i) for i in range(len(items) if scramble else 0))
        items += [scrambled(b, tokenizer, k, rows) for b, k in zip(items, keys, strict=False)]
    else:
        items = source
    made = [_keywords(model, item) if isinstance(item, TokenBatch) else item for item in items]
    for item in made:
        if not any(hasattr(x, "shape") for x in jax.tree.leaves(item)):
            raise InputError(f"{_FORMS}; one of the batches is a {type(item).__name__}")
    if not ours:
        return made
    made = [_by_name(model, item) for item in made]
    for item in made:
        ids = [item[name] for name in ("input_ids", "decoder_input_ids") if name in item]
        check_tokens(model, ids)
        length = np.shape(item["input_ids"])[-1] if "input_ids" in item else 0
        if most is not None and length > most:
            raise InputError(f"a batch has {length} tokens a row; the model has {most} positions")
    return made


_FORMS = (
    "calibration must be a list: of strings, or of batches of the model's arguments, each of them "
    "an array, a tuple of arguments, or a mapping of keyword arguments, such as "
    '[{"input_ids": ids, "attention_mask": mask}]; or inputs by site path, a file, or "random"'
)


def _by_name(model: nnx.Module, batch: Any) -> Mapping[str, Any]:
    """Returns a batch as keyword arguments."""
    if isinstance(batch, Mapping):
        return batch
    args = batch if isinstance(batch, tuple | list) else (batch,)
    try:
        bound = inspect.signature(type(model).__call__).bind_partial(model, *args).arguments
        return {name: value for name, value in bound.items() if value is not model}
    except TypeError as error:
        raise InputError(f"a batch does not fit the model ({error}); {_FORMS}") from None


def _keywords(model: nnx.Module, batch: TokenBatch) -> Mapping[str, Any]:
    """Returns a batch as keyword arguments; a decoder beside an encoder reads the same text."""
    fields = batch._asdict()
    if "decoder_input_ids" not in inspect.signature(type(model).__call__).parameters:
        return fields
    return {**fields, **{f"decoder_{name}": value for name, value in fields.items()}}


def _tokenizer(model: nnx.Module) -> Any:
    if "text" not in getattr(model, "takes", "text"):
        try:
            check_takes_text(model)
        except InputError as error:
            raise InputError(f"{error}, or a file .npz of such arrays") from None
    provenance = getattr(model, "provenance", None)
    if not isinstance(provenance, Provenance):
        raise InputError(
            "calibration with text needs the tokenizer of a model from fusion_jax.load; give a "
            "list of batches of the model's arguments, or inputs by site path"
        )
    return load_tokenizer(provenance.folder)


def scrambled(
    batch: TokenBatch, tokenizer: Any, key: Key[Array, ""], rows: int | None = None
) -> TokenBatch:
    """Returns a batch in which random tokens of the vocabulary replace all but special tokens.

    On text of one kind, a model takes a small part of its possible inputs. With as many random
    tokens in addition, a fit to the text also holds on text of other kinds. The model has
    embeddings for the first ``rows`` tokens; None for all.
    """
    ids = np.asarray(batch.input_ids)
    drawn = _random_words(tokenizer, ids.shape, key, rows)
    ids = np.where(np.isin(ids, tokenizer.all_special_ids), ids, drawn)
    return batch._replace(input_ids=jnp.asarray(ids))


def _random_words(
    tokenizer: Any, shape: tuple[int, ...], key: Array, rows: int | None
) -> np.ndarray:
    count = len(tokenizer) if rows is None else min(rows, len(tokenizer))
    words = np.setdiff1d(np.arange(count), tokenizer.all_special_ids).astype(np.int32)
    return generator(key).choice(words, shape)


def generator(key: Key[Array, ""]) -> np.random.Generator:
    """Returns a NumPy generator whose seed is drawn with a random key."""
    return np.random.default_rng(np.asarray(_bits(key)))


@jax.jit
def _bits(key: Key[Array, ""]) -> Array:
    return jax.random.bits(key, (4,), "uint32")
