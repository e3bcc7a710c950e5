"""Stops runs in an orderly way: on Ctrl-C and SIGTERM, which clouds send to free a machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np


class Terminated(BaseException):
    """SIGTERM came where there was nothing to save; like KeyboardInterrupt for Ctrl-C."""


class StopSignal:
    """Whether this process was told to stop."""

    def __init__(self):
        self.received = False
        self.interrupted = False
        """Whether it was told so by Ctrl-C."""

    def agreed(self, step: int, every: int) -> bool:
        """Returns whether all processes stop after this step because one of them was told to.

        Args:
            step: The steps done.
            every: The steps after which several processes ask each other.

        Returns:
            The same answer in all processes.
        """
        return agreed(self.received, step, every)


def agreed(wish: bool, step: int, every: int) -> bool:
    """Returns whether one of the processes has a wish, the same answer in all processes.

    Args:
        wish: The wish of this process.
        step: The steps done.
        every: The steps after which several processes ask each other.
    """
    if jax.process_count() == 1:
        return wish
    if step % every:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(wish))))


@contextmanager
def catch_stops(*, interrupts: bool) -> Iterator[StopSignal]:
    """Catches SIGTERM inside the block, and the first Ctrl-C if that is asked for.

    Args:
        interrupts: Whether to catch Ctrl-C too; a second one raises KeyboardInterrupt.

    Yields:
        Whether a signal came; always False outside the main thread, where Python cannot catch
        signals.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def terminate(*_: object) -> None:
        stop.received = True

    def interrupt(*_: object) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.received = stop.interrupted = True
        # Not print: the signal may come while the main program prints.
        os.write(2, b"\nStopping after this step; press Ctrl-C again to stop without saving it.\n")

    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminate)}
    # Where Ctrl-C has another handler, as in a test runner or a server, that one is right.
    if interrupts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        old[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` inside the block, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    old = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
