"""The registry of architectures; a new family adds its import and its line here."""

from __future__ import annotations

from fusion_jax.models import bert, distilbert, electra, gpt2, llama, mpnet, t5
from fusion_jax.models.base import Family as Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **distilbert.FAMILIES,
    **electra.FAMILIES,
    **gpt2.FAMILIES,
    **llama.FAMILIES,
    **mpnet.FAMILIES,
    **t5.FAMILIES,
}
"""The architecture for each ``model_type`` of a ``config.json``."""
