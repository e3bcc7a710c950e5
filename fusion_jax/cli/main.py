"""The command line: fusion-jax inspect | compress | finetune | verify-ntk | export | ..."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from fusion_jax.cli import evaluating as use_commands
from fusion_jax.cli import finetuning as commands
from fusion_jax.cli import static_pruning as smp_commands
from fusion_jax.errors import InputError
from fusion_jax.methods.base import Method
from fusion_jax.methods.registry import METHODS


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


AnyMethod = Union[  # noqa: UP007 - made at run time
    tuple(
        Annotated[cls, subcommand(name, description=_first_line(cls))]
        for name, cls in METHODS.items()
    )
]
Name = Annotated[str, arg(metavar="MODEL")]
Out = Annotated[Path, arg(metavar="OUT")]
LayerText = Annotated[
    str | None,
    arg(
        metavar="LAYERS",
        help="Which MLPs: indices (2,3,-1), a slice (-4: is the last four), or a regular "
        "expression for whole paths (layers.[2-5].mlp); fusion-jax inspect lists them.",
        help_behavior_hint="(default: all)",
    ),
]
Calibration = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="Unlabelled text that the method may fit to, a sentence per line (a few hundred do); "
        "or random, for random tokens.",
        help_behavior_hint="(default: none)",
    ),
]
Budget = Annotated[
    float | None,
    arg(
        metavar="SHARE",
        help="The share of each MLP's parameters to keep, such as 0.25, in place of the method's "
        "own size.",
        help_behavior_hint="(default: by the method's options)",
    ),
]
HeadName = Annotated[
    Literal["classification", "masked-lm", "causal-lm", "seq2seq-lm"] | None,
    arg(
        metavar="HEAD",
        help="Head to load: classification, masked-lm, causal-lm or seq2seq-lm.",
        help_behavior_hint="(default: none)",
    ),
]
Labels = Annotated[
    int | None,
    arg(metavar="N", help="Classes of a new classification head.", help_behavior_hint=""),
]
Text = Annotated[
    Path | None, arg(metavar="FILE", help_behavior_hint="(default: English sentences of ours)")
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(
        metavar="DTYPE",
        help="Type of the parameters: float32, bfloat16 or float16.",
        help_behavior_hint="(default: that of the files)",
    ),
]


def inspect(model: Positional[Name]) -> None:
    """List the MLPs of a model: where they are, how wide, and their share of the parameters.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
    """
    from fusion_jax.checkpoint import open_checkpoint
    from fusion_jax.nn.linear_forms import find_forms
    from fusion_jax.nn.site import sites
    from fusion_jax.report import num_params, size_of
    from ntk.tables import table

    abstract = open_checkpoint(model).abstract
    found = sites(abstract)
    size = size_of(abstract, (site.mlp for site in found))
    rows = [["site", "index", "kind", "width", "parameters", "share"]]
    for site in found:
        n = num_params(site.mlp)
        kinds = sorted({form.kind for form in find_forms(site.mlp).values()})
        kind, width = ", ".join([type(site.mlp).__name__, *kinds]), str(site.mlp.width)
        kind = f"{site.mlp.stack[0]} x {kind}" if site.mlp.stack else kind
        rows.append([site.path, str(site.index), kind, width, f"{n:,}", f"{n / size.params:.1%}"])
    share = size.mlp_params / size.params
    rows.append(["all MLPs", "", "", "", f"{size.mlp_params:,}", f"{share:.1%}"])
    print(f"{type(abstract).__name__}: {size.params:,} parameters, {size.bytes / 1e6:,.1f} MB\n")
    print(table(rows))


def compress(
    model: Positional[Name],
    out: Positional[Out],
    method: AnyMethod,  # type: ignore[valid-type]
    layers: LayerText = None,
    budget: Budget = None,
    calibration: Calibration = None,
    head: HeadName = None,
    num_labels: Labels = None,
    dtype: DType = None,
    seed: int = 0,
) -> None:
    """Compress a model's MLPs and save the result as an artefact.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        out: Folder for the artefact; must not exist or be empty.
        method: How to compress.
        layers: Which MLPs.
        budget: The share of each MLP's parameters to keep.
        calibration: Text that the method may fit to.
        head: Head to load.
        num_labels: Classes of a new head.
        dtype: Type of the parameters.
        seed: Seed of all random choices.
    """
    import jax

    from fusion_jax import checkpoint
    from fusion_jax.checkpoint.files import check_new_folder
    from fusion_jax.compression.mlps import compress as run

    check_new_folder(out)
    assert isinstance(method, Method)
    key = jax.random.key(seed)
    loaded = checkpoint.load(model, head=head, num_labels=num_labels, dtype=dtype, key=key)
    smaller, report = run(
        loaded,
        method,
        key=key,
        layers=parse_layers(layers),
        budget=budget,
        calibration=calibration,
        progress=True,
    )
    checkpoint.save(smaller, out, report=report)
    print(report)
    print(f"\nSaved {out}. For transformers: fusion-jax export {out} FOLDER")


def export(artefact: Positional[Annotated[str, arg(metavar="ARTEFACT")]], out: Positional[Out]):
    """Write a plain Hugging Face checkpoint that gives the same logits in transformers.

    Args:
        artefact: Artefact, hub id, or Hugging Face folder.
        out: Folder for the checkpoint; must not exist or be empty.
    """
    from fusion_jax import checkpoint
    from fusion_jax.checkpoint.files import check_new_folder
    from fusion_jax.nn.site import sites

    check_new_folder(out)
    model = checkpoint.load(artefact)
    checkpoint.export_hf(model, out)
    widths = [site.mlp.width for site in sites(model)]
    print(f"Exported {out}, with MLPs of width {max(widths)}.")
    if min(widths) < max(widths):
        print(
            f"Widths differ ({min(widths)} to {max(widths)}), and the format has one for all "
            "layers: narrower MLPs were filled up with zero units, which changes no output."
        )


def generate(
    model: Positional[Name],
    prompts: Positional[Annotated[list[str], arg(metavar="PROMPT...")]],
    max_new_tokens: int = 50,
    beams: int = 1,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    dtype: DType = None,
    seed: int = 0,
) -> None:
    """Continue prompts, or give the target texts of an encoder-decoder, one paragraph each.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        prompts: The texts.
        max_new_tokens: Tokens to generate at most.
        beams: Beams of the search; 1 for greedy.
        temperature: Draw tokens, with logits divided by this.
        top_k: Draw from so many of the likeliest tokens; 0 for all.
        top_p: Draw from the likeliest tokens that together have this probability.
        dtype: Type of the parameters.
        seed: Seed of the draws.
    """
    import jax

    from fusion_jax import checkpoint
    from fusion_jax.models.decoding import Beams, Sampling
    from fusion_jax.models.decoding import generate as run
    from fusion_jax.models.tokens import load_tokenizer, tokenize_prompts

    drawn = temperature is not None or top_k != 0 or top_p != 1
    sampling = Sampling(1.0 if temperature is None else temperature, top_k, top_p)
    search = None if beams == 1 else Beams(beams)
    head = checkpoint.open_checkpoint(model).family.text_head
    if head is None:
        raise InputError(f"{model} is no model that generates text")
    loaded: Any = checkpoint.load(model, head=head, dtype=dtype)
    tokenizer = load_tokenizer(loaded.provenance.folder)
    ids = run(
        loaded,
        *tokenize_prompts(tokenizer, prompts),
        max_new_tokens=max_new_tokens,
        sampling=sampling if drawn else None,
        beams=search,
        pad=tokenizer.pad_token_id or 0,
        key=jax.random.key(seed),
    )
    texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    starts = prompts if loaded.reads_prompts else [""] * len(prompts)
    print("\n\n".join(a + b for a, b in zip(starts, texts, strict=True)))


def verify_ntk(
    original: Positional[Annotated[str, arg(metavar="ORIGINAL")]],
    compressed: Positional[Annotated[str, arg(metavar="COMPRESSED")]],
    text: Text = None,
    num_examples: int = 64,
    json: Annotated[Path | None, arg(metavar="FILE")] = None,
    seed: int = 0,
) -> int:
    """Compare exact NTKs of a model and its compressed version, and certify each fused MLP.

    Exits with 1 if a certified bound is violated or engines disagree.

    Args:
        original: Hub id, Hugging Face folder, or artefact.
        compressed: Artefact.
        text: Text file, one example a line.
        num_examples: How many of its lines.
        json: Write the figures here, too.
        seed: Seed of a random head.
    """
    from fusion_jax.verification.checks import verify_files

    found = verify_files(original, compressed, text, num_examples, seed).verification
    print(found)
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    for failure in found.failures():
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(found.failures()))


def report(
    artefact: Positional[Annotated[str, arg(metavar="ARTEFACT")]],
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html"),
    original: Annotated[
        str | None, arg(metavar="MODEL", help_behavior_hint="(default: what it was made of)")
    ] = None,
    text: Text = None,
    num_examples: int = 32,
    seed: int = 0,
) -> int:
    """Write one HTML page on what compressing changed: kernels, bounds, predicted training.

    Args:
        artefact: Artefact.
        out: The page.
        original: The model it was made of.
        text: Text file, one example a line.
        num_examples: How many of its lines.
        seed: Seed of a random head.
    """
    from fusion_jax.verification.checks import verify_files

    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} for the page")
    found = verify_files(original, artefact, text, num_examples, seed)
    out.write_text(found.page(), encoding="utf-8")
    print(f"Wrote {out}")
    return int(bool(found.verification.failures()))


def demo(out: Path = Path("fusion-demo")) -> None:
    """Fuse a real model, all-MiniLM-L6-v2, and measure what it does to real sentences.

    Args:
        out: Folder for the results; an earlier demo's is replaced.
    """
    from fusion_jax.cli.demo import run

    run(out)


COMMANDS = {
    "inspect": inspect,
    "compress": compress,
    "generate": generate,
    **commands.COMMANDS,
    **use_commands.COMMANDS,
    **smp_commands.COMMANDS,
    "verify-ntk": verify_ntk,
    "export": export,
    "report": report,
    "demo": demo,
}


def parse_layers(text: str | None) -> Any:
    """What ``--layers`` means.

    Args:
        text: Indices, a slice, or a regular expression.

    Returns:
        A value for the argument ``layers`` of `fusion_jax.compress`.

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


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Arguments; None for those of the process.

    Returns:
        Exit code: 0 done, 1 what was asked for cannot be done or a check failed, 2 wrong usage,
        130 interrupted.
    """
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="fusion-jax",
            description="Make a pre-trained language model smaller in one shot.",
            args=args,
            config=(
                tyro.conf.CascadeSubcommandArgs,
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
            ),
        )
    except SystemExit as stop:  # from tyro: help or wrong usage
        return int(stop.code or 0)
    except (InputError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status or 0
