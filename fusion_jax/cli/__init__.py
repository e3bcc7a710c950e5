"""The command line ``fusion-jax``: `main`, and a file for each group of commands."""
