"""Stops runs in an orderly way on SIGTERM, which clouds send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np


class StopSignal:
    """Whether this process was told to stop."""

    def __init__(self):
        self.received = False

    def agreed(self, step: int, every: int) -> bool:
        """Returns whether all processes stop after this step because one of them was told to.

        Args:
            step: The steps done.
            every: The steps after which several processes ask each other.

        Returns:
            The same answer in all processes.
        """
        if jax.process_count() == 1:
            return self.received
        if step % every:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self.received))))


@contextmanager
def catch_sigterm() -> Iterator[StopSignal]:
    """Catches SIGTERM inside the block.

    Yields:
        Whether the signal came; always False outside the main thread, where Python cannot catch
        signals.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def receive(*_: object) -> None:
        stop.received = True

    old = signal.signal(signal.SIGTERM, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, old)
