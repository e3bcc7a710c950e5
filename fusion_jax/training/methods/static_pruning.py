"""Static pruning: pre-trained weights stay fixed, and scores learn which weights to keep."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from fusion_jax.checkpoint.masks import save_masks
from fusion_jax.compression.matrices import LAYERS
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.fingerprints import fingerprint_of_all_bits
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.recipe import Recipe
from fusion_jax.training.engine.step import VariableUpdate
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.methods.finetuning import finetune
from fusion_jax.training.methods.importance import type_of
from fusion_jax.training.methods.scores import (
    PenaltyOf,
    penalized,
    scored_layers,
    with_masks,
    with_scores,
)
from fusion_jax.training.tasks.classes import check_head
from fusion_jax.training.tasks.classification import Classification

Allocation = Literal["S", "L"]

SCORE_CONFIG = TrainConfig(
    epochs=12,
    batch_size=64,
    learning_rate=2e-2,
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    schedule="linear",
    warmup=0.0,
)
"""The published code's settings for training scores on GLUE's large tasks; for small tasks it has
60 epochs and batches of 32."""

LABEL_WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sst2": ("terrible", "great"),
        "cola": ("incorrect", "correct"),
        "mrpc": ("No", "Yes"),
        "stsb": ("Yes",),
        "qqp": ("No", "Yes"),
        "mnli": ("Yes", "Maybe", "No"),
        "qnli": ("Yes", "No"),
        "rte": ("Yes", "No"),
    }
)
"""The label words of GLUE's tasks, in the order of their classes.

MNLI's words are for entailment, neutral, contradiction. The published code reorders the classes but
not the words, so that it has "Maybe" for entailment, "No" for neutral and "Yes" for contradiction.

References:
    Jiang et al. (ACL 2023), and its code.
"""


@dataclass(frozen=True, kw_only=True)
class StaticPruning:
    """Settings of static pruning; the defaults are those of the published code.

    Step t keeps the share ``keep + (1 - keep) (1 - t / N)^3`` of the weights and adds ``lambda R``
    to the loss: R is the mean over matrices of the mean sigmoid of their scores, and lambda rises
    to ``penalty``.

    Raises:
        InputError: A value is out of range.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning, and its
        code. Text and code differ: in the text R is a sum (``penalty_of``), with which a lambda of
        400 would outweigh any loss, and lambda rises with the pruning (``penalty_steps`` equal to
        ``ramp``).

    Example:
        >>> pruning = StaticPruning(keep=0.5, ramp=4)
        >>> [round(float(pruning.kept(jnp.int32(t), 10)), 3) for t in range(6)]
        [1.0, 0.711, 0.562, 0.508, 0.5, 0.5]
    """

    keep: float = 0.5
    """The share of the weights to keep at the end."""
    allocation: Allocation = "S"
    """L keeps the same share of each matrix; S keeps more of matrices with larger scores, balanced
    over the layers among matrices of one type."""
    ramp: int | float = 0.6
    """Steps N until the share is reached: an int, or a float for a part of the run. The paper's
    text has 3500 steps for a small share and 7 of 12 epochs for 0.7 and more; its scripts have the
    opposite."""
    temperature: float = 1.0
    """Allocation S compares sigmoid(scores / temperature): above 1, layers become more similar. The
    published scripts have 4 for shares of 0.7 and more: otherwise some shares of S reach 1, and
    less is kept in total."""
    penalty: float = 400.0
    """The final factor lambda of the scores' sigmoids in the loss."""
    penalty_of: PenaltyOf = "mean"
    """The meaning of R: "sum" is the paper's equation, the sum of the sigmoids of all scores, which
    starts at 43 million for BERT-base, so that it needs another penalty than 400."""
    penalty_steps: int | float = 1.0
    """Steps until the penalty is reached: an int, or a float for a part of the run."""
    matrices: str = LAYERS
    """Which matrices: a regular expression for whole paths."""
    train_head: bool = False
    """Whether the head trains too; for a head that was not pre-trained."""

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be in (0, 1]; got {self.keep}")
        if self.allocation not in get_args(Allocation):
            raise InputError(f"allocation must be S or L; got {self.allocation!r}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0; got {self.temperature}")
        if self.penalty_of not in get_args(PenaltyOf):
            raise InputError(f"penalty_of must be mean or sum; got {self.penalty_of!r}")
        if not 0 <= self.penalty < math.inf:
            raise InputError(f"penalty must be at least 0, and finite; got {self.penalty}")
        for name in ("ramp", "penalty_steps"):
            value = getattr(self, name)
            if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
                raise InputError(f"{name} must be steps or a part in (0, 1]; got {value}")

    def ramp_steps(self, steps: int) -> int:
        """Returns the number of steps N of the ramp in a run.

        Args:
            steps: The number of steps of the run.

        Returns:
            The number, below ``steps``, so that the last step keeps the final share.

        Raises:
            InputError: The run is too short.
        """
        ramp = _steps(self.ramp, steps)
        if ramp >= steps:
            raise InputError(
                f"keep is reached after {ramp} steps (ramp {self.ramp}), but the run has {steps}; "
                "train longer or give a shorter ramp"
            )
        return ramp

    def kept(self, step: Array, steps: int) -> Float[Array, ""]:
        """Returns the share of the weights that a step keeps, which falls from 1 to ``keep``.

        Args:
            step: The number of steps done before.
            steps: The number of steps of the run.
        """
        return self.keep + (1 - self.keep) * _left(step, self.ramp_steps(steps))

    def variable_update(self, model: nnx.Module, steps: int) -> VariableUpdate:
        """Returns the function that sets the shares and the penalty before each step.

        Args:
            model: A model with `Scored` layers.
            steps: The number of steps of the run.

        Returns:
            The value for the field ``update`` of a `Recipe`.

        Raises:
            InputError: The model has no scores, or the run is too short.
        """
        self.ramp_steps(steps)
        types: dict[str, list[str]] = {}
        for path in scored_layers(model):
            types.setdefault(type_of(path), []).append(path)

        def values(params: Mapping, rest: Mapping, step: Array) -> dict[str, Array]:
            keep = self.kept(step, steps)
            penalty = self.penalty * (1 - _left(step, _steps(self.penalty_steps, steps)))
            new = {}
            for paths in types.values():
                scores = [params[f"{path}.scores"] for path in paths]
                shares = self._shares(scores, keep)
                for path, share in zip(paths, shares, strict=True):
                    penalties = jnp.broadcast_to(penalty, share.shape)
                    new |= {f"{path}.keep": share, f"{path}.penalty": penalties}
            return new

        return values

    def _shares(self, scores: list[Array], keep: Array) -> list[Array]:
        """Returns the shares of the matrices of one type: (*s) each, for scores (*s d o)."""
        stacks = [x.shape[:-2] for x in scores]
        if self.allocation == "L":
            return [jnp.broadcast_to(keep, stack) for stack in stacks]
        large = [
            jax.nn.sigmoid(x / self.temperature).mean((-1, -2)).astype(keep.dtype) for x in scores
        ]
        # Weighted by size, since the matrices of a type may differ in size.
        total = sum((r * (x.size / r.size)).sum() for r, x in zip(large, scores, strict=True))
        scale = keep * sum(x.size for x in scores) / jnp.maximum(total, jnp.finfo(keep.dtype).tiny)
        return [jnp.minimum(r * scale, 1.0) for r in large]


def _steps(value: int | float, steps: int) -> int:
    return value if isinstance(value, int) else max(1, int(value * steps))


def _left(step: Array, steps: int) -> Array:
    return (1 - jnp.minimum(step.astype(jnp.float32) / steps, 1.0)) ** 3


@on_auto_axes
def static_prune(
    model: Model,
    data: Classification,
    config: TrainConfig = SCORE_CONFIG,
    pruning: StaticPruning = StaticPruning(),
    *,
    key: Key[Array, ""],
    teacher: Model | None = None,
    folder: str | os.PathLike[str] | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    progress: bool | None = None,
) -> Fit[Model]:
    """Prunes a pre-trained model for a task by learning which of its weights to keep.

    Only scores train; the head trains too with ``pruning.train_head``. Otherwise use a pre-trained
    head, ``load(..., head="classification", label_words=...)``. A stopped run can be resumed, as
    with `finetune`.

    Args:
        model: A model with a classification head, such as one of label words; not changed.
        data: A task from `load_task` or `read_task`.
        config: The settings of training; ``train`` does not apply.
        pruning: The settings of pruning.
        key: Random key of dropout and of the order of the examples.
        teacher: A model fine-tuned on the task, for distillation with `losses.distilled`.
        folder: Where the run is kept, as in `finetune`. The artefacts ``best`` and ``last`` are
            masks and a reference to the model (`save_masks`). Only models with the final share
            count for ``best``.
        recipe: Further customization; only ``loss``, ``multipliers`` and ``on_step`` apply. The
            loss is that of the task without the penalty, such as
            ``partial(losses.distilled, teacher, reverse=True)``; a resumed run cannot check that it
            is the same.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The pruned model, with `Masked` layers, and the metrics of all evaluations. If the run was
        stopped, the model with its scores.

    Raises:
        InputError: Model, data and settings do not fit together, or the folder holds another run.
            Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning.

    Example:
        >>> words = LABEL_WORDS["sst2"]
        >>> model = load(name, head="classification", label_words=words)  # doctest: +SKIP
        >>> fit = static_prune(model, data, key=key, folder="run")  # doctest: +SKIP
    """
    if config.train != "all":
        raise InputError("train does not apply: scores train, and the head with train_head")
    recipe.check_only("loss", "multipliers", "on_step", method="static_prune")
    if teacher is not None and recipe.loss is not None:
        raise InputError("give a teacher, or a loss that has one; not both")
    if teacher is not None:
        check_head(teacher, data.spec)
        if data.spec.labels is None:
            raise InputError(f"{data.spec.name} has no classes, but a teacher needs classes")
    steps = config.steps(-(-len(data.train.texts) // config.batch_size))
    student = with_scores(model, matrices=pruning.matrices)
    about = {
        **dataclasses.asdict(pruning),
        "teacher": None if teacher is None else teacher.provenance.folder,
    }
    provenance = getattr(student, "provenance", None)
    if isinstance(provenance, Provenance):
        student.provenance = provenance.after({"static pruning": about})

    given = recipe.loss

    def loss(own: Loss) -> Loss:
        if teacher is not None:
            own = losses.distilled(teacher, own)
        elif given is not None:
            own = given(own)
        return penalized(own, of=pruning.penalty_of)

    prefixes = ("head.", "pooler.") if pruning.train_head else ()
    recipe = dataclasses.replace(
        recipe,
        trains=lambda path: path.endswith(".scores") or path.startswith(prefixes),
        loss=loss,
        update=pruning.variable_update(student, steps),
        about=about,
    )
    if folder is not None:
        # Not in the history of the artefact, which is written without a folder too.
        weights = None if teacher is None else fingerprint_of_all_bits(teacher)
        recipe = dataclasses.replace(
            recipe,
            about={**about, "weights of the teacher": weights},
            save=lambda model, folder: save_masks(with_masks(model), folder),
            best_from=pruning.ramp_steps(steps) + 1,
        )
    fit = finetune(student, data, config, key=key, folder=folder, recipe=recipe, progress=progress)
    return dataclasses.replace(fit, model=with_masks(fit.model)) if fit.finished else fit
