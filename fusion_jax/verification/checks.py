"""Compares the neural tangent kernels of a model and its compressed version, and certifies MLPs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

import ntk
from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.checkpoint.files import read_json
from fusion_jax.checkpoint.opening import load
from fusion_jax.errors import InputError, check_at_least
from fusion_jax.models.base import Model
from fusion_jax.models.provenance import CLASS_HEADS
from fusion_jax.models.tokens import (
    TokenBatch,
    check_tokens,
    length_for,
    sentences,
    tokenize,
    tokenizer_of,
)
from fusion_jax.nn.linear_forms import Frozen
from fusion_jax.nn.site import sites
from fusion_jax.progress import show_progress
from fusion_jax.report import Report, num_params
from fusion_jax.verification.outlook import (
    RATES,
    FirstStep,
    Mover,
    first_steps,
    mover,
    step_table,
    validity,
    verdict,
)
from ntk.bounds import Certificate, certify, pair
from ntk.comparison import Comparison, compare
from ntk.tables import table

ENGINES = ("jacobian", "vector-product", "neural-tangents")
TOLERANCE = 1e-4
"""The largest difference of engines in float32, relative to the largest entry of a kernel."""
KERNEL_NAMES: dict[ntk.KernelKind, str] = {"sgd": "SGD", "adam": "Adam"}
"""The kinds of kernels that are compared, and their names in text."""
LOOSE = 1.0
"""Relative bounds above this are loose: an MLP that is gone has changed by as much."""
_CROSS_CHECK_TEXTS = 3


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The kernels of an original and a compressed model, compared; ``str()`` returns tables.

    Args:
        num_texts: The number n of texts.
        kernels: For each kind (2, n, n): the kernels of the original and of the compressed model.
        comparisons: For each kind, how far the two kernels are apart.
        steps: For each kind, one real step of both models at three learning rates.
        certificates: For each site, bounds and measured changes of the MLP's outputs and kernels,
            at the inputs that the MLP has in the original.
        scaling: The scaling of the fused MLPs, if they have the same one.
        engine_differences: The relative difference between each further engine and the first, on a
            few texts; empty if engines were not compared, None if neural-tangents is not installed.
    """

    num_texts: int
    kernels: dict[ntk.KernelKind, Float[np.ndarray, "2 n n"]] = field(repr=False)
    comparisons: dict[ntk.KernelKind, Comparison]
    steps: dict[ntk.KernelKind, list[FirstStep]]
    certificates: dict[str, Certificate]
    scaling: str | None
    engine_differences: dict[str, float] | None

    def failures(self) -> list[str]:
        """Returns a sentence for each violated bound and each engine that disagrees."""
        found = [
            f"{site}: a certified bound is violated"
            for site, certificate in self.certificates.items()
            if certificate.violations()
        ]
        # "not <=" also finds NaN.
        differences = (self.engine_differences or {}).items()
        return found + [
            f"engine {name} differs by {x:.1e}" for name, x in differences if not x <= TOLERANCE
        ]

    def loose_bounds(self) -> str | None:
        """Returns a sentence on the bounds that say little, or None if there are none."""
        lines = [line for c in self.certificates.values() for line in c.lines]
        loose = [line for line in lines if min(line.a_priori, line.data) > LOOSE]
        if not loose:
            return None
        changed = sum(line.measured > LOOSE for line in loose)
        also = f" (in {changed} cases, the change itself is above 100 %)" if changed else ""
        return (
            f"{len(loose)} of {len(lines)} certified bounds are loose: above 100 %, which is the "
            f"change of an MLP that is gone{also}"
        )

    def kinds(self) -> list[ntk.KernelKind]:
        """Returns the kinds of kernels, first that which the scaling keeps."""
        return sorted(self.kernels, key=lambda kind: kind != self.scaling)

    def outlook(self, kind: ntk.KernelKind) -> tuple[str, str]:
        """Returns whether the smaller model trains like the original, and how far that holds."""
        steps = self.steps[kind]
        first = verdict(kind, self.comparisons[kind].frobenius, steps)
        if self.scaling in KERNEL_NAMES and kind != self.scaling:
            first += (
                f" Its scaling keeps the {KERNEL_NAMES[self.scaling]} kernel; to train with "
                f"{KERNEL_NAMES[kind]}, compress with scaling {kind!r}."
            )
        return first, validity(kind, steps)

    def to_json(self) -> dict[str, object]:
        """Returns the results as JSON values."""
        return {
            "examples": self.num_texts,
            "kernels": {
                kind: {
                    "frobenius": c.frobenius,
                    "spectral": c.spectral,
                    "alignment": c.alignment,
                    "effective_ranks": list(c.effective_ranks),
                    "first_steps": [step._asdict() for step in self.steps[kind]],
                    "outlook": " ".join(self.outlook(kind)),
                    "original": self.kernels[kind][0].tolist(),
                    "compressed": self.kernels[kind][1].tolist(),
                }
                for kind, c in self.comparisons.items()
            },
            "sites": {
                site: [line._asdict() for line in certificate.lines]
                for site, certificate in self.certificates.items()
            },
            "engines_apart": self.engine_differences,
            "failures": self.failures(),
        }

    def __str__(self) -> str:
        parts = ["Will the smaller model train like the original?"]
        for kind in self.kinds():
            parts += [" ".join(self.outlook(kind)), table(step_table(self.steps[kind]))]
        for kind in self.kinds():
            comparison = self.comparisons[kind]
            name = KERNEL_NAMES[kind]
            heading = f"{name} kernel of {self.num_texts} texts, original and compressed"
            parts.append(f"{heading}\n\n{comparison}")
        if self.certificates:
            rows = [["site, relative change", "bound a priori", "bound from data", "measured"]]
            for site, certificate in self.certificates.items():
                for line in certificate.lines:
                    rows.append([f"{site} {line.quantity}", *(f"{x:.3g}" for x in line[1:])])
            parts.append(
                f"MLPs at their inputs in the original, with certified bounds\n\n{table(rows)}"
            )
            loose = self.loose_bounds()
            parts += [] if loose is None else [f"{loose}."]
        if self.engine_differences is None:
            parts.append("Engines were not compared: neural-tangents is not installed.")
        else:
            found = ", ".join(f"{name} {x:.0e}" for name, x in self.engine_differences.items())
            parts.append(f"Largest relative difference from the engine {ENGINES[0]}: {found}")
        return "\n\n".join(parts)


class Probability(nnx.Module):
    """The softmax probability of class 0, from a random head if the model has no such head."""

    def __init__(self, model: Model, head: Float[Array, "d 2"]):
        self.model = model
        self.random = Frozen(head)

    def __call__(self, *batch: Array) -> Float[Array, " n"]:
        """Returns the probability for each text; the arguments are those of the model."""
        result = self.model(*batch)
        logits = getattr(result, "logits", None)
        if logits is None or logits.ndim != 2:
            real = batch[1][..., None].astype(jnp.float32)
            hidden = result.last_hidden_state.astype(jnp.float32)
            logits = (hidden * real).sum(1) / real.sum(1) @ self.random[...]
        return jax.nn.softmax(logits.astype(jnp.float32))[:, 0]


class VerifiedArtefact(NamedTuple):
    """The verification of an artefact.

    Args:
        verification: The result.
        artefact: The folder of the compressed model.
        original: The hub id or folder of the original.
        num_params: The numbers of parameters of the original and of the compressed model.
        texts: The texts, in the order of the kernels' rows.
        history: What was done to the compressed model, as in its provenance.
        report: The report of the compression, if the artefact has one.
    """

    verification: Verification
    artefact: Path
    original: str
    num_params: tuple[int, int]
    texts: tuple[str, ...]
    history: tuple[str, ...]
    report: Report | None


def verify_files(
    original: str | None, compressed: str, text: Path | None, num_examples: int, seed: int
) -> VerifiedArtefact:
    """Verifies an artefact against its original, as the command line does.

    Args:
        original: The hub id or folder of the original; None for the one that the artefact states.
        compressed: The artefact.
        text: A text file, one example per line; None for the sentences of the package.
        num_examples: The number of lines to use.
        seed: The seed of random choices.

    Raises:
        InputError: A file is missing, or the models do not belong together.
    """
    check_at_least(2, num_examples=num_examples)
    if text is not None and not text.is_file():
        raise InputError(f"there is no file {text}")
    content = None if text is None else text.read_text(encoding="utf-8").splitlines()
    lines = [x for x in (sentences() if content is None else content) if x.strip()]
    if len(lines) < 2:
        raise InputError(f"{text} has fewer than two lines of text")
    texts = tuple(lines[:num_examples])
    report = _saved_report(Path(compressed))
    key = jax.random.key(seed)
    smaller = load(compressed, dtype=jnp.float32)
    if not smaller.provenance.history:
        raise InputError(f"nothing in {compressed} is compressed; give an artefact of compress")
    name = smaller.provenance.name if original is None else original
    larger = load_original(name, smaller, key=key)
    tokenizer = tokenizer_of(smaller)
    batch = tokenize(tokenizer, texts, length_for(smaller))
    check_tokens(smaller, batch.input_ids, tokenizer=tokenizer)
    result = verify(larger, smaller, batch, key=key)
    sizes = num_params(larger), num_params(smaller)
    history = smaller.provenance.history
    return VerifiedArtefact(result, Path(compressed), name, sizes, texts, history, report)


def _saved_report(artefact: Path) -> Report | None:
    """Returns the report in an artefact, or None if it has none."""
    file = artefact / "report.json"
    if not file.is_file():
        return None
    try:
        return Report.from_json(read_json(file)[1])
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def load_original(name: str, smaller: Model, *, key: Key[Array, ""]) -> Model:
    """Loads the original of a compressed model, with the same head; the key is for a new head.

    Raises:
        InputError: The original cannot be loaded, or is another model.
    """
    head = smaller.provenance.head
    labels = smaller.config.num_labels if head in CLASS_HEADS else None
    original = load(name, head=head, num_labels=labels, dtype=jnp.float32, key=key)
    if head is not None:
        # A head that was new when the model was compressed exists in the compressed model only.
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
    """Compares the exact kernels of two models, and certifies each fused MLP.

    The kernels are those of a scalar function, the softmax probability of class 0, with respect to
    all parameters. Experts of a mixture have no certificates, as each sees different positions.

    Args:
        original: The original model.
        smaller: The compressed model.
        batch: At least two texts.
        key: Random key of a head, if the models have none, and of the targets for predicted
            training.
        positions: The largest number of token positions at which MLPs are certified.
        cross_check: Whether to compare NTK engines on three texts.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The kernels, their comparison, and the certificates.

    Raises:
        InputError: The models do not belong together, or there are too few texts.

    Example:
        >>> print(verify(model, smaller, batch, key=jax.random.key(0)))  # doctest: +SKIP
    """
    n = batch.input_ids.shape[0]
    if n < 2:
        raise InputError(f"comparing kernels needs at least two texts; got {n}")
    pairs = list(zip(sites(original), sites(smaller), strict=False))
    if [a.path for a, _ in pairs] != [s.path for s in sites(smaller)]:
        raise InputError("the two models have their MLPs in different places")
    width = sites(original)[0].mlp.d_in
    head = jax.random.normal(key, (width, 2)) / width**0.5
    models = [Probability(model, head) for model in (original, smaller)]

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    targets = rng.permutation(np.arange(n) % 2).astype(np.float64)
    kernels, comparisons, moved, certificates = {}, {}, {}, {}
    movers: list[Mover] = []
    fused = [(a, b) for a, b in pairs if hasattr(b.mlp, "labels")]
    scalings = {getattr(b.mlp, "scaling", None) for _, b in fused}
    steps = 1 + 3 * len(KERNEL_NAMES) + cross_check + 1 + len(fused)
    with show_progress("Verifying", steps, progress, first="outputs of the original") as advance:
        begin = partial(advance, begins=True)
        start = np.asarray(jax.jit(lambda m, b: m(*b))(models[0], batch))
        # Made once, so that both kinds share the compiled gradients.
        functions = [ntk.functional(model) for model in models]
        for kind, title in KERNEL_NAMES.items():
            both = []
            for (f, params), name in zip(functions, ("original", "compressed"), strict=True):
                begin(f"{title} kernel of the {name} model")
                both.append(np.asarray(ntk.kernel(f, params, batch, kind=kind)))
            kernels[kind] = np.stack(both)
            comparisons[kind] = compare(*both, targets=targets, outputs=start)
            begin(f"first steps with {title}")
            scale = 1 / float(np.linalg.norm(both[0], 2)) if kind == "sgd" else 1.0
            rates = [scale * rate for rate in RATES[kind]]
            if not movers:  # once, as both kinds share the compiled programs
                movers = [mover(f, params, batch, targets) for f, params in functions]
            moved[kind] = first_steps(movers[0], movers[1], kind, rates)
        differences = {}
        if cross_check:
            begin("comparison of the engines")
            differences = _engine_differences(models[1], batch, pairs[-1][1].path)
        begin("inputs of the MLPs")
        seen = jax.jit(mlp_inputs)(original, *batch)
        real = np.asarray(batch.attention_mask)
        chosen = np.linspace(0, real.sum() - 1, min(positions, int(real.sum()))).astype(int)
        for a, b in fused:
            begin(f"bounds of {a.path}")
            if a.path in seen:
                x = jnp.asarray(np.asarray(seen[a.path])[real][chosen])
                certificates[a.path] = certify(pair(a.mlp, b.mlp), x)
        advance("done")
    return Verification(
        num_texts=n,
        kernels=kernels,
        comparisons=comparisons,
        steps=moved,
        certificates=certificates,
        scaling=scalings.pop() if len(scalings) == 1 else None,
        engine_differences=differences,
    )


def _engine_differences(model: nnx.Module, batch: TokenBatch, path: str) -> dict[str, float] | None:
    """Returns relative differences of engines on a few texts, for the parameters of one MLP."""
    where = re.escape(f"model.{path}" if path else "model")
    f, params = ntk.functional(model, wrt=rf"{where}\..*")
    few = jax.tree.map(lambda x: x[:_CROSS_CHECK_TEXTS], batch)
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
