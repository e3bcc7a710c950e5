"""Text generation from source texts: fine-tuning on pairs, generating, and measuring."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Key

from fusion_jax import checkpoint
from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Generative, Model
from fusion_jax.models.decoding import Beams, Sampling, generate
from fusion_jax.models.tokens import check_finite
from fusion_jax.progress import show_progress
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples, TokenIds
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.sharding import Placement
from fusion_jax.training.tasks.base import Prepared
from fusion_jax.training.tasks.pair_encoding import PairBatches, PairEncoder, Pairs
from fusion_jax.training.tasks.text_metrics import TEXT_METRICS, sacrebleu


@dataclass(frozen=True, eq=False)
class TextPairs:
    """A task of generating target texts from source texts, for `fusion_jax.finetune`.

    Evaluations during training measure the loss, which is quick; `generate_texts` and
    `measure_texts` measure the quality of generated texts.

    Args:
        name: The name of the task.
        train: The training pairs; every reference is a target.
        dev: The pairs to measure on while training, or None.
        test: The pairs to measure on at the end, or None.
    """

    name: str
    train: Pairs
    dev: Pairs | None = None
    test: Pairs | None = None

    def prepare(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> Prepared:
        """Returns what training needs, see `fusion_jax.training.Task`."""
        encoder = _encoder_of(model, config.max_length, config.truncate)
        order, _ = jax.random.split(key)
        seed, size, shapes = int(jax.random.bits(order)), config.batch_size, config.shapes
        batches = encoder.batches(self.train, size, shapes=shapes, seed=seed)
        loss = losses.with_routers(encoder.loss(), model, config)
        if self.dev is None:
            return Prepared(batches, loss)
        dev = encoder.batches(self.dev, size, shapes=shapes)
        return Prepared(batches, loss, lambda model: _nats(model, dev, encoder.loss()), lowest=True)

    def inputs(self, model: Model, config: TrainConfig, *, key: Key[Array, ""]) -> PairBatches:
        """Returns the training pairs in batches."""
        return tuning_batches(self.train, model, config, key=key)

    def load(self, name: str, *, key: Key[Array, ""] | None = None) -> Model:
        """Loads a model with its language-model head, see `fusion_jax.load`."""
        return load_generative(name)

    def to_json(self) -> dict[str, object]:
        """Returns a description of the task as JSON values by name."""
        return {"kind": "pairs", "name": self.name, "metrics": list(TEXT_METRICS)}


def tuning_batches(
    pairs: Pairs, model: Model, config: TrainConfig, *, key: Key[Array, ""]
) -> PairBatches:
    """Returns pairs in batches, in an order that depends on the key."""
    encoder = PairEncoder(model, config.max_length, config.truncate)
    seed = int(jax.random.bits(key))
    return encoder.batches(pairs, config.batch_size, shapes=config.shapes, seed=seed)


def load_generative(name: str | os.PathLike[str]) -> Generative:
    """Loads a model with its language-model head.

    Raises:
        InputError: The architecture of the model does not generate text.
    """
    head = checkpoint.open_checkpoint(name).family.text_head
    if head is None:
        raise InputError(f"{name} is not a model that generates text")
    model = checkpoint.load(name, head=head)
    assert isinstance(model, Generative)
    return model


def _encoder_of(model: Model, max_length: int | None, truncate: bool) -> PairEncoder:
    encoder = PairEncoder(model, max_length, truncate)
    if not model.has_logits:  # type: ignore[attr-defined]
        head = "causal-lm" if encoder.prompts else "seq2seq-lm"
        raise InputError(f"the model has no language-model head; load it with head={head!r}")
    return encoder


@partial(jax.jit, static_argnames="loss")
def _total(model: Model, batch: losses.Batch, loss: losses.Loss) -> losses.Total:
    return loss(model, batch, None)


def _nats(model: Model, batches: PairBatches, loss: losses.Loss) -> dict[str, float]:
    placement = Placement()
    placement.check_batch(batches.batch_size)
    totals: list[dict[str, Array]] = []
    count = len(batches)
    with placement.active(), show_progress("Evaluating", count, first="compiling") as advance:
        for step in range(count):
            total = _total(model, placement.batch(batches(step)), loss)._asdict()
            totals.append(placement.gathered(total))
            jax.block_until_ready(totals[-2:-1])  # one batch is computed while the next is made
            advance("batches")
    read = jax.device_get(totals)
    nats = sum(float(t["total"]) for t in read) / sum(float(t["count"]) for t in read)
    check_finite(nats, "the log-probabilities of the references")
    return {"nats": nats, "perplexity": float(np.exp(nats))}


@on_auto_axes
def measure_pairs(
    model: Model,
    pairs: Pairs,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    truncate: bool = False,
) -> dict[str, float]:
    """Measures how likely the references are, without generating texts.

    Args:
        model: A model with a language-model head.
        pairs: The pairs.
        max_length: The largest number of tokens, as in ``TrainConfig``; None for the number of the
            model's positions.
        batch_size: The number of pairs per batch.
        truncate: Whether the ends of longer sources are cut off.

    Returns:
        ``nats`` per token of the references, ends included, and their exponential, ``perplexity``.

    Raises:
        InputError: A pair is too long.
    """
    encoder = _encoder_of(model, max_length, truncate)
    return _nats(model, encoder.batches(pairs, batch_size), encoder.loss())


def generate_texts(
    model: Model,
    sources: Sequence[str] | Pairs,
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    beams: Beams | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    shapes: int = 4,
    truncate: bool = False,
    key: Key[Array, ""] | None = None,
    progress: bool | None = False,
) -> list[str]:
    """Generates a text from each source, with a model that was fine-tuned on `TextPairs`.

    Sources of similar lengths share a batch, and batches have few lengths, each compiled once.

    Args:
        model: A model with a language-model head.
        sources: The texts to generate from.
        max_new_tokens: The largest number of tokens to generate.
        max_length: The largest number of tokens of a source with its line break; None for the
            number of the model's positions.
        beams: Searches with beams; None for greedy search, unless ``sampling`` is given.
        sampling: Samples tokens.
        batch_size: The number of sources per batch.
        shapes: The largest number of padded lengths.
        truncate: Whether the ends of longer sources are cut off.
        key: Random key of sampling.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The texts, in the order of the sources.

    Raises:
        InputError: A source is too long; names it.

    Example:
        >>> texts = generate_texts(fit.model, data.test, beams=Beams(5))  # doctest: +SKIP
    """
    encoder = _encoder_of(model, max_length, truncate)
    if isinstance(sources, Pairs):
        names = [each[0] for each in sources.names]
        sources = sources.sources
    else:
        names = [f"sources[{i}]" for i in range(len(sources))]
    if not sources:
        return []
    tokens = encoder.sources(sources, names, max_new_tokens)
    batches = Batches(
        Examples(tokens, None, None, names), batch_size, pad_id=encoder.pad_id, shapes=shapes
    )
    texts = {}
    with show_progress("Generating", len(batches), progress, first="compiling") as advance:
        for step in range(len(batches)):
            batch = batches(step)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            if encoder.prompts:  # generation needs the padding on the left
                shift = (np.arange(ids.shape[1]) + mask.sum(1, keepdims=True)) % ids.shape[1]
                ids, mask = (np.take_along_axis(x, shift, axis=1) for x in (ids, mask))
            out = generate(
                model,
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                beams=beams,
                sampling=sampling,
                eos=encoder.ends,
                pad=encoder.pad_id,
                key=None if key is None else jax.random.fold_in(key, step),
            )
            rows = batches.rows(step)
            for row, generated in zip(rows.tolist(), np.asarray(out), strict=False):
                texts[row] = _decode(encoder, generated)
            advance(f"{len(texts)} of {len(sources)} texts")
    return [texts[i] for i in range(len(texts))]


def _decode(encoder: PairEncoder, ids: TokenIds) -> str:
    ends = np.flatnonzero(np.isin(ids, encoder.ends))
    ids = ids[: ends[0]] if len(ends) else ids
    # Without clean-up, which would join words and full stops that are apart in the tokens.
    text = encoder.tokenizer.decode(
        ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.strip()


def measure_texts(
    pairs: Pairs,
    texts: Sequence[str],
    metrics: Sequence[str] = tuple(TEXT_METRICS),
) -> Mapping[str, Mapping[str, float]]:
    """Measures generated texts against the references.

    Args:
        pairs: The sources with their references.
        texts: The generated text of each source.
        metrics: Any of ``"bleu"``, ``"chrf"``, ``"chrf++"`` and ``"ter"``.

    Returns:
        The metrics of ``all`` texts, and of the texts of each group if there are groups.

    Raises:
        InputError: The numbers of texts and sources differ, or sacrebleu is not installed.

    Example:
        >>> measure_texts(data.test, texts)["all"]["bleu"]  # doctest: +SKIP
    """
    sacrebleu()
    if len(texts) != len(pairs.sources):
        raise InputError(f"{len(texts)} texts for {len(pairs.sources)} sources")
    groups = {"all": list(range(len(texts)))}
    for i, group in enumerate(pairs.groups or ()):
        groups.setdefault(group, []).append(i)
    results = {}
    for group, rows in groups.items():
        chosen, references = [texts[i] for i in rows], [pairs.references[i] for i in rows]
        results[group] = {name: TEXT_METRICS[name](chosen, references) for name in metrics}
    return results
