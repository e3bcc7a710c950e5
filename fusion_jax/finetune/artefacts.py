"""The artefacts that a run leaves: its best model and its last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fusion_jax.models.base import Model

BEST = "best"
LAST = "last"


def best_keeper(
    folder: Path | None, *, lowest: bool = False
) -> Callable[[Model, list[dict[str, Any]]], None] | None:
    """For `fit`: saves the model under ``best`` whenever the first metric is better than ever.

    Args:
        folder: The folder of the run; None keeps nothing.
        lowest: Whether low values are better.

    Returns:
        What `fit` calls after an evaluation.
    """
    if folder is None:
        return None
    sign = -1 if lowest else 1

    def keep(model: Model, history: list[dict[str, Any]]) -> None:
        main = next(name for name in history[-1] if name != "step")
        if all(sign * history[-1][main] > sign * earlier[main] for earlier in history[:-1]):
            replace(model, folder / BEST)

    return keep


def replace(model: Model, folder: Path) -> None:
    """Saves an artefact in the place of an earlier one."""
    from fusion_jax.checkpoint import save

    if jax.process_index():
        return
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save(model, new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
