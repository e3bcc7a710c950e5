"""The commands evaluate and predict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
from tyro.conf import Positional, arg

from fusion_jax import checkpoint
from fusion_jax.checkpoint.files import check_new_file, write_text
from fusion_jax.checkpoint.opening import stated_head
from fusion_jax.cli.options import (
    ANSWERS,
    PLAIN,
    TOKENS,
    Context,
    Data,
    DataOptions,
    File,
    Length,
    ModelName,
    SourceColumn,
    TargetColumn,
    TaskKind,
    TaskName,
    TextColumns,
)
from fusion_jax.cli.run_folders import RunRecord, read_run
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.decoding import Beams
from fusion_jax.training.tasks import (
    classification,
    generation,
    question_answering,
    tables,
    token_classification,
)
from fusion_jax.training.tasks.classes import TaskSpec
from fusion_jax.training.tasks.glue import GLUE, load_task, texts_of
from fusion_jax.training.tasks.pairs import load_pairs, pairs_of
from fusion_jax.training.tasks.plain_text import CONTEXT, nats_per_token, start_token, token_ids
from fusion_jax.training.tasks.questions import Questions, measure_answers, questions_of
from fusion_jax.training.tasks.tagged_words import measure_tags, tag_set, tagged_words_of
from fusion_jax.training.tasks.text_metrics import TEXT_METRICS, sacrebleu


class Limits(TypedDict):
    """How texts are read in batches."""

    max_length: int | None
    batch_size: int
    truncate: bool


class Search(TypedDict):
    """How texts are generated."""

    max_new_tokens: int
    beams: Beams | None


def evaluate(
    model: Positional[ModelName],
    task: TaskName = None,
    data: Data = None,
    file: File = None,
    perplexity: File = None,
    text: TextColumns = ("text",),
    label: str = "label",
    source: SourceColumn = "source",
    target: TargetColumn = None,
    context: Context = None,
    split: Literal["dev", "test"] = "test",
    max_new_tokens: int = 128,
    beams: int = 1,
    out: File = None,
    batch_size: int = 64,
    max_length: Length = None,
    truncate: bool = False,
) -> None:
    """Measure a fine-tuned model on a task, or on a file.

    Labels are measured on GLUE's dev sets, tags and answers on a --file. For webnlg, e2e and tables
    with sources and targets, texts are generated and measured by BLEU, chrF, chrF++ and TER (needs
    fusion-jax[nlg]); nats per token and perplexity show how likely the references are.

    Args:
        model: Run folder, whose best model is used, or an artefact or checkpoint.
        task: The task.
        data: The task's files.
        file: A csv, tsv or jsonl file with labels, if the model is given by its run folder, or with
            sources and targets; or the tags or the questions of a --task or a run.
        perplexity: A text file, short for --task text --data FILE. Each window starts with the
            token that the model's texts start with, if there is one.
        text: Columns with text.
        label: Column with labels.
        source: Column with sources.
        target: Column with targets.
        context: Tokens of a window.
        split: Part of webnlg or e2e to measure on.
        max_new_tokens: Largest number of tokens to generate for each source.
        beams: Beams of the search; 1 for greedy search.
        out: A jsonl file to write the generated texts to; must not exist.
        batch_size: Texts at a time.
        max_length: Longest text in tokens.
        truncate: Cut longer texts off; of pairs, the sources.
    """
    if perplexity is not None:
        if task is not None or data is not None:
            raise InputError("give either --perplexity FILE or --task and --data")
        task, data = PLAIN, str(perplexity)
    run = read_run(model)
    folder = model if run is None else run.model
    options = DataOptions(
        task=task,
        data=data,
        text=text,
        label=label,
        source=source,
        target=target,
        context=context,
    )
    kind = options.kind
    if task is None:
        kind = run.kind if run is not None else _kind_of(folder, kind)
    if kind != "pairs" and (out is not None or beams != 1):
        raise InputError("--out and --beams are for generated texts; leave them out")
    if kind == "text":
        if file is not None:
            raise InputError("plain text is given by --task text --data FILE.txt, not by --file")
        if max_length is not None or truncate:
            raise InputError("--max-length and --truncate are not for plain text; leave them out")
        results = _measure_plain_text(folder, run, options, batch_size)
    else:
        if max_length is None and run is not None:
            max_length = run.max_length
        limits: Limits = {"max_length": max_length, "batch_size": batch_size, "truncate": truncate}
        if kind == TOKENS:
            results = _measure_tags(folder, options, file, limits)
        elif kind == ANSWERS:
            results = _measure_answers(folder, run, options, file, limits)
        elif kind == "labels":
            results = _measure_labels(folder, run, options, file, limits)
        else:
            searched = None if beams == 1 else Beams(beams)
            search: Search = {"max_new_tokens": max_new_tokens, "beams": searched}
            results = _measure_pairs(folder, options, file, split, out, limits, search)
    for name, value in results.items():
        print(f"{name} {value:.4f}")


def _published(
    options: DataOptions, file: Path | None, kind: str, *columns: str
) -> tuple[str, str] | None:
    """Returns name and data of a published task; None if there is a file, of this kind, instead."""
    if file is not None:
        options.check_only(kind, *columns)
        return None
    options.check_only("a published task", "task", "data")
    if options.task is None or options.data is None:
        raise InputError("give either --task and --data, or --file")
    return options.task, options.data


def _measure_labels(
    folder: str,
    run: RunRecord | None,
    options: DataOptions,
    file: Path | None,
    limits: Limits,
) -> dict[str, float]:
    """Returns the metrics of a model's labels on each dev set of a task, or on a file."""
    published = _published(options, file, "a file with labels", "text", "label")
    model = checkpoint.load(folder, head="classification")
    if published is not None:
        loaded = load_task(*published)
        spec, dev = loaded.spec, loaded.dev
    else:
        assert file is not None
        spec = _spec_of(model, run)
        table = tables.read(file)
        numbered = spec.name in GLUE and spec.labels == GLUE[spec.name].labels
        columns = options.text, options.label
        dev = {file.name: texts_of(table, *columns, labels=spec.labels, numbered=numbered)}
    columns = classification.check_head(model, spec)
    results = {}
    for name, texts in dev.items():
        logits = classification.predict(model, texts, **limits)[:, columns]
        measured = classification.measure(spec, logits, texts)
        results |= {f"{name} {metric}": value for metric, value in measured.items()}
    return results


def _spec_of(model: Model, run: RunRecord | None) -> TaskSpec:
    """Returns the task that a classification head is for."""
    if run is not None:
        return TaskSpec.from_json(run.task)
    labels, count = model.provenance.labels, model.config.num_labels
    if count == 1:
        return TaskSpec(name="regression", labels=None, metrics=("pearson", "spearman"))
    labels = labels or tuple(map(str, range(count)))
    return TaskSpec(name="classification", labels=labels, metrics=("accuracy", "matthews"))


def _measure_pairs(
    folder: str,
    options: DataOptions,
    file: Path | None,
    split: Literal["dev", "test"],
    out: Path | None,
    limits: Limits,
    search: Search,
) -> dict[str, float]:
    """Returns the metrics of generated texts, and how likely the references are."""
    published = _published(options, file, "a file of sources and targets", "source", "target")
    sacrebleu()  # raises now if it is missing, not after generating the texts
    if out is not None:
        _check_out(out)
    model = generation.load_generative(folder)
    if published is not None:
        loaded = load_pairs(*published)
        name, pairs = split, loaded.dev if split == "dev" else loaded.test
        assert pairs is not None
    else:
        assert file is not None
        name, pairs = file.name, pairs_of(file, options.source, options.target or "target")
    likelihood = generation.measure_pairs(model, pairs, **limits)
    texts = generation.generate_texts(model, pairs, progress=True, **limits, **search)
    if out is not None:
        rows = zip(pairs.sources, texts, pairs.references, strict=True)
        names = ("source", "text", "references")
        _write_rows(out, [dict(zip(names, row, strict=True)) for row in rows], ensure_ascii=False)
    results = {f"{name} {key}": value for key, value in likelihood.items()}
    for group, values in generation.measure_texts(pairs, texts, tuple(TEXT_METRICS)).items():
        prefix = name if pairs.groups is None else f"{name} {group}"
        results |= {f"{prefix} {metric}": value for metric, value in values.items()}
    return results


def _kind_of(folder: str, otherwise: TaskKind) -> TaskKind:
    """Returns the kind of task that the head of a model is for, if it is for tags or answers."""
    head = stated_head(folder)
    return head if head in (TOKENS, ANSWERS) else otherwise


def _own_file(options: DataOptions, file: Path | None, *names: str) -> Path:
    """Returns the file of tags or questions to measure on."""
    options.check_only("a file with tags or questions", "task", *names)
    if file is None:
        raise InputError("give the tags or the questions to measure on by --file")
    return file


def _measure_tags(
    folder: str, options: DataOptions, file: Path | None, limits: Limits
) -> dict[str, float]:
    """Returns the metrics of a model's tags on a file."""
    file = _own_file(options, file, "text", "label")
    fields = options.word_fields
    data = tagged_words_of(file, fields["words"], fields["tags"])
    model = checkpoint.load(folder, head=TOKENS)
    token_classification.head_tags(model, tag_set(data))
    assert data.tags is not None
    measured = measure_tags(token_classification.tag_words(model, data, **limits), data.tags)
    return {f"{file.name} {name}": value for name, value in measured.items()}


def _measure_answers(
    folder: str,
    run: RunRecord | None,
    options: DataOptions,
    file: Path | None,
    limits: Limits,
) -> dict[str, float]:
    """Returns the metrics of a model's answers on a file."""
    file = _own_file(options, file)
    data = questions_of(file)
    assert data.answers is not None
    answers = _answers(folder, run, data, limits, empty=not all(data.answers))
    measured = measure_answers(answers, data.answers)
    return {f"{file.name} {name}": value for name, value in measured.items()}


def _answers(
    folder: str, run: RunRecord | None, data: Questions, limits: Limits, *, empty: bool
) -> list[str]:
    """Returns the answers of a model, read in windows as in its training."""
    if limits["truncate"]:
        raise InputError("--truncate does not apply to questions; leave it out")
    trained = {} if run is None else {n: run.task[n] for n in ("stride", "longest")}
    model = checkpoint.load(folder, head=ANSWERS)
    return question_answering.answer_questions(
        model,
        data,
        max_length=limits["max_length"],
        batch_size=limits["batch_size"],
        empty=empty,
        **trained,
    )


def _measure_plain_text(
    folder: str, run: RunRecord | None, options: DataOptions, batch_size: int
) -> dict[str, float]:
    """Returns the nats per token of a plain text, and the perplexity."""
    options.check_only("plain text", "task", "data", "context")
    if options.data is None:
        raise InputError(f"--task {PLAIN} needs --data FILE.txt")
    model = generation.load_generative(folder)
    path = Path(options.data)
    trained_with = CONTEXT if run is None else run.task.get("context", CONTEXT)
    context = options.context or trained_with
    # Runs train on windows without it.
    start = start_token(model) if run is None else None
    ids = token_ids(model, path)
    nats = nats_per_token(model, ids, context, batch_size=batch_size, start=start)
    return {f"{path.name} nats": nats, f"{path.name} perplexity": float(np.exp(nats))}


def predict(
    model: Positional[ModelName],
    file: Annotated[Path, arg(metavar="FILE")],
    out: Annotated[Path, arg(metavar="OUT")],
    text: TextColumns = ("text",),
    max_new_tokens: int = 128,
    beams: int = 1,
    batch_size: int = 64,
    max_length: Length = None,
    truncate: bool = False,
) -> None:
    """Label the texts of a file, or generate texts from them, with one JSON object per line.

    Args:
        model: Run folder, whose best model is used, or an artefact or checkpoint.
        file: A csv, tsv or jsonl file, or CoNLL text for tags.
        out: The jsonl file to write: label and probabilities of each text, its words and their
            tags, the answer to its question, or the text generated from it; must not exist.
        text: Columns with text.
        max_new_tokens: Largest number of tokens to generate for each text.
        beams: Beams of the search; 1 for greedy search.
        batch_size: Texts at a time.
        max_length: Longest text in tokens.
        truncate: Cut longer texts off.
    """
    _check_out(out)
    run = read_run(model)
    folder = model if run is None else run.model
    if run is not None and run.kind == "text":
        raise InputError(f"{model} was trained on plain text; see fusion-jax generate")
    if max_length is None and run is not None:
        max_length = run.max_length
    limits: Limits = {"max_length": max_length, "batch_size": batch_size, "truncate": truncate}
    rows: list[dict[str, object]]
    if beams != 1 and (run is None or run.kind != "pairs"):
        raise InputError("--beams is for generated texts; leave it out")
    options = DataOptions(text=text)
    kind = run.kind if run is not None else _kind_of(folder, "labels")
    if kind == TOKENS:
        words = tagged_words_of(file, options.word_fields["words"], tagged=False)
        tags = token_classification.tag_words(checkpoint.load(folder, head=TOKENS), words, **limits)
        rows = [{"words": a, "tags": b} for a, b in zip(words.words, tags, strict=True)]
    elif kind == ANSWERS:
        options.check_only("questions")
        questions = questions_of(file, answered=False)
        found = _answers(
            folder, run, questions, limits, empty=run is not None and run.task["empty"]
        )
        asked = zip(questions.questions, found, strict=True)
        rows = [{"question": question, "answer": answer} for question, answer in asked]
    elif run is not None and run.kind == "pairs":
        if len(text) > 1:
            raise InputError("texts are generated from one column; give one to --text")
        texts = texts_of(tables.read(file), text, None)
        generated = generation.generate_texts(
            generation.load_generative(folder),
            [first for first, *_ in texts.texts],
            max_new_tokens=max_new_tokens,
            beams=None if beams == 1 else Beams(beams),
            progress=True,
            **limits,
        )
        rows = [{"text": each} for each in generated]
    else:
        texts = texts_of(tables.read(file), text, None)
        loaded = checkpoint.load(folder, head="classification")
        spec = _spec_of(loaded, run)
        names = loaded.provenance.labels or spec.labels
        rows = [_prediction(x, names) for x in classification.predict(loaded, texts, **limits)]
    _write_rows(out, rows)
    print(f"Wrote {len(rows)} lines to {out}.")


def _prediction(logits: np.ndarray, names: Sequence[str] | None) -> dict[str, object]:
    """Returns the label and probabilities of one text, or its value in a regression task."""
    if names is None:
        return {"value": float(logits[0])}
    weights = np.exp(logits.astype(np.float64) - logits.max())
    shares = (weights / weights.sum()).tolist()
    return {
        "label": names[int(logits.argmax())],
        "probabilities": dict(zip(names, shares, strict=True)),
    }


def _check_out(path: Path) -> None:
    """Raises `InputError` if a file of results exists, or cannot be written."""
    if path.exists():
        raise InputError(f"{path} exists; choose another file or remove it")
    check_new_file(path)


def _write_rows(
    path: Path, rows: Iterable[dict[str, object]], *, ensure_ascii: bool = True
) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows))


COMMANDS = {"evaluate": evaluate, "predict": predict}
