"""Starts the command line ``fusion-jax``, so that Ctrl-C is quiet while Python still imports it."""

import sys


def main() -> int:
    """Runs the command line; returns its exit code."""
    try:
        # Imports JAX, which takes a second or two.
        from fusion_jax.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return run()
