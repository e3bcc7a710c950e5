"""Static pruning: weights stay as they were pre-trained; only which of them count is learnt."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float, Key

from fusion_jax.checkpoint.masks import save_masks
from fusion_jax.compression.matrices import LAYERS, select_matrices
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance
from fusion_jax.nn.dtypes import wide
from fusion_jax.nn.linear_forms import Masked, Scored, check_plain, find_forms
from fusion_jax.nn.surgery import replaced
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Batch, Loss, Total
from fusion_jax.training.engine.step import Rule
from fusion_jax.training.engine.trainer import Fit
from fusion_jax.training.tasks.classification import check_head, finetune
from fusion_jax.training.tasks.glue import TaskData
from ntk.selection import Selection

ModelT = TypeVar("ModelT", bound=nnx.Module)
Allocation = Literal["S", "L"]

SCORES = TrainConfig(
    epochs=12,
    batch_size=64,
    learning_rate=2e-2,
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    schedule="linear",
    warmup=0.0,
)
"""How the published code trains scores on GLUE's large tasks; on small ones, 60 epochs of batches
of 32."""

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

MNLI's are for entailment, neutral, contradiction. The published code orders the classes anew and
not the words, and so has "Maybe" for entailment, "No" for neutral and "Yes" for contradiction.

References:
    Jiang et al. (ACL 2023), and its code.
"""


@dataclass(frozen=True, kw_only=True)
class StaticPruning:
    """How weights are chosen; the defaults are those of the published code where it has one value.

    Step t of T keeps ``keep + (1 - keep) (1 - t / N)^3`` of the weights, and adds ``lambda R`` to
    the loss: R is the mean over matrices of their mean sigmoid(S), and lambda rises to ``penalty``.

    References:
        Jiang et al. (ACL 2023), Pruning Pre-trained Language Models Without Fine-Tuning, and its
        code. Text and code differ: in the text R is a sum (``penalty_of``), with which a lambda of
        400 would outweigh any loss, and lambda rises with the pruning (``penalty_steps`` equal to
        ``ramp``).

    Example:
        >>> smp = StaticPruning(keep=0.5, ramp=4)
        >>> [round(float(smp.kept(jnp.int32(t), 10)), 3) for t in range(6)]
        [1.0, 0.711, 0.562, 0.508, 0.5, 0.5]
    """

    keep: float = 0.5
    """The share of the weights to keep in the end."""
    allocation: Allocation = "S"
    """L keeps the same share of each matrix; S more of those with larger scores, balanced over the
    layers among matrices of one type."""
    ramp: int | float = 0.6
    """Steps N until the share is reached, or their part of the run. The paper's text has 3500 steps
    to keep little and 7 of 12 epochs to keep 0.7 and more; its scripts the opposite."""
    temperature: float = 1.0
    """S compares sigmoid(scores / temperature): above 1, layers are more alike. The published
    scripts have 4 to keep 0.7 and more: else shares of S reach 1, and less is kept in all."""
    penalty: float = 400.0
    """Factor of the mean sigmoid of the scores in the loss, in the end."""
    penalty_of: Literal["mean", "sum"] = "mean"
    """What the factor is of: "sum" is R as the paper prints it, the sigmoids of all scores added
    up: of BERT-base some 43 million at first, so that it wants another penalty than 400."""
    penalty_steps: int | float = 1.0
    """Steps until the penalty is whole, or their part of the run."""
    matrices: str = LAYERS
    """Which matrices: a regular expression for whole paths."""
    train_head: bool = False
    """Whether the head trains too, for one that was not pre-trained."""

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be in (0, 1]; got {self.keep}")
        if self.allocation not in get_args(Allocation):
            raise InputError(f"allocation must be S or L; got {self.allocation!r}")
        if not self.temperature > 0:
            raise InputError(f"temperature must be above 0; got {self.temperature}")
        if self.penalty_of not in ("mean", "sum"):
            raise InputError(f"penalty_of must be mean or sum; got {self.penalty_of!r}")
        if not 0 <= self.penalty < math.inf:
            raise InputError(f"penalty must be at least 0, and finite; got {self.penalty}")
        for name in ("ramp", "penalty_steps"):
            value = getattr(self, name)
            if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
                raise InputError(f"{name} must be steps or a part in (0, 1]; got {value}")

    def ramp_steps(self, steps: int) -> int:
        """The steps N of the ramp in a run.

        Args:
            steps: All steps of the run.

        Returns:
            The number, below ``steps``, so that the last step keeps what is asked for.

        Raises:
            InputError: The run is too short.
        """
        found = _steps(self.ramp, steps)
        if found >= steps:
            raise InputError(
                f"keep is reached after {found} steps (ramp {self.ramp}), but the run has {steps}; "
                "train longer or give a shorter ramp"
            )
        return found

    def kept(self, step: Array, steps: int) -> Float[Array, ""]:
        """The share that a step keeps.

        Args:
            step: Steps done before.
            steps: All steps of the run.

        Returns:
            From 1 down to ``keep``.
        """
        return self.keep + (1 - self.keep) * _left(step, self.ramp_steps(steps))

    def rule(self, model: nnx.Module, steps: int) -> Rule:
        """What each step sets: the shares to keep, and the factor of the penalty.

        Args:
            model: A model with `Scored` layers.
            steps: All steps of the run.

        Returns:
            For the argument ``rule`` of `finetune` and `fit`.

        Raises:
            InputError: The model has no scores, or the run is too short.
        """
        self.ramp_steps(steps)
        types: dict[str, list[str]] = {}
        for path in _scored(model):
            kind = ".".join(name for name in path.split(".") if not name.isdigit())
            types.setdefault(kind, []).append(path)

        def values(params: Mapping, rest: Mapping, step: Array) -> dict[str, Array]:
            keep = self.kept(step, steps)
            penalty = self.penalty * (1 - _left(step, _steps(self.penalty_steps, steps)))
            new = {}
            for paths in types.values():
                scores = [params[f"{path}.scores"] for path in paths]
                shares = self._shares(scores, keep)
                for path, share in zip(paths, shares, strict=True):
                    whole = jnp.broadcast_to(penalty, share.shape)
                    new |= {f"{path}.keep": share, f"{path}.penalty": whole}
            return new

        return values

    def _shares(self, scores: list[Array], keep: Array) -> list[Array]:
        """The shares of the matrices of one type: (*s) each, for scores (*s d o)."""
        stacks = [x.shape[:-2] for x in scores]
        if self.allocation == "L":
            return [jnp.broadcast_to(keep, stack) for stack in stacks]
        large = [
            jax.nn.sigmoid(x / self.temperature).mean((-1, -2)).astype(keep.dtype) for x in scores
        ]
        # Weights are counted, not matrices, where those of a type differ in size.
        total = sum((r * (x.size / r.size)).sum() for r, x in zip(large, scores, strict=True))
        scale = keep * sum(x.size for x in scores) / jnp.maximum(total, jnp.finfo(keep.dtype).tiny)
        return [jnp.minimum(r * scale, 1.0) for r in large]


def _steps(value: int | float, steps: int) -> int:
    return value if isinstance(value, int) else max(1, int(value * steps))


def _left(step: Array, steps: int) -> Array:
    return (1 - jnp.minimum(step.astype(jnp.float32) / steps, 1.0)) ** 3


def _scored(model: nnx.Module) -> dict[str, Scored]:
    found = {path: form for path, form in find_forms(model).items() if isinstance(form, Scored)}
    if not found:
        raise InputError("the model has no scores; see fusion_jax.training.scored")
    return found


@on_auto_axes
def scored(model: ModelT, *, matrices: Selection = LAYERS) -> ModelT:
    """The same function with matrices as `Scored` layers, whose weights are Frozen.

    Args:
        model: The model; not changed.
        matrices: Which plain linear layers: a regular expression for whole paths, or a function of
            a path.

    Returns:
        The model with all scores 0, which shares its arrays with the original.

    Raises:
        InputError: No layer was chosen, or one is not plain.

    Example:
        >>> from fusion_jax import Mlp
        >>> mlp = scored(Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)), matrices="up")
        >>> type(mlp.up).__name__, type(mlp.up.kernel).__name__, type(mlp.down).__name__
        ('Scored', 'Frozen', 'Linear')
    """
    new: Any = nnx.clone(model)
    for path, layer in select_matrices(model, matrices).items():
        if isinstance(layer, nnx.Embed):
            raise InputError(f"{path} is an embedding; only linear layers have scores")
        check_plain(layer, path)
        form = Scored.abstract(layer)
        kernel = layer.kernel[...]
        one = jnp.ones(kernel.shape[:-2], jnp.float32)
        values = [kernel, wide(jnp.zeros_like(kernel)), one, jnp.zeros_like(one)]
        form.load(values, None if layer.bias is None else layer.bias[...])
        new = replaced(new, path, form)
    return new


@on_auto_axes
def finished(model: ModelT) -> ModelT:
    """The same function with masks that stay as they are in the place of scores.

    Args:
        model: A model with `Scored` layers; not changed.

    Returns:
        The model with `Masked` layers, whose pruned weights are 0.

    Raises:
        InputError: The model has no scores.
    """
    new: Any = nnx.clone(model)
    for path, form in _scored(model).items():
        mask, kernel = _mask(form), np.asarray(form.kernel[...])
        masked = Masked.abstract(form)
        kept = np.where(mask, kernel, np.zeros((), kernel.dtype))
        arrays = [jnp.asarray(kept), jnp.asarray(mask)]
        masked.load(arrays, None if form.bias is None else form.bias[...])
        new = replaced(new, path, masked)
    return new


def _mask(form: Scored) -> np.ndarray:
    """The mask, computed on one device, since on a mesh one process alone writes artefacts."""
    one = jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.local_devices()[:1])
    with jax.set_mesh(one):
        return np.asarray(_jitted_mask(jax.tree.map(np.asarray, form)))


@jax.jit
def _jitted_mask(form: Scored) -> Array:
    return form.mask()


def penalised(loss: Loss, *, of: Literal["mean", "sum"] = "mean") -> jax.tree_util.Partial:
    """A loss, and the mean over matrices of the mean sigmoid of their scores, times its factor.

    Args:
        loss: The loss besides.
        of: "sum" has the sum of all sigmoids instead.

    Returns:
        The loss; the factor is the variable ``penalty`` of `Scored` layers, which `StaticPruning`
        sets.
    """
    bound = loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)
    return jax.tree_util.Partial(partial(_penalised, of), bound)


def _penalised(of: str, loss: Loss, model: Any, batch: Batch, key: Any) -> Total:
    own = loss(model, batch, key)
    add = jnp.sum if of == "sum" else jnp.mean
    parts = []
    for form in _scored(model).values():
        scores = add(jax.nn.sigmoid(form.scores[...]), (-1, -2)).astype(own.total.dtype)
        parts.append(jnp.ravel(form.penalty[...].astype(scores.dtype) * scores))
    return Total(own.total + add(jnp.concatenate(parts)) * own.count, own.count)


@on_auto_axes
def static_prune(
    model: Model,
    data: TaskData,
    config: TrainConfig = SCORES,
    smp: StaticPruning = StaticPruning(),
    *,
    key: Key[Array, ""],
    teacher: Model | None = None,
    loss: Callable[[Loss], Loss] | None = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Fit:
    """Prunes a pre-trained model for a task by learning which of its weights count.

    Nothing else trains, not the head either, unless ``smp.train_head``: take one that is
    pre-trained, ``load(..., head="classification", label_words=...)``. A run goes on where it was
    stopped, as those of `finetune`.

    Args:
        model: A model with a classification head, such as of label words; not changed.
        data: From `load_task` or `read_task`.
        config: How to train; ``train`` does not apply.
        smp: How weights are chosen.
        key: Random key of dropout and of the order of the examples.
        teacher: A model fine-tuned on the task, for distillation with `losses.distilled`.
        loss: What is minimised besides the penalty, made of the task's loss, in place of that: for
            a teacher in another way, ``partial(losses.distilled, teacher, reverse=True)``. A run
            that is gone on with does not tell whether it is the same.
        folder: Where the run is kept, as in `finetune`. The artefacts ``best`` and ``last`` are
            masks beside a reference to the model (`save_masks`); only models with the share that
            was asked for are taken for the best.
        **options: Further arguments of `finetune`: ``on_step``, ``multipliers``, ``progress``.

    Returns:
        The pruned model, with `Masked` layers, and the metrics of every evaluation. If the run was
        stopped, the model with its scores.

    Raises:
        InputError: Model, data and configurations do not fit together, or the folder holds another
            run. Raised before training starts.
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
    if teacher is not None and loss is not None:
        raise InputError("give a teacher, or a loss that has one; not both")
    if teacher is not None:
        check_head(teacher, data.task)
        if data.task.labels is None:
            raise InputError(f"{data.task.name} has no classes, which a teacher is for")
    steps = config.steps(-(-len(data.train.texts) // config.batch_size))
    student = scored(model, matrices=smp.matrices)
    about = {
        **dataclasses.asdict(smp),
        "teacher": None if teacher is None else teacher.provenance.folder,
    }
    provenance = getattr(student, "provenance", None)
    if isinstance(provenance, Provenance):
        student.provenance = provenance.after({"static pruning": about})

    def made(own: Loss) -> Loss:
        if teacher is not None:
            own = losses.distilled(teacher, own)
        elif loss is not None:
            own = loss(own)
        return penalised(own, of=smp.penalty_of)

    beginnings = ("head.", "pooler.") if smp.train_head else ()
    result = finetune(
        student,
        data,
        config,
        key=key,
        folder=folder,
        trains=lambda path: path.endswith(".scores") or path.startswith(beginnings),
        loss=made,
        rule=smp.rule(student, steps),
        save=lambda model, folder: save_masks(finished(model), folder),
        best_from=smp.ramp_steps(steps) + 1,
        about=about,
        **options,
    )
    return dataclasses.replace(result, model=finished(result.model)) if result.finished else result
