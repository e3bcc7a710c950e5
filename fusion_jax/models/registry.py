"""The registry of architectures; a new family adds its import and its line here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from flax import nnx

from fusion_jax.models import (
    albert,
    bart,
    bert,
    bloom,
    clip,
    clip_text,
    cohere,
    deberta,
    deepseek,
    dinov2,
    distilbert,
    electra,
    ernie4_5,
    eurobert,
    exaone4,
    falcon,
    gemma,
    gemma4,
    glm4,
    gpt2,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    helium,
    hunyuan,
    llama,
    llama4,
    longt5,
    modernbert,
    mpnet,
    nemotron,
    nomic_bert,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    qwen,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    t5,
    t5gemma,
    two_towers,
    vit,
    whisper,
)
from fusion_jax.models.base import Family as Family
from fusion_jax.models.base import Model
from fusion_jax.models.moe import mixtures
from fusion_jax.models.provenance import Provenance

FAMILIES: dict[str, Family] = {
    **albert.FAMILIES,
    **bart.FAMILIES,
    **bert.FAMILIES,
    **bloom.FAMILIES,
    **clip.FAMILIES,
    **clip_text.FAMILIES,
    **cohere.FAMILIES,
    **deberta.FAMILIES,
    **deepseek.FAMILIES,
    **dinov2.FAMILIES,
    **distilbert.FAMILIES,
    **electra.FAMILIES,
    **ernie4_5.FAMILIES,
    **eurobert.FAMILIES,
    **exaone4.FAMILIES,
    **falcon.FAMILIES,
    **gemma.FAMILIES,
    **gemma4.FAMILIES,
    **glm4.FAMILIES,
    **gpt2.FAMILIES,
    **gpt_neo.FAMILIES,
    **gpt_neox.FAMILIES,
    **gpt_oss.FAMILIES,
    **gptj.FAMILIES,
    **granite.FAMILIES,
    **helium.FAMILIES,
    **hunyuan.FAMILIES,
    **llama.FAMILIES,
    **llama4.FAMILIES,
    **longt5.FAMILIES,
    **modernbert.FAMILIES,
    **mpnet.FAMILIES,
    **nemotron.FAMILIES,
    **nomic_bert.FAMILIES,
    **olmo2.FAMILIES,
    **olmoe.FAMILIES,
    **opt.FAMILIES,
    **phi.FAMILIES,
    **phi3.FAMILIES,
    **qwen.FAMILIES,
    **qwen3_next.FAMILIES,
    **seed_oss.FAMILIES,
    **smollm3.FAMILIES,
    **stablelm.FAMILIES,
    **starcoder2.FAMILIES,
    **t5.FAMILIES,
    **t5gemma.FAMILIES,
    **two_towers.FAMILIES,
    **vit.FAMILIES,
    **whisper.FAMILIES,
}
"""The architecture for each ``model_type`` of a ``config.json``."""

TESTED: Mapping[str, str] = {
    "bert": "all-MiniLM-L6-v2",
    "gemma3_text": "Gemma 3 270M",
    "gpt2": "tinygpt-shakespeare",
    "llama": "stories260K",
    "mpnet": "all-mpnet-base-v2",
    "qwen2": "Qwen2.5-Coder-0.5B",
}
"""A checkpoint with trained weights whose outputs were compared, by ``model_type``."""


class Coverage(NamedTuple):
    """One type of models that is supported.

    Args:
        model_type: The field of ``config.json``.
        model: The class in `transformers`, without a head.
        heads: The heads.
        tested: The weights that outputs were compared with `transformers` on.
    """

    model_type: str
    model: str
    heads: tuple[str, ...]
    tested: str


def coverage() -> list[Coverage]:
    """Returns what is supported, in the order of the names.

    Every type is loaded, compressed, fine-tuned, saved and exported, and generates text if it has
    the head ``causal-lm`` or ``seq2seq-lm``. Models of images and sounds are fine-tuned on classes.

    Example:
        >>> coverage()[0].model_type, coverage()[0].heads[:2]
        ('albert', ('classification', 'token-classification'))
    """
    return [
        Coverage(
            model_type,
            str(family.architectures[None]),
            tuple(head for head in family.architectures if head is not None),
            TESTED.get(model_type, "random weights"),
        )
        for model_type, family in sorted(FAMILIES.items())
    ]


def state_expert_count(model: nnx.Module) -> None:
    """Makes the configuration of a model state the number of experts that its mixtures have.

    So does the text of its ``config.json``, for artefacts and exports.
    """
    counts = {moe.router.out_features for moe in mixtures(model).values()}
    if not isinstance(model, Model) or not counts or model.config.num_experts in counts:
        return
    (count,) = counts  # as `fusion_jax.compress` has checked
    old, new = model.config, replace(model.config, num_experts=count)
    for _, module in nnx.iter_modules(model):
        if getattr(module, "config", None) == old:
            module.config = new  # type: ignore[attr-defined]
    provenance = getattr(model, "provenance", None)
    if isinstance(provenance, Provenance):
        fields = json.loads(provenance.config)
        names = {FAMILIES[new.model_type].experts_field}
        names |= {"num_experts", "num_local_experts"} & fields.keys()
        fields |= dict.fromkeys(sorted(names), count)
        model.provenance = replace(provenance, config=json.dumps(fields, indent=2))
