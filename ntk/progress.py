"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """A function to call after each step."""

    def __call__(self, step: str, n: int = 1) -> None:
        """Counts n finished steps; ``step`` describes the last of them."""
        ...


@contextmanager
def show_progress(title: str, total: int, show: bool | None) -> Iterator[Advance]:
    """Shows on standard error how much of some work is done.

    Args:
        title: The name of the work.
        total: The number of steps.
        show: True for a bar on a terminal and plain lines elsewhere; False for nothing; None for a
            bar on a terminal and nothing elsewhere.

    Yields:
        A function to call after each step, with a short description of the step.

    Example:
        >>> with show_progress("Fusing", 2, show=False) as advance:
        ...     advance("layers.0.mlp")
    """
    terminal = sys.stderr.isatty()
    if show is False or (show is None and not terminal):
        yield lambda step, n=1: None
    elif terminal:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[step]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, step="")
            yield lambda step, n=1: bar.update(task, advance=n, step=step)
    else:
        done, start = 0, time.perf_counter()

        def line(step: str, n: int = 1) -> None:
            nonlocal done
            done += n
            seconds = time.perf_counter() - start
            print(f"{title}: {done}/{total} {step} ({seconds:.1f} s)", file=sys.stderr, flush=True)

        yield line
