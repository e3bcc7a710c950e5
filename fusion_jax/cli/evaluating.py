"""The commands evaluate and predict."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from fusion_jax import checkpoint
from fusion_jax.cli.options import (
    Columns,
    Context,
    Data,
    File,
    Length,
    Name,
    Source,
    Target,
    TaskName,
)
from fusion_jax.cli.run_folders import about_run, kind_of
from fusion_jax.errors import InputError
from fusion_jax.models.decoding import Beams
from fusion_jax.training.tasks import classification as classify
from fusion_jax.training.tasks import tables
from fusion_jax.training.tasks.generation import generate_texts
from fusion_jax.training.tasks.glue import Task, load_task, texts_of
from fusion_jax.training.tasks.jobs import Given, evaluate_language, evaluate_pairs, load_generative


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
    about, folder, trained = about_run(model)
    given = Given(
        task=task,
        data=data,
        text=text,
        label=label,
        source=source,
        target=target,
        context=context,
    )
    kind = given.kind if task is not None else kind_of(about) or given.kind
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
        max_length: Longest text in tokens.
        truncate: Cut texts off that are too long.
    """
    if out.exists():
        raise InputError(f"{out} exists; choose another or remove it")
    about, folder, trained = about_run(model)
    if kind_of(about) == "text":
        raise InputError(f"{model} was trained on plain text; see fusion-jax generate")
    max_length = trained if max_length is None else max_length
    texts = texts_of(tables.read(file), text, None)
    if kind_of(about) == "pairs":
        if len(text) > 1:
            raise InputError("texts are generated from one column; give one to --text")
        said = generate_texts(
            load_generative(folder),
            [first for first, *_ in texts.texts],
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            beams=None if beams == 1 else Beams(beams),
            batch_size=batch_size,
            truncate=truncate,
            progress=True,
        )
        rows: list[dict[str, Any]] = [{"text": each} for each in said]
    else:
        if beams != 1:
            raise InputError("--beams is for texts to generate; leave it out")
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


COMMANDS = {"evaluate": evaluate, "predict": predict}
