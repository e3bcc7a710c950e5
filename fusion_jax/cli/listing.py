"""The command models."""

from __future__ import annotations

from fusion_jax.models.registry import coverage


def models() -> None:
    """List the types of models that can be loaded, their heads, and what they were tested on."""
    print(f"{'model_type':20} {'tested on':20} heads")
    for known in coverage():
        print(f"{known.model_type:20} {known.tested:20} {', '.join(known.heads)}")


COMMANDS = {"models": models}
