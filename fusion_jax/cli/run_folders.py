"""What the commands of fine-tuning keep and say of a run."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from fusion_jax.checkpoint.files import check_new_folder, read_json
from fusion_jax.errors import InputError
from fusion_jax.training.engine.trainer import CHECKPOINTS
from fusion_jax.training.tasks.jobs import Kind
from ntk.tables import table

RUN = "run.json"


def mesh_of(text: str | None) -> Any:
    """The context of a mesh; of none where there is one device."""
    if text is None:
        if jax.device_count() == 1:
            return contextlib.nullcontext()
        text = f"data={jax.device_count()}"
    axes = {name: size for name, _, size in (part.partition("=") for part in text.split(","))}
    if not all(size.isdigit() and int(size) for size in axes.values()):
        raise InputError(f"mesh {text!r} is not of the form data=4,model=2")
    sizes = [int(size) for size in axes.values()]
    if np.prod(sizes) != jax.device_count():
        raise InputError(f"mesh {text!r} is not for the {jax.device_count()} devices here")
    auto = (AxisType.Auto,) * len(sizes)
    return jax.set_mesh(jax.make_mesh(tuple(sizes), tuple(axes), axis_types=auto))


def described(out: Path, fields: dict[str, Any]) -> Any:
    """What writes, at the first step, what a run is about.

    Raises:
        InputError: The folder holds another run, or something else.
    """
    path = out / RUN
    if path.exists():
        _, old = read_json(path)
        different = [n for n in fields if old.get(n) != json.loads(json.dumps(fields[n]))]
        if different:
            raise InputError(
                f"{out} holds a run with another {' and '.join(different)}; choose another folder"
            )
    elif jax.process_count() == 1 and not _unbegun(out):
        check_new_folder(out)

    def write(step: int, state: Any) -> None:
        if jax.process_index() == 0 and not path.exists():
            new = path.with_suffix(".new")
            new.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            new.replace(path)

    return write


def _unbegun(out: Path) -> bool:
    """Whether a run was stopped here before its first step was done."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return (
        bool(names)
        and names <= {CHECKPOINTS, "metrics.jsonl"}
        and not any((out / CHECKPOINTS).glob("*"))
    )


def about_run(name: str) -> tuple[dict[str, Any] | None, str, int | None]:
    """What ``run.json`` says of a run's task, the run's best model, and the longest text.

    None, the name, and None, if the name is not that of a run.
    """
    run = Path(name).expanduser()
    if not (run / RUN).is_file():
        return None, name, None
    _, fields = read_json(run / RUN)
    best = next((run / n for n in ("best", "last") if (run / n).is_dir()), None)
    if best is None:
        raise InputError(f"{run} has no model yet; let the run go on")
    return fields["task"], str(best), fields.get("max_length")


def kind_of(about: dict[str, Any] | None) -> Kind | None:
    """What a run was trained on."""
    return None if about is None else about.get("kind", "labels")


def history_table(history: list[dict[str, Any]]) -> str:
    """The metrics of a run, a row for each evaluation."""
    names = list(history[0])
    rows = [
        [f"{h[n]:.4f}" if isinstance(h[n], float) else str(h[n]) for n in names] for h in history
    ]
    return table([names, *rows])
