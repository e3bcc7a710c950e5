"""How to train: one frozen dataclass, whose fields are the command line's options too."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fusion_jax.errors import InputError

Optimiser = Literal["adamw", "sgd"]
Schedule = Literal["linear", "polynomial", "cosine", "constant"]
ComputeDType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are those of the paper's runs on RoBERTa.

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
    """Parts that a batch is computed in, one after the other, to save memory."""
    optimiser: Optimiser = "adamw"
    """AdamW with decoupled weight decay, or SGD."""
    learning_rate: float = 2e-5
    """Highest learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment; the momentum of SGD is in its own field."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-6
    """AdamW's epsilon."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms have none."""
    clip_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it; None does not."""
    schedule: Schedule = "polynomial"
    """How the learning rate falls to 0 after the warmup."""
    power: float = 1.0
    """Exponent of the polynomial schedule; 1 is linear."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0."""
    train: str = "all"
    """What trains: all, mlp, head, or a regular expression for whole paths of parameters."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """Regular expressions for whole paths of parameters, each with what multiplies the learning
    rate there; the first that matches counts."""
    compute_dtype: ComputeDType | None = None
    """Dtype of forward and backward; weights and moments stay float32. None for the model's own."""
    remat: bool = False
    """Compute layers' activations again in the backward pass instead of keeping them."""
    router_balance: float | None = None
    """Coefficient of the routers' load-balancing loss, for language models with experts, such as
    0.01; None leaves it out."""
    router_z: float | None = None
    """Coefficient of the routers' z-loss, for language models with experts, such as 0.001; None
    leaves it out."""
    dropout: bool = True
    """Whether the model's dropout is on."""
    shapes: int = 4
    """Most different lengths that batches are padded to; each is compiled once."""
    max_length: int | None = None
    """Longest text in tokens; None for what the model has positions for."""
    truncate: bool = False
    """Cut longer texts off instead of refusing them."""
    eval_every: int | None = None
    """Steps between evaluations; None for one per epoch."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None for one per epoch."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, newest first."""
    log_every: int = 10
    """Steps between lines of the log; the loss is looked at only then."""
    tensorboard: bool = False
    """Write TensorBoard events too (needs fusion-jax[tensorboard])."""

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
        if self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}"
            )
        for name, choices in (
            ("optimiser", get_args(Optimiser)),
            ("schedule", get_args(Schedule)),
            ("compute_dtype", (None, *get_args(ComputeDType))),
        ):
            if getattr(self, name) not in choices:
                known = ", ".join(map(str, choices))
                raise InputError(f"{name} must be one of {known}; got {getattr(self, name)!r}")

    def _at_least_one(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")

    def steps(self, per_epoch: int) -> int:
        """The steps of a run with so many batches in an epoch."""
        steps = self.epochs * per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        fields = dataclasses.asdict(self)
        return {**fields, "multipliers": [list(pair) for pair in self.multipliers]}
