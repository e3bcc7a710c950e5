"""The registry of architectures. A new family adds its file and its line here."""

from __future__ import annotations

from fusion_jax.models import bert, gpt2, llama, t5
from fusion_jax.models.base import Family as Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **gpt2.FAMILIES,
    **llama.FAMILIES,
    **t5.FAMILIES,
}
"""Architectures by the ``model_type`` of their ``config.json``."""
