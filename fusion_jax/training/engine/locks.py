"""The lock of a run folder, so that no two processes train in it."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from fusion_jax.errors import InputError

LOCK = ".lock"


class FolderLock:
    """Locks a folder for this process; the operating system unlocks it when the process ends.

    The file stays, with the last owner's process id and host. Of several processes of one job, the
    first has the lock.

    Args:
        folder: The folder, which exists.

    Raises:
        InputError: Another process, or another call of this process, has the lock.
    """

    def __init__(self, folder: Path):
        self._lock = None
        if jax.process_index():
            return
        path = (folder / LOCK).absolute()
        owner = _owner(path)  # before trying: some versions of filelock empty the file
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{folder} is in use by {owner}; wait until it has ended, or give another folder"
            ) from None
        self._lock = lock
        now = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}
        path.write_text(json.dumps(now) + "\n", encoding="utf-8")

    def release(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _owner(path: Path) -> str:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return f"process {fields['pid']} on {fields['host']} (since {fields['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
