"""The commands finetune, tune, evaluate and predict."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import AxisType
from tyro.conf import OmitArgPrefixes, Positional, arg

from fusion_jax import checkpoint
from fusion_jax.errors import InputError
from fusion_jax.files import check_new_folder, read_json
from fusion_jax.finetune import classify, tables
from fusion_jax.finetune import tune as tuning
from fusion_jax.finetune.config import TrainConfig
from fusion_jax.finetune.tasks import Task, TaskData, load_task, read_task, texts_of
from fusion_jax.report import table

RUN = "run.json"
Name = Annotated[str, arg(metavar="MODEL")]
TaskName = Annotated[
    str | None,
    arg(
        metavar="TASK",
        help="A GLUE task: sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte or wnli.",
        help_behavior_hint="(or give --train-file)",
    ),
]
Data = Annotated[
    str | None,
    arg(
        metavar="DIR|hub",
        help="Folder with GLUE's tsv files, or hub.",
        help_behavior_hint="(with --task)",
    ),
]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Columns = Annotated[
    tuple[str, ...],
    arg(metavar="COLUMN", help="Column with the text; two for pairs.",
        help_behavior_hint="(default: text)"),
]  # fmt: skip
MeshText = Annotated[
    str | None,
    arg(
        metavar="MESH",
        help="How devices are used, such as data=4,model=2: data splits batches, fsdp batches and "
        "parameters, model the widths of MLPs.",
        help_behavior_hint="(default: all on data)",
    ),
]
Settings = OmitArgPrefixes[TrainConfig]


def finetune(
    model: Positional[Name],
    out: Annotated[Path, arg(metavar="RUN")],
    config: Settings = TrainConfig(),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    dev_file: File = None,
    text: Columns = ("text",),
    label: str = "label",
    regression: bool = False,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Fine-tune a model on a task; run again, the same command goes on where it was stopped.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Folder of the run: checkpoints, metrics.jsonl, and the artefacts best and last.
        config: How to train.
        task: GLUE task.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file of your own to train on.
        dev_file: Another to measure on.
        text: Columns with text.
        label: Column with labels.
        regression: Labels are numbers to predict.
        seed: Seed of the head, dropout and order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    loaded = _task(task, data, train_file, dev_file, text, label, regression)
    key = jax.random.key(seed)
    started = checkpoint.load(
        model, head="classification", num_labels=loaded.task.num_labels, key=key
    )
    describe = _describe(out, {"model": model, "seed": seed, "task": loaded.task.to_json()})
    with _mesh(mesh):
        result = classify.finetune(
            started, loaded, config, key=key, folder=out, on_step=describe, progress=True
        )
    if not result.finished:
        print(f"Stopped after step {result.step}. To go on, give the same command again.")
        return
    if result.history:
        print(_table(result.history))
        print(f"\nSaved {out / 'best'} (best by the first metric) and {out / 'last'}.")
    else:
        print(f"Saved {out / 'last'}.")


def tune(
    student: Positional[Annotated[str, arg(metavar="STUDENT")]],
    teacher: Annotated[str, arg(metavar="MODEL")],
    out: Annotated[Path, arg(metavar="OUT")],
    config: Settings = TrainConfig(epochs=1),  # noqa: B008 - frozen
    task: TaskName = None,
    data: Data = None,
    train_file: File = None,
    text: Columns = ("text",),
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Tune compressed MLPs towards the hidden states of the original, on unlabelled texts.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression.
        out: Folder for the tuned artefact; its run is kept beside it until it is done.
        config: How to train; train and dropout do not apply.
        task: GLUE task whose training texts are taken.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file with a column of texts.
        text: Columns with text.
        seed: Seed of the order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    check_new_folder(out)
    if train_file is not None and task is None:
        texts = texts_of(tables.read(train_file), text, None)
    elif task is not None and data is not None and train_file is None:
        texts = load_task(task, data).train
    else:
        raise InputError("give either --task and --data, or --train-file")
    key = jax.random.key(seed)
    small = checkpoint.load(student)
    folder = out.with_name(f"{out.name}.run")
    big = checkpoint.load(
        teacher,
        head=small.origin.head,  # type: ignore[arg-type]
        num_labels=small.config.num_labels if small.origin.head == "classification" else None,
        key=key,
    )
    with _mesh(mesh):
        result = tuning(small, big, texts, config, key=key, folder=folder, progress=True)
    if not result.finished:
        print(f"Stopped after step {result.step}. To go on, give the same command again.")
        return
    if jax.process_index() == 0:
        checkpoint.save(result.model, out)
        shutil.rmtree(folder)
    print(f"Saved {out}.")


def evaluate(
    model: Positional[Name],
    task: TaskName = None,
    data: Data = None,
    file: File = None,
    text: Columns = ("text",),
    label: str = "label",
    batch_size: int = 64,
    truncate: bool = False,
) -> None:
    """Measure a fine-tuned model on a task's dev set, or on a file.

    Args:
        model: Folder of a run, whose best model is taken, or an artefact or checkpoint.
        task: GLUE task.
        data: Where its files are.
        file: A csv, tsv or jsonl file with labels, for a model with the folder of its run.
        text: Columns with text.
        label: Column with labels.
        batch_size: Texts at a time.
        truncate: Cut texts off that are too long.
    """
    loaded, about = _load(model)
    if file is None:
        if task is None or data is None:
            raise InputError("give either --task and --data, or --file")
        found = load_task(task, data)
        about, sets = found.task, dict(found.dev)
    else:
        if about is None:
            raise InputError(f"{model} is no run, whose classes would be known; give the run")
        sets = {file.name: texts_of(tables.read(file), text, label, labels=about.labels)}
    classify.check_head(loaded, about)
    for name, texts in sets.items():
        logits = classify.predict(loaded, texts, batch_size=batch_size, truncate=truncate)
        for metric, value in classify.measure(about, logits, texts).items():
            print(f"{name} {metric} {value:.4f}")


def predict(
    model: Positional[Name],
    file: Annotated[Path, arg(metavar="FILE")],
    out: Annotated[Path, arg(metavar="OUT")],
    text: Columns = ("text",),
    batch_size: int = 64,
    truncate: bool = False,
) -> None:
    """Label the texts of a file, one JSON object a line.

    Args:
        model: Folder of a run, whose best model is taken, or an artefact or checkpoint.
        file: A csv, tsv or jsonl file.
        out: The jsonl file to write: label and probabilities of each text; must not exist.
        text: Columns with text.
        batch_size: Texts at a time.
        truncate: Cut texts off that are too long.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another or remove it")
    loaded, task = _load(model)
    texts = texts_of(tables.read(file), text, None)
    logits = classify.predict(loaded, texts, batch_size=batch_size, truncate=truncate)
    new = out.with_name(f".{out.name}.new")
    with new.open("w", encoding="utf-8") as lines:
        for row in logits:
            lines.write(json.dumps(_said(row, task)) + "\n")
    os.replace(new, out)
    print(f"Wrote {len(logits)} lines to {out}.")


COMMANDS = {"finetune": finetune, "tune": tune, "evaluate": evaluate, "predict": predict}


def _mesh(text: str | None) -> Any:
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


def _task(
    task: str | None,
    data: str | None,
    train: Path | None,
    dev: Path | None,
    text: tuple[str, ...],
    label: str,
    regression: bool,
) -> TaskData:

    if task is not None and data is not None and train is None and dev is None:
        return load_task(task, data)
    if train is not None and task is None and data is None:
        return read_task(train, dev, text=text, label=label, regression=regression)
    raise InputError("give either --task and --data, or --train-file (and --dev-file)")


def _describe(out: Path, fields: dict[str, Any]) -> Any:
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
    elif jax.process_count() == 1:
        check_new_folder(out)

    def write(step: int, state: Any) -> None:
        if jax.process_index() == 0 and not path.exists():
            path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    return write


def _load(name: str) -> tuple[Any, Task | None]:
    """A run's best model and its task, or any other model and None."""
    run = Path(name).expanduser()
    if not (run / RUN).is_file():
        return checkpoint.load(name, head="classification"), None
    _, fields = read_json(run / RUN)
    best = next((run / n for n in ("best", "last") if (run / n).is_dir()), None)
    if best is None:
        raise InputError(f"{run} has no model yet; let the run go on")
    return checkpoint.load(best), Task.from_json(fields["task"])


def _said(logits: Any, task: Task | None) -> dict[str, Any]:

    if task is not None and task.labels is None:
        return {"value": float(logits[0])}
    names = [str(i) for i in range(len(logits))] if task is None else list(task.labels or ())
    weights = np.exp(logits.astype(np.float64) - logits.max())
    shares = (weights / weights.sum()).tolist()
    return {
        "label": names[int(logits.argmax())],
        "probabilities": dict(zip(names, shares, strict=True)),
    }


def _table(history: list[dict[str, Any]]) -> str:

    names = list(history[0])
    rows = [
        [f"{h[n]:.4f}" if isinstance(h[n], float) else str(h[n]) for n in names] for h in history
    ]
    return table([names, *rows])
