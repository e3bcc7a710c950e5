"""Layer-wise task-specific tuning: a compressed model learns its original's hidden states."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import sites
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.fingerprints import fingerprint_of_batch, fingerprint_of_model
from fusion_jax.training.engine.partition import Parts
from fusion_jax.training.engine.trainer import Fit, Source, fit
from fusion_jax.training.tasks.classification import Encoder
from fusion_jax.training.tasks.glue import Texts
from fusion_jax.training.tasks.pair_encoding import PairEncoder
from fusion_jax.training.tasks.pairs import Pairs


@on_auto_axes
def tune(
    student: Model,
    teacher: Model,
    texts: Texts | Pairs | Sequence[str] | Source,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Tunes the compressed MLPs of a model towards the hidden states of the original.

    Minimises the mean squared error between the hidden states after every layer, over unlabelled
    texts of the task to come. Only the MLPs that differ in shape or kind move. There is no dropout.

    Args:
        student: The compressed model; not changed.
        teacher: The model that it was compressed from.
        texts: The inputs of a task, such as ``data.train``, plain strings, or batches, such as the
            `Windows` of a language model's text. An encoder-decoder needs pairs.
        config: How to train; None for one epoch with the paper's settings. ``train``,
            ``dropout`` and the routers' losses do not apply.
        key: Random key of the order of the texts.
        folder: Where checkpoints and ``metrics.jsonl`` go; a run found there is gone on with, if it
            has the same models and texts. None keeps nothing.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The tuned model.

    Raises:
        InputError: No MLP of the student is compressed, the models do not fit together, or the
            folder holds another run.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), section 4.4.

    Example:
        >>> fit = tune(smaller, model, data.train, key=key)  # doctest: +SKIP
    """
    config = TrainConfig(epochs=1) if config is None else config
    if config.train != "all":
        raise InputError("train does not apply: the compressed MLPs train")
    config = replace(config, dropout=False)
    places = compressed(student, teacher)
    source = texts if isinstance(texts, Source) else _batches(student, texts, config, key)
    about = {}
    if folder is not None:
        about = {
            "student": fingerprint_of_model(student),
            "teacher": fingerprint_of_model(teacher),
            "first batch": fingerprint_of_batch(source(0)),
        }
    return fit(
        student,
        source,
        jax.tree_util.Partial(losses.hidden_states, _in_dtype(teacher, config)),
        config,
        key=key,
        trains=lambda path: path.startswith(places),
        folder=None if folder is None else Path(folder),
        about=about,
        progress=progress,
    )


def _batches(
    student: Model, texts: Texts | Pairs | Sequence[str], config: TrainConfig, key: Key[Array, ""]
) -> Batches:
    seed = int(jax.random.bits(key))
    if isinstance(texts, Pairs):
        pairs = PairEncoder(student, config.max_length, config.truncate)
        return pairs.batches(texts, config.batch_size, shapes=config.shapes, seed=seed)
    if not isinstance(texts, Texts):
        texts = Texts([(t,) for t in texts], None, [f"texts[{i}]" for i in range(len(texts))])
    encoder = Encoder(student, config.max_length, config.truncate)
    examples = encoder(texts._replace(labels=None))
    return encoder.batches(examples, config.batch_size, shapes=config.shapes, seed=seed)


def compressed(student: nnx.Module, teacher: nnx.Module) -> tuple[str, ...]:
    """The beginnings of the paths of a student's compressed MLPs.

    Args:
        student: The compressed model.
        teacher: The original.

    Returns:
        Such as ``("layers.2.mlp.", "layers.3.mlp.")``.

    Raises:
        InputError: The models have MLPs at different places, or all MLPs are alike.
    """
    ours, theirs = sites(student), sites(teacher)
    if [s.path for s in ours] != [s.path for s in theirs]:
        raise InputError("student and teacher have their MLPs at different places")
    places = tuple(
        f"{a.path}." for a, b in zip(ours, theirs, strict=True) if _what(a.mlp) != _what(b.mlp)
    )
    if not places:
        raise InputError(
            "no MLP of the student differs from the teacher's; the teacher is the model before "
            "compression"
        )
    return places


def _what(mlp: AnyMlp) -> tuple[Any, ...]:
    """What kind of MLP it is, matrices in other forms included."""
    return mlp.spec(), {path: form.spec() for path, form in find_forms(mlp).items()}


def _in_dtype(teacher: Model, config: TrainConfig) -> Any:
    parts = Parts(teacher, compute_dtype=config.compute_dtype and jnp.dtype(config.compute_dtype))
    return parts.compute(*parts.split(teacher))
