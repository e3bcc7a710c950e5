"""Measures time and peak memory of loading checkpoints, beside transformers if torch is installed.

Each load is a process of its own. "Used" is the time until every weight was read once: transformers
maps the files into memory and reads them later. Peaks are without what the imports take, in times
of the size of the files.

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
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import finish, parser, peak_gib
from benchmarks.large import config, write


def ours(folder: Path) -> dict[str, Any]:
    """Loads with this library."""
    import jax
    from flax import nnx

    from fusion_jax.checkpoint.opening import open_checkpoint

    opened = open_checkpoint(folder)
    opened = open_checkpoint(folder, head=opened.family.text_head)
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    opened.abstract  # noqa: B018 - what JAX imports for it does not count
    before, start = peak_gib(), time.perf_counter()
    model = opened.read()
    jax.block_until_ready(nnx.state(model))
    loaded = time.perf_counter() - start
    for x in jax.tree.leaves(nnx.state(model)):
        x.max().block_until_ready()
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


def measure(library: str, folder: Path) -> dict[str, Any]:
    """Returns the row of one load in this process."""
    found = {"fusion_jax": ours, "transformers": theirs}[library](folder)
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
    libraries = ["fusion_jax"]
    if importlib.util.find_spec("torch") is not None:
        libraries.append("transformers")
    rows = []
    with tempfile.TemporaryDirectory() as made:
        if arguments.models is None and not arguments.quick:
            raise SystemExit("give --models DIR, or --quick")
        if arguments.models is None:
            write(config("llama-7b", True, None), Path(made) / "tiny")
        for path in sorted((arguments.models or Path(made)).glob("*/config.json")):
            for library in libraries:
                command = [sys.executable, "-m", "benchmarks.loading", "--measure", library]
                done = subprocess.run([*command, path.parent], check=True, stdout=subprocess.PIPE)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    finish(arguments, rows, {}, "torch", "transformers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
