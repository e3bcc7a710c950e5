"""Fine-tuning on pairs of source and target text, generating targets, and measuring them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from fusion_jax.errors import InputError
from fusion_jax.finetune import losses
from fusion_jax.finetune.artefacts import fit_and_keep
from fusion_jax.finetune.config import TrainConfig
from fusion_jax.finetune.data import Batches, Examples, round_up
from fusion_jax.finetune.optimiser import Multipliers
from fusion_jax.finetune.pairs import Pairs, TextData
from fusion_jax.finetune.sharding import Layout
from fusion_jax.finetune.text_metrics import TEXT_METRICS, sacrebleu
from fusion_jax.finetune.trainer import Fit, OnStep
from fusion_jax.generate import Beams, Sampling, generate
from fusion_jax.models.base import Generative, Model
from fusion_jax.progress import progress as show_progress
from fusion_jax.text import load_tokenizer

SEPARATOR = "\n"
"""What decoder-only models read between source and target."""
_MORE = "allow more with max_length if the model has positions for them"
Tokens = Int[np.ndarray, " _"]


class PairBatches(Batches):
    """Batches of sequences with tokens to predict: a source for `fit` and `fusion_jax.tune`.

    Args:
        examples: What the model reads.
        labels: The tokens to predict for each example, -100 at those that do not count: as long as
            the example where they are its own next tokens, of any length for an encoder-decoder.
        batch_size: Rows of every batch.
        pad_id: The token id of padding.
        shapes: Most different lengths of examples; each has one length of labels.
        seed: Seed of the order; None keeps like lengths together, in order.
    """

    def __init__(
        self,
        examples: Examples,
        labels: Sequence[Tokens],
        batch_size: int,
        *,
        pad_id: int,
        shapes: int = 4,
        seed: int | None = None,
    ):
        super().__init__(examples, batch_size, pad_id=pad_id, shapes=shapes, seed=seed)
        self._labels = labels
        widths = round_up(np.array([len(each) for each in labels]))
        # What does not fill a batch goes on to the next length: widths must not fall.
        self._widths = {bound: widths[self._lengths <= bound].max() for bound in self.bounds}

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step.

        Args:
            step: Counted from 0, over all epochs.

        Returns:
            As `Batches`, and ``labels`` (b, s) int32, -100 where nothing counts.
        """
        batch = super().__call__(step)
        width = self._widths[batch["input_ids"].shape[1]]
        batch["labels"] = np.full((self.batch_size, width), -100, np.int32)
        for row, example in enumerate(self.rows(step)):
            labels = self._labels[example]
            batch["labels"][row, : len(labels)] = labels
        return batch


class PairEncoder:
    """Turns sources and targets into what a model reads and should say.

    A decoder-only model reads source, line break, target and the end token, and learns the last
    two. An encoder-decoder encodes the source and says target and end token.

    Args:
        model: A generative model from `fusion_jax.load`.
        max_length: Most tokens of what is read, and of a target; None for what the model has
            positions for.
        truncate: Whether the ends of sources that are too long are cut off; targets never are.

    Raises:
        InputError: The model does not generate text, has fewer positions than ``max_length``, or
            its tokenizer lacks the end token or the line break.
    """

    def __init__(self, model: Model, max_length: int | None = None, truncate: bool = False):
        if not isinstance(model, Generative):
            raise InputError("the model does not generate text; pairs of texts need one that does")
        most = model.max_length
        if max_length is not None and most is not None and max_length > most:
            raise InputError(f"max_length {max_length} is above the model's {most} positions")
        self.positions = most
        self.max_length = most if max_length is None else max_length
        self.truncate = truncate
        self.prompts = model.reads_prompts
        """Whether the model reads source and target one after the other."""
        self.tokenizer = load_tokenizer(model.origin.folder)
        known = model.config.eos_token_id
        known = () if known is None else (known,) if isinstance(known, int) else tuple(known)
        own = self.tokenizer.eos_token_id
        self.ends: tuple[int, ...] = (*known,) if own is None else (own, *known)
        """The tokens that end a text; the first is learnt."""
        if not self.ends:
            raise InputError("neither the model's configuration nor its tokenizer has an eos_token")
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.ends[0] if pad is None else pad
        self._separator = self._ids([SEPARATOR], special=False)[0] if self.prompts else []
        if self.prompts and not self._separator:
            raise InputError(
                "the model's tokenizer has no token for the line break between source and target"
            )

    def _ids(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        if not texts:
            return []
        out = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        return out["input_ids"]

    def sources(self, texts: Sequence[str], names: Sequence[str], room: int) -> list[Tokens]:
        """The tokens to generate from.

        Args:
            texts: The sources, of ``max_length`` tokens at most.
            names: Where they come from.
            room: How many tokens are to be generated, which a decoder-only model must have
                positions left for, behind ``max_length`` too.

        Returns:
            The tokens of each.

        Raises:
            InputError: One is too long; names it.
        """
        found, what = [], f", the line break and max_new_tokens {room}"
        for ids, name in zip(self._ids(texts), names, strict=True):
            if not self.prompts or self.max_length != self.positions:
                ids = self._cut(ids, self.max_length, 0, name, " and the line break", _MORE)
            if self.prompts:
                way = "generate fewer with max_new_tokens"
                ids = self._cut(ids, self.positions, room, name, what, way)
            found.append(np.array(ids + self._separator, np.int32))
        return found

    def _cut(
        self, ids: list[int], length: int | None, room: int, name: str, what: str, way: str
    ) -> list[int]:
        """A source that leaves this room within the length."""
        if length is None:
            return ids
        most, long = length, f"{name}: a source of {len(ids)} tokens"
        if self.prompts:
            most -= len(self._separator) + room
            long = f"{long}{what}"
        if len(ids) > most:
            long = f"{long}, above {length}"
            if not self.truncate:
                raise InputError(f"{long}; {way}, or have sources cut off with truncate")
            if most < 1:
                raise InputError(f"{long}, which leaves no place for any source; {way}")
            # An encoder's end token stays.
            end = [] if self.prompts or ids[-1] != self.ends[0] else ids[-1:]
            ids = ids[: most - len(end)] + end
        return ids

    def batches(
        self, pairs: Pairs, batch_size: int, *, shapes: int = 4, seed: int | None = None
    ) -> PairBatches:
        """Batches of every source with each of its references.

        Args:
            pairs: The pairs.
            batch_size: Pairs of a batch.
            shapes: Most different lengths.
            seed: Seed of the order; None keeps like lengths together.

        Returns:
            The batches, for `losses.next_token` or `losses.sequence_to_sequence`.

        Raises:
            InputError: A pair is too long; names it.
        """
        names = [name for each in pairs.names for name in each]
        sources = self._ids(pairs.sources)
        targets = self._ids([text for each in pairs.references for text in each], not self.prompts)
        read, labels, at = [], [], iter(zip(targets, names, strict=True))
        for source, references in zip(sources, pairs.references, strict=True):
            for _ in references:
                target, name = next(at)
                if target[-1:] != [self.ends[0]]:
                    target = [*target, self.ends[0]]
                if not self.prompts and self.max_length and len(target) > self.max_length:
                    raise InputError(f"{name}: {len(target)} tokens, above {self.max_length}")
                what = f", the line break and a target of {len(target)}"
                ids = self._cut(source, self.max_length, len(target), name, what, _MORE)
                ids = np.array(ids + self._separator, np.int32)
                said = np.array(target, np.int32)
                if self.prompts:
                    labels.append(np.concatenate([np.full_like(ids, -100), said]))
                    ids = np.concatenate([ids, said])
                else:
                    labels.append(said)
                read.append(ids)
        examples = Examples(read, None, None, names)
        return PairBatches(
            examples, labels, batch_size, pad_id=self.pad_id, shapes=shapes, seed=seed
        )

    def loss(self) -> losses.Loss:
        """What is minimised."""
        return losses.next_token if self.prompts else losses.sequence_to_sequence


def finetune_pairs(
    model: Model,
    data: TextData,
    config: TrainConfig | None = None,
    *,
    key: Key[Array, ""],
    folder: str | os.PathLike[str] | None = None,
    multipliers: Multipliers | None = None,
    on_step: OnStep | None = None,
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
        multipliers: What multiplies the learning rate of some parameters, see `fit`.
        on_step: Called after each step with the steps done and the state; may return another.
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
    order, dropout = jax.random.split(key)
    size, shapes = config.batch_size, config.shapes
    seed = int(jax.random.bits(order))
    train = encoder.batches(data.train, size, shapes=shapes, seed=seed)
    dev = None if data.dev is None else encoder.batches(data.dev, size, shapes=shapes)

    def evaluate(model: Any) -> dict[str, float]:
        assert dev is not None
        return _nats(model, dev, encoder.loss())

    return fit_and_keep(
        model,
        train,
        losses.with_routers(encoder.loss(), model, config),
        config,
        key=dropout,
        multipliers=multipliers,
        folder=folder,
        evaluate=None if dev is None else evaluate,
        lowest=True,
        on_step=on_step,
        progress=progress,
    )


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
        metrics: Keys of `fusion_jax.finetune.text_metrics.TEXT_METRICS`.

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
