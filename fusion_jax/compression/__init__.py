"""Applies methods to models."""
