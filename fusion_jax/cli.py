"""The command line: fusion-jax inspect | compress | export | demo."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from fusion_jax.errors import InputError
from fusion_jax.methods import METHODS, Method


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
HeadName = Annotated[
    Literal["classification", "masked-lm"] | None,
    arg(
        metavar="HEAD",
        help="Head to load: classification or masked-lm.",
        help_behavior_hint="(default: none)",
    ),
]
Labels = Annotated[
    int | None,
    arg(metavar="N", help="Classes of a new classification head.", help_behavior_hint=""),
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
    from fusion_jax.compress import sites
    from fusion_jax.report import num_params, size_of, table

    abstract = open_checkpoint(model).abstract
    found = sites(abstract)
    size = size_of(abstract, (site.mlp for site in found))
    rows = [["site", "index", "kind", "width", "parameters", "share"]]
    for site in found:
        n = num_params(site.mlp)
        kind, width = type(site.mlp).__name__, str(site.mlp.width)
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
        head: Head to load.
        num_labels: Classes of a new head.
        dtype: Type of the parameters.
        seed: Seed of all random choices.
    """
    import jax

    from fusion_jax import checkpoint
    from fusion_jax.compress import compress as run
    from fusion_jax.files import check_new_folder

    check_new_folder(out)
    assert isinstance(method, Method)
    key = jax.random.key(seed)
    loaded = checkpoint.load(model, head=head, num_labels=num_labels, dtype=dtype, key=key)
    smaller, report = run(loaded, method, key=key, layers=parse_layers(layers), progress=True)
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
    from fusion_jax.compress import sites
    from fusion_jax.files import check_new_folder

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


def demo(out: Path = Path("fusion-demo")) -> None:
    """Fuse a real model, all-MiniLM-L6-v2, and measure what it does to real sentences.

    Args:
        out: Folder for the results; an earlier demo's is replaced.
    """
    from fusion_jax.demo import run

    run(out)


COMMANDS = {"inspect": inspect, "compress": compress, "export": export, "demo": demo}


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
        Exit code: 0 done, 1 what was asked for cannot be done, 2 wrong usage, 130 interrupted.
    """
    try:
        tyro.extras.subcommand_cli_from_dict(
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
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
