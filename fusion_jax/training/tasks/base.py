"""The protocol of tasks: anything that a model can be fine-tuned on."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from flax import nnx
from jaxtyping import Array, Key

from fusion_jax.training.engine.batches import BatchSource
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.trainer import Evaluate

ModelT_contra = TypeVar("ModelT_contra", bound=nnx.Module, contravariant=True)


class Classes(NamedTuple):
    """The classes and the purpose of a head with classes, as in `Provenance`.

    Args:
        labels: The names of the classes in the order of the logits; None for regression.
        problem_type: ``"single_label_classification"`` or ``"regression"``; None for tokens.
    """

    labels: tuple[str, ...] | None
    problem_type: str | None


class Prepared(NamedTuple):
    """A task that is ready for the training of one model.

    Args:
        batches: The training batches.
        loss: The loss to minimize.
        evaluate: Measures a model: metrics by name, of which the first chooses the best model. None
            if the task has no data for that.
        lowest: Whether the lowest value of the first metric is the best.
        classes: What the trained model's classification head is for, if it has one.
    """

    batches: BatchSource
    loss: Loss
    evaluate: Evaluate | None = None
    lowest: bool = False
    classes: Classes | None = None


@runtime_checkable
class Task(Protocol[ModelT_contra]):
    """A task with its data, such as `Classification`, `TextPairs` or `PlainText`."""

    def prepare(
        self, model: ModelT_contra, config: TrainConfig, *, key: Key[Array, ""]
    ) -> Prepared:
        """Returns what training a model on the task needs.

        Args:
            model: The model to train.
            config: The settings of training.
            key: The key that `finetune` gets; the order of the examples depends on it.

        Returns:
            The batches, the loss and the evaluation.

        Raises:
            InputError: Model, data and configuration do not fit together.
        """
        ...

    def inputs(
        self, model: ModelT_contra, config: TrainConfig, *, key: Key[Array, ""]
    ) -> BatchSource:
        """Returns the training inputs in batches, for layer-wise tuning.

        Args:
            model: The model to tune.
            config: The settings of training.
            key: The key that `tune` gets; the order of the examples depends on it.

        Returns:
            The batches.

        Raises:
            InputError: Model, data and configuration do not fit together.
        """
        ...
