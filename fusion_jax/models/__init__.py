"""Architectures, a file for each family."""
