"""Writes tests/goldens with torch and transformers: python -m tests.make_goldens [CASE ...]."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

from fusion_jax.cli.demo import find_model
from fusion_jax.models.registry import FAMILIES
from tests import tiny

MINILM_IDS = [
    [101, 2009, 2003, 1037, 3606, 21186, 8969, 102, 0, 0],
    [101, 2655, 2033, 2003, 28519, 3286, 1012, 2009, 2001, 102],
]
# Names of tensors in a golden, and of what a Hugging Face model gives.
MANY = {
    "hidden": ("hidden_states", "decoder_hidden_states"),
    "encoder": ("encoder_hidden_states",),
    "router": ("router_logits", "decoder_router_logits"),
    "encoder_router": ("encoder_router_logits",),
}
ONE = ("pooler_output", "logits", "aux_loss", "encoder_aux_loss", "encoder_z_loss")


def inputs(batch):
    """Torch tensors, with the positions that `generate` gives where padding is on the left."""
    tensors = {name: torch.tensor(x).long() for name, x in batch.items()}
    mask = tensors.get("attention_mask")
    if mask is not None and bool((mask[:, 0] == 0).any()):
        tensors["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return tensors


def run(model, batch, **options):
    with torch.no_grad():
        out = model(**inputs(batch), output_hidden_states=True, **options)
    result = {}
    for ours, theirs in MANY.items():
        values = next((out[name] for name in theirs if out.get(name) is not None), ())
        for i, x in enumerate(values):
            rows = batch["input_ids"].shape[0]
            result[f"{ours}.{i}"] = x.reshape(rows, -1, x.shape[-1]).numpy()
    for name in ONE:
        if out.get(name) is not None:
            result[name] = np.asarray(out[name])
    return result


def tiny_model(family, head, folder):
    """A Hugging Face model with the weights of `tiny.weight`, and its tensors' shapes on disk."""
    cls = getattr(transformers, tiny.architecture(family, head))
    fields = tiny.config_of(family, head)
    config = json.loads(json.dumps(fields))  # transformers writes into nested fields
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    cls(config).save_pretrained(folder / "names")
    written = safetensors.numpy.load_file(folder / "names" / "model.safetensors")
    shapes = {name: list(x.shape) for name, x in written.items()}
    if family == "t5-v1.1":  # untied, which transformers only loads and never makes
        shapes["lm_head.weight"] = shapes["shared.weight"]
    tensors = {name: tiny.weight(name, shape) for name, shape in shapes.items()}
    return tiny.hugging_face(tiny.write_folder(folder / "model", fields, tensors),
                             family, head), shapes  # fmt: skip


def generated(model, batch):
    """Greedy and beam search, with an end token that greedy search comes to."""
    arguments = {k: v for k, v in inputs(batch).items() if k in ("input_ids", "attention_mask")}
    prompt = 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}

    def ids(**more):
        out = model.generate(**arguments, **options, **more)[:, prompt:].numpy()
        out = out[:, 1:] if model.config.is_encoder_decoder else out
        padded = np.pad(out, ((0, 0), (0, 8 - out.shape[1])), constant_values=tiny.PAD)
        return padded.astype(np.int32)

    eos = int(ids()[0, 3])
    result = {"greedy": ids(eos_token_id=eos), "beam": ids(eos_token_id=eos, num_beams=3)}
    if model.config.model_type == "gpt2":
        result["endless"] = ids(num_beams=3)
        result["long"] = ids(eos_token_id=eos, num_beams=3, length_penalty=2.0, early_stopping=True)
    return result, eos


def write(family, head):
    batch, options, eos = tiny.batch(family), {}, None
    with tempfile.TemporaryDirectory() as folder:
        model, shapes = tiny_model(family, head, Path(folder))
    if "num_experts" in tiny.CONFIGS[family] or "num_local_experts" in tiny.CONFIGS[family]:
        options["output_router_logits"] = True
    tensors = run(model, batch, **options)
    if (family, head) in tiny.ENCODERS:
        whole = {"input_ids": batch["input_ids"][:1]}
        tensors |= {f"plain.{name}": x for name, x in run(model, whole).items()}
    if (family, head) in tiny.GENERATIVE:
        ids, eos = generated(model, batch)
        tensors |= {f"generated.{name}": x for name, x in ids.items()}
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    metadata = {"shapes": json.dumps(shapes), "eos": json.dumps(eos)}
    safetensors.numpy.save_file(tensors, tiny.golden_path(family, head), metadata=metadata)


def logits_of(out):
    """The logits of a head; of answers, those of their starts and of their ends."""
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    return out.logits.numpy()


def loss_of(model, head, batch):
    """The loss of the first text."""
    labels = torch.tensor(tiny.head_labels(head)).long()
    first = {name: x[:1] for name, x in batch.items()}
    if head == "question-answering":
        given = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
    else:
        given = {"labels": labels}
    with torch.no_grad():
        return model(**inputs(first), **given).loss.numpy()


def heads():
    tensors, shapes = {}, {}
    for family, head in tiny.HEAD_GOLDENS:
        with tempfile.TemporaryDirectory() as folder:
            model, shapes[f"{family} {head}"] = tiny_model(family, head, Path(folder))
        batch = tiny.batch(family, head)
        with torch.no_grad():
            out = model(**inputs(batch))
        tensors[f"{family} {head} logits"] = np.ascontiguousarray(logits_of(out))
        tensors[f"{family} {head} loss"] = loss_of(model, head, batch)
    path = tiny.GOLDENS / "heads.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})


def vision():
    tensors, shapes = {}, {}
    for family, config in tiny.VISION.items():
        for head in FAMILIES[family].architectures:
            rest = json.loads(json.dumps(config))
            fields = transformers.AutoConfig.for_model(rest.pop("model_type"), **rest)
            cls = getattr(transformers, FAMILIES[family].architectures[head])
            with tempfile.TemporaryDirectory() as folder:
                cls(fields).save_pretrained(folder)
                written = safetensors.numpy.load_file(f"{folder}/model.safetensors")
                own = {name: tiny.weight(name, x.shape) for name, x in written.items()}
                model = cls.from_pretrained(tiny.write_folder(Path(folder) / "m", config, own))
            with torch.no_grad():
                out = model.eval()(torch.tensor(tiny.images(config)))
            case = f"{family} {head or 'base'}"
            shapes[case] = {name: list(x.shape) for name, x in own.items()}
            for name in ("last_hidden_state", "pooler_output", "logits"):
                if out.get(name) is not None:
                    tensors[f"{case} {name}"] = out[name].numpy().copy()
    path = tiny.GOLDENS / "vision.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"shapes": json.dumps(shapes)})


def minilm():
    model = transformers.AutoModel.from_pretrained(find_model()).eval()
    ids = np.array(MINILM_IDS)
    tensors = run(model, {"input_ids": ids, "attention_mask": (ids != 0).astype(int)})
    tensors["input_ids"] = ids.astype(np.int32)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        tiny.GOLDENS / "minilm.safetensors",
    )


def main(names):
    for family, head in tiny.CASES:
        if not names or family in names:
            write(family, head)
    if not names or "heads" in names:
        heads()
    if not names or "vision" in names:
        vision()
    if not names or "minilm" in names:
        minilm()


if __name__ == "__main__":
    main(sys.argv[1:])
