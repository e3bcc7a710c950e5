"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

_SHOW: ContextVar[bool | None] = ContextVar("show", default=None)
"""What None means for ``show``; None for a bar on a terminal and nothing elsewhere."""
_BARS: ContextVar[Any] = ContextVar("bars", default=None)
"""The bars that are on the terminal; work inside other work adds a bar to them."""
_SECONDS_BETWEEN_LINES = 2.0


@runtime_checkable
class Advance(Protocol):
    """A function to call after each step."""

    def __call__(self, step: str, n: int = 1, *, begins: bool = False) -> None:
        """Counts n finished steps.

        ``step`` describes the last of them; or with ``begins`` the step that begins, which is
        always shown.
        """
        ...


@contextmanager
def progress_shown(show: bool) -> Iterator[None]:
    """Shows the progress of all work inside, or of none, where its own ``show`` is None.

    Example:
        >>> with progress_shown(False), show_stage("Loading"):
        ...     pass
    """
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


@contextmanager
def show_progress(
    title: str, total: int, show: bool | None = None, *, done: int = 0, first: str = ""
) -> Iterator[Advance]:
    """Shows on standard error how much of some work is done, and about how long the rest takes.

    The time left is estimated from all steps but the first, which often includes compilation.
    Elsewhere than on a terminal, there is a line at the start, at the end, and in between for steps
    that end at least two seconds after the line before.

    Args:
        title: The name of the work.
        total: The number of steps.
        show: True for a bar on a terminal and plain lines elsewhere; False for nothing; None for
            what the work around it shows, and otherwise for a bar on a terminal and nothing
            elsewhere. It holds for all work inside too.
        done: The number of steps that were done earlier.
        first: What the work begins with, such as ``"compiling"``.

    Yields:
        A function to call after each step, with a short description of the step.

    Example:
        >>> with show_progress("Fusing", 2, show=False) as advance:
        ...     advance("layers.0.mlp")
    """
    with _shown(show) as shown:
        if not shown:
            yield lambda step, n=1, *, begins=False: None
            return
        with _display(title, total) as display:
            counts = _Counts(total, done)
            display(counts, first, True)

            def advance(step: str, n: int = 1, *, begins: bool = False) -> None:
                counts.add(n)
                display(counts, step, begins)

            yield advance


@contextmanager
def show_stage(title: str, show: bool | None = None) -> Iterator[None]:
    """Shows on standard error that some work has begun whose steps cannot be counted.

    Args:
        title: The name of the work.
        show: As for `show_progress`.

    Example:
        >>> with show_stage("Loading", show=False):
        ...     pass
    """
    with _shown(show) as shown:
        if not shown:
            yield
        elif sys.stderr.isatty():
            with _display(title, None):
                yield
        else:
            print(f"{title} ...", file=sys.stderr, flush=True)
            yield


@contextmanager
def _shown(show: bool | None) -> Iterator[bool]:
    show = _SHOW.get() if show is None else show
    shown = sys.stderr.isatty() if show is None else show
    with progress_shown(shown):
        yield shown


class _Counts:
    """Counts steps and estimates the time that is left."""

    def __init__(self, total: int, done: int):
        self.total, self.done, self._start = total, done, time.perf_counter()
        self._first: tuple[int, float] | None = None

    def add(self, n: int) -> None:
        self.done += n
        if n and self._first is None:
            self._first = self.done, time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def left(self) -> str:
        """Returns the time left in words; empty if it is not known."""
        if self._first is None or not self._first[0] < self.done < self.total:
            return ""
        done, then = self._first
        speed = (time.perf_counter() - then) / (self.done - done)
        left = speed * (self.total - self.done)
        return f", about {_span(left)} left" if left >= 1 else ""


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class _Display(Protocol):
    def __call__(self, counts: _Counts, step: str, begins: bool) -> None: ...


@contextmanager
def _display(title: str, total: int | None) -> Iterator[_Display]:
    """Shows a bar on a terminal and prints lines elsewhere; yields a function that updates it."""
    if not sys.stderr.isatty():
        yield _Lines(title)
        return
    with _bars() as bars:
        task = bars.add_task(title, total=total, note="")

        def update(counts: _Counts, step: str, begins: bool) -> None:
            note = f"{counts.done}/{counts.total}{counts.left()} {step}"
            bars.update(task, completed=counts.done, note=note)

        try:
            yield update
        finally:
            bars.remove_task(task)


class _Lines:
    """Prints what is done as lines on standard error."""

    def __init__(self, title: str):
        self._title, self._printed = title, time.perf_counter()

    def __call__(self, counts: _Counts, step: str, begins: bool) -> None:
        now, ends = time.perf_counter(), counts.done >= counts.total
        if begins or ends or now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            what = f"{self._title}: {counts.done}/{counts.total} {step}".rstrip()
            print(f"{what} ({_span(counts.seconds())}{counts.left()})", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Any]:
    """Returns the bars on the terminal, of which there can be one group at a time."""
    if _BARS.get() is not None:
        yield _BARS.get()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    # Markup off: names of parameters have brackets.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bars = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    with bars:
        token = _BARS.set(bars)
        try:
            yield bars
        finally:
            _BARS.reset(token)
