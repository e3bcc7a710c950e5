"""Healing: a compressed model learns to give what the original model gives."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Key

from fusion_jax.errors import InputError, check_at_least
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.nn.site import sites
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.divergence import Output, output_of
from fusion_jax.training.engine.divergence import healing as healing_loss
from fusion_jax.training.engine.fingerprints import (
    fingerprint_of_all_bits,
    fingerprint_of_model,
    fingerprint_of_tokenizer,
)
from fusion_jax.training.engine.partition import Trains, in_compute_dtype
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.trainer import Fit, fit
from fusion_jax.training.methods.layerwise import compressed
from fusion_jax.training.methods.stored_logits import TOP_K, StoredLogits, WithLogits
from fusion_jax.training.tasks.base import Task
from fusion_jax.training.tasks.unlabeled import Inputs, unlabeled

COMPRESSED = "compressed"
"""The value of ``TrainConfig.train`` with which only compressed MLPs train."""
SETTINGS = TrainConfig(
    epochs=1_000_000,  # as many as the steps need
    max_steps=200,
    batch_size=8,
    learning_rate=1e-4,
    weight_decay=0.0,
    schedule="cosine",
    dropout=False,
)
"""How healing trains, but for the learning rate, which depends on the model: see `heal_config`."""
_RATE = 0.064
"""The learning rate times the number of features."""


def heal_config(model: Model, **settings: Any) -> TrainConfig:
    """Returns the settings with which `heal` trains a model unless you say otherwise.

    200 steps on batches of 8 with AdamW, no weight decay, a cosine schedule, no dropout. The
    learning rate is 0.064 divided by the number of features of the hidden states: 1e-3 for 64, 1e-4
    for 640. Weights of wider layers bear smaller steps; one rate for all models would be too low
    for small ones or damage larger ones.

    Args:
        model: The model.
        **settings: Other values for some of the settings.

    Returns:
        The settings.

    References:
        Yang et al. (2022), Tensor Programs V (arXiv 2203.03466): Adam's learning rate of matrices
        falls as one over the width.

    Example:
        >>> config = heal_config(student, batch_size=16)  # doctest: +SKIP
    """
    features = max((site.mlp.d_in for site in sites(model)), default=640)
    return dataclasses.replace(SETTINGS, **{"learning_rate": _RATE / features, **settings})


@dataclass(frozen=True, kw_only=True)
class Healing:
    """The loss that `heal` minimizes: the divergence from the teacher, and terms added to it.

    Args:
        top_k: The number of the teacher's most probable classes that are compared one by one; all
            others are compared as one class more. None for 64, or for what stored logits have.
        hidden_states: The weight of the squared errors of hidden states after each layer, relative
            to the teacher's squares. The teacher must be in memory.
        labels: The weight of the loss of true labels, which for language models is that of the next
            token.

    Raises:
        InputError: A value is out of range.

    Example:
        >>> Healing(hidden_states=0.5).top_k
    """

    top_k: int | None = None
    hidden_states: float = 0.0
    labels: float = 0.0

    def __post_init__(self):
        check_at_least(1, top_k=self.top_k)
        for name in ("hidden_states", "labels"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be at least 0; got {value}")


@on_auto_axes
def heal(
    student: Model,
    teacher: Model | str | os.PathLike[str],
    data: Inputs,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    steps: int | None = None,
    healing: Healing = Healing(),
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Fit[Model]:
    """Trains a compressed model to give what the original model gives, on unlabeled text.

    Minimizes KL(teacher || student), per token for language models and token classes, per text for
    classes, and over the places of answers: see `fusion_jax.training.Healing`. A head that predicts
    a number minimizes its squared error, and a model without a head the squared error of the final
    hidden states relative to the teacher's squares. Dropout is off.

    Args:
        student: The compressed model; not changed.
        teacher: The model before compression, with the same head; or the folder that `store_logits`
            wrote of it, so that it need not be in memory.
        data: The task, whose training inputs are used; or its texts or pairs, plain strings, a text
            file, or batches. An encoder-decoder that writes text needs pairs. A language model is
            compared at every token, a masked one on the text as it is.
        config: The settings of training; None for those of `fusion_jax.training.heal_config`. With
            ``train="compressed"`` only the MLPs train whose shape or kind differs from the
            teacher's. ``dropout`` and the routers' losses do not apply.
        key: Random key of the order of the texts.
        steps: The number of steps, over as many epochs as needed; None for that of the config.
        healing: What is minimized.
        folder: Where checkpoints and ``metrics.jsonl`` go. A run found there is resumed if it has
            the same models, texts and settings. None keeps nothing.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The healed model.

    Raises:
        InputError: The models are the same or do not fit together, stored logits are of other data,
            or the folder holds another run. Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    References:
        Hinton et al. (2015), Distilling the Knowledge in a Neural Network.

    Example:
        >>> smaller, _ = fj.compress(model, fj.Fusion(width=0.5), key=key)  # doctest: +SKIP
        >>> fit = fj.heal(smaller, model, "book.txt", steps=200, key=key)  # doctest: +SKIP
    """
    config = heal_config(student) if config is None else dataclasses.replace(config, dropout=False)
    if steps is not None:
        check_at_least(1, steps=steps)
        config = dataclasses.replace(config, epochs=max(config.epochs, steps), max_steps=steps)
    for name in ("router_balance", "router_z"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} does not apply to healing; leave it out")
    stored = StoredLogits(teacher) if isinstance(teacher, str | os.PathLike) else None
    source, labeled = _with_loss(student, data, config, healing, key)
    about: dict[str, object] = {"healing": dataclasses.asdict(healing)}
    trains: Trains | None = None
    if not isinstance(teacher, str | os.PathLike):
        output = _checked(student, teacher, source(0), healing)
        top_k = healing.top_k or TOP_K
        if config.train == COMPRESSED:
            places = compressed(student, teacher)
            trains = lambda path: path.startswith(places)  # noqa: E731
        bound = in_compute_dtype(teacher, config)
        if folder is not None:
            about["teacher"] = fingerprint_of_model(teacher)
            about["weights of the teacher"] = fingerprint_of_all_bits(teacher)
    else:
        assert stored is not None
        _check_use(stored, student, config, healing)
        stored.check(student, source, config.steps(len(source)))
        output, top_k, bound = output_of(student, source(0)), stored.facts["top_k"], None
        source = WithLogits(source, stored)
        about["weights of the teacher"] = stored.facts["teacher"]
    if folder is not None:
        about["tokenizer"] = fingerprint_of_tokenizer(student)
    loss = partial(
        healing_loss,
        kind=output.kind,
        top_k=top_k,
        states=healing.hidden_states,
        labels=healing.labels,
    )
    return fit(
        student,
        source,
        jax.tree_util.Partial(loss, bound, labeled),
        config,
        key=key,
        folder=folder,
        recipe=Recipe(trains=trains, about=about),
        progress=progress,
    )


def _with_loss(
    student: Model, data: Inputs, config: TrainConfig, healing: Healing, key: Array
) -> tuple[BatchSource, losses.Loss | None]:
    """Returns the batches, and the loss of true labels if it is asked for."""
    if not healing.labels:
        return unlabeled(student, data, config, key), None
    if isinstance(data, Task):
        prepared = data.prepare(student, config, key=key)
        return prepared.batches, losses.bound(prepared.loss)
    source = unlabeled(student, data, config, key)
    kind = output_of(student, source(0)).kind
    head = getattr(getattr(student, "provenance", None), "head", None)
    known: Mapping[str, losses.Loss] = {
        "class": losses.classification,
        "number": losses.regression,
        "answer": losses.question_answering,
        "targets": losses.sequence_to_sequence,
    }
    loss = known.get(kind)
    if kind == "tokens" and head in ("causal-lm", None):
        loss = losses.next_token
    elif kind == "tokens" and head == "token-classification":
        loss = losses.token_classification
    if loss is None or (loss is not losses.next_token and "labels" not in source(0)):
        raise InputError(
            "labels of the healing needs data with labels, such as a task; give it, or leave "
            "labels out"
        )
    return source, losses.bound(loss)


def _checked(student: Model, teacher: Model, batch: losses.Batch, healing: Healing) -> Output:
    """Returns what two models give; raises `InputError` if it cannot be compared."""
    if _is_same(student, teacher):
        raise InputError(
            "student and teacher are the same model, and there is nothing to heal; the student is "
            "the model after compression"
        )
    asked = bool(healing.hidden_states)
    ours, theirs = (output_of(model, batch, states=asked) for model in (student, teacher))
    if ours.kind != theirs.kind or (ours.classes is None) != (theirs.classes is None):
        heads = [getattr(getattr(m, "provenance", None), "head", None) for m in (student, teacher)]
        raise InputError(
            f"the student's head is {heads[0]!r} and the teacher's {heads[1]!r}; load both with "
            "the same head"
        )
    if ours.classes != theirs.classes:
        what = "classes" if ours.kind == "class" else "tokens or classes"
        raise InputError(
            f"the student has {ours.classes:,} {what} and the teacher {theirs.classes:,}; the "
            "teacher is the model before compression"
        )
    if ours.states != theirs.states:
        raise InputError(
            "the hidden states of student and teacher have other shapes; leave hidden_states out"
        )
    _check_labels(student, _labels_of(teacher), "the teacher's classes")
    return ours


def _is_same(student: Model, teacher: Model) -> bool:
    same = student is teacher or fingerprint_of_model(student) == fingerprint_of_model(teacher)
    return same and fingerprint_of_all_bits(student) == fingerprint_of_all_bits(teacher)


def _check_use(stored: StoredLogits, student: Model, config: TrainConfig, healing: Healing) -> None:
    """Raises `InputError` if stored logits are not enough for what was asked."""
    if healing.hidden_states:
        raise InputError(
            "hidden states are not stored; give the teacher, or leave hidden_states out"
        )
    if config.train == COMPRESSED:
        raise InputError(
            f"train {COMPRESSED!r} compares the MLPs with the teacher's; give the teacher, or "
            "train 'mlp'"
        )
    if healing.top_k not in (None, stored.facts["top_k"]):
        raise InputError(
            f"{stored.folder} has top_k {stored.facts['top_k']}, not {healing.top_k}; leave top_k "
            "out, or store the logits again"
        )
    if stored.facts["teacher"] == fingerprint_of_all_bits(student):
        raise InputError(
            f"the student is the model whose logits are in {stored.folder}, and there is nothing "
            "to heal; the student is the model after compression"
        )
    _check_labels(student, stored.facts["labels"], f"the classes of the logits in {stored.folder}")


def _labels_of(model: Model) -> Sequence[str] | None:
    return getattr(getattr(model, "provenance", None), "labels", None)


def _check_labels(student: Model, theirs: Sequence[str] | None, what: str) -> None:
    """Raises `InputError` if a teacher's classes are not the student's, where both have names."""
    ours = _labels_of(student)
    if ours is not None and theirs is not None and list(ours) != list(theirs):
        raise InputError(
            f"{what} ({', '.join(theirs)}) are not the student's, in the same order "
            f"({', '.join(ours)})"
        )
