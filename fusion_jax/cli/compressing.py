"""The commands inspect, compress and export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import jax
from tyro.conf import Positional, arg, subcommand

from fusion_jax.checkpoint.files import check_new_folder, read_json
from fusion_jax.checkpoint.opening import load, open_checkpoint
from fusion_jax.checkpoint.writing import export_hf, save
from fusion_jax.cli.options import Artefact, DType, ModelName, NewFolder
from fusion_jax.compression import mlps
from fusion_jax.compression.width_scores import plan_from_json
from fusion_jax.errors import InputError
from fusion_jax.methods.registry import METHODS
from fusion_jax.models.provenance import Head
from fusion_jax.models.tokens import tokenizer_of
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.nn.site import sites
from fusion_jax.report import num_params, size_of, table
from fusion_jax.streaming.layerwise import compress_files


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


PLAN = "plan"


@dataclass(frozen=True)
class PlanFile:
    """The method and the width of each MLP from a file of the command plan."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The file."""


AnyMethod = Union[  # noqa: UP007 - made at run time
    tuple(
        Annotated[cls, subcommand(name, description=_first_line(cls))]
        for name, cls in (*METHODS.items(), (PLAN, PlanFile))
    )
]
Layers = Annotated[
    str | None,
    arg(
        metavar="LAYERS",
        help="Which MLPs: indices (2,3,-1), a slice (-4: is the last four), or a regular "
        "expression for whole paths (layers.[2-5].mlp). See fusion-jax inspect.",
        help_behavior_hint="(default: all)",
    ),
]
Calibration = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="Unlabeled text for the method to fit, one sentence per line (a few hundred are "
        "enough); or random, for random tokens; or .npz, arrays by the names of the model's "
        "arguments, such as pixel_values (or .npy, the first argument, or a folder of such files).",
        help_behavior_hint="(default: none)",
    ),
]
Budget = Annotated[
    float | None,
    arg(
        metavar="SHARE",
        help="The share of the parameters of each MLP to keep, such as 0.25; replaces the size "
        "in the options of the method.",
        help_behavior_hint="(default: by the options of the method)",
    ),
]
HeadName = Annotated[Head | None, arg(metavar="HEAD", help_behavior_hint="(default: none)")]
NumLabels = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]


def inspect(model: Positional[ModelName]) -> None:
    """List the MLPs of a model with their paths, widths, and shares of the parameters.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
    """
    abstract = open_checkpoint(model).abstract
    found = sites(abstract)
    size = size_of(abstract, (site.mlp for site in found))
    rows = [["site", "index", "kind", "width", "parameters", "share"]]
    for site in found:
        n = num_params(site.mlp)
        forms = sorted({form.kind for form in find_forms(site.mlp).values()})
        kind, width = ", ".join([type(site.mlp).__name__, *forms]), str(site.mlp.width)
        kind = f"{site.mlp.stack[0]} x {kind}" if site.mlp.stack else kind
        rows.append([site.path, str(site.index), kind, width, f"{n:,}", f"{n / size.params:.1%}"])
    share = size.mlp_params / size.params
    rows.append(["all MLPs", "", "", "", f"{size.mlp_params:,}", f"{share:.1%}"])
    print(f"{type(abstract).__name__}: {size.params:,} parameters, {size.bytes / 1e6:,.1f} MB\n")
    print(table(rows))


def compress(
    model: Positional[ModelName],
    out: Positional[NewFolder],
    method: AnyMethod,  # type: ignore[valid-type]
    layers: Layers = None,
    budget: Budget = None,
    calibration: Calibration = None,
    head: HeadName = None,
    num_labels: NumLabels = None,
    new_head: bool = False,
    dtype: DType = None,
    seed: int = 0,
    stream: bool = False,
) -> None:
    """Compress the MLPs of a model and save the result as an artefact.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Folder for the artefact; must not exist or be empty.
        method: How to compress.
        layers: Which MLPs.
        budget: The share of the parameters of each MLP to keep.
        calibration: Text or arrays for the method to fit.
        head: Head to load: classification, token-classification, question-answering, masked-lm,
            causal-lm or seq2seq-lm.
        num_labels: Number of classes of a new head for texts or for tokens.
        new_head: Make a new head with random weights, as for a model that has none.
        dtype: Type of the parameters.
        seed: Seed of all random choices.
        stream: Have one layer in memory at a time, for models that are larger than memory.
    """
    check_new_folder(out)
    if isinstance(method, PlanFile):
        method = plan_from_json(read_json(method.file)[1])
    key = jax.random.key(seed)
    shared: dict[str, Any] = {
        "key": key,
        "layers": parse_layers(layers),
        "budget": budget,
        "calibration": calibration,
        "progress": True,
    }
    if stream and isinstance(method, dict):
        raise InputError("--stream takes one method for all MLPs, not a plan")
    if stream and (new_head or num_labels is not None):
        raise InputError("--stream does not make a new head")
    if stream:
        report = compress_files(model, out, method, head=head, dtype=dtype, **shared)
    else:
        loaded = load(
            model,
            head=head,
            num_labels=num_labels,
            dtype=dtype,
            key=key if new_head else None,
            new_head=new_head,
        )
        smaller, report = mlps.compress(loaded, method, **shared)
        save(smaller, out, report=report)
    print(report)
    print(f"\nSaved {out}. For transformers: fusion-jax export {out} FOLDER")


Server = Literal["sentence-transformers", "vllm", "llama.cpp"]
# What widths are a multiple of (the blocks of llama.cpp's formats have 256 numbers), the heads, and
# the next command.
SERVERS: dict[str, tuple[int, tuple[Head | None, ...], str]] = {
    "sentence-transformers": (
        1,
        (None,),
        'python -c "from sentence_transformers import SentenceTransformer; '
        "print(SentenceTransformer('{}').encode('A sentence.').shape)\"",
    ),
    "vllm": (128, (None, "causal-lm", "classification"), "vllm serve {}"),
    "llama.cpp": (
        256,
        (None, "causal-lm"),
        "python convert_hf_to_gguf.py {0} --outfile {0}.gguf",
    ),
}


def export(
    artefact: Positional[Artefact],
    out: Positional[NewFolder],
    serve: Annotated[Server | None, arg(metavar="TOOL", help_behavior_hint="")] = None,
) -> None:
    """Write a plain Hugging Face checkpoint that gives the same logits in transformers.

    Args:
        artefact: Artefact, hub id, or Hugging Face folder.
        out: Folder for the checkpoint; must not exist or be empty.
        serve: In the layout that a tool asks for: sentence-transformers, vllm or llama.cpp.
    """
    check_new_folder(out)
    model = load(artefact)
    round_to, heads, command = SERVERS[serve] if serve else (1, None, "")
    head = model.provenance.head
    if heads and head not in heads:
        raise InputError(
            f"{serve} serves models with the head {' or '.join(map(str, heads)).lower()}; "
            f"{artefact} has the head {head}"
        )
    if serve:
        tokenizer_of(model)
    export_hf(model, out, round_to=round_to)
    widths = [site.mlp.width for site in sites(model)]
    stored = max(site.mlp.width for site in sites(open_checkpoint(out).abstract))
    print(f"Exported {out}, with MLPs of width {stored}.")
    if min(widths) < stored:
        reason = f"The format cannot state a width of {max(widths)}"
        if min(widths) < max(widths):
            reason = (
                f"The widths differ ({min(widths)} to {max(widths)}), but the format has one width "
                "for all layers"
            )
        elif serve:
            reason = f"{serve} asks for a multiple of {round_to}, and the width is {max(widths)}"
        print(
            f"{reason}: zero units pad the narrower MLPs, which changes no output but takes their "
            f"memory and time; {out}/README.md says how many numbers are zeros."
        )
    if command:
        print(f"Next: {command.format(out)}")


def parse_layers(text: str | None) -> Sequence[int] | slice | str | None:
    """Returns the value of ``--layers`` as `fusion_jax.compress` takes it.

    Args:
        text: Indices, a slice, or a regular expression.

    Example:
        >>> parse_layers("2,-1"), parse_layers("-4:"), parse_layers("layers.0.mlp")
        ([2, -1], slice(-4, None, None), 'layers.0.mlp')
    """
    if text is None:
        return None
    if re.fullmatch(r"-?\d+(,-?\d+)*", text):
        return [int(i) for i in text.split(",")]
    if re.fullmatch(r"(-?\d+)?:(-?\d+)?(:-?\d+)?", text):
        return slice(*(int(i) if i else None for i in text.split(":")))
    return text


COMMANDS = {"inspect": inspect, "compress": compress, "export": export}
