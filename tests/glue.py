"""Tiny tasks for tests of fine-tuning: a tokenizer of the tiny models, and tsv files."""

import numpy as np

from tests import tiny

WORDS = [f"w{i}" for i in range(90)]


def checkpoint(folder):
    """A tiny BERT of two layers with a tokenizer; every layer costs seconds of compilation."""
    tensors = {n: x for n, x in tiny.weights("bert", None).items() if ".layer.2." not in n}
    tiny.write_folder(folder, {**tiny.BERT, "num_hidden_layers": 2}, tensors)
    return vocabulary(folder)


def vocabulary(folder):
    """Gives a tiny BERT checkpoint's folder a tokenizer of 99 words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"x{i}" for i in range(tiny.BERT["vocab_size"] - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def sentences(n, seed=0):
    """Sentences of 1 to 20 words, labeled by whether their first word is one of the first 45."""
    rng = np.random.RandomState(seed)
    rows = [rng.randint(0, 90, rng.randint(1, 21)) for _ in range(n)]
    return [(" ".join(f"w{i}" for i in row), int(row[0] < 45)) for row in rows]


def sst2(folder, n=48):
    """A folder like SST-2's."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("train", "dev")):
        rows = [f"{text}\t{label}" for text, label in sentences(n, seed)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder
