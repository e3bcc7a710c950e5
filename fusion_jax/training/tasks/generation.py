"""Fine-tuning on pairs of source and target text, generating targets, and measuring them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.models.base import Model
from fusion_jax.models.decoding import Beams, Sampling, generate
from fusion_jax.progress import show_progress
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.artefacts import Write, fit_and_keep
from fusion_jax.training.engine.batches import Batches, Examples
from fusion_jax.training.engine.config import TrainConfig
from fusion_jax.training.engine.losses import Loss
from fusion_jax.training.engine.optimizer import Multipliers
from fusion_jax.training.engine.partition import Trains
from fusion_jax.training.engine.sharding import Layout
from fusion_jax.training.engine.step import Rule
from fusion_jax.training.engine.trainer import Fit, Growth, OnStep
from fusion_jax.training.tasks.pair_encoding import PairBatches, PairEncoder
from fusion_jax.training.tasks.pairs import Pairs, TextData
from fusion_jax.training.tasks.text_metrics import TEXT_METRICS, sacrebleu


def finetune_pairs(
    model: Model,
    data: TextData,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    trains: Trains | None = None,
    loss: Callable[[Loss], Loss] | None = None,
    multipliers: Multipliers | None = None,
    on_step: OnStep | None = None,
    rule: Rule | None = None,
    growth: Growth | None = None,
    save: Write | None = None,
    best_from: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Trains a model to generate the targets of sources; the model itself is not changed.

    On the caller's mesh, stopped and gone on with as `finetune`. Evaluations are by the loss, which
    is quick; `generate_texts` and `measure_texts` say what the texts are worth.

    Args:
        model: A model from `fusion_jax.load` with ``head="causal-lm"`` or ``"seq2seq-lm"``.
        data: From `load_pairs` or `read_pairs`.
        config: How to train; None for the paper's settings.
        key: Random key of dropout and of the order of the pairs.
        folder: Where checkpoints, ``metrics.jsonl``, and the artefacts ``best`` (fewest nats per
            token on dev) and ``last`` go; None keeps nothing.
        trains: What trains, if not what ``config.train`` says.
        loss: What is minimised, made of the model's own loss: for teachers and penalties.
        multipliers: What multiplies the learning rate of some parameters, see `fit`.
        on_step: Called after each step with the steps done and the state; may return another.
        rule: What variables that do not train are in each step, see `fit`.
        growth: What changes the model's structure now and then, see `fit`.
        save: What writes the artefacts; None for `fusion_jax.save`.
        best_from: Evaluations after fewer steps do not count for ``best``, such as those while a
            schedule still changes the model.
        about: What else the run is about, see `fit`.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The trained model, and of every evaluation ``nats`` per token of the targets on dev and
        their exponential, ``perplexity``.

    Raises:
        InputError: Model, data and configuration do not fit together, or the folder holds another
            run. Raised before training starts.
        FloatingPointError: The loss or the gradient was NaN or infinite.

    Example:
        >>> model = load("gpt2", head="causal-lm")  # doctest: +SKIP
        >>> fit = finetune_pairs(model, load_pairs("webnlg", "nlg"), key=key)  # doctest: +SKIP
    """
    config = TrainConfig() if config is None else config
    encoder = _with_head(model, config.max_length, config.truncate)
    _, dropout = jax.random.split(key)
    train, own = pairs_source(model, data, config, key=key)
    size, shapes = config.batch_size, config.shapes
    dev = None if data.dev is None else encoder.batches(data.dev, size, shapes=shapes)

    def evaluate(model: Any) -> dict[str, float]:
        assert dev is not None
        return _nats(model, dev, encoder.loss())

    return fit_and_keep(
        model,
        train,
        own if loss is None else loss(own),
        config,
        key=dropout,
        trains=trains,
        multipliers=multipliers,
        folder=folder,
        evaluate=None if dev is None else evaluate,
        lowest=True,
        best_from=best_from,
        write=save,
        on_step=on_step,
        rule=rule,
        growth=growth,
        about=about,
        progress=progress,
    )


def pairs_source(
    model: Model, data: TextData, config: TrainConfig, *, key: Key[Array, ""]
) -> tuple[PairBatches, Loss]:
    """The batches that `finetune_pairs` trains on, and the loss that it minimises.

    Args:
        model: A model with a language-model head.
        data: The pairs.
        config: How it trains.
        key: The key that `finetune_pairs` gets.

    Returns:
        The batches and the loss.

    Raises:
        InputError: Model, data and configuration do not fit together.
    """
    encoder = _with_head(model, config.max_length, config.truncate)
    order, _ = jax.random.split(key)
    batches = encoder.batches(
        data.train,
        config.batch_size,
        shapes=config.shapes,
        seed=int(jax.random.bits(order)),
    )
    return batches, losses.with_routers(encoder.loss(), model, config)


def _with_head(model: Model, max_length: int | None, truncate: bool) -> PairEncoder:
    encoder = PairEncoder(model, max_length, truncate)
    if not model.has_logits:  # type: ignore[attr-defined]
        head = "causal-lm" if encoder.prompts else "seq2seq-lm"
        raise InputError(f"the model has no language-model head; load it with head={head!r}")
    return encoder


@partial(jax.jit, static_argnames="loss")
def _total(model: Model, batch: Any, loss: losses.Loss) -> losses.Total:
    return loss(model, batch, None)


def _nats(model: Any, batches: PairBatches, loss: losses.Loss) -> dict[str, float]:
    layout = Layout({})
    layout.check_batch(batches.batch_size)
    with layout.active():
        totals = [
            layout.gathered(_total(model, layout.batch(batches(step)), loss)._asdict())
            for step in range(len(batches))
        ]
    read = jax.device_get(totals)
    nats = sum(float(t["total"]) for t in read) / sum(float(t["count"]) for t in read)
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
    """How likely the references are, without generating anything.

    Args:
        model: A model with a language-model head.
        pairs: The pairs.
        max_length: Most tokens as in `finetune_pairs`; None for what the model has positions for.
        batch_size: Pairs at a time.
        truncate: Whether the ends of sources that are too long are cut off.

    Returns:
        ``nats`` per token of the references, ends included, and their exponential, ``perplexity``.

    Raises:
        InputError: A pair is too long.
    """
    encoder = _with_head(model, max_length, truncate)
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
    """Generates a text from each source, as a model does that `finetune_pairs` trained.

    Sources of like lengths share a batch, and batches have few lengths, each compiled once.

    Args:
        model: A model with a language-model head.
        sources: What to generate from.
        max_new_tokens: How many tokens to generate at most.
        max_length: Most tokens of a source, with its line break; None for what the model has
            positions for.
        beams: Search with beams; None for greedy search, unless ``sampling`` is given.
        sampling: Draw tokens.
        batch_size: Sources at a time.
        shapes: Most different lengths.
        truncate: Whether the ends of sources that are too long are cut off.
        key: Random key of sampling.
        progress: True shows progress on standard error, False does not, None only on a terminal.

    Returns:
        The texts, in the order of the sources.

    Raises:
        InputError: A source is too long; names it.

    Example:
        >>> texts = generate_texts(fit.model, data.test, beams=Beams(5))  # doctest: +SKIP
    """
    encoder = _with_head(model, max_length, truncate)
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
    with show_progress("Generating", len(batches), progress) as advance:
        for step in range(len(batches)):
            batch = batches(step)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            if encoder.prompts:  # padding goes to the left
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
            for row, said in zip(rows.tolist(), np.asarray(out), strict=False):
                texts[row] = _text(encoder, said)
            advance(f"{len(texts)} of {len(sources)} texts")
    return [texts[i] for i in range(len(texts))]


def _text(encoder: PairEncoder, ids: np.ndarray) -> str:
    ends = np.flatnonzero(np.isin(ids, encoder.ends))
    ids = ids[: ends[0]] if len(ends) else ids
    # As the tokens say: cleaning up would join words and full stops that stood apart.
    text = encoder.tokenizer.decode(
        ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text.strip()


def measure_texts(
    pairs: Pairs,
    texts: Sequence[str],
    metrics: Sequence[str] = ("bleu", "chrf", "chrf++", "ter"),
) -> Mapping[str, Mapping[str, float]]:
    """What generated texts are worth.

    Args:
        pairs: The sources, whose references are right.
        texts: The text of each source.
        metrics: Keys of `fusion_jax.training.tasks.text_metrics.TEXT_METRICS`.

    Returns:
        The metrics of ``all`` texts, and of those of each group, if there are groups.

    Raises:
        InputError: There are more or fewer texts than sources, or sacrebleu is not installed.
    """
    sacrebleu()
    if len(texts) != len(pairs.sources):
        raise InputError(f"{len(texts)} texts for {len(pairs.sources)} sources")
    groups = {"all": list(range(len(texts)))}
    for i, group in enumerate(pairs.groups or ()):
        groups.setdefault(group, []).append(i)
    results = {}
    for group, rows in groups.items():
        said, right = [texts[i] for i in rows], [pairs.references[i] for i in rows]
        results[group] = {name: TEXT_METRICS[name](said, right) for name in metrics}
    return results
