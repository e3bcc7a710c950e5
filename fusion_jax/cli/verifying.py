"""The commands verify-ntk, report, certify and verify."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fusion_jax.checkpoint.files import check_new_file, write_text
from fusion_jax.cli.options import Artefact, TextFile
from fusion_jax.errors import InputError
from fusion_jax.models.tokens import sentences
from fusion_jax.training.tasks.tables import read_text
from fusion_jax.verification.certificate_files import (
    CERTIFICATE,
    check_certificate,
    write_certificate,
)
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


def certify(
    artefact: Positional[Artefact],
    original: Annotated[
        str | None, arg(metavar="MODEL", help_behavior_hint="(default: as stated in the artefact)")
    ] = None,
    text: TextFile = None,
    num_examples: int = 32,
    positions: int = 64,
) -> int:
    """Write a certificate into an artefact: bounds on what fusing changed, checked by verify.

    Args:
        artefact: Artefact.
        original: The model before compression.
        text: Text file, one example per line, at whose tokens the bounds hold.
        num_examples: Number of its lines to use.
        positions: Largest number of tokens.
    """
    if text is None:
        lines = sentences()
    else:
        lines = [line for line in read_text(text).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{text} has no text")
    found = write_certificate(Path(artefact), original, lines[:num_examples], positions=positions)
    for path, certificate in found.items():
        print(f"{path}, {certificate.inputs} inputs\n\n{certificate}\n")
    print(f"Wrote {Path(artefact) / CERTIFICATE}; check it with fusion-jax verify {artefact}")
    return int(any(certificate.violations() for certificate in found.values()))


def verify(
    artefact: Positional[Artefact],
    original: Annotated[
        str | None, arg(metavar="MODEL", help_behavior_hint="(default: as the certificate states)")
    ] = None,
) -> int:
    """Check the certificate of an artefact from the weights alone.

    The exit code is 1 if a file or a figure is not as the certificate states.

    Args:
        artefact: Artefact.
        original: The model before compression.
    """
    checked = check_certificate(Path(artefact), original)
    for problem in checked.problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    if checked.problems:
        return 1
    lines = sum(len(certificate.lines) for certificate in checked.certificates.values())
    print(
        f"The certificate holds: {lines} figures of {len(checked.certificates)} MLPs were found "
        "again, and no bound is violated."
    )
    return 0


COMMANDS = {"verify-ntk": verify_ntk, "report": report, "certify": certify, "verify": verify}
