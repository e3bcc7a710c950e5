"""Layer-wise tuning: a compressed model learns the hidden states of the original model."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import sites
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.fingerprints import (
    fingerprint_of_all_bits,
    fingerprint_of_batch,
    fingerprint_of_model,
    fingerprint_of_tokenizer,
)
from fusion_jax.training.engine.partition import in_compute_dtype
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.trainer import Fit, fit
from fusion_jax.training.tasks.unlabeled import Inputs, unlabeled


@on_auto_axes
def tune(
    student: Model,
    teacher: Model,
    data: Inputs,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Fit[Model]:
    """Tunes the compressed MLPs of a model towards the hidden states of the original model.

    Minimizes the mean squared error between the hidden states after every layer, over unlabeled
    texts of the task. Only the MLPs whose shape or kind differs from the original train. There is
    no dropout.

    Args:
        student: The compressed model; not changed.
        teacher: The model before compression.
        data: The task, whose training inputs are used; or its texts or pairs, plain strings, a text
            file, or batches. An encoder-decoder that writes text needs pairs.
        config: The settings of training; None for one epoch with the paper's settings. ``train``,
            ``dropout`` and the routers' losses do not apply.
        key: Random key of the order of the texts.
        folder: Where checkpoints and ``metrics.jsonl`` go. A run found there is resumed if it has
            the same models and texts. None keeps nothing.
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
        >>> fit = tune(smaller, model, data, key=key)  # doctest: +SKIP
    """
    config = tuning_config(config)
    places = compressed(student, teacher)
    source = unlabeled(student, data, config, key)
    about = {}
    if folder is not None:
        about = {
            "student": fingerprint_of_model(student),
            "teacher": fingerprint_of_model(teacher),
            "first batch": fingerprint_of_batch(source(0)),
            "tokenizer": fingerprint_of_tokenizer(student),
            "weights of the teacher": fingerprint_of_all_bits(teacher),
        }
    return fit(
        student,
        source,
        tuning_loss(teacher, config),
        config,
        key=key,
        folder=folder,
        recipe=Recipe(trains=lambda path: path.startswith(places), about=about),
        progress=progress,
    )


def tuning_config(config: TrainConfig | None) -> TrainConfig:
    """Returns the settings of tuning; raises `InputError` if one does not apply."""
    config = TrainConfig(epochs=1) if config is None else config
    if config.train != "all":
        raise InputError("train does not apply: the compressed MLPs train")
    return replace(config, dropout=False)


def tuning_loss(teacher: Model, config: TrainConfig) -> losses.Loss:
    """Returns the loss of tuning towards a teacher."""
    return jax.tree_util.Partial(losses.hidden_states, in_compute_dtype(teacher, config))


def compressed(student: nnx.Module, teacher: nnx.Module) -> tuple[str, ...]:
    """Returns prefixes of the paths of compressed MLPs, such as ``"layers.2.mlp."``.

    Raises:
        InputError: The models have MLPs at different places, or no MLP differs.
    """
    ours, theirs = sites(student), sites(teacher)
    if [s.path for s in ours] != [s.path for s in theirs]:
        raise InputError("student and teacher have their MLPs at different places")
    places = tuple(
        f"{a.path}."
        for a, b in zip(ours, theirs, strict=True)
        if _structure(a.mlp) != _structure(b.mlp)
    )
    if not places:
        raise InputError(
            "no MLP of the student differs from the teacher's; the teacher is the model before "
            "compression"
        )
    return places


def _structure(mlp: AnyMlp) -> tuple[object, ...]:
    """Returns the kind, experts and shape of an MLP, and of its matrices in other forms."""
    forms = {path: form.spec() for path, form in find_forms(mlp).items()}
    return mlp.spec(), mlp.stack, forms
