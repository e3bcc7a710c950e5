"""Runs the command line: ``python -m fusion_jax.cli``."""

import sys

from fusion_jax.cli.main import main

sys.exit(main())
