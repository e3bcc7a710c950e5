"""Measures generated text with sacrebleu: a whole corpus, with any number of references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from fusion_jax.errors import InputError

References = Sequence[Sequence[str]]
"""For each text, its references."""


def sacrebleu() -> ModuleType:
    """Imports sacrebleu.

    Raises:
        InputError: sacrebleu is not installed.
    """
    try:
        import sacrebleu  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "BLEU, chrF and TER need sacrebleu: pip install 'fusion-jax[nlg]'"
        ) from None
    return sacrebleu


def bleu(texts: Sequence[str], references: References) -> float:
    """Returns corpus BLEU of up to 4-grams, from 0 to 100; cased, with words as in mteval-v13a.

    References:
        Papineni et al. (2002), BLEU; Post (2018), A Call for Clarity in Reporting BLEU Scores.

    Example:
        >>> bleu(["a b c d e"], [["a b c d e", "another one"]])  # doctest: +SKIP
        100.0
    """
    # force: the texts of some tasks are already split into words.
    return _score(sacrebleu().BLEU(force=True), texts, references)


def chrf(texts: Sequence[str], references: References) -> float:
    """Returns chrF2, from 0 to 100: the F score of character 6-grams.

    References:
        Popović (2015), chrF: character n-gram F-score for automatic MT evaluation.
    """
    return _score(sacrebleu().CHRF(), texts, references)


def chrf_words(texts: Sequence[str], references: References) -> float:
    """Returns chrF2++, from 0 to 100: chrF2 with 2-grams of words.

    References:
        Popović (2017), chrF++: words helping character n-grams.
    """
    return _score(sacrebleu().CHRF(word_order=2), texts, references)


def ter(texts: Sequence[str], references: References) -> float:
    """Returns the translation edit rate: edits per 100 words to the nearest reference, uncased.

    Low values are good.

    References:
        Snover et al. (2006), A Study of Translation Edit Rate with Targeted Human Annotation.
    """
    return _score(sacrebleu().TER(), texts, references)


def _score(metric: Any, texts: Sequence[str], references: References) -> float:
    most = max(map(len, references))
    # sacrebleu takes the first references of all texts, then the second, and so on.
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(metric.corpus_score(list(texts), columns).score)


TEXT_METRICS: Mapping[str, Callable[[Sequence[str], References], float]] = MappingProxyType(
    {"bleu": bleu, "chrf": chrf, "chrf++": chrf_words, "ter": ter}
)
"""Functions of (texts, references) by name."""
