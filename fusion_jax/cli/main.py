"""The command line ``fusion-jax``: parses arguments, runs a command, returns its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from fusion_jax import __version__
from fusion_jax.cli import (
    compressing,
    demo,
    evaluating,
    finetuning,
    generating,
    static_pruning,
    verifying,
)
from fusion_jax.errors import InputError
from fusion_jax.progress import progress_shown
from fusion_jax.training.engine.preemption import Terminated, raise_on_sigterm

COMMANDS = {
    **demo.COMMANDS,
    **compressing.COMMANDS,
    **finetuning.COMMANDS,
    **static_pruning.COMMANDS,
    **evaluating.COMMANDS,
    **generating.COMMANDS,
    **verifying.COMMANDS,
}


@raise_on_sigterm()
def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; None for those of the process.

    Returns:
        The exit code: 0 for success, 1 if a command cannot do what was asked for or a check failed,
        2 for wrong usage, 130 if interrupted, 143 if terminated; a run that can be resumed ends
        with 0 if terminated.
    """
    args = sys.argv[1:] if args is None else args
    if list(args) == ["--version"]:
        print(f"fusion-jax {__version__}")
        return 0
    try:
        with progress_shown(True):
            status = tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="fusion-jax",
                description="Make a pre-trained language model smaller in one shot. The option "
                "--version prints the version.",
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
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    return status or 0
