"""Tiny tasks of generating text for tests: character tokenizers of the tiny models, and files."""

import itertools
import json
import re

from tests import tiny

CHARS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,:|_\"'ABCDEFT"
FAMILIES = ("gpt2", "llama", "t5")


def checkpoint(folder, family, **config):
    """A tiny model of two layers a stack, with a tokenizer of one token per character."""
    head = "seq2seq-lm" if family == "t5" else "causal-lm"
    layers = {"gpt2": "n_layer", "llama": "num_hidden_layers", "t5": "num_layers"}[family]
    tensors = tiny.weights(family, head).items()
    tensors = {name: x for name, x in tensors if not re.search(r"\b(h|layers|block)\.2\.", name)}
    if "n_positions" in config:  # more positions than the golden case has
        name = "transformer.wpe.weight"
        tensors[name] = tiny.weight(name, (config["n_positions"], 16))
    config = {**tiny.CONFIGS[family], layers: 2, "eos_token_id": 1, **config}
    return tokenizer(tiny.write_folder(folder, config, tensors), ends=family == "t5")


def tokenizer(folder, ends=False, chars=CHARS, unknown=True):
    """Gives a folder a tokenizer of one token per character, which may put an end token last."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<pad>", "</s>", "<unk>", *chars))}
    unknown_token = "<unk>" if unknown else None
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown_token))
    made.decoder = decoders.Fuse()
    if ends:
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token=unknown_token
    )
    fast.save_pretrained(folder)
    return folder


def pairs(n, length=3):
    """Words of a, b and c, and the same words in capitals."""
    words = ("".join(w) for k in range(1, length + 1) for w in itertools.product("abc", repeat=k))
    return [(word, word.upper()) for word in itertools.islice(words, n)]


def csv(path, rows):
    """A table of sources and targets."""
    path.write_text("\n".join(["source,target", *(f"{a},{b}" for a, b in rows)]) + "\n")
    return path


def entry(i, category, triples, texts):
    """An entry of WebNLG."""
    parts = ("subject", "property", "object")
    fields = {
        "category": category,
        "size": str(len(triples)),
        "modifiedtripleset": [dict(zip(parts, triple, strict=True)) for triple in triples],
        "lexicalisations": [{"comment": "good", "lex": text, "xml_id": "Id1"} for text in texts],
    }
    return {str(i + 1): fields}


def webnlg(folder):
    """A folder like WebNLG's."""
    folder.mkdir(parents=True, exist_ok=True)
    two = [("a", "b", "c"), ("a", "d", "e")]
    parts = {
        "train": [
            entry(0, "Food", [("a", "b", "c")], ["Ab c.", "Ac b."]),
            entry(1, "Food", two, ["Abc de."]),
            entry(2, "City", [("b", "d", "f")], ["Bd f."]),
        ],
        "dev": [entry(0, "City", [("b", "b", "f")], ["Bb f."])],
        "test": [
            entry(0, "Food", [("c", "b", "c")], ["Cb c.", "Cc b.", "Cbc."]),
            entry(1, "Artist", two, ["Abc de a."]),
            entry(2, "City", [("f", "d", "f")], ["Fd f."]),
        ],
    }
    for name, entries in parts.items():
        (folder / f"{name}.json").write_text(json.dumps({"entries": entries}))
    return folder


def e2e(folder):
    """A folder like E2E's."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["name : a | food : b||A has b . ", "name : c||C .", "name : a | food : b||B at a ."]
    for name in ("train", "valid", "test"):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
