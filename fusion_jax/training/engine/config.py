"""The settings of training: one frozen dataclass whose fields are also command-line options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from fusion_jax.errors import InputError, nearest

JsonT = TypeVar("JsonT")
OptimizerName = Literal["adamw", "sgd"]
ScheduleName = Literal["linear", "polynomial", "cosine", "constant"]
ComputeDType = Literal["float32", "bfloat16"]
EXTENDING = ("epochs", "max_steps", "learning_rate", "schedule", "power", "warmup", "eval_every")
"""Settings that may change on purpose when a run resumes: none is part of a checkpoint's shape."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of training; the defaults are those of the paper's runs on RoBERTa.

    Raises:
        InputError: A value is out of range.

    References:
        MLP Fusion (ICML 2023, arXiv 2307.08941), appendix B: AdamW with betas (0.9, 0.98), epsilon
        1e-6, weight decay 0.1, polynomial decay, 6 % warmup, batches of 32, 10 epochs.

    Example:
        >>> TrainConfig(epochs=3, learning_rate=4e-5).batch_size
        32
    """

    epochs: int = 10
    """Passes over the training examples."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule ends there too."""
    batch_size: int = 32
    """Examples per step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Split each batch into this many parts, computed one after the other to save memory."""
    optimizer: OptimizerName = "adamw"
    """AdamW with decoupled weight decay, or SGD."""
    learning_rate: float = 2e-5
    """Highest learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment (for SGD, see momentum)."""
    beta2: float = 0.98
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-6
    """AdamW's epsilon."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to biases and norms."""
    clip_norm: float | None = 1.0
    """Scale gradients with a larger global norm down to this norm; None does not clip."""
    schedule: ScheduleName = "polynomial"
    """How the learning rate falls to 0 after the warmup."""
    power: float = 1.0
    """Exponent of the polynomial schedule; 1 is linear."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    train: str = "all"
    """Which parameters train: all, mlp, head, or a regular expression for whole paths."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """Learning-rate multipliers: pairs of a regular expression for whole paths of parameters and a
    number; the first match applies."""
    compute_dtype: ComputeDType | None = None
    """Dtype of the forward and backward pass; weights and moments stay float32. None for the
    model's own dtype."""
    remat: bool = False
    """Recompute the layers' activations in the backward pass to save memory."""
    router_balance: float | None = None
    """Coefficient of the routers' load-balancing loss in language models with experts, such as
    0.01; None leaves the loss out."""
    router_z: float | None = None
    """Coefficient of the routers' z-loss in language models with experts, such as 0.001; None
    leaves the loss out."""
    dropout: bool = True
    """Whether the model's dropout is on."""
    shapes: int = 4
    """Largest number of lengths that batches are padded to; each is compiled once."""
    max_length: int | None = None
    """Longest text in tokens; None for the number of positions of the model."""
    truncate: bool = False
    """Cut longer texts off instead of refusing them."""
    eval_every: int | None = None
    """Steps between evaluations; None for one per epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None for one per epoch."""
    checkpoint_minutes: float | None = 10.0
    """Write a checkpoint, too, when the last is this many minutes old; None does not."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; the newest are kept."""
    log_every: int = 10
    """Steps between lines of the log; losses are checked for NaN at these steps only."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs fusion-jax[tensorboard])."""
    resume_with: tuple[str, ...] = ()
    """Settings in which this call may differ from the run in the folder, to extend it on purpose:
    epochs, max_steps, learning_rate, schedule, power, warmup, eval_every. The learning rate resumes
    on the schedule of the longer run."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "shapes", "log_every"):
            self._at_least_one(name)
        for name in ("max_steps", "max_length", "eval_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                self._at_least_one(name)
        self._at_least_one("keep_checkpoints")
        for name in ("learning_rate", "epsilon", "power"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2", "momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay must be at least 0; got {self.weight_decay}")
        for name in ("router_balance", "router_z"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must be at least 0, or None; got {getattr(self, name)}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"clip_norm must be above 0, or None; got {self.clip_norm}")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise InputError(
                f"checkpoint_minutes must be above 0, or None; got {self.checkpoint_minutes}"
            )
        for name in self.resume_with:
            if name not in EXTENDING:
                raise InputError(
                    f"resume_with takes {', '.join(EXTENDING)}; got {name!r}"
                    f"{nearest(name, EXTENDING)}"
                )
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        for name, choices in (
            ("optimizer", get_args(OptimizerName)),
            ("schedule", get_args(ScheduleName)),
            ("compute_dtype", (None, *get_args(ComputeDType))),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(map(str, choices))
                raise InputError(f"{name} must be one of {known}; got {getattr(self, name)!r}")

    def _at_least_one(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    def steps(self, per_epoch: int) -> int:
        """Returns the number of steps of a run with this number of batches in an epoch."""
        steps = self.epochs * per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_json(self) -> dict[str, object]:
        """Returns the settings as JSON values by name."""
        fields = dataclasses.asdict(self)
        return {**fields, "multipliers": [list(pair) for pair in self.multipliers]}


def with_current_names(fields: Mapping[str, JsonT]) -> dict[str, JsonT]:
    """Returns the JSON values of a `TrainConfig` under its present field names.

    Example:
        >>> with_current_names({"optimiser": "sgd", "epochs": 3})
        {'optimizer': 'sgd', 'epochs': 3}
    """
    return {"optimizer" if name == "optimiser" else name: x for name, x in fields.items()}
