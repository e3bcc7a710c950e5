"""The commands verify-ntk and report."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fusion_jax.checkpoint.files import check_new_file, write_text
from fusion_jax.cli.options import Artefact, TextFile
from fusion_jax.verification.checks import verify_files
from fusion_jax.verification.page import html_page


def verify_ntk(
    original: Positional[Annotated[str, arg(metavar="ORIGINAL")]],
    compressed: Positional[Annotated[str, arg(metavar="COMPRESSED")]],
    text: TextFile = None,
    num_examples: int = 64,
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
    seed: int = 0,
) -> int:
    """Compare the exact NTKs of a model and its compressed version; certify each fused MLP.

    The exit code is 1 if a certified bound is violated or NTK engines disagree.

    Args:
        original: Hub id, Hugging Face folder, or artefact.
        compressed: Artefact.
        text: Text file, one example per line.
        num_examples: Number of its lines to use.
        json: Also write the results to this file.
        seed: Seed of a random head.
    """
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        check_new_file(json)
    result = verify_files(original, compressed, text, num_examples, seed).verification
    print(result)
    if json is not None:
        write_text(json, dumps(result.to_json(), indent=1) + "\n")
    for failure in result.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(result.failures()))


def report(
    artefact: Positional[Artefact],
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
    original: Annotated[
        str | None, arg(metavar="MODEL", help_behavior_hint="(default: as stated in the artefact)")
    ] = None,
    text: TextFile = None,
    num_examples: int = 32,
    seed: int = 0,
) -> int:
    """Write an HTML page on what compressing changed: kernels, bounds, predicted training.

    Args:
        artefact: Artefact.
        out: The page.
        original: The model before compression.
        text: Text file, one example per line.
        num_examples: Number of its lines to use.
        seed: Seed of a random head.
    """
    check_new_file(out)
    result = verify_files(original, artefact, text, num_examples, seed)
    write_text(out, html_page(result))
    print(f"Wrote {out}")
    return int(bool(result.verification.failures()))


COMMANDS = {"verify-ntk": verify_ntk, "report": report}
