"""Batches of inputs without labels, from whatever holds them: texts, files, pairs, tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.models.base import Generative, Model, max_positions
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.base import Task
from fusion_jax.training.tasks.classification import Texts, unlabeled_batches
from fusion_jax.training.tasks.generation import tuning_batches
from fusion_jax.training.tasks.pair_encoding import Pairs
from fusion_jax.training.tasks.plain_text import CONTEXT, PlainText, token_ids

Inputs = Task | Texts | Pairs | Sequence[str] | str | os.PathLike[str] | BatchSource
"""A task, whose training inputs are used; its texts or pairs; plain strings; a text file; or
batches."""


def unlabeled(model: Model, data: Inputs, config: TrainConfig, key: Array) -> BatchSource:
    """Returns inputs in batches, in an order that depends on the key.

    Args:
        model: The model that reads them.
        data: The inputs; for a text file see `read_files`.
        config: The settings of training.
        key: Random key of the order.

    Raises:
        InputError: The data does not fit the model, or there is none.
    """
    if isinstance(data, BatchSource):
        source = data
        if not len(source):
            raise InputError("there is no text in the data")
        missing = [name for name in ("attention_mask", "weights") if name not in source(0)]
        if missing:
            raise InputError(f"the batches have no {' and no '.join(missing)}; see BatchSource")
    else:
        data = read_files(model, [data]) if isinstance(data, str | os.PathLike) else data
        if isinstance(data, Task):
            source = data.inputs(model, config, key=key)
        elif isinstance(data, Pairs):
            source = tuning_batches(data, model, config, key=key)
        else:
            if not isinstance(data, Texts):
                names = [f"data[{i}]" for i in range(len(data))]
                data = Texts([(text,) for text in data], None, names)
            if not len(data.texts):
                raise InputError("there is no text in the data")
            source = unlabeled_batches(data, model, config, key=key)
    return source


def read_files(
    model: Model, files: Sequence[str | os.PathLike[str]], context: int | None = None
) -> PlainText | Texts:
    """Returns the text of files as a model reads it.

    Args:
        model: The model.
        files: Text files in UTF-8.
        context: The number of tokens of a window; None for `CONTEXT`, or as many as the model has
            positions or the text has tokens if these are fewer.

    Returns:
        For a decoder the files one after the other, in windows; for other models a text for each
        line that is not empty.

    Raises:
        InputError: A file is missing, is not UTF-8 or has no text, or there are no windows.
    """
    paths = [Path(file).expanduser() for file in files]
    if isinstance(model, Generative) and model.reads_prompts:
        ids = np.concatenate([token_ids(model, path) for path in paths])
        if context is None:
            context = max(2, min(CONTEXT, max_positions(model) or CONTEXT, len(ids)))
        return PlainText(ids, context=context)
    if context is not None:
        raise InputError("context is for decoder-only models; leave it out")
    texts, names = [], []
    for path in paths:
        for i, line in enumerate(tables.read_text(path).splitlines(), 1):
            if line.strip():
                texts.append((line,))
                names.append(tables.place(path, i))
    return Texts(texts, None, names)
