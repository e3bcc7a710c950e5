"""Text for models: a folder's tokenizer, and batches of token ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Batch(NamedTuple):
    """Tokenised texts.

    Args:
        input_ids: (b, t) token ids.
        attention_mask: (b, t), False at padding.
    """

    input_ids: Int[Array, "b t"]
    attention_mask: Bool[Array, "b t"]


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model's folder.

    Args:
        folder: A folder with tokenizer files, such as ``model.origin.folder``.

    Returns:
        A tokenizer of `transformers`.
    """
    # transformers advises at import to install PyTorch, which tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int = 128) -> Batch:
    """Texts as one batch, padded to the longest.

    Args:
        tokenizer: From `load_tokenizer`.
        texts: The texts.
        max_length: Longer ones are cut off at this many tokens.

    Returns:
        The batch.
    """
    out = tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="np"
    )
    mask = jnp.asarray(out["attention_mask"]).astype(bool)
    return Batch(jnp.asarray(out["input_ids"]).astype(jnp.int32), mask)
