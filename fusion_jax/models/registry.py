"""The registry of architectures; a new family adds its import and its line here."""

from __future__ import annotations

from fusion_jax.models import (
    bert,
    distilbert,
    electra,
    gemma,
    gpt2,
    granite,
    llama,
    mpnet,
    olmo2,
    phi3,
    qwen,
    seed_oss,
    smollm3,
    t5,
)
from fusion_jax.models.base import Family as Family

FAMILIES: dict[str, Family] = {
    **bert.FAMILIES,
    **distilbert.FAMILIES,
    **electra.FAMILIES,
    **gemma.FAMILIES,
    **gpt2.FAMILIES,
    **granite.FAMILIES,
    **llama.FAMILIES,
    **mpnet.FAMILIES,
    **olmo2.FAMILIES,
    **phi3.FAMILIES,
    **qwen.FAMILIES,
    **seed_oss.FAMILIES,
    **smollm3.FAMILIES,
    **t5.FAMILIES,
}
"""The architecture for each ``model_type`` of a ``config.json``."""
