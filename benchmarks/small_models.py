"""Converts small real language models, each published in its own format, to checkpoints.

`--data DIR` of the benchmarks holds them in ``DIR/models``: stories260K (a Llama by A. Karpathy),
llm-viz-gpt-nano-sort (a GPT-2 that sorts letters, by B. Bycroft) and tinygpt-shakespeare (a GPT-2
for characters).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Int

Tensors = dict[str, np.ndarray]

_LLAMA = {
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w1_gate": "mlp.gate_proj",
    "mlp.w2_down": "mlp.down_proj",
    "mlp.w3_up": "mlp.up_proj",
}


def _stories(tensors: Tensors) -> Tensors:
    """Renames tensors, and moves rotated pairs of features to where Hugging Face has them."""
    result = {}
    for name, x in tensors.items():
        if name.startswith("layers."):
            _, layer, rest = name.removesuffix(".weight").split(".", 2)
            if rest in ("attn.wq", "attn.wk"):
                features = 8
                pairs = x.reshape(-1, features // 2, 2, x.shape[1])
                x = pairs.swapaxes(1, 2).reshape(x.shape)
            result[f"model.layers.{layer}.{_LLAMA[rest]}.weight"] = x
        else:
            result["model." + name.replace("embed.", "embed_tokens.")] = x
    return result


def _gpt2(tensors: Tensors) -> Tensors:
    """Transposes to GPT-2's layout, and adds the biases that one of the models does not have."""
    result = {}
    for name, x in tensors.items():
        matrix = x.ndim == 2 and name.startswith("h.")
        result[name if name.startswith("lm_head") else f"transformer.{name}"] = x.T if matrix else x
        bias = name.replace(".weight", ".bias")
        if matrix and bias not in tensors:
            result[f"transformer.{bias}"] = np.zeros(x.shape[0], x.dtype)
    return result


_LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "stories260K": _stories,
    "llm-viz-gpt-nano-sort": _gpt2,
    "tinygpt-shakespeare": _gpt2,
}


def hf_folder(data: Path, name: str, folder: Path) -> Path:
    """Writes one of the models as a Hugging Face checkpoint.

    Args:
        data: The folder of ``--data``.
        name: The model's folder in ``data / "models"``.
        folder: Where to write.

    Returns:
        The folder.
    """
    source = data / "models" / name
    tensors = _LAYOUTS[name](safetensors.numpy.load_file(source / "model.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def shakespeare_ids(data: Path, share: float = 0.1) -> Int[Array, " n"]:
    """Returns the end of tinyshakespeare in the tokens of tinygpt-shakespeare.

    Args:
        data: The folder of ``--data``.
        share: The share of the text to return.

    Returns:
        One token for each character.
    """
    fields = json.loads((data / "models/tinygpt-shakespeare/char_tokenizer.json").read_text())
    number = {char: int(i) for i, char in fields["itos"].items()}
    text = (data / "lm/tinyshakespeare/input.txt").read_text()
    text = text[len(text) - int(share * len(text)) :]
    return jnp.asarray([number[char] for char in text], jnp.int32)
