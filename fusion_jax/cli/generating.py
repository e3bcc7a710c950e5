"""The command generate."""

from __future__ import annotations

import sys
from typing import Annotated

import jax
from tyro.conf import Positional, arg

from fusion_jax.checkpoint.descriptions import ignored_generation_fields
from fusion_jax.checkpoint.opening import load, open_checkpoint
from fusion_jax.cli.options import DType, ModelName
from fusion_jax.errors import InputError
from fusion_jax.models import decoding
from fusion_jax.models.base import Generative
from fusion_jax.models.tokens import (
    check_takes_text,
    check_tokens,
    continuation,
    load_tokenizer,
    tokenize_prompts,
)
from fusion_jax.progress import show_stage


def generate(
    model: Positional[ModelName],
    prompts: Positional[
        Annotated[list[str], arg(metavar="PROMPT...", help_behavior_hint="(one or more)")]
    ],
    max_new_tokens: int = 50,
    beams: int = 1,
    temperature: float | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    dtype: DType = None,
    seed: int = 0,
) -> None:
    """Continue prompts, or write the target texts of an encoder-decoder, one paragraph each.

    Args:
        model: Hub id, Hugging Face folder, or artefact.
        prompts: The prompts or source texts.
        max_new_tokens: Largest number of tokens to generate.
        beams: Number of beams of the search; 1 for greedy search.
        temperature: Draw tokens at random, with logits divided by this.
        top_k: Draw from this number of the likeliest tokens; 0 for all.
        top_p: Draw from the likeliest tokens that together have this probability.
        dtype: Type of the parameters.
        seed: Seed of the random tokens.
    """
    if not prompts:
        raise InputError("give at least one prompt")
    drawn = temperature is not None or top_k != 0 or top_p != 1
    sampling = decoding.Sampling(1.0 if temperature is None else temperature, top_k, top_p)
    search = None if beams == 1 else decoding.Beams(beams)
    head = open_checkpoint(model).family.text_head
    if head is None:
        raise InputError(f"{model} cannot generate text")
    loaded = load(model, head=head, dtype=dtype)
    assert isinstance(loaded, Generative)
    check_takes_text(loaded)
    folder = loaded.provenance.folder
    tokenizer = load_tokenizer(folder)
    batch = tokenize_prompts(tokenizer, prompts)
    check_tokens(loaded, batch.input_ids, tokenizer=tokenizer)
    for name, value in ignored_generation_fields(folder).items():
        print(f"generation_config.json: {name} {value} is not applied", file=sys.stderr)
    with show_stage("Generating, after compiling"):
        ids = decoding.generate(
            loaded,
            *batch,
            max_new_tokens=max_new_tokens,
            sampling=sampling if drawn else None,
            beams=search,
            pad=tokenizer.pad_token_id or 0,
            key=jax.random.key(seed),
        )
        jax.block_until_ready(ids)
    if not loaded.reads_prompts:
        texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
    else:
        rows = zip(prompts, batch.input_ids.tolist(), ids.tolist(), strict=True)
        texts = [prompt + continuation(tokenizer, old, new) for prompt, old, new in rows]
    print("\n\n".join(texts))


COMMANDS = {"generate": generate}
