"""The commands finetune, tune, evaluate and predict."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

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
from fusion_jax.finetune.generation import generate_texts
from fusion_jax.finetune.jobs import Given, Kind, evaluate_language, evaluate_pairs, load_generative
from fusion_jax.finetune.tasks import Task, load_task, texts_of
from fusion_jax.finetune.trainer import CHECKPOINTS
from fusion_jax.generate import Beams
from fusion_jax.report import table

RUN = "run.json"
Name = Annotated[str, arg(metavar="MODEL")]
TaskName = Annotated[
    str | None,
    arg(
        metavar="TASK",
        help="A GLUE task (sst2, cola, mrpc, stsb, qqp, mnli, qnli, rte, wnli); webnlg or e2e, to "
        "generate text; or text, to model plain text.",
        help_behavior_hint="(or give a file of your own)",
    ),
]
Data = Annotated[
    str | None,
    arg(
        metavar="DIR|FILE|hub",
        help="Folder with the task's files; hub for GLUE from there; for text, a text file.",
        help_behavior_hint="(with --task)",
    ),
]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Source = Annotated[
    str,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate from.",
        help_behavior_hint="(default: source)",
    ),
]
Target = Annotated[
    str | None,
    arg(
        metavar="COLUMN",
        help="Column with the texts to generate; says that the file has sources and targets, not "
        "labels. Rows with the same source are several references.",
        help_behavior_hint="(such as target)",
    ),
]
Context = Annotated[
    int | None,
    arg(
        metavar="N",
        help="With --task text: tokens that the model sees at a time.",
        help_behavior_hint="(default: 512, or as the run was trained)",
    ),
]
Columns = Annotated[
    tuple[str, ...],
    arg(
        metavar="COLUMN",
        help="Column with the text, or two where labels are of two texts.",
        help_behavior_hint="(default: text)",
    ),
]
Length = Annotated[
    int | None,
    arg(
        metavar="N",
        help="Longest text in tokens; of a pair, with its target.",
        help_behavior_hint="(default: as the run was trained)",
    ),
]
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
    source: Source = "source",
    target: Target = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Fine-tune a model on a task; run again, the same command goes on where it was stopped.

    Three kinds of task. Labels, for encoders: GLUE's by --task, or --train-file with --text and
    --label. Targets from sources, for models that generate text: --task webnlg or e2e, or
    --train-file with --source and --target. Plain text, for decoder-only models: --task text --data
    FILE.txt.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Folder of the run: checkpoints, metrics.jsonl, and the artefacts best and last.
        config: How to train.
        task: The task.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file of your own to train on.
        dev_file: Another to measure on; with --task text, a text file.
        text: Columns with text.
        label: Column with labels.
        regression: Labels are numbers to predict.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the head, dropout and order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    job = Given(
        task=task,
        data=data,
        train_file=train_file,
        dev_file=dev_file,
        text=text,
        label=label,
        regression=regression,
        source=source,
        target=target,
        context=context,
    ).job()
    key = jax.random.key(seed)
    started = job.load(model, key)
    about = {"model": model, "seed": seed, "task": job.to_json(), "max_length": config.max_length}
    describe = _describe(out, about)
    with _mesh(mesh):
        result = job.fit(started, config, key=key, folder=out, on_step=describe, progress=True)
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
    source: Source = "source",
    target: Target = None,
    context: Context = None,
    seed: int = 0,
    mesh: MeshText = None,
    distributed: bool = False,
) -> None:
    """Tune compressed MLPs towards the hidden states of the original, on unlabelled texts.

    Args:
        student: Artefact of the compressed model.
        teacher: Hub id or folder of the model before compression.
        out: Folder for the tuned artefact; its run is kept beside it until it is done.
        config: How to train; train, dropout and the routers' losses do not apply.
        task: Task whose training texts are taken.
        data: Where its files are.
        train_file: A csv, tsv or jsonl file with a column of texts.
        text: Columns with text.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        seed: Seed of the order.
        mesh: How the devices are used.
        distributed: Join the other processes of this job (jax.distributed).
    """
    if distributed:
        jax.distributed.initialize()
    check_new_folder(out)
    given = Given(
        task=task,
        data=data,
        train_file=train_file,
        text=text,
        source=source,
        target=target,
        context=context,
    )
    key = jax.random.key(seed)
    small = checkpoint.load(student)
    if given.kind == "labels" and train_file is not None and task is None:
        given.only("a column of texts", "train_file", "text")
        texts: Any = texts_of(tables.read(train_file), text, None)
    else:
        texts = given.job().texts(small, config, key)
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
    source: Source = "source",
    target: Target = None,
    context: Context = None,
    split: Literal["dev", "test"] = "test",
    max_new_tokens: int = 128,
    beams: int = 1,
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    batch_size: int = 64,
    max_length: Length = None,
    truncate: bool = False,
) -> None:
    """Measure a fine-tuned model on a task, or on a file.

    Labels are measured on GLUE's dev sets. For webnlg, e2e and tables with sources and targets,
    texts are generated and measured by BLEU, chrF, chrF++ and TER (needs fusion-jax[nlg]), and nats
    per token and perplexity say how likely the references are.

    Args:
        model: Folder of a run, whose best model is taken, or an artefact or checkpoint.
        task: The task.
        data: Where its files are.
        file: A csv, tsv or jsonl file with labels, for a model with the folder of its run, or with
            sources and targets.
        text: Columns with text.
        label: Column with labels.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        split: Which part of webnlg or e2e.
        max_new_tokens: Tokens to generate at most for each source.
        beams: Beams of the search; 1 for greedy.
        out: A jsonl file to write the generated texts to; must not exist.
        batch_size: Texts at a time.
        max_length: Longest text in tokens.
        truncate: Cut texts off that are too long; of pairs, the sources.
    """
    about, folder, trained = _about(model)
    given = Given(
        task=task,
        data=data,
        text=text,
        label=label,
        source=source,
        target=target,
        context=context,
    )
    kind = given.kind if task is not None else _kind(about) or given.kind
    if kind != "pairs" and (out is not None or beams != 1):
        raise InputError("--out and --beams are for texts to generate; leave them out")
    if kind == "text":
        if file is not None:
            raise InputError("plain text is given by --task text --data FILE.txt, not by --file")
        given.only("plain text", "task", "data", "context")
        if max_length is not None or truncate:
            raise InputError("--max-length and --truncate are not for plain text; leave them out")
    elif file is None:
        given.only("a published task", "task", "data")
    elif kind == "pairs":
        given.only("a file of sources and targets", "source", "target")
    else:
        given.only("a file with labels", "text", "label")
    max_length = trained if max_length is None else max_length
    results: dict[str, float] = {}
    if kind == "labels":
        loaded = checkpoint.load(folder, head="classification")
        if file is None:
            if task is None or data is None:
                raise InputError("give either --task and --data, or --file")
            measured, _, sets = load_task(task, data)
        elif about is None:
            raise InputError(f"{model} is no run, whose classes would be known; give the run")
        else:
            measured = Task.from_json(about)
            sets = {file.name: texts_of(tables.read(file), text, label, labels=measured.labels)}
        classify.check_head(loaded, measured)
        for name, texts in sets.items():
            logits = classify.predict(
                loaded, texts, max_length=max_length, batch_size=batch_size, truncate=truncate
            )
            found = classify.measure(measured, logits, texts)
            results |= {f"{name} {metric}": value for metric, value in found.items()}
    elif kind == "pairs":
        results = evaluate_pairs(
            load_generative(folder),
            given,
            file=file,
            split=split,
            out=out,
            max_new_tokens=max_new_tokens,
            beams=None if beams == 1 else Beams(beams),
            batch_size=batch_size,
            max_length=max_length,
            truncate=truncate,
        )
    else:
        results = evaluate_language(
            load_generative(folder), given, about=about or {}, batch_size=batch_size
        )
    for name, value in results.items():
        print(f"{name} {value:.4f}")


def predict(
    model: Positional[Name],
    file: Annotated[Path, arg(metavar="FILE")],
    out: Annotated[Path, arg(metavar="OUT")],
    text: Columns = ("text",),
    max_new_tokens: int = 128,
    beams: int = 1,
    batch_size: int = 64,
    max_length: Length = None,
    truncate: bool = False,
) -> None:
    """Label the texts of a file, or generate texts from them, one JSON object a line.

    Args:
        model: Folder of a run, whose best model is taken, or an artefact or checkpoint.
        file: A csv, tsv or jsonl file.
        out: The jsonl file to write: label and probabilities of each text, or the text generated
            from it; must not exist.
        text: Columns with text.
        max_new_tokens: Tokens to generate at most for each text.
        beams: Beams of the search; 1 for greedy.
        batch_size: Texts at a time.
        max_length: Longest text in tokens, to label; those to generate from may be as long as the
            model has positions for.
        truncate: Cut texts off that are too long.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another or remove it")
    about, folder, trained = _about(model)
    if _kind(about) == "text":
        raise InputError(f"{model} was trained on plain text; see fusion-jax generate")
    texts = texts_of(tables.read(file), text, None)
    if _kind(about) == "pairs":
        if len(text) > 1:
            raise InputError("texts are generated from one column; give one to --text")
        if max_length is not None:
            raise InputError("--max-length is for texts to label; leave it out")
        said = generate_texts(
            load_generative(folder),
            [first for first, *_ in texts.texts],
            max_new_tokens=max_new_tokens,
            beams=None if beams == 1 else Beams(beams),
            batch_size=batch_size,
            truncate=truncate,
            progress=True,
        )
        rows: list[dict[str, Any]] = [{"text": each} for each in said]
    else:
        if beams != 1:
            raise InputError("--beams is for texts to generate; leave it out")
        max_length = trained if max_length is None else max_length
        task = None if about is None else Task.from_json(about)
        loaded = checkpoint.load(folder, head="classification")
        logits = classify.predict(
            loaded, texts, max_length=max_length, batch_size=batch_size, truncate=truncate
        )
        rows = [_said(row, task) for row in logits]
    new = out.with_name(f".{out.name}.new")
    with new.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
    os.replace(new, out)
    print(f"Wrote {len(rows)} lines to {out}.")


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
    elif jax.process_count() == 1 and not _unbegun(out):
        check_new_folder(out)

    def write(step: int, state: Any) -> None:
        if jax.process_index() == 0 and not path.exists():
            path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    return write


def _unbegun(out: Path) -> bool:
    """Whether a run was stopped here before its first step was done."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return (
        bool(names)
        and names <= {CHECKPOINTS, "metrics.jsonl"}
        and not any((out / CHECKPOINTS).glob("*"))
    )


def _about(name: str) -> tuple[dict[str, Any] | None, str, int | None]:
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


def _kind(about: dict[str, Any] | None) -> Kind | None:
    """What a run was trained on."""
    return None if about is None else about.get("kind", "labels")


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
