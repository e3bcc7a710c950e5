"""Keeps compiled programs from one command to the next, in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import jax

VARIABLE = "FUSION_JAX_CACHE"
"""The environment variable that names another folder, or switches this off."""
MOST_BYTES = 2 * 2**30
"""The most bytes that stay in the folder when a command starts; the longest unused files go."""


def keep_programs() -> None:
    """Sets JAX's persistent cache of compiled programs, for this process.

    Commands and benchmarks call it; the library does not, since settings of JAX are the caller's.
    It leaves a folder alone that the user or another program gave to JAX. A folder that cannot be
    written costs one warning.
    """
    chosen = os.environ.get(VARIABLE, "")
    given = getattr(jax.config, "jax_compilation_cache_dir", None)
    if given or chosen.lower() in ("off", "0"):
        return
    try:
        folder = (Path(chosen).expanduser() if chosen else _users()) / _processor()
        # Whoever can write programs there can run them as this user.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        shrink(folder, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(
            f"warning: compiled programs are not kept for the next command ({error}); "
            f"{VARIABLE}=DIR names another folder, {VARIABLE}=off switches this off",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # All of them: reading the smallest takes a fifth of the time of compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def shrink(folder: Path, most: int) -> None:
    """Removes the files of a folder that were not used for longest, until it has few bytes.

    JAX can do so itself, but then looks at all files whenever it writes one.

    Args:
        folder: The folder.
        most: The number of bytes that may stay.
    """
    files = [(file, file.stat()) for file in folder.rglob("*") if file.is_file()]
    total = sum(about.st_size for _, about in files)
    for file, about in sorted(files, key=lambda item: max(item[1].st_atime, item[1].st_mtime)):
        if total <= most:
            return
        file.unlink(missing_ok=True)
        total -= about.st_size


def _users() -> Path:
    """Returns the user's folder for programs."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "fusion_jax" / "programs"


def _processor() -> str:
    """Returns a name for the kind of the processor.

    Programs for a CPU use its instructions, and machines of several kinds may share a home folder.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    known = sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    text = "\n".join(known) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
