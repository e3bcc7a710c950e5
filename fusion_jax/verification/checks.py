"""What compressing did to a model's neural tangent kernels, with bounds and cross-checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

import ntk
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.checkpoint import load
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model
from fusion_jax.models.tokens import TokenBatch, length_for, load_tokenizer, sentences, tokenize
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.nn.site import sites
from fusion_jax.report import num_params
from ntk.bounds.certificates import Certificate, certify
from ntk.bounds.changes import pair
from ntk.comparison import Comparison, compare
from ntk.tables import table

ENGINES = ("jacobian", "vector-product", "neural-tangents")
TOLERANCE = 1e-4
"""How far engines may be apart in float32, relative to the largest entry."""
_BLOCK = 3
_KINDS = {"sgd": "SGD", "adam": "Adam"}


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Kernels of an original and a compressed model; ``str()`` is tables.

    Args:
        examples: How many texts.
        kernels: By kind, (2, n, n): the original's and the compressed model's.
        comparisons: By kind, how far these are apart.
        certificates: By site, bounds and changes of its MLP's outputs and kernels at the inputs
            that it has in the original.
        apart: How far engines are from the first, relative, on a few texts; None if
            neural-tangents is not installed.
    """

    examples: int
    kernels: dict[str, Float[np.ndarray, "2 n n"]]
    comparisons: dict[str, Comparison]
    certificates: dict[str, Certificate]
    apart: dict[str, float] | None

    def failures(self) -> list[str]:
        """What must not be: sentences, none if bounds hold and engines agree."""
        found = [
            f"{site}: a certified bound is violated"
            for site, certificate in self.certificates.items()
            if certificate.violations()
        ]
        # Also for NaN, of which no comparison is true.
        bad = {name: x for name, x in (self.apart or {}).items() if not x <= TOLERANCE}
        return found + [f"engine {name} is off by {x:.1e}" for name, x in bad.items()]

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "examples": self.examples,
            "kernels": {
                kind: {
                    "frobenius": c.frobenius,
                    "spectral": c.spectral,
                    "alignment": c.alignment,
                    "effective_ranks": list(c.effective_ranks),
                    "original": self.kernels[kind][0].tolist(),
                    "compressed": self.kernels[kind][1].tolist(),
                }
                for kind, c in self.comparisons.items()
            },
            "sites": {
                site: [line._asdict() for line in certificate.lines]
                for site, certificate in self.certificates.items()
            },
            "engines_apart": self.apart,
            "failures": self.failures(),
        }

    def __str__(self) -> str:
        parts = []
        for kind, comparison in self.comparisons.items():
            heading = f"{_KINDS[kind]} kernel of {self.examples} texts, original and compressed"
            parts.append(f"{heading}\n\n{comparison}")
        if self.certificates:
            rows = [["site, relative change", "a priori, at most", "data, at most", "measured"]]
            for site, certificate in self.certificates.items():
                for line in certificate.lines:
                    rows.append([f"{site} {line.quantity}", *(f"{x:.3g}" for x in line[1:])])
            parts.append(f"MLPs at the original's inputs, with certified bounds\n\n{table(rows)}")
        if self.apart is None:
            parts.append("Engines were not compared: neural-tangents is not installed.")
        else:
            found = ", ".join(f"{name} {x:.0e}" for name, x in self.apart.items())
            parts.append(f"Engines, largest relative distance from {ENGINES[0]}: {found}")
        return "\n\n".join(parts)


class Probability(nnx.Module):
    """The softmax probability of class 0, with a random head where the model has none."""

    def __init__(self, model: Model, head: Float[Array, "d 2"]):
        self.model = model
        self.random = Frozen(head)

    def __call__(self, *batch: Array) -> Float[Array, " n"]:
        """The probability for each text of a batch: token ids, mask, and what else it has."""
        result = self.model(*batch)
        logits = getattr(result, "logits", None)
        if logits is None or logits.ndim != 2:
            real = batch[1][..., None].astype(jnp.float32)
            hidden = result.last_hidden_state.astype(jnp.float32)
            logits = (hidden * real).sum(1) / real.sum(1) @ self.random[...]
        return jax.nn.softmax(logits.astype(jnp.float32))[:, 0]


class Verified(NamedTuple):
    """A verification of files, and what a page on it needs."""

    verification: Verification
    artefact: Path
    original: str
    sizes: tuple[int, int]

    def page(self) -> str:
        """The HTML page."""
        from fusion_jax.verification.page import page

        return page(*self)


def verify_files(
    original: str | None, compressed: str, text: Path | None, num_examples: int, seed: int
) -> Verified:
    """Verifies an artefact against the model it was made of, as the command line does.

    Args:
        original: Hub id or folder; None for what the artefact says.
        compressed: The artefact.
        text: A text file, one example a line; None for the package's sentences.
        num_examples: How many of its lines.
        seed: Seed of random choices.

    Returns:
        What was found.

    Raises:
        InputError: A file is missing or does not fit.
    """
    if num_examples < 2:
        raise InputError(f"num_examples must be at least 2; got {num_examples}")
    if text is not None and not text.is_file():
        raise InputError(f"there is no file {text}")
    content = None if text is None else text.read_text(encoding="utf-8").splitlines()
    examples = [x for x in (sentences() if content is None else content) if x.strip()]
    if len(examples) < 2:
        raise InputError(f"{text} has fewer than two lines of text")
    key = jax.random.key(seed)
    smaller = load(compressed, dtype=jnp.float32)
    name = smaller.provenance.name if original is None else original
    larger = load_original(name, smaller, key=key)
    tokenizer = load_tokenizer(smaller.provenance.folder)
    batch = tokenize(tokenizer, examples[:num_examples], length_for(smaller))
    found = verify(larger, smaller, batch, key=key)
    return Verified(found, Path(compressed), name, (num_params(larger), num_params(smaller)))


def load_original(name: str, smaller: Model, *, key: Key[Array, ""]) -> Model:
    """The model that a compressed one was made of, with the same head.

    Args:
        name: Hub id or folder.
        smaller: The compressed model.
        key: Random key for a head that neither's files have.

    Returns:
        The original.

    Raises:
        InputError: It cannot be loaded, or is another model.
    """
    head: Any = smaller.provenance.head
    labels = smaller.config.num_labels if head == "classification" else None
    original: Any = load(name, head=head, num_labels=labels, dtype=jnp.float32, key=key)
    if head is not None:
        # A head that compressing made is in the compressed model only.
        original.head = smaller.head  # type: ignore[attr-defined]
    return original


def verify(
    original: Model,
    smaller: Model,
    batch: TokenBatch,
    *,
    key: Key[Array, ""],
    positions: int = 64,
    cross_check: bool = True,
    progress: bool | None = None,
) -> Verification:
    """Computes and compares exact kernels of both models, and certifies each fused MLP.

    Experts of a mixture have no certificates, as each sees other positions.

    The kernels are those of one scalar, the softmax probability of class 0, with respect to all
    parameters.

    Args:
        original: The original.
        smaller: The compressed model.
        batch: Texts, at least two.
        key: Random key of the head, if the models have none, and of the targets of training.
        positions: Most token positions at which MLPs are certified.
        cross_check: Whether to compare engines on three texts.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        What was found.

    Raises:
        InputError: The models do not belong together, or there are too few texts.

    Example:
        >>> verify(model, smaller, batch, key=jax.random.key(0))  # doctest: +SKIP
    """
    n = batch.input_ids.shape[0]
    if n < 2:
        raise InputError(f"kernels of at least two texts can be compared; got {n}")
    pairs = list(zip(sites(original), sites(smaller), strict=False))
    if [a.path for a, _ in pairs] != [s.path for s in sites(smaller)]:
        raise InputError("the two models have their MLPs in different places")
    width = sites(original)[0].mlp.d_in
    head = jax.random.normal(key, (width, 2)) / width**0.5
    models = [Probability(model, head) for model in (original, smaller)]

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    targets = rng.permutation(np.arange(n) % 2).astype(np.float64)
    kernels, comparisons = {}, {}
    start = np.asarray(jax.jit(lambda m, b: m(*b))(models[0], batch))
    # Once for both kinds, which share compiled gradients.
    functions = [ntk.functional(model) for model in models]
    for kind in _KINDS:
        both = [
            np.asarray(ntk.kernel(f, params, batch, kind=kind, progress=progress))
            for f, params in functions
        ]
        kernels[kind] = np.stack(both)
        comparisons[kind] = compare(*both, targets=targets, outputs=start)
    apart = _engines_apart(models[1], batch, pairs[-1][1].path) if cross_check else {}
    seen = jax.jit(mlp_inputs)(original, *batch)
    real = np.asarray(batch.attention_mask)
    chosen = np.linspace(0, real.sum() - 1, min(positions, int(real.sum()))).astype(int)
    certificates = {
        a.path: certify(pair(a.mlp, b.mlp), jnp.asarray(np.asarray(seen[a.path])[real][chosen]))
        for a, b in pairs
        if hasattr(b.mlp, "labels") and a.path in seen
    }
    return Verification(
        examples=n,
        kernels=kernels,
        comparisons=comparisons,
        certificates=certificates,
        apart=apart,
    )


def _engines_apart(model: nnx.Module, batch: TokenBatch, path: str) -> dict[str, float] | None:
    """Relative distances of engines on a few texts, by the parameters of one MLP."""
    where = re.escape(f"model.{path}" if path else "model")
    f, params = ntk.functional(model, wrt=rf"{where}\..*")
    few = jax.tree.map(lambda x: x[:_BLOCK], batch)
    kernels = {}
    for engine in ENGINES:
        try:
            kernels[engine] = np.asarray(ntk.kernel(f, params, few, engine=engine))
        except ntk.InputError as error:
            if "not installed" not in str(error):
                raise
            return None
    first = kernels.pop(ENGINES[0])
    return {
        name: float(np.abs(k - first).max() / np.abs(first).max()) for name, k in kernels.items()
    }
