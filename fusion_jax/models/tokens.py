"""Loads tokenizers, and makes batches of token ids from texts."""

from __future__ import annotations

import importlib.resources
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from fusion_jax.errors import InputError
from fusion_jax.models.base import TAKES, Model, check_needed_tokens, max_positions

MAX_LENGTH = 128
"""The default number of tokens at which texts are cut off."""


class TokenBatch(NamedTuple):
    """Tokenised texts.

    Args:
        input_ids: (b, t) token ids.
        attention_mask: (b, t), False at padding.
    """

    input_ids: Int[Array, "b t"]
    attention_mask: Bool[Array, "b t"]


def load_tokenizer(folder: str) -> Any:
    """Loads the tokenizer of a model, with `transformers`.

    Args:
        folder: A folder with tokenizer files, such as ``model.provenance.folder``.

    Raises:
        InputError: The folder has no tokenizer, or one that cannot be read.
    """
    # On import, transformers would advise to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # Never code from the folder: transformers would ask whether to run it.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{folder} has no tokenizer that can be read: {reason}") from None
    # Without files, transformers makes a tokenizer with special tokens only (T5: and a space).
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 1:
        raise InputError(f"{folder} has no tokenizer; add its files, such as tokenizer.json")
    return tokenizer


def tokenizer_of(model: Any) -> Any:
    """Loads the tokenizer of a model from `fusion_jax.load`.

    Raises:
        InputError: The model takes more than text, or see `load_tokenizer`.
    """
    check_takes_text(model)
    return load_tokenizer(model.provenance.folder)


def check_takes_text(model: Any) -> None:
    """Raises `InputError` for a model that takes more than text, or for its class."""
    takes = getattr(model, "takes", "text")
    if takes in TAKES:
        reads = "not of text alone" if "text" in takes else "which cannot read text"
        raise InputError(
            f"this is a model of {takes}, {reads}; in Python it takes batches such as "
            f"{TAKES[takes]}"
        )


def check_tokens(
    model: Any,
    input_ids: Iterable[Any],
    token_type_ids: Iterable[Any] | None = None,
    *,
    names: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> None:
    """Checks that a model can read tokens: it has an embedding for each, and the tokens it needs.

    Without an embedding, results would be NaN.

    Args:
        model: The model; a model without ``config`` is not checked.
        input_ids: The token ids of each text or batch.
        token_type_ids: Its token types, or None.
        names: The name of each text, for the error.
        tokenizer: The tokenizer, to name the token in the error.

    Raises:
        InputError: An id is negative or has no row in the model's embeddings, or a text lacks a
            token that the model needs.
    """
    config = getattr(model, "config", None)
    fields = (("token", "vocab_size", input_ids), ("token type", "type_vocab_size", token_type_ids))
    for what, size, arrays in fields:
        rows = getattr(config, size, None)
        for i, array in enumerate(() if arrays is None or rows is None else arrays):
            ids = np.asarray(array)
            wrong = ids[(ids < 0) | (ids >= rows)]
            at = "" if names is None else f"{names[i]}: "
            if wrong.size:
                word = ""
                if tokenizer is not None and what == "token":
                    word = f" ({tokenizer.convert_ids_to_tokens(int(wrong[0]))!r})"
                raise InputError(
                    f"{at}{what} {wrong[0]}{word} has no embedding: the model has {rows}, counted "
                    "from 0; use the tokenizer that belongs to the model"
                )
            if what == "token":
                check_needed_tokens(model, ids, at)


def check_finite(values: Any, what: str) -> None:
    """Raises `FloatingPointError` if numbers of a model are NaN or infinite.

    Args:
        values: The numbers.
        what: What they are, such as "the logits".
    """
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} are NaN or infinite; the weights may be damaged, or the dtype too narrow for "
            "this model (try float32 or bfloat16)"
        )


def length_for(model: Model) -> int:
    """Returns the default length of a model's texts: `MAX_LENGTH`, or all its positions."""
    return min(MAX_LENGTH, max_positions(model) or MAX_LENGTH)


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int | None = MAX_LENGTH
) -> TokenBatch:
    """Returns texts as one batch, padded to the longest.

    Args:
        tokenizer: A tokenizer from `load_tokenizer`.
        texts: The texts.
        max_length: Longer texts are cut off at this number of tokens; None for no limit.
    """
    return _batch(*_tokenized(tokenizer, texts, max_length))


def _tokenized(
    tokenizer: Any, texts: Sequence[str], max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and the mask of `tokenize`; for arrays of JAX, every length has programs."""
    if tokenizer.pad_token is None:  # GPT-2 and Llama; any token will do, as the mask excludes it
        tokenizer.pad_token = tokenizer.eos_token
    out = tokenizer(
        list(texts),
        padding=True,
        truncation=max_length is not None,
        max_length=max_length,
        return_tensors="np",
    )
    return np.asarray(out["input_ids"], np.int32), np.asarray(out["attention_mask"], bool)


def _batch(ids: np.ndarray, mask: np.ndarray) -> TokenBatch:
    return TokenBatch(jnp.asarray(ids), jnp.asarray(mask))


def tokenize_prompts(tokenizer: Any, texts: Sequence[str]) -> TokenBatch:
    """Returns prompts as one batch, padded on the left and not cut off."""
    tokenizer.padding_side = "left"
    return tokenize(tokenizer, texts, max_length=None)


def continuation(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> str:
    """Returns the text that new tokens add to a prompt.

    Decoded alone, the new tokens could lose the space before their first word, or be a part of a
    character.

    Args:
        tokenizer: A tokenizer from `load_tokenizer`.
        prompt: The tokens of the prompt.
        new: The tokens that follow it.

    Returns:
        The text, without special tokens.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(list(prompt), **options)
    whole = tokenizer.decode([*prompt, *new], **options)
    equal = (a == b for a, b in zip(before, whole, strict=False))
    return whole[sum(itertools.takewhile(bool, equal)) :]


def batches(
    tokenizer: Any, texts: Sequence[str], *, size: int = 64, max_length: int = MAX_LENGTH
) -> list[TokenBatch]:
    """Returns texts in batches of few different shapes, so that there are few compilations.

    Args:
        tokenizer: A tokenizer from `load_tokenizer`.
        texts: The texts, at least one.
        size: The number of texts in a batch; the last batch may have fewer.
        max_length: Longer texts are cut off at this number of tokens.

    Returns:
        The batches, with texts sorted by length; their lengths in tokens are powers of two or
        ``max_length``.
    """
    ordered = sorted(texts, key=len)
    result = []
    for start in range(0, len(ordered), size):
        group = ordered[start : start + size]
        ids, mask = _tokenized(tokenizer, group, max_length)
        length = min(max_length, 1 << max(3, (ids.shape[1] - 1).bit_length()))
        more = ((0, 0), (0, length - ids.shape[1]))
        ids = np.pad(ids, more, constant_values=tokenizer.pad_token_id or 0)
        result.append(_batch(ids, np.pad(mask, more)))
    return result


def sentences() -> list[str]:
    """Returns the few dozen English sentences that come with the package, from old books."""
    return _lines("models/sentences.txt")


def everyday_sentences() -> list[str]:
    """Returns the 195 everyday English sentences that come with the package, to calibrate on."""
    return _lines("models/calibration.txt")


def _lines(file: str) -> list[str]:
    text = importlib.resources.files("fusion_jax").joinpath(file)
    return text.read_text(encoding="utf-8").splitlines()
