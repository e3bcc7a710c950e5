"""Compression methods, a file each."""
