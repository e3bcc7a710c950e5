"""Measures time and peak memory of loading checkpoints, beside transformers if torch is installed.

Each load is a process of its own. "Used" is the time until every weight was read once: transformers
maps the files into memory and reads them later. Peaks are without what the imports take, in times
of the size of the files. Two rows more show what any copy takes: the files' bytes, read into new
memory, and into memory that the process has used before. Every row is the fastest of several runs,
for which all take turns.

    python -m benchmarks.loading --models DIR [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parser, peak_gib
from benchmarks.large import config, write

RUNS = 5
"""How often each load is measured."""


def ours(folder: Path) -> dict[str, Any]:
    """Loads with this library."""
    import jax
    from flax import nnx

    from fusion_jax.checkpoint.opening import open_checkpoint

    jax.block_until_ready(jax.numpy.ones(8) + 1)
    start = time.perf_counter()
    opened = open_checkpoint(folder)
    opened = open_checkpoint(folder, head=opened.family.text_head)
    shapes = jax.tree.leaves(nnx.state(opened.abstract))
    structure = time.perf_counter() - start
    # What JAX imports and compiles for it does not count.
    largest = {(x.shape, x.dtype): jax.jit(jax.numpy.max).lower(x).compile() for x in shapes}
    before, start = peak_gib(), time.perf_counter() - structure
    model = opened.read()
    jax.block_until_ready(nnx.state(model))
    loaded = time.perf_counter() - start
    for x in jax.tree.leaves(nnx.state(model)):
        largest[x.shape, x.dtype](x).block_until_ready()
    used = time.perf_counter() - start
    return {
        "seconds": loaded,
        "used_seconds": used,
        "before": before,
        "structure_seconds": structure,
    }


def plain(folder: Path, warm: bool) -> dict[str, Any]:
    """Reads the bytes of the files into memory that is new, or that was used before."""
    import numpy as np

    before = peak_gib()
    paths = sorted(folder.glob("*.safetensors"))
    memory = [np.empty(path.stat().st_size, np.int8) for path in paths]
    for x in memory if warm else ():
        x.fill(1)
    start = time.perf_counter()
    for path, x in zip(paths, memory, strict=True):
        with open(path, "rb", buffering=0) as file:
            view = x.data
            while len(view):
                view = view[file.readinto(view) :]
    loaded = time.perf_counter() - start
    for x in memory:
        x.max()
    return {"seconds": loaded, "used_seconds": time.perf_counter() - start, "before": before}


def theirs(folder: Path) -> dict[str, Any]:
    """Loads with transformers."""
    import transformers

    from fusion_jax.models.registry import FAMILIES

    torch: Any = import_module("torch")

    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    cls = getattr(transformers, str(family.architectures[family.text_head]))
    before, start = peak_gib(), time.perf_counter()
    model = cls.from_pretrained(folder)
    loaded = time.perf_counter() - start
    with torch.no_grad():
        for x in model.parameters():
            x.max()
    return {"seconds": loaded, "used_seconds": time.perf_counter() - start, "before": before}


LIBRARIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fusion_jax": ours,
    "transformers": theirs,
    "new memory": partial(plain, warm=False),
    "used memory": partial(plain, warm=True),
}


def measure(library: str, folder: Path) -> dict[str, Any]:
    """Returns the row of one load in this process."""
    found = LIBRARIES[library](folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    peak = (peak_gib() - found.pop("before")) / size
    return {"model": folder.name, "library": library, "gib": size, **found, "peak": peak}


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--models", type=Path, help="folder with checkpoints")
    arguments.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    if arguments.measure:
        library, folder = arguments.measure
        print(json.dumps(measure(library, Path(folder))))
        return 0
    libraries = list(LIBRARIES)
    if importlib.util.find_spec("torch") is None:
        libraries.remove("transformers")
    rows = []
    with tempfile.TemporaryDirectory() as made:
        if arguments.models is None and not arguments.quick:
            raise SystemExit("give --models DIR, or --quick")
        if arguments.models is None:
            write(config("llama-7b", True, None), Path(made) / "tiny")
        for path in sorted((arguments.models or Path(made)).glob("*/config.json")):
            runs = {library: [] for library in libraries}
            for _ in range(1 if arguments.quick else RUNS):
                for library, found in runs.items():
                    command = [sys.executable, "-m", "benchmarks.loading", "--measure", library]
                    command.append(str(path.parent))
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                    found.append(json.loads(done.stdout.splitlines()[-1]))
            for found in runs.values():
                found.sort(key=lambda row: row["seconds"])
                rows.append({**found[0], "slowest_seconds": found[-1]["seconds"]})
    finish(arguments, rows, {}, "torch", "transformers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
