"""The command line, fusion-jax."""
