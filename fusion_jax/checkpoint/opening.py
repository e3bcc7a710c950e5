"""Opens a model's files: finds them, and reads which model they hold."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, Key

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.any_module import check_not_module
from fusion_jax.checkpoint.descriptions import generation_fields, read_artefact
from fusion_jax.checkpoint.fp8_files import Fp8Files
from fusion_jax.checkpoint.mask_files import BaseModel, BaseReference, MaskFiles, base_reference
from fusion_jax.checkpoint.mxfp4_files import Mxfp4Files
from fusion_jax.checkpoint.reading import Checkpoint
from fusion_jax.checkpoint.tensor_files import TensorFiles
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import CLASS_HEADS, Head, Provenance, class_names
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.tokens import check_takes_text, load_tokenizer

_log = logging.getLogger("fusion_jax")


def load(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    key: Key[Array, ""] | None = None,
    new_head: bool = False,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Model:
    """Loads a model from the Hugging Face hub, from a folder, or from an artefact of `save`.

    Memory: the tensors are read one at a time into the model; there is no second copy.

    Args:
        name: A hub id such as ``"google-bert/bert-base-uncased"``, a folder with a Hugging Face
            checkpoint, or an artefact that `save` or `save_masks` wrote.
        head: The head of the model: ``"classification"``, ``"token-classification"`` or
            ``"question-answering"`` for encoders, decoders and T5, ``"masked-lm"`` for encoders,
            ``"causal-lm"`` for decoders, ``"seq2seq-lm"`` for encoder-decoders. None for the model
            without a head or, for an artefact, for the head that it was saved with.
        num_labels: The number of classes of the classification or token-classification head. None
            for the number that the files state.
        label_words: A word (or token id) for each class, in BERT and RoBERTa. The logit of a class
            is then that of its word in the masked-language-model head at the first position, so
            that the classification head needs no training. If the files have no such head, it is
            the first hidden state times the embedding of the word. Each word must be one token
            where it follows a space.
        dtype: The dtype of the parameters and of the computation, such as ``"bfloat16"``. None
            for the dtype of the files.
        key: A random key for the initial weights of a head that the files do not have. Without
            it, a missing head is an error.
        new_head: Whether to make a new head even if the files have one, such as one for another
            number of classes; needs ``key``.
        revision: The branch, tag or commit on the hub.
        base: For an artefact of `save_masks`: the hub id or folder of its base model, if the base
            has moved.

    Returns:
        The model, a Flax NNX module. Call it with token ids and an attention mask, or a model of
        images with ``pixel_values``; ``config`` and ``provenance`` are its configuration and its
        origin.

    Raises:
        InputError: The model cannot be found, its type is unknown, or a file is damaged. If tensors
            are missing, left over or of the wrong shape, one message lists all of them.

    Example:
        >>> model = load("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> states = model(input_ids, attention_mask).last_hidden_state  # doctest: +SKIP
    """
    if new_head and (head is None or key is None):
        raise InputError("new_head needs head= and key=")
    opened = open_checkpoint(
        name,
        head=head,
        num_labels=num_labels,
        label_words=label_words,
        dtype=dtype,
        revision=revision,
        base=base,
    )
    other = opened.other_head
    if other is not None and key is None:
        raise InputError(
            f"{opened.tensors.folder} has a {other} head, not a {head} head; to make a new one: "
            "key= in Python, --new-head on the command line"
        )
    if other is not None:
        _log.warning("%s: the head %s is left out", opened.tensors.folder, other)
    return replace(opened, new_head=new_head or other is not None).read(key)


def stated_head(name: str | os.PathLike[str]) -> Head | None:
    """Returns the head that a model's files say they have, or None.

    Args:
        name: A hub id, a folder with a Hugging Face checkpoint, or an artefact.

    Raises:
        InputError: The model cannot be found, or its files cannot be read.
    """
    folder = files.find_folder(name, None)
    artefact = read_artefact(folder)
    if artefact is not None:
        return artefact.get("head")
    _, fields = files.read_json(folder / files.CONFIG)
    family = FAMILIES.get(str(fields.get("model_type")))
    return None if family is None else family.stated_head(fields)


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: DTypeLike | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    within: frozenset[Path] = frozenset(),
) -> Checkpoint:
    """Opens a model's files without reading the weights; the arguments are those of `load`.

    The folder must not be one of ``within``, whose masks need it.

    Returns:
        The opened checkpoint, whose ``abstract`` is the model with shapes in place of arrays.

    Raises:
        InputError: As for `load`, except for errors that only the weights show.
    """
    folder = files.find_folder(name, revision)
    if folder.resolve() in within:
        raise InputError(f"{folder} holds masks whose base is itself")
    check_not_module(folder)
    text, fields = files.read_json(folder / files.CONFIG)
    fields = {**fields, **generation_fields(folder)}
    artefact = read_artefact(folder)
    if artefact is not None:
        head = artefact.get("head") if head is None else head
        if num_labels is None and head == artefact.get("head"):
            num_labels = artefact.get("num_labels")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        close = difflib.get_close_matches(str(model_type), FAMILIES, n=1, cutoff=0.85)
        typo = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"{folder}: model_type {str(model_type)[:100]!r} is not supported{typo}; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    family.check_head(head)
    if num_labels is not None:
        if head not in CLASS_HEADS:
            raise InputError("num_labels is for head='classification' or 'token-classification'")
        check_at_least(1, num_labels=num_labels)
        fields = {**fields, "num_labels": num_labels}
    named = label_words is None  # classes of other label words are not those of the files
    if named and head == "classification":
        label_words = (artefact or {}).get("label_ids") or fields.get("label_ids")
    if label_words is not None:
        check_takes_text(family.model)
        fields = {**fields, "label_ids": _label_ids(folder, label_words, head, num_labels)}
    try:
        config = family.config(fields)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except _WRONG_VALUES as error:
        where, kind = folder / files.CONFIG, type(error).__name__
        raise InputError(f"{where} has a field of a wrong type: {kind}: {error}") from error
    provenance = Provenance(os.fspath(name), str(folder.absolute()), text, head)
    if artefact is not None:
        history = tuple(json.dumps(step) for step in artefact["history"])
        provenance = replace(
            provenance,
            name=artefact["base"],
            history=history,
            new_head=artefact.get("new_head", False),
        )
    if named and head in CLASS_HEADS:
        provenance = _with_classes(provenance, fields, artefact, config.num_labels)
    if artefact is not None and "masks" in artefact:
        tensors = _open_masks(folder, artefact, base, within | {folder.resolve()})
        if base is not None:
            provenance = replace(provenance, base=base_reference(base)["name"])
    elif base is not None:
        raise InputError(f"base is for artefacts of fusion_jax.save_masks; {folder} is not one")
    else:
        tensors = _files_of(folder, fields.get("quantization_config"))
    towers = (getattr(config, name, config) for name in ("text", "vision"))
    for part in (config, *towers):
        for field in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"):
            shared = hasattr(part, "blocks") and getattr(part.blocks, "schedule", ())
            if not shared and getattr(part, field, 0) > len(tensors.shapes):
                raise InputError(
                    f"{folder}: {field} is {getattr(part, field)}, but the files have only "
                    f"{len(tensors.shapes)} tensors"
                )
    opened = Checkpoint(family, config, provenance, tensors, dtype, artefact).untied()
    config = opened.config
    if label_words is None:
        return opened
    if not hasattr(config, "label_ids"):
        raise InputError(f"{folder}: only BERT and RoBERTa take label words, not {model_type}")
    # A model that was made without the layers of the masked-language-model head stays without.
    if not opened.has("head.dense"):
        opened = replace(opened, config=replace(config, label_transform=False))
    return opened


def _files_of(folder: Path, quantized: object) -> TensorFiles:
    """Returns the tensors of a folder, which are computed if they are stored in fewer bits."""
    settings = quantized if isinstance(quantized, Mapping) else {}
    method = settings.get("quant_method")
    if method == "mxfp4":
        return Mxfp4Files(folder)
    return Fp8Files(folder, settings) if method == "fp8" else TensorFiles(folder)


_WRONG_VALUES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def open_base(
    reference: BaseReference,
    head: Head | None,
    num_labels: int | None,
    label_ids: Sequence[int] | None,
    dtype: str,
    within: frozenset[Path] = frozenset(),
) -> BaseModel:
    """Opens the base model with this ``name`` and ``revision``, with the head of a masked model."""
    opened = open_checkpoint(
        reference["name"],
        head=head,
        num_labels=num_labels,
        label_words=label_ids,
        dtype=dtype,
        revision=reference["revision"],
        within=within,
    )
    return BaseModel(opened)


def _with_classes(
    provenance: Provenance,
    fields: Mapping[str, Any],
    artefact: Mapping[str, Any] | None,
    num_labels: int,
) -> Provenance:
    """Returns the provenance with the classes of a classification head, where they are known.

    Artefacts of earlier versions do not say whether their head was trained for other classes.
    """
    known = fields
    labels = None if artefact is not None else class_names(fields)
    if artefact is not None:
        known = artefact
        labels = tuple(artefact["labels"]) if artefact.get("labels") else None
    if labels is None or len(labels) != num_labels:
        labels = None
    return replace(provenance, labels=labels, problem_type=known.get("problem_type"))


def _open_masks(
    folder: Path,
    artefact: Mapping[str, Any],
    base: str | os.PathLike[str] | None,
    within: frozenset[Path],
) -> MaskFiles:
    """Opens an artefact of masks, and its base: the one it refers to, or another."""
    reference = artefact["masks"]["base"] if base is None else base_reference(base)
    name = reference["name"]
    given = [artefact.get(field) for field in ("head", "num_labels", "label_ids", "dtype")]
    try:
        base_model = open_base(reference, *given, within=within)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(
            f"{folder} holds masks for the model {name}, which cannot be read ({error}); if the "
            f"model has moved: fusion-jax rebase {folder} BASE, or load(..., base=BASE)"
        ) from None
    return MaskFiles(folder, artefact["masks"], base_model, name)


def _label_ids(
    folder: Path, words: Sequence[str] | Sequence[int], head: str | None, num_labels: int | None
) -> list[int]:
    """Returns the token ids of label words, each of which must be one token."""
    if head != "classification":
        raise InputError("label_words is for head='classification'")
    if num_labels not in (None, len(words)):
        raise InputError(f"num_labels is {num_labels}, but label_words has {len(words)}")
    ids = []
    tokenizer = None
    for word in words:
        if isinstance(word, str):
            tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
            # As inside a text: RoBERTa's tokens of words include the space before them.
            found = tokenizer.encode(f" {word}", add_special_tokens=False)
            if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                raise InputError(f"label word {word!r} is not one token of {folder}; use another")
            word = found[0]
        ids.append(word)
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"label words must be different from each other; got {list(words)}")
    return ids
