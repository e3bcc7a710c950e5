"""Opens a model's files: finds them, and says which model they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Array, Key

from fusion_jax.checkpoint import files
from fusion_jax.checkpoint.reading import Checkpoint
from fusion_jax.errors import InputError, nearest
from fusion_jax.models.base import Head, Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.tokens import load_tokenizer


def load(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: Any = None,
    key: Key[Array, ""] | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Model:
    """Loads a model from the hub, a Hugging Face folder, or an artefact of `save`.

    Tensors are read one at a time into a model that holds only shapes before, so that no second
    copy of the model is in memory.

    Args:
        name: A hub id or a folder.
        head: ``"classification"``, ``"masked-lm"``, or None for the base model alone (for an
            artefact: for the head it was saved with).
        num_labels: Classes of the classification head; None for what the files say.
        label_words: A word or token id for each class, for a classification head that needs no
            training (BERT and RoBERTa): the logits of these words in the files' masked-LM head at
            the first position; if they have no such head, the first hidden state times the words'
            embeddings. Words are such as stand after a space.
        dtype: The dtype of the parameters, in which the model also computes; None for that of the
            files.
        key: Random key of a head that the files do not have; without it that is an error.
        revision: Branch, tag or commit on the hub.
        base: For what `save_masks` wrote: the model that it was made of, if it is not where it was.

    Returns:
        The model: a Flax NNX module with the attributes ``config`` and ``provenance``.

    Raises:
        InputError: There is no such model, its type is unknown, a file is damaged, or tensors are
            missing, left over or of another shape; all of these are listed in one message.

    Example:
        >>> model = load("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    """
    opened = open_checkpoint(
        name,
        head=head,
        num_labels=num_labels,
        label_words=label_words,
        dtype=dtype,
        revision=revision,
        base=base,
    )
    return opened.read(key)


def open_checkpoint(
    name: str | os.PathLike[str],
    *,
    head: Head | None = None,
    num_labels: int | None = None,
    label_words: Sequence[str] | Sequence[int] | None = None,
    dtype: Any = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Opens a model's files without reading the weights; the arguments are those of `load`.

    Args:
        name: A hub id or a folder.
        head: The head, or None.
        num_labels: Classes of the classification head.
        label_words: A word or token id for each class.
        dtype: The dtype of the parameters.
        revision: Branch, tag or commit on the hub.
        base: For what `save_masks` wrote: the model that it was made of.

    Returns:
        The opened checkpoint, whose ``abstract`` is the model with shapes for arrays.

    Raises:
        InputError: As `load`, except for what only the weights tell.
    """
    folder = files.find_folder(name, revision)
    text, fields = files.read_json(folder / files.CONFIG)
    artefact = None
    if (folder / files.FUSION).is_file():
        _, artefact = files.read_json(folder / files.FUSION)
        if artefact.get("format", files.FORMAT + 1) > files.FORMAT:
            raise InputError(f"{folder} was written by a newer fusion-jax; update to read it")
        head = artefact["head"] if head is None else head
        if num_labels is None and head == artefact["head"]:
            num_labels = artefact.get("num_labels")
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{folder} has model_type {model_type!r}{nearest(str(model_type), FAMILIES)}"
        )
    family = FAMILIES[model_type]
    family.check_head(head)
    if num_labels is not None:
        if head != "classification":
            raise InputError("num_labels is for head='classification'")
        if num_labels < 1:
            raise InputError(f"num_labels must be at least 1; got {num_labels}")
        fields = {**fields, "num_labels": num_labels}
    if label_words is None and head == "classification":
        label_words = (artefact or {}).get("label_ids") or fields.get("label_ids")
    if label_words is not None:
        fields = {**fields, "label_ids": _label_ids(folder, label_words, head, num_labels)}
    try:
        config = family.config(fields)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    provenance = Provenance(os.fspath(name), str(folder.absolute()), text, head)
    if artefact is not None:
        history = tuple(json.dumps(step) for step in artefact["history"])
        provenance = Provenance(artefact["base"], provenance.folder, text, head, history)
    if artefact is not None and "masks" in artefact:
        from fusion_jax.checkpoint.masks import MaskFiles

        tensors = MaskFiles(folder, artefact, base)
        if base is not None:
            provenance = replace(provenance, base=tensors.base)
    elif base is not None:
        raise InputError(f"base is for what fusion_jax.save_masks wrote; {folder} is none of it")
    else:
        tensors = files.TensorFiles(folder)
    opened = Checkpoint(family, config, provenance, tensors, dtype, artefact)
    if label_words is None:
        return opened
    if not hasattr(config, "label_ids"):
        raise InputError(f"{folder}: only BERT and RoBERTa take label words, not {model_type}")
    # A model that was made without the head's layers stays so.
    if not opened.has("head.dense"):
        opened = replace(opened, config=replace(config, label_transform=False))
    return opened


def _label_ids(
    folder: Path, words: Sequence[str] | Sequence[int], head: str | None, num_labels: int | None
) -> list[int]:
    """The token ids of label words; raises `InputError` if a word is not one token."""
    if head != "classification":
        raise InputError("label_words is for head='classification'")
    if num_labels not in (None, len(words)):
        raise InputError(f"num_labels is {num_labels}, but label_words are {len(words)}")
    ids = []
    tokenizer = None
    for word in words:
        if isinstance(word, str):
            tokenizer = load_tokenizer(str(folder)) if tokenizer is None else tokenizer
            # As inside a text: RoBERTa's tokens of words hold the space before them.
            found = tokenizer.encode(f" {word}", add_special_tokens=False)
            if len(found) != 1 or found[0] == tokenizer.unk_token_id:
                raise InputError(f"label word {word!r} is not one token of {folder}; use another")
            word = found[0]
        ids.append(word)
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"label words must be different from each other; got {list(words)}")
    return ids
