"""Sentence encoders in sentence-transformers, and so in its evaluators and in mteb.

The model runs in JAX. Pooling, normalization, prompts and all else are those of
sentence-transformers (``pip install sentence-transformers``)::

    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    print(EmbeddingSimilarityEvaluator(first, second, scores)(sentence_transformer("smaller")))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

try:
    import torch  # pyright: ignore[reportMissingImports]
    from sentence_transformers import (  # pyright: ignore[reportMissingImports]
        SentenceTransformer,
    )
    from sentence_transformers.base.modules.input_module import (  # pyright: ignore[reportMissingImports]
        InputModule,
    )
    from sentence_transformers.sentence_transformer.modules import (  # pyright: ignore[reportMissingImports]
        Pooling,
    )
    from sentence_transformers.util import (  # pyright: ignore[reportMissingImports]
        import_from_string,
    )
except ImportError as error:
    raise ImportError(
        f"sentence-transformers 6 or later is needed ({error}): pip install sentence-transformers"
    ) from error

from fusion_jax.checkpoint.opening import load
from fusion_jax.errors import InputError
from fusion_jax.models.base import Model, max_positions
from fusion_jax.models.tokens import tokenizer_of

LENGTH_STEP = 16
"""Lengths of batches are multiples of this, so that few programs are compiled."""
DEFAULT_LENGTH = 512
OWN = "sentence_transformers."


def sentence_transformer(pretrained: str | Model, *, dtype: Any = None) -> SentenceTransformer:
    """Returns a model as a ``SentenceTransformer`` that computes hidden states in JAX.

    The modules after the transformer and the settings are those of the folder that the model came
    from; without any, the mean over tokens, as sentence-transformers does. The result encodes and
    is evaluated; it cannot be trained or saved by PyTorch.

    Args:
        pretrained: An encoder without a head, or an artefact, folder or hub id of one.
        dtype: Type of the parameters; None for that of the files.

    Raises:
        InputError: The model has a head or generates text, its folder has no tokenizer, or a module
            is not one of sentence-transformers.

    Example:
        >>> encoder = sentence_transformer("smaller")  # doctest: +SKIP
        >>> encoder.encode(["A sentence."]).shape  # doctest: +SKIP
        (1, 384)
    """
    model = load(pretrained, dtype=dtype) if isinstance(pretrained, str) else pretrained
    if model.provenance.head is not None:
        raise InputError(
            f"a sentence encoder has no head; this model has the head {model.provenance.head}"
        )
    folder = Path(model.provenance.folder)
    settings = _read(folder / "sentence_bert_config.json")
    first = _Transformer(model, settings.get("max_seq_length"), settings.get("do_lower_case"))
    described = folder / "modules.json"
    if described.is_file():
        rest = [_module(folder, entry) for entry in _read(described)[1:]]
    else:
        rest = [Pooling(model.config.hidden_size, "mean")]
    shared = _read(folder / "config_sentence_transformers.json")
    names = ("prompts", "default_prompt_name", "similarity_fn_name")
    given = {name: shared[name] for name in names if shared.get(name)}
    return SentenceTransformer(modules=[first, *rest], device="cpu", **given)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _module(folder: Path, entry: dict[str, Any]) -> Any:
    """Returns a module after the first; never code from the folder."""
    if not entry["type"].startswith(OWN):
        raise InputError(f"{folder}/modules.json has a module of its own code: {entry['type']}")
    return import_from_string(entry["type"]).load(str(folder), subfolder=entry["path"])


class _Transformer(InputModule):
    """The first module: texts to hidden states of tokens."""

    def __init__(self, model: Model, length: int | None, lower: bool | None):
        super().__init__()
        self.tokenizer = tokenizer_of(model)
        limit = max_positions(model)
        bounds = [x for x in (length, limit, self.tokenizer.model_max_length) if x]
        self.max_seq_length = min([*bounds, length or DEFAULT_LENGTH])
        self.lower = bool(lower)
        graph, self.state = nnx.split(model)
        self.hidden = jax.jit(
            lambda state, batch: nnx.merge(graph, state)(**batch).last_hidden_state
        )
        self.features = model.config.hidden_size

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> Any:
        texts = [f"{prompt or ''}{text}" for text in inputs]
        step = min(LENGTH_STEP, self.max_seq_length)
        return self.tokenizer(
            [text.lower() for text in texts] if self.lower else texts,
            padding=True,
            truncation=True,
            max_length=self.max_seq_length,
            pad_to_multiple_of=step if self.max_seq_length % step == 0 else None,
            return_tensors="pt",
        )

    def forward(self, features: Any, **_: Any) -> Any:
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {n: features[n].numpy().astype(np.int32) for n in names if n in features}
        hidden = np.array(self.hidden(self.state, batch), np.float32)
        return {**features, "token_embeddings": torch.from_numpy(hidden)}

    def get_embedding_dimension(self) -> int:
        return self.features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        raise InputError("save the model itself: fusion_jax.save, or fusion_jax.export_hf")
