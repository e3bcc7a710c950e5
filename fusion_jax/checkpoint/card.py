"""Writes model cards: the README.md of artefacts and of exported checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_jax.checkpoint.files import CARD, FUSION, MODULES, versions
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import Provenance, history_in_words
from fusion_jax.nn.site import sites
from fusion_jax.report import Report, num_params

CARRIED = (
    "base_model",
    "license",
    "license_name",
    "license_link",
    "language",
    "library_name",
    "pipeline_tag",
    "datasets",
    "tags",
)
"""Fields of the original's card that hold for the smaller model."""
AUTO_CLASSES = {
    None: "AutoModel",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}
"""The class of transformers that loads a model, by its head."""
SOUND_CLASSES: dict[str | None, str] = {
    None: "AutoModel",
    "classification": "AutoModelForAudioClassification",
    "seq2seq-lm": "AutoModelForSpeechSeq2Seq",
}
"""The same for models of sounds."""
PAPER = (
    "MLP Fusion: Wei, Guo, Chen, He, [NTK-approximating MLP Fusion for Efficient Language Model "
    "Fine-tuning](https://arxiv.org/abs/2307.08941), ICML 2023."
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HEADING = re.compile(r"^#+ .*\b(cit(e|ing|ations?)|bibtex)\b", re.IGNORECASE)


def write_card(
    folder: Path,
    model: Model,
    report: Report | None = None,
    padded: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Writes the model card of a folder that holds a model.

    The licence, the language, the tags and the citation of the original's card are carried on.

    Args:
        folder: The folder; its other files are there already.
        model: The model; its provenance leads to the original's card.
        report: What the compression changed, if it is known.
        padded: For an export, the width in the file and the parameters that are zeros, of each MLP
            that was padded.
    """
    from huggingface_hub import ModelCardData

    provenance: Provenance = model.provenance
    given, text = _read(Path(provenance.folder) / CARD)
    artefact, sentences = ((folder / name).is_file() for name in (FUSION, MODULES))
    exported = not artefact
    name = "/".join(Path(provenance.name).parts[-2:])
    # The name of a folder says nothing to others.
    if _HUB_ID.fullmatch(provenance.name) and not Path(provenance.name).exists():
        given.setdefault("base_model", provenance.name)
    tags = given.get("tags")
    given["tags"] = list(dict.fromkeys([*(tags if isinstance(tags, list) else []), "fusion-jax"]))
    given["library_name"] = "fusion-jax"
    if exported:
        given["library_name"] = "sentence-transformers" if sentences else "transformers"
    rows = [f"| {site.path or 'the model'} | {site.mlp.width} |" for site in sites(model)]
    parts = [
        f"# {name}, {history_in_words(provenance.history)}",
        f"Made from {name} by fusion-jax {versions()['fusion_jax']}: {num_params(model):,} "
        "parameters.",
        "" if report is None else f"## What changed\n\n```text\n{report}\n```",
        f"## Widths\n\n| MLP | hidden units |\n| :-- | --: |\n{chr(10).join(rows)}",
        _padding(padded or {}),
        f"## Use\n\n{_use(model, exported, sentences)}",
        "## License\n\nThe license of the original holds for this model too.",
        f"## Citation\n\n{_citation(text)}",
        PAPER,
    ]
    head = ModelCardData(ignore_metadata_errors=True, **given).to_yaml()
    body = "\n\n".join(part.strip() for part in parts if part)
    (folder / CARD).write_text(f"---\n{head}\n---\n\n{body}\n", encoding="utf-8")


def _read(card: Path) -> tuple[dict[str, Any], str]:
    """Returns the fields of a model card that are carried on, and its text; empty without one."""
    from huggingface_hub import ModelCard

    try:
        read = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        fields = read.data.to_dict()
    except Exception:  # a card is text that anyone may write; nothing depends on it
        return {}, ""
    return {name: fields[name] for name in CARRIED if fields.get(name)}, read.text


def _padding(padded: Mapping[str, tuple[int, int]]) -> str:
    """Returns what zero units cost, or nothing if there are none."""
    if not padded:
        return ""
    widest = max(width for width, _ in padded.values())
    return (
        "The format has one width for all layers. Zero units pad the narrower MLPs to up to "
        f"{widest} units, which changes no output: {sum(n for _, n in padded.values()):,} of the "
        "numbers in the file are such zeros."
    )


def _use(model: Model, exported: bool, sentences: bool) -> str:
    """Returns how to load the model."""
    provenance = model.provenance
    if not exported:
        head = "" if provenance.head is None else f', head="{provenance.head}"'
        lines = ["import fusion_jax as fj", "", f'model = fj.load("FOLDER"{head})']
    elif sentences:
        lines = ["from sentence_transformers import SentenceTransformer", ""]
        lines += [
            'model = SentenceTransformer("FOLDER")',
            'vectors = model.encode(["A sentence."])',
        ]
    else:
        auto, name, reader = AUTO_CLASSES[provenance.head], "tokenizer", "AutoTokenizer"
        if model.takes == "images":
            name, reader = "processor", "AutoImageProcessor"
            auto = "AutoModelForImageClassification" if provenance.head else auto
        elif model.takes != "text":
            name, reader = "processor", "AutoProcessor"
            auto = SOUND_CLASSES[provenance.head] if model.takes == "sounds" else auto
        lines = [f"from transformers import {', '.join(sorted((auto, reader)))}", ""]
        lines += [f'model = {auto}.from_pretrained("FOLDER")']
        lines += [f'{name} = {reader}.from_pretrained("FOLDER")']
    return "\n".join(["```python", *lines, "```"])


def _citation(text: str) -> str:
    """Returns the section of a card that says how to cite, without its heading; may be empty."""
    found: list[str] = []
    inside = fenced = False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("#") and not fenced:
            inside = bool(_HEADING.match(line))
        elif inside:
            found.append(line)
    return "\n".join(found).replace(PAPER, "").strip()
