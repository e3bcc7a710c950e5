"""Tokenizes pairs of source and target text for models that generate text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusion_jax.errors import InputError
from fusion_jax.models.base import Generative, Model
from fusion_jax.models.tokens import check_tokens, tokenizer_of
from fusion_jax.progress import show_stage
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples, TokenIds, round_up

SEPARATOR = "\n"
"""Separates source and target in the input of decoder-only models."""
_MORE = "allow more with max_length if the model has positions for them"


class Pairs(NamedTuple):
    """Source texts with their references.

    Args:
        sources: The texts to generate from.
        references: One or more right texts for each source.
        groups: The group of each source, for results by group; None if there are no groups.
        names: Where each reference comes from, such as ``"e2e/train.txt:12"``.
    """

    sources: Sequence[str]
    references: Sequence[tuple[str, ...]]
    groups: Sequence[str] | None
    names: Sequence[tuple[str, ...]]

    @property
    def size(self) -> int:
        """The number of pairs of a source and a reference."""
        return sum(map(len, self.references))


class PairBatches(Batches):
    """Batches of examples with tokens to predict, for `fit` and `fusion_jax.tune`.

    Args:
        examples: The inputs of the model.
        labels: The tokens to predict for each example, with -100 at tokens that do not count: as
            long as the example for a decoder-only model, of any length for an encoder-decoder.
        batch_size: The number of rows of every batch.
        pad_id: The token id of padding.
        shapes: The largest number of padded lengths of examples; each has one length of labels.
        seed: Seed of the order; None sorts the batches by padded length.
    """

    def __init__(
        self,
        examples: Examples,
        labels: Sequence[TokenIds],
        batch_size: int,
        *,
        pad_id: int,
        shapes: int = 4,
        seed: int | None = None,
    ):
        super().__init__(examples, batch_size, pad_id=pad_id, shapes=shapes, seed=seed)
        self._labels = labels
        widths = round_up(np.array([len(each) for each in labels]))
        # A short example may be in a batch of a larger length: widths must not decrease.
        self._widths = {
            length: widths[self._lengths <= length].max() for length in self.padded_lengths
        }

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the batch of a step.

        Args:
            step: The step, counted from 0 over all epochs.

        Returns:
            The arrays of `Batches`, and ``labels`` (b, s) int32, -100 where a token does not count.
        """
        batch = super().__call__(step)
        width = self._widths[batch["input_ids"].shape[1]]
        batch["labels"] = np.full((self.batch_size, width), -100, np.int32)
        for row, example in enumerate(self.rows(step)):
            labels = self._labels[example]
            batch["labels"][row, : len(labels)] = labels
        return batch


class PairEncoder:
    """Tokenizes sources and targets for a model that generates text.

    A decoder-only model reads source, line break, target and end token, and learns target and end
    token. An encoder-decoder encodes the source and learns target and end token.

    Args:
        model: A generative model from `fusion_jax.load`.
        max_length: The largest number of tokens of the input, and of a target; None for the number
            of the model's positions.
        truncate: Whether the ends of longer sources are cut off; targets are never cut off.

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
        """Whether the model is decoder-only, so that it reads the source as a prompt."""
        self.model, self.tokenizer = model, tokenizer_of(model)
        known = model.config.eos_token_id
        known = () if known is None else (known,) if isinstance(known, int) else tuple(known)
        own = self.tokenizer.eos_token_id
        self.ends: tuple[int, ...] = (*known,) if own is None else (own, *known)
        """The tokens that end a text; the model learns the first one."""
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
        # None: as the work around it.
        with show_stage(f"Tokenizing {len(texts):,} texts", None if len(texts) > 1 else False):
            out = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)
        check_tokens(self.model, out["input_ids"], tokenizer=self.tokenizer)
        return out["input_ids"]

    def sources(self, texts: Sequence[str], names: Sequence[str], room: int) -> list[TokenIds]:
        """Returns the tokens of each source to generate from.

        Args:
            texts: The sources, of at most ``max_length`` tokens.
            names: Where they come from.
            room: The number of tokens to generate; a decoder-only model must have positions for
                them after the source.

        Raises:
            InputError: A source is too long; names it.
        """
        found, others = [], f", the line break and max_new_tokens {room}"
        for ids, name in zip(self._ids(texts), names, strict=True):
            if not self.prompts or self.max_length != self.positions:
                ids = self._cut(ids, self.max_length, 0, name, " and the line break", _MORE)
            if self.prompts:
                advice = "generate fewer with max_new_tokens"
                ids = self._cut(ids, self.positions, room, name, others, advice)
            found.append(np.array(ids + self._separator, np.int32))
        return found

    def _cut(
        self, ids: list[int], length: int | None, room: int, name: str, others: str, advice: str
    ) -> list[int]:
        """Returns a source that leaves room for other tokens within a length.

        ``others`` names the other tokens in error messages; ``advice`` says how to avoid the error.
        """
        if length is None:
            return ids
        most, long = length, f"{name}: a source of {len(ids)} tokens"
        if self.prompts:
            most -= len(self._separator) + room
            long = f"{long}{others}"
        if len(ids) > most:
            long = f"{long}, above {length}"
            if not self.truncate:
                raise InputError(f"{long}; {advice}, or cut sources off with truncate")
            if most < 1:
                raise InputError(f"{long}, which leaves no place for any source; {advice}")
            # An encoder's end token stays.
            end = [] if self.prompts or ids[-1] != self.ends[0] else ids[-1:]
            ids = ids[: most - len(end)] + end
        return ids

    def batches(
        self, pairs: Pairs, batch_size: int, *, shapes: int = 4, seed: int | None = None
    ) -> PairBatches:
        """Returns batches of every source with each of its references; see `Batches`.

        Raises:
            InputError: A pair is too long; names it.
        """
        names = [name for each in pairs.names for name in each]
        sources = self._ids(pairs.sources)
        targets = self._ids([text for each in pairs.references for text in each], not self.prompts)
        inputs, labels, rest = [], [], iter(zip(targets, names, strict=True))
        for source, references in zip(sources, pairs.references, strict=True):
            for _ in references:
                target, name = next(rest)
                if target[-1:] != [self.ends[0]]:
                    target = [*target, self.ends[0]]
                if not self.prompts and self.max_length and len(target) > self.max_length:
                    raise InputError(f"{name}: {len(target)} tokens, above {self.max_length}")
                others = f", the line break and a target of {len(target)}"
                ids = self._cut(source, self.max_length, len(target), name, others, _MORE)
                ids = np.array(ids + self._separator, np.int32)
                wanted = np.array(target, np.int32)
                if self.prompts:
                    labels.append(np.concatenate([np.full_like(ids, -100), wanted]))
                    ids = np.concatenate([ids, wanted])
                else:
                    labels.append(wanted)
                inputs.append(ids)
        examples = Examples(inputs, None, None, names)
        return PairBatches(
            examples, labels, batch_size, pad_id=self.pad_id, shapes=shapes, seed=seed
        )

    def loss(self) -> losses.Loss:
        """Returns the loss to minimize on these batches."""
        return losses.next_token if self.prompts else losses.sequence_to_sequence
