"""Shared by the benchmarks: options, facts about the machine, tables, JSON, and peak memory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from fusion_jax.cli.programs import keep_programs
from ntk.tables import table


def parser(description: str | None, *, keep: bool = True) -> argparse.ArgumentParser:
    """Returns an argument parser with the options that all benchmarks have.

    Args:
        description: What the benchmark measures.
        keep: Whether compiled programs are kept for the next run, as commands keep them; not where
            compiling is measured.
    """
    if keep:
        keep_programs()
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="small sizes, for a self-check")
    result.add_argument("--json", type=Path, help="write env, rows and summary here")
    return result


def environment(*packages: str) -> dict[str, Any]:
    """Returns facts about the machine, and the versions of packages."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    versions = {}
    for name in ("fusion-jax", "jax", "flax", "numpy", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *_arguments()]),
    }


def _arguments() -> list[str]:
    """Returns the command's arguments, with names such as DIR in place of paths on this machine."""
    names = {
        "--data": "DIR",
        "--models": "DIR",
        "--json": "FILE",
        "--model": "PATH",
        "--runs": "DIR",
        "--cache": "DIR",
    }
    before = ["", *sys.argv[1:]]
    return [names.get(last, each) for last, each in zip(before, sys.argv[1:], strict=False)]


def peak_gib() -> float:
    """Returns the peak memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Prints rows as a table, with the summary below it."""
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        print(table([names, *([_cell(row.get(name, "")) for name in names] for row in rows)]))
    print()
    for name, value in summary.items():
        print(f"{name}: {_cell(value)}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def finish(
    arguments: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    *packages: str,
    shown: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Prints the results (``shown`` in place of ``rows``, if given); writes them to ``--json``."""
    show(rows if shown is None else shown, summary)
    if arguments.json is not None:
        result = {"env": environment(*packages), "rows": list(rows), "summary": summary}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def pyplot() -> Any:
    """Returns matplotlib's pyplot, set up to write the same file from the same rows."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fusion_jax"
    return import_module("matplotlib.pyplot")
