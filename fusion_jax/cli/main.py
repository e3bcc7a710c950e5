"""The command line ``fusion-jax``: parses arguments, runs a command, returns its exit code."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

import tyro

from fusion_jax import __version__
from fusion_jax.cli import (
    benching,
    compressing,
    demo,
    evaluating,
    finetuning,
    generating,
    listing,
    planning,
    static_pruning,
    verifying,
)
from fusion_jax.cli.compressing import PLAN
from fusion_jax.cli.programs import keep_programs
from fusion_jax.errors import InputError, nearest
from fusion_jax.methods.registry import METHODS
from fusion_jax.progress import progress_shown
from fusion_jax.training.engine.preemption import Terminated, raise_on_sigterm

COMMANDS = {
    **demo.COMMANDS,
    **compressing.COMMANDS,
    **planning.COMMANDS,
    **finetuning.COMMANDS,
    **static_pruning.COMMANDS,
    **evaluating.COMMANDS,
    **generating.COMMANDS,
    **listing.COMMANDS,
    **verifying.COMMANDS,
    **benching.COMMANDS,
}


@raise_on_sigterm()
def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; None for those of the process.

    Returns:
        The exit code: 0 for success, 1 if a command cannot do what was asked for or a check failed,
        2 for wrong usage, 130 if interrupted, 141 if nobody reads the output any more, 143 if
        terminated; a run that can be resumed ends with 0 if terminated.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"fusion-jax {__version__}")
        return 0
    try:
        with progress_shown(True):
            command = _parse(args)
            if callable(command):
                keep_programs()
            status = command() if callable(command) else command
        sys.stdout.flush()
    except (InputError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError):
            # Python would complain when it flushes the output at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    return status or 0


def _parse(args: list[str]) -> Callable[[], int | None] | int:
    """Returns the command with its arguments; an exit code after help or for wrong usage."""
    mistake = _misspelled(args)
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(run) for name, run in COMMANDS.items()},
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
        print(_plainer(said.getvalue(), args), end="", file=sys.stderr)
        return int(stop.code or 0)


def _later(run: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    """Returns a function with the same arguments that returns the call instead of making it."""

    @functools.wraps(run)
    def bind(*args: object, **kwargs: object) -> Callable[[], int | None]:
        return partial(run, *args, **kwargs)

    return bind


def _misspelled(args: list[str]) -> str | None:
    """Returns what is wrong with the name of a command or method, or None."""
    command = next((word for word in args if not word.startswith("-")), None)
    if command is None or command != args[0]:
        return None
    if command not in COMMANDS:
        return f"there is no command {command!r}{nearest(command, COMMANDS)}"
    words = [word for word in args[1:] if not word.startswith("-")]
    if command != "compress" or {"-h", "--help"} & set(args) or set(words) & {*METHODS, PLAN}:
        return None
    for word in words:
        if get_close_matches(word, METHODS, n=1, cutoff=0.75):
            return f"there is no method {word!r}{nearest(word, METHODS)}"
    return f"give a method after MODEL and OUT: {', '.join((*METHODS, PLAN))}"


def _plainer(text: str, args: list[str]) -> str:
    """Returns what tyro says about wrong usage, with the option as it was typed."""
    words = " ".join(line.strip(" │|") for line in text.splitlines())
    found = re.search(r"Error parsing \S+: (.*?) (?:─{5}|-{5}|For full)", words)
    if found is None:
        return text
    name, _, rest = found[1].partition(" ")
    flag = "--" + name.replace("_", "-")
    given = any(word == flag or word.startswith(f"{flag}=") for word in args)
    path = [args[0], *(word for word in args if word in (*METHODS, PLAN))]
    message = f"{flag if given else name} {rest}"
    return f"error: {message}; see fusion-jax {' '.join(path)} --help\n"
