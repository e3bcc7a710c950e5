"""Writes tests/goldens with torch and transformers: python -m tests.make_goldens."""

import json

import numpy as np
import safetensors.numpy
import torch
import transformers

from fusion_jax.demo import find_model
from tests import tiny

MINILM_IDS = [
    [101, 2009, 2003, 1037, 3606, 21186, 8969, 102, 0, 0],
    [101, 2655, 2033, 2003, 28519, 3286, 1012, 2009, 2001, 102],
]


def run(model, batch):
    with torch.no_grad():
        tensors = {name: torch.tensor(x).long() for name, x in batch.items()}
        out = model(**tensors, output_hidden_states=True)
    result = {f"hidden.{i}": h.numpy() for i, h in enumerate(out.hidden_states)}
    for name in ("pooler_output", "logits"):
        if getattr(out, name, None) is not None:
            result[name] = out[name].numpy()
    return result


def tiny_model(family, head):
    """A Hugging Face model with the weights of `tiny.weight`, and its tensors' shapes."""
    cls = getattr(transformers, {"bert": "Bert", "roberta": "Roberta"}[family] + tiny.HEADS[head])
    config = dict(tiny.CONFIGS[family])
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = cls(config).eval()
    # Names as save_pretrained writes them: tied tensors once, no buffers.
    shared = set(model.all_tied_weights_keys)
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if n not in shared}
    state = {n: torch.tensor(tiny.weight(n, s)) for n, s in shapes.items()}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    model.tie_weights()
    return model, shapes


def main():
    for family, head in tiny.CASES:
        model, shapes = tiny_model(family, head)
        batch = tiny.batch(family)
        tensors = run(model, batch)
        whole = {"input_ids": batch["input_ids"][:1]}
        tensors |= {f"plain.{name}": x for name, x in run(model, whole).items()}
        tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
        safetensors.numpy.save_file(
            tensors, tiny.golden_path(family, head), metadata={"shapes": json.dumps(shapes)}
        )
    model = transformers.AutoModel.from_pretrained(find_model()).eval()
    ids = np.array(MINILM_IDS)
    tensors = run(model, {"input_ids": ids, "attention_mask": (ids != 0).astype(int)})
    tensors["input_ids"] = ids.astype(np.int32)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        tiny.GOLDENS / "minilm.safetensors",
    )


if __name__ == "__main__":
    main()
