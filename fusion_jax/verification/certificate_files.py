"""Certificates that travel with an artefact, and that anyone can check from the weights alone.

``certificate.json`` holds, for each fused MLP, the bounds on the change of its outputs and kernels
and the measured changes; ``certificate.safetensors`` the inputs that they hold for. Checksums say
which weights they are about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.checkpoint.files import CONFIG, FUSION, read_json, versions, write_json
from fusion_jax.checkpoint.opening import load
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Model
from fusion_jax.models.tokens import length_for, tokenize, tokenizer_of
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.site import sites
from fusion_jax.progress import show_progress
from fusion_jax.verification.checks import load_original
from ntk.bounds import Certificate, certify, pair
from ntk.bounds.certificates import CertificateLine

CERTIFICATE = "certificate.json"
INPUTS = "certificate.safetensors"
FORMAT = 2
"""Certificates of format 1 have looser bounds, which hold if those found now are no larger."""
TOLERANCE = 1e-3
"""The largest relative difference between a stated figure and the one that is found again."""


class Checked(NamedTuple):
    """What came out of checking a certificate.

    Args:
        certificates: What was found again, by the path of the MLP.
        problems: A sentence for each thing that is not as stated; empty if the certificate holds.
    """

    certificates: dict[str, Certificate]
    problems: list[str]


def write_certificate(
    artefact: Path, original: str | None, texts: list[str], *, positions: int = 64
) -> dict[str, Certificate]:
    """Certifies the fused MLPs of an artefact, and writes the certificate into its folder.

    Args:
        artefact: The artefact.
        original: The hub id or folder of the original; None for the one that the artefact states.
        texts: The texts at whose tokens the certificate holds.
        positions: The largest number of tokens.

    Returns:
        The certificates by the path of the MLP.

    Raises:
        InputError: The artefact has a certificate already or no fused MLPs, or the models do not
            belong together.
    """
    check_at_least(1, positions=positions)
    if (artefact / CERTIFICATE).exists():
        raise InputError(f"{artefact} has a certificate already: {CERTIFICATE}")
    name, larger, smaller = _both(artefact, original)
    pairs = _fused(larger, smaller)
    tokenizer = tokenizer_of(smaller)
    batch = tokenize(tokenizer, texts, length_for(smaller))
    seen = jax.jit(mlp_inputs)(larger, *batch)
    real = np.asarray(batch.attention_mask)
    chosen = np.linspace(0, real.sum() - 1, min(positions, int(real.sum()))).astype(int)
    inputs = {path: np.asarray(seen[path], np.float32)[real][chosen] for path in pairs}
    found = _certified(pairs, inputs)
    safetensors.numpy.save_file(inputs, artefact / INPUTS)
    fields = {
        "format": FORMAT,
        "original": name,
        "versions": versions(),
        "files": _checksums(artefact),
        "original_weights": {path: _checksum_of(old) for path, (old, _) in pairs.items()},
        "sites": {
            path: [line._asdict() for line in certificate.lines]
            for path, certificate in found.items()
        },
    }
    write_json(artefact / CERTIFICATE, fields)
    return found


def check_certificate(artefact: Path, original: str | None = None) -> Checked:
    """Checks the certificate of an artefact: the files, the original's weights, and all figures.

    Args:
        artefact: The artefact.
        original: The hub id or folder of the original; None for the one that the certificate
            states.

    Raises:
        InputError: There is no certificate that can be read, or a model cannot be loaded.
    """
    stated = _read(artefact)
    now = _checksums(artefact)
    names = sorted(stated["files"].keys() | now.keys())
    changed = [name for name in names if stated["files"].get(name) != now.get(name)]
    problems = [f"{name} is not the file that was certified" for name in changed]
    if problems:  # of other weights nothing is stated
        return Checked({}, problems)
    _, larger, smaller = _both(artefact, original or stated["original"])
    pairs = _fused(larger, smaller)
    if stated["original_weights"].keys() != pairs.keys():
        return Checked({}, ["the certificate is about other MLPs"])
    for path, (old, _) in pairs.items():
        if stated["original_weights"][path] != _checksum_of(old):
            problems.append(f"{path}: the original's weights are not those that were certified")
    if problems:
        return Checked({}, problems)
    try:
        inputs = safetensors.numpy.load_file(artefact / INPUTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {artefact / INPUTS}: {error}") from None
    found = _certified(pairs, inputs)
    for path, certificate in found.items():
        if certificate.violations():
            problems.append(f"{path}: a bound is violated")
        lines = [CertificateLine(**line) for line in stated["sites"][path]]
        for line, again in zip(lines, certificate.lines, strict=True):
            for what in ("a_priori", "data", "measured"):
                was, now_is = getattr(line, what), getattr(again, what)
                most = TOLERANCE * abs(was) + 1e-9
                looser = stated["format"] == 1 and what != "measured"
                if not (now_is <= was + most if looser else abs(now_is - was) <= most):
                    problems.append(
                        f"{path}: {line.quantity}, {what.replace('_', ' ')}: {was:.4g} is stated, "
                        f"{now_is:.4g} was found"
                    )
    return Checked(found, problems)


def _read(artefact: Path) -> dict[str, Any]:
    file = artefact / CERTIFICATE
    if not file.is_file():
        raise InputError(f"{artefact} has no {CERTIFICATE}; write one with fusion-jax certify")
    fields = read_json(file)[1]
    try:
        assert fields["format"] in (1, FORMAT)
        assert all(
            isinstance(fields[name], dict) for name in ("files", "original_weights", "sites")
        )
        for lines in fields["sites"].values():
            for line in lines:
                assert all(isinstance(CertificateLine(**line)[i], int | float) for i in (1, 2, 3))
        assert fields["sites"].keys() == fields["original_weights"].keys()
        assert isinstance(fields["original"], str)
    except (LookupError, TypeError, AssertionError, AttributeError):
        raise InputError(f"{file} is not a certificate of this version") from None
    return fields


def _both(artefact: Path, original: str | None) -> tuple[str, Model, Model]:
    if not (artefact / FUSION).is_file():
        raise InputError(f"{artefact} is not an artefact")
    smaller = load(artefact, dtype=jnp.float32)
    name = smaller.provenance.name if original is None else original
    return name, load_original(name, smaller, key=jax.random.key(0)), smaller


def _fused(larger: Model, smaller: Model) -> dict[str, tuple[AnyMlp, AnyMlp]]:
    """Returns the MLPs that were fused, without experts, by path: before and after."""
    old = {site.path: site.mlp for site in sites(larger)}
    found = {
        site.path: (old[site.path], site.mlp)
        for site in sites(smaller)
        if hasattr(site.mlp, "labels") and not site.mlp.stack and site.path in old
    }
    if not found:
        raise InputError("nothing to certify: the artefact has no fused MLPs beside experts")
    return found


def _certified(
    pairs: Mapping[str, tuple[AnyMlp, AnyMlp]], inputs: Mapping[str, np.ndarray]
) -> dict[str, Certificate]:
    found = {}
    with show_progress("Certifying", len(pairs), first="compiling") as advance:
        for path, (old, new) in pairs.items():
            if path not in inputs:
                raise InputError(f"{INPUTS} has no inputs for {path}")
            found[path] = certify(pair(old, new), jnp.asarray(inputs[path]))
            advance(path)
    return found


def _checksums(artefact: Path) -> dict[str, str]:
    """Returns the SHA-256 of the files that decide what a model computes, and of the inputs."""
    files = [artefact / CONFIG, artefact / FUSION, *sorted(artefact.glob("*.safetensors"))]
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                digest.update(part)
        found[file.name] = digest.hexdigest()
    return found


def _checksum_of(mlp: AnyMlp) -> str:
    """Returns the SHA-256 of an MLP's weights in float32."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(mlp.sub_mlps()):
        array = np.asarray(leaf, np.float32)
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    bias = mlp.out_bias()
    digest.update(b"" if bias is None else np.asarray(bias, np.float32).tobytes())
    return digest.hexdigest()
