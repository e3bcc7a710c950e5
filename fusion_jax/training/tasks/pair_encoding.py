"""Pairs of source and target text as tokens: what models read, and what they should say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from fusion_jax.errors import InputError
from fusion_jax.models.base import Generative, Model
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples, round_up
from fusion_jax.training.tasks.pairs import Pairs

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
        self.tokenizer = load_tokenizer(model.provenance.folder)
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
