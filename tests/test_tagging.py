"""Token classification: files, tokens of words, metrics of entities, and training."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.training import TaggedWords, measure_tags, tag_words
from fusion_jax.training.tasks import token_classification
from fusion_jax.training.tasks.classification import TextEncoder
from fusion_jax.training.tasks.tagged_words import entities, tag_set, tagged_words_of
from tests import glue, nlg

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-ORG
rejects VBZ O

Peter\tNNP\tB-PER\r
"""
JSONL = '{"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}\n\n{"words": ["x"], "tags": ["O"]}\n'


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_conll_text(tmp_path):
    folder = tmp_path / "conll"
    folder.mkdir()
    data = fj.read_tagged_words(write(folder / "train.txt", CONLL))
    assert data.train.words == (("EU", "rejects"), ("Peter",))
    assert data.train.tags == (("B-ORG", "O"), ("B-PER",))
    assert data.train.names == ["conll/train.txt:3", "conll/train.txt:6"]
    assert data.labels == ("O", "B-ORG", "B-PER")


def test_json_lines(tmp_path):
    data = fj.read_tagged_words(write(tmp_path / "a.jsonl", JSONL), tmp_path / "a.jsonl")
    assert data.dev.words == (("EU", "rejects"), ("x",))
    assert data.train.names[1].endswith("a.jsonl:3")
    text = '{"tokens": ["a", "b"], "ner_tags": [0, 3]}'
    path = write(tmp_path / "b.jsonl", text)
    data = fj.read_tagged_words(path, words="tokens", tags="ner_tags")
    assert data.train.tags == (("0", "3"),)
    assert data.labels == ("0", "1", "2", "3")
    assert tagged_words_of(path, "tokens", tagged=False).tags is None
    words = write(tmp_path / "c.txt", "one\ntwo\n\nthree")
    assert tagged_words_of(words, tagged=False).words == (("one", "two"), ("three",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "EU O\nrejects\n", r"a\.txt:2: the word 'rejects' has no tag"),
        ("a.txt", "EU B O\n\nrejects O", r"a\.txt:3: 2 columns, but 3 in the lines before"),
        ("a.txt", "-DOCSTART- O\n\n", r"a\.txt has no texts"),
        ("a.jsonl", '{"words": ["a"], "tags": ["O", "O"]}', r"a\.jsonl:1: 1 words, but 2 tags"),
        ("a.jsonl", JSONL + '{"words": ["a"]}', r"a\.jsonl:4: no list in field 'tags'"),
        ("a.jsonl", '{"words": "a", "tags": ["O"]}', r":1: 'a' is not a list of words in field"),
        ("a.jsonl", '{"words": [], "tags": []}', r":1: '\[\]' is not a list of words in field"),
        ("a.jsonl", '{"words": ["a", " "], "tags": ["O", "O"]}', r":1: item 2 of field 'words' is"),
        ("a.jsonl", '{"words": ["a"], "tags": [true]}', r":1: item 1 of field 'tags' is not a wo"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"]}', r"has no column 'words'"),
        ("a.txt", "EU O\nrejects O", "all words have the same tag"),
    ],
)
def test_bad_files(name, text, message, tmp_path):
    with pytest.raises(fj.InputError, match=message):
        fj.read_tagged_words(write(tmp_path / name, text))


def test_entities_by_hand():
    tags = ["B-PER", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC", "S-PER", "I-PER", "E-PER", "E-PER"]
    assert [tuple(each) for each in entities(tags)] == [
        ("PER", 0, 1),
        ("LOC", 2, 2),
        ("LOC", 4, 4),
        ("LOC", 5, 5),
        ("PER", 6, 6),
        ("PER", 7, 8),
        ("PER", 9, 9),
    ]
    assert entities(["B-A-B", "I-A-B", "U-X", "L-X"])[0].kind == "A-B"
    assert entities([]) == entities(["O", "O"]) == []


def conlleval(tags):
    """The rules of conlleval as its authors, and those of seqeval, write them."""
    result, before, kind_before, first = [], "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        ends = before in ("E", "S") or (before in ("B", "I") and mark in ("B", "S", "O"))
        if ends or (before != "O" and kind_before != kind):
            result.append((kind_before, first, i - 1))
        begins = mark in ("B", "S") or (before in ("E", "S", "O") and mark in ("E", "I"))
        if begins or (mark != "O" and kind_before != kind):
            first = i
        before, kind_before = mark, kind
    return result


def test_entities_are_those_of_conlleval():
    choices = ["O", *(f"{mark}-{kind}" for mark in "BIES" for kind in ("X", "Y"))]
    rng = random.Random(0)
    for _ in range(2000):
        tags = [rng.choice(choices) for _ in range(rng.randint(0, 8))]
        assert [tuple(each) for each in entities(tags)] == conlleval(tags), tags


def test_metrics_by_hand():
    """The example of seqeval, and counts by hand."""
    right = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert measure_tags(said, right) == {
        "f1": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "accuracy": 0.8,
    }
    # Two said of which one is right, three true; the same words of another text do not count.
    said = [["B-A", "O", "B-B"], ["O"]]
    right = [
        ["B-A", "O", "O"],
        ["B-B"],
    ]
    right[0][2] = "B-A"
    found = measure_tags(said, right)
    assert (found["precision"], found["recall"]) == (1 / 2, 1 / 3)
    assert found["f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert found["accuracy"] == 2 / 4
    assert measure_tags([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 1}
    assert measure_tags([["NOUN", "O"]], [["NOUN", "VERB"]]) == {"accuracy": 0.5}


def test_tag_sets():
    some = TaggedWords([("a", "b")], [("I-X", "O")], ["a"])
    assert tag_set(some, None, some._replace(tags=[("B-X", "I-X")])) == ("O", "B-X", "I-X")
    assert tag_set(some._replace(tags=[("10", "2")])) == tuple(map(str, range(11)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return glue.checkpoint(tmp_path_factory.mktemp("tags") / "model")


TAGS = ("O", "B-X", "I-X")


@pytest.fixture(scope="module")
def model(folder):
    return fj.load(folder, head="token-classification", num_labels=3, key=jax.random.key(0))


def named(model, labels):
    """The model, whose head has these names."""
    import copy

    other = copy.copy(model)
    other.provenance = dataclasses.replace(model.provenance, labels=labels)
    return other


def test_the_first_token_of_a_word_has_its_tag(model):
    words = [("w1-w2", "\u200b", "w3"), ("w4",)]
    data = fj.TokenClassification(TaggedWords(words, [TAGS, ("I-X",)], ["a", "b"]), labels=TAGS)
    examples, firsts = token_classification.encode(TextEncoder(model), data.train)
    assert examples.tokens[0].tolist() == [2, 6, 1, 7, 8, 3]  # [CLS] w1 - w2 w3 [SEP]
    assert [each.tolist() for each in firsts] == [[1, -1, 4], [1]]
    config = fj.TrainConfig(batch_size=2, shapes=1)
    prepared = data.prepare(model, config, key=jax.random.key(0))
    (batch,) = [prepared.batches(i) for i in range(len(prepared.batches))]
    by_length = sorted(map(list, batch["labels"].tolist()), key=lambda row: row[4])
    assert by_length == [[-100, 2, *[-100] * 6], [-100, 0, -100, -100, 2, *[-100] * 3]]
    inputs = data.inputs(model, config, key=jax.random.key(0))(0)
    assert "labels" not in inputs
    assert sorted(inputs["input_ids"].tolist()) == sorted(batch["input_ids"].tolist())
    alone = fj.TokenClassification(
        TaggedWords([("\u200b",), ("w1",)], [("B-X",), ("O",)], ["a", "b"]), labels=TAGS
    )
    with pytest.raises(fj.InputError, match="a: none of the words has a token"):
        alone.prepare(model, config, key=jax.random.key(0))


def test_tokens_with_spaces_and_parts_of_characters():
    """As byte-level and sentence-piece tokenizers give them, with and without trimmed offsets."""
    words = ("ab", "c", "de")  # "ab c de"
    for spans, want in (
        ([(0, 1), (1, 2), (2, 4), (4, 5), (5, 7)], [0, 2, 4]),  # "a", "b", " c", " ", "de"
        ([(0, 0), (0, 2), (3, 4), (3, 4), (4, 7), (0, 0)], [1, 2, 4]),  # "c" in two bytes
        ([(0, 2), (5, 7)], [0, -1, 1]),
    ):
        assert token_classification._firsts(words, np.array(spans)).tolist() == want


def test_longer_texts(model):
    words = [tuple(f"w{i}" for i in range(12))]
    with pytest.raises(fj.InputError, match=r"text 0: 14 tokens, above 8"):
        tag_words(model, words, max_length=8)
    tags = tag_words(named(model, ("B-X", "I-X", "B-Y")), words, max_length=8, truncate=True)
    assert [len(each) for each in tags] == [12]
    assert set(tags[0][:6]) <= {"B-X", "I-X", "B-Y"} and tags[0][6:] == ["O"] * 6
    assert tag_words(model, []) == []


def test_heads_and_tags(model, folder, key, caplog):
    def check(labels, names=None, **options):
        return token_classification.head_tags(named(model, names), labels, **options)

    assert check(TAGS, ("I-X", "O", "B-X")) == ("I-X", "O", "B-X")  # in the order of the head
    assert check(("O", "B-X"), TAGS) == TAGS
    assert check(("0", "2")) == ("0", "1", "2")
    assert check(TAGS, trains=True) == TAGS
    assert check(TAGS, ("a", "b", "c"), trains=True) == TAGS
    assert "the head's classes a, b, c become O, B-X, I-X" in caplog.text
    with pytest.raises(fj.InputError, match="have the names a, b, c, but the tags are O, B-X"):
        check(TAGS, ("a", "b", "c"))
    with pytest.raises(fj.InputError, match="have no names, but the tags are O, B-X"):
        check(TAGS)
    with pytest.raises(fj.InputError, match="head has 3 outputs, but there are 2 tags"):
        check(("O", "B-X"), trains=True)
    other = fj.load(folder, head="classification", num_labels=3, key=key)
    with pytest.raises(fj.InputError, match="no token-classification head; load it with"):
        token_classification.head_tags(other, TAGS)
    with pytest.raises(fj.InputError, match="not among the labels: I-X"):
        fj.TokenClassification(TaggedWords([("a",) * 3], [TAGS], ["a"]), labels=TAGS[:2])
    with pytest.raises(fj.InputError, match="the training texts have no tags"):
        fj.TokenClassification(TaggedWords([("a",)], None, ["a"]))


def toy(n, seed):
    """Words 0 to 4 begin an entity, 5 to 9 continue one, others are outside."""
    rng = np.random.RandomState(seed)
    rows = [rng.randint(0, 15, rng.randint(1, 9)) for _ in range(n)]
    words = [tuple(f"w{i}" for i in row) for row in rows]
    tags = [tuple(("B-X", "I-X", "O")[i // 5] for i in row) for row in rows]
    return TaggedWords(words, tags, [f"{seed}:{i}" for i in range(n)])


CONFIG = fj.TrainConfig(
    max_steps=40, batch_size=32, learning_rate=3e-3, shapes=1, dropout=False, eval_every=40
)


@pytest.mark.full
def test_training_learns_tags_and_keeps_their_names(folder, key, tmp_path):
    data = fj.TokenClassification(toy(96, 0), toy(32, 1))
    model = data.load(folder, key=key)
    assert model.provenance.new_head
    fit = fj.finetune(model, data, CONFIG, key=key, folder=tmp_path / "run")
    (measured,) = fit.history
    assert list(measured) == ["step", "f1", "precision", "recall", "accuracy"]
    assert measured["f1"] > 0.9 and measured["accuracy"] > 0.9
    best = fj.load(tmp_path / "run" / "best")
    assert best.provenance.labels == data.labels == ("O", "B-X", "I-X")
    assert not best.provenance.new_head and best.provenance.problem_type is None
    found = tag_words(best, data.dev)
    assert measure_tags(found, data.dev.tags)["f1"] == measured["f1"]
    config = json.loads((fj.export_hf(best, tmp_path / "hf") / "config.json").read_text())
    assert config["architectures"] == ["BertForTokenClassification"]
    assert config["id2label"] == {"0": "O", "1": "B-X", "2": "I-X"}
    # A model with names of its own has its own order, and may have more classes.
    again = fj.load(tmp_path / "hf", head="token-classification")
    fewer = fj.TokenClassification(toy(96, 0)._replace(tags=[("O",) * 5] * 95 + [("B-X",) * 5]))
    assert fewer.labels == ("O", "B-X")
    assert token_classification.head_tags(again, fewer.labels) == ("O", "B-X", "I-X")


@pytest.mark.full
def test_decoders_learn_tags(key, tmp_path):
    folder = nlg.checkpoint(tmp_path / "llama", "llama")
    rng = np.random.RandomState(0)
    rows = [rng.choice(list("abc"), rng.randint(1, 5)) for _ in range(64)]
    data = TaggedWords(
        [tuple(row) for row in rows], [tuple(c.upper() for c in row) for row in rows], ["x"] * 64
    )
    task = fj.TokenClassification(data, data)
    fit = fj.finetune(task.load(folder, key=key), task, CONFIG, key=key)
    assert list(fit.history[0]) == ["step", "accuracy"]
    assert fit.history[0]["accuracy"] > 0.9


@pytest.mark.full
@pytest.mark.torch
def test_tags_are_those_of_the_pipeline_in_transformers(folder, key, tmp_path):
    import transformers

    wide = fj.load(folder, head="token-classification", num_labels=3, key=key)
    kernel = jax.random.normal(jax.random.key(1), wide.head.out.kernel.shape)
    wide.head.out.kernel.set_value(kernel)
    rng = np.random.RandomState(0)
    words = [[f"w{i}" for i in rng.randint(0, 90, 9)] for _ in range(8)]
    options = {"aggregation_strategy": "none", "ignore_labels": []}
    exported = str(fj.export_hf(wide, tmp_path / "hf"))
    tagger = transformers.pipeline("token-classification", model=exported, **options)
    found = [[each["entity"] for each in tagger(" ".join(text))] for text in words]
    ours = tag_words(wide, words)
    assert [[f"LABEL_{tag}" for tag in text] for text in ours] == found
    assert len({tag for text in ours for tag in text}) > 1
