"""Compresses models that are larger than memory, layer by layer, from files to files."""
