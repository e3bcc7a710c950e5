"""Being told to stop: SIGTERM, as clouds send it before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np


class Stop:
    """Whether this process was told to stop.

    Args:
        told: Whether it was.
    """

    def __init__(self, told: bool = False):
        self.told = told

    def agreed(self, step: int, every: int) -> bool:
        """Whether all processes stop after this step, because one of them was told to.

        Args:
            step: The steps done.
            every: With several processes, they ask each other after so many steps.

        Returns:
            The same in all processes.
        """
        if jax.process_count() == 1:
            return self.told
        if step % every:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self.told))))


@contextmanager
def listening() -> Iterator[Stop]:
    """Catches SIGTERM inside the block.

    Yields:
        What says whether it came. Outside of the main thread, where Python cannot catch signals, it
        says no.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def tell(*_: object) -> None:
        stop.told = True

    old = signal.signal(signal.SIGTERM, tell)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, old)
