"""The record of a run: ``metrics.jsonl``, and TensorBoard events on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fusion_jax.errors import InputError


class Log:
    """Writes lines of numbers.

    Args:
        folder: Where; None writes nothing.
        tensorboard: Whether to write TensorBoard events too.
        after: Drops lines of later steps, which a run that goes on will write again.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, after: int = 0):
        self._file = None
        self._board = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines(True) if _step(line) <= after]
            new = path.with_suffix(".new")
            new.write_text("".join(kept))
            os.replace(new, path)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
            except ImportError:
                raise InputError(
                    "tensorboard needs tensorboardX: pip install 'fusion-jax[tensorboard]'"
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Writes one line: the steps done, and what is to say of them."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def _step(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line cut off when the run was killed
