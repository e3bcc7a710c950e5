"""Verifies compressed models: compares kernels, certifies MLPs, and writes a page on it."""
