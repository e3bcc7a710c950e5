"""Reads and checks ``fusion.json`` and ``generation_config.json``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from fusion_jax.checkpoint.files import FORMAT, FUSION, GENERATION, read_json
from fusion_jax.errors import InputError
from fusion_jax.models.provenance import Head

_ARTEFACT_FIELDS: dict[str, tuple[type, str]] = {
    "base": (str, "required"),
    "head": (str, "nullable"),
    "num_labels": (int, "nullable"),
    "label_ids": (list, "nullable"),
    "labels": (list, "nullable"),
    "problem_type": (str, "nullable"),
    "new_head": (bool, "optional"),
    "untied": (list, "optional"),
    "dtype": (str, "required"),
    "sites": (dict, "required"),
    "forms": (dict, "optional"),
    "history": (list, "required"),
    "masks": (dict, "optional"),
}
"""The type of each field of ``fusion.json``; nullable fields may also be missing."""
_ITEMS = {"label_ids": int, "labels": str, "untied": str, "history": dict}
"""The type of the items of lists."""


def read_artefact(folder: Path) -> dict[str, Any] | None:
    """Returns the fields of ``fusion.json``, or None if the folder has no such file."""
    if not (folder / FUSION).is_file():
        return None
    _, artefact = read_json(folder / FUSION)
    version = artefact.get("format")
    if not isinstance(version, int):
        raise InputError(f"{folder / FUSION} does not state its format")
    if version > FORMAT:
        raise InputError(
            f"{folder} was written by a newer version of fusion-jax; update fusion-jax to read it"
        )
    for field, (kind, need) in _ARTEFACT_FIELDS.items():
        value = artefact.get(field)
        absent = field not in artefact if need == "optional" else value is None
        items = value if isinstance(value, list) else []
        wrong = any(not isinstance(item, _ITEMS.get(field, object)) for item in items)
        if wrong or not (isinstance(value, kind) or (absent and need != "required")):
            raise InputError(f"{folder / FUSION}: {field} is missing or of a wrong type")
    if artefact.get("head") not in (None, *get_args(Head)):
        raise InputError(f"{folder / FUSION}: unknown head {artefact['head'][:100]!r}")
    if "masks" in artefact:
        _check_masks(folder / FUSION, artefact["masks"])
    return artefact


def _check_masks(where: Path, masks: dict[str, object]) -> None:
    base = masks.get("base")
    shapes, prints = masks.get("shapes"), masks.get("prints")
    if not (
        isinstance(base, dict)
        and isinstance(base.get("name"), str)
        and isinstance(base.get("revision"), str | None)
        and isinstance(shapes, dict)
        and all(isinstance(shape, list) for shape in shapes.values())
        and all(isinstance(n, int) and n >= 0 for shape in shapes.values() for n in shape)
        and isinstance(prints, dict)
        and all(isinstance(each, str) for each in prints.values())
    ):
        raise InputError(f"{where}: masks is not as fusion_jax.save_masks writes it")


def generation_fields(folder: Path) -> dict[str, object]:
    """Returns what ``generation_config.json`` says instead of ``config.json``."""
    if not (folder / GENERATION).is_file():
        return {}
    _, given = read_json(folder / GENERATION)
    names = ("eos_token_id", "decoder_start_token_id")
    return {name: given[name] for name in names if given.get(name) is not None}


def ignored_generation_fields(folder: str | os.PathLike[str]) -> dict[str, object]:
    """Returns the fields of ``generation_config.json`` that change texts, but are not applied.

    Args:
        folder: The folder of a model.

    Returns:
        The fields by name; empty if there are none, or no such file.
    """
    path = Path(folder) / GENERATION
    if not path.is_file():
        return {}
    _, given = read_json(path)
    sampling = _SAMPLING_FIELDS if given.get("do_sample") else set()
    return {
        name: value
        for name, value in given.items()
        if name in _TEXT_FIELDS | sampling and value not in (None, 0, 1, False, [], {})
    }


_SAMPLING_FIELDS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"}
_TEXT_FIELDS = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "length_penalty",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
}
"""The fields of ``generation_config.json`` that change texts, without those of sampling."""
