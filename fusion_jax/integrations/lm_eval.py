"""Language models in lm-evaluation-harness (``pip install fusion-jax[eval]``).

From Python, `FusionLM` goes into ``lm_eval.simple_evaluate(model=...)``. On the command line, this
module takes the arguments of ``lm_eval`` and adds the model type ``fusion_jax``::

    python -m fusion_jax.integrations.lm_eval run --model fusion_jax \
        --model_args pretrained=FOLDER --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

try:
    import lm_eval.__main__  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is needed ({error}): pip install 'fusion-jax[eval]'"
    ) from error

from fusion_jax.checkpoint.opening import load
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model, max_positions
from fusion_jax.models.decoding import Sampling, generate
from fusion_jax.models.tokens import continuation, tokenize_prompts, tokenizer_of
from fusion_jax.progress import show_progress

LENGTH_STEP = 64
"""Lengths of batches are multiples of this, so that few programs are compiled."""
MAX_LENGTH = 2048
"""The largest number of tokens of models whose positions have no limit."""
MAX_NEW_TOKENS = 256
GREEDY = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "temperature"}


@register_model("fusion_jax")
class FusionLM(TemplateLM):
    """A decoder-only model of this library as lm-evaluation-harness sees models.

    Args:
        pretrained: A model with its language-model head, or an artefact, folder or hub id.
        dtype: Type of the parameters; None for that of the files.
        batch_size: Texts at a time.
        max_length: Longer texts are cut off on the left; None for the model's positions.
        add_bos_token: Whether texts start with the beginning-of-text token; None for the
            tokenizer's own way.

    Raises:
        InputError: The model has no language-model head, or is an encoder-decoder.

    Example:
        >>> model = FusionLM("smaller")  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model=model, tasks=["lambada_openai"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | Model,
        *,
        dtype: Any = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        **_: Any,  # such as the device, which JAX chooses
    ):
        super().__init__()
        if isinstance(pretrained, str):
            pretrained = load(pretrained, head="causal-lm", dtype=dtype)
        if not getattr(pretrained, "reads_prompts", True):
            raise InputError("lm-evaluation-harness needs a decoder-only model")
        self.model: Any = pretrained
        self.tokenizer = tokenizer_of(pretrained)
        most = max_positions(pretrained) or getattr(
            pretrained.config, "max_position_embeddings", MAX_LENGTH
        )
        self.max_length = min(most, max_length or most)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self._add_bos = add_bos_token
        graph, self._state = nnx.split(pretrained)
        self._score = jax.jit(_scorer(graph))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name under which requests are cached."""
        return self.model.provenance.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text, by the template of the tokenizer."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the tokens of a text."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos
            first = self.tokenizer.decode([self.prefix_token_id])
            if first and string.startswith(first):
                add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, **given)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the likeliest."""
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = range(0, len(order), self.batch_size)
        with show_progress("Scoring", len(batches), first="compiling") as advance:
            for start in batches:
                rows = order[start : start + self.batch_size]
                found = self._scores([requests[i][1:] for i in rows])
                for i, value in zip(rows, found, strict=True):
                    results[i] = value
                advance("batches")
        return results

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Returns the results of one batch of contexts and continuations."""
        longest = max(len(context) + len(wanted) - 1 for context, wanted in pairs)
        length = min(self.max_length, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        ids = np.zeros((self.batch_size, length), np.int32)
        targets, counts = np.zeros_like(ids), np.zeros(ids.shape, bool)
        mask = np.zeros(ids.shape, bool)
        mask[:, 0] = True  # rows that only fill the batch
        for row, (context, wanted) in enumerate(pairs):
            if len(wanted) > self.max_length:
                raise InputError(
                    f"a continuation has {len(wanted)} tokens; the model takes {self.max_length}"
                )
            whole = [*context, *wanted][-(self.max_length + 1) :]
            read = len(whole) - 1
            ids[row, :read], mask[row, :read] = whole[:-1], True
            targets[row, read - len(wanted) : read] = wanted
            counts[row, read - len(wanted) : read] = True
        total, likeliest = jax.device_get(self._score(self._state, ids, mask, targets, counts))
        if not np.isfinite(total).all():
            raise FloatingPointError("the logits are NaN or infinite")
        return [(float(t), bool(g)) for t, g in zip(total, likeliest, strict=True)][: len(pairs)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each whole text, in windows of the largest length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = np.zeros(len(requests))
        scored = self._loglikelihood_tokens(windows)
        np.add.at(totals, owners, [value for value, _ in scored])
        return totals.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that continues each prompt, up to a text that ends it."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        with show_progress("Generating", len(requests), first="compiling") as advance:
            for members in groups.values():
                members.sort(key=lambda i: len(requests[i].args[0]))
                for start in range(0, len(members), self.batch_size):
                    rows = members[start : start + self.batch_size]
                    prompts = [requests[i].args[0] for i in rows]
                    texts = self._continued(prompts, requests[rows[0]].args[1])
                    for i, text in zip(rows, texts, strict=True):
                        results[i] = text
                        advance("prompts")
        return results

    def _continued(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        unknown = set(options) - GREEDY - {"top_p", "top_k"}
        if unknown:
            raise InputError(f"generating with {', '.join(sorted(unknown))} is not supported")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [*until]
        limit = options.get("max_gen_toks", options.get("max_new_tokens", MAX_NEW_TOKENS))
        room = self.max_length - limit
        if room < 1:
            raise InputError(f"the model takes {self.max_length} tokens, not {limit} new ones more")
        sampling = None
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            given = {name: options[name] for name in ("top_p", "top_k") if name in options}
            sampling = Sampling(options.get("temperature", 1.0), **given)
        batch = tokenize_prompts(self.tokenizer, prompts)
        ids, mask = (np.asarray(x)[:, -room:] for x in batch)
        new = generate(
            self.model,
            jnp.asarray(ids),
            jnp.asarray(mask),
            max_new_tokens=limit,
            sampling=sampling,
            key=None if sampling is None else jax.random.key(0),
        )
        ends = {self.eot_token_id}
        texts = []
        for row, real, found in zip(ids, mask, np.asarray(new), strict=True):
            stop = next((k for k, token in enumerate(found) if int(token) in ends), len(found))
            text = continuation(self.tokenizer, row[real].tolist(), found[:stop].tolist())
            for word in until:
                text = text.split(word)[0] if word else text
            texts.append(text)
        return texts


def _scorer(graph: Any) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that scores a batch of continuations."""

    def score(
        state: Any, ids: Any, mask: Any, targets: Any, counts: Any
    ) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, state)(input_ids=ids, attention_mask=mask).logits
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        own = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        greedy = jnp.where(counts, scores.argmax(-1) == targets, True).all(1)
        return jnp.where(counts, own, 0).sum(1), greedy

    return score


if __name__ == "__main__":
    sys.exit(lm_eval.__main__.cli_evaluate())
