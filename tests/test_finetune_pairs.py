"""Pairs of source and target: reading, batches, fine-tuning, generating, measuring."""

import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.models.decoding import Beams, Sampling, generate
from fusion_jax.models.tokens import load_tokenizer, tokenize
from fusion_jax.nn.linear_forms import find_forms, find_linears
from fusion_jax.training import Chains, Pairs, Recipe, measure_pairs
from fusion_jax.training.engine import losses
from fusion_jax.training.methods.importance import type_of
from fusion_jax.training.tasks import text_metrics
from fusion_jax.training.tasks.pair_encoding import PairEncoder
from tests import nlg, tiny

CONFIG = fj.TrainConfig(
    max_steps=60,
    epochs=100,
    batch_size=8,
    learning_rate=1e-2,
    shapes=1,
    log_every=10,
    dropout=False,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    heads = {"t5": "seq2seq-lm"}
    return {
        family: fj.load(
            nlg.checkpoint(folder / family, family), head=heads.get(family, "causal-lm")
        )
        for family in nlg.FAMILIES
    }


@pytest.fixture
def data(tmp_path):
    """Twelve words to capitalize, the dev set with a second reference for the first."""
    rows = nlg.pairs(12)
    dev = nlg.csv(tmp_path / "dev.csv", [*rows[:4], ("a", "B")])
    return fj.read_pairs(nlg.csv(tmp_path / "train.csv", rows), dev)


def numbers(text):
    """Token ids by the definition of the test's tokenizer."""
    return [3 + nlg.CHARS.index(char) for char in text]


# ------------------------------------------------------------------------------------------------
# Files


def test_webnlg(tmp_path):
    nlg.webnlg(tmp_path / "webnlg")
    for folder in (tmp_path, tmp_path / "webnlg"):
        data = fj.load_pairs("webnlg", folder)
        assert data.name == "webnlg"
        assert list(data.train.sources) == ["a : b : c", "a : b : c | a : d : e", "b : d : f"]
        assert list(data.train.references) == [("Ab c.", "Ac b."), ("Abc de.",), ("Bd f.",)]
        assert (data.train.size, data.train.groups, data.dev.groups) == (4, None, None)
        assert list(data.test.groups) == ["seen", "unseen", "seen"]
        assert data.test.names[0][2] == "webnlg/test.json, entry 1, text 3"


def test_e2e(tmp_path):
    data = fj.load_pairs("e2e", nlg.e2e(tmp_path / "e2e"))
    for pairs in (data.train, data.dev, data.test):
        assert list(pairs.sources) == ["name : a | food : b", "name : c"]
        assert list(pairs.references) == [("A has b .", "B at a ."), ("C .",)]
    assert data.dev.names[0] == ("e2e/valid.txt:1", "e2e/valid.txt:3")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_own_files(kind, tmp_path):
    rows = [("in", "out"), ("x", "y"), ("in", "more")]
    path = tmp_path / f"own.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"mr": a, "ref": b}) for a, b in rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join(mark.join(row) for row in [("mr", "ref"), *rows]))
    data = fj.read_pairs(path, path, source="mr", target="ref")
    assert data.name == "own"
    assert data.test is None
    first = 1 + (kind != "jsonl")
    names = [f"{tmp_path.name}/own.{kind}:{first + i}" for i in range(3)]
    for pairs in (data.train, data.dev):
        assert list(pairs.sources) == ["in", "x"]
        assert list(pairs.references) == [("out", "more"), ("y",)]
        assert list(pairs.names) == [(names[0], names[2]), (names[1],)]


def broken(text):
    return lambda path: path.write_text(text)


def without(*keys):
    def change(path):
        fields = json.loads(path.read_text())
        inner = next(iter(fields["entries"][1].values()))
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        path.write_text(json.dumps(fields))

    return change


REAL = Path(os.environ.get("FUSION_JAX_DATA", "nowhere")) / "nlg"


@pytest.mark.skipif(not REAL.is_dir(), reason="FUSION_JAX_DATA names no folder with nlg")
def test_published_files():
    data = fj.load_pairs("webnlg", REAL)
    parts = data.train, data.dev, data.test
    assert [len(pairs.sources) for pairs in parts] == [6940, 872, 1862]
    assert [pairs.size for pairs in parts] == [18102, 2268, 4928]
    assert collections.Counter(data.test.groups) == {"seen": 971, "unseen": 891}
    data = fj.load_pairs("e2e", REAL)
    parts = data.train, data.dev, data.test
    assert [pairs.size for pairs in parts] == [42061, 4672, 4693]
    assert [len(pairs.sources) for pairs in parts] == [4862, 547, 630]


@pytest.mark.parametrize(
    ("task", "file", "change", "message"),
    [
        ("e2e", "train.txt", broken("a||b\n\nc|d\n"), r"train.txt:3: not in the form meaning\|\|"),
        ("e2e", "valid.txt", broken("a|| \n"), "valid.txt:1: not in the form"),
        ("e2e", "test.txt", broken("\n"), "test.txt has no lines"),
        ("e2e", "test.txt", lambda path: path.unlink(), "there is no file .*test.txt"),
        ("e2e", "train.txt", lambda p: p.write_bytes(b"a||b\n\xff||c"), "train.txt:2: broken UTF"),
        ("webnlg", "train.json", broken('{"entries":\n[}'), "train.json: not valid JSON"),
        ("webnlg", "dev.json", broken("[1]"), "dev.json has no entries"),
        ("webnlg", "dev.json", broken('{"entries": []}'), "dev.json has an empty list of entries"),
        ("webnlg", "test.json", broken('{"entries": [3]}'), "test.json, entry 1: not in WebNLG's"),
        ("webnlg", "train.json", without("category"), "train.json, entry 2: no 'category'"),
        (
            "webnlg",
            "train.json",
            without("modifiedtripleset", 0, "object"),
            "train.json, entry 2: no 'object'",
        ),
        ("webnlg", "train.json", without("lexicalisations", 0), "entry 2: no text"),
    ],
)
def test_broken_files(task, file, change, message, tmp_path):
    folder = getattr(nlg, task)(tmp_path / task)
    change(folder / file)
    with pytest.raises(fj.InputError, match=message):
        fj.load_pairs(task, folder)


def test_bad_names(tmp_path):
    with pytest.raises(fj.InputError, match="unknown task 'webnl'; did you mean"):
        fj.load_pairs("webnl", tmp_path)
    with pytest.raises(
        fj.InputError, match="there is no folder hub; give the folder with e2e's files"
    ):
        fj.load_pairs("e2e", "hub")
    path = nlg.csv(tmp_path / "x.csv", [("a", "b"), ("a", " ")])
    with pytest.raises(fj.InputError, match=r"x\.csv:3: no text in column 'target'"):
        fj.read_pairs(path)
    with pytest.raises(fj.InputError, match="no column 'sources'; did you mean 'source'"):
        fj.read_pairs(path, source="sources")


# ------------------------------------------------------------------------------------------------
# Batches


def test_decoders_learn_the_target_and_its_end(models, data):
    for family in ("gpt2", "llama"):
        batches = PairEncoder(models[family]).batches(data.dev, 2, shapes=1, seed=3)
        seen = []
        for step in range(2 * len(batches)):
            batch = batches(step)
            assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
            for row in range(2):
                if not batch["weights"][row]:
                    assert (batch["labels"][row] == -100).all()
                    continue
                real = batch["attention_mask"][row]
                ids = batch["input_ids"][row][real].tolist()
                labels = batch["labels"][row][real]
                assert (batch["labels"][row][~real] == -100).all()
                split = ids.index(numbers("\n")[0]) + 1
                assert (labels[:split] == -100).all()
                assert labels[split:].tolist() == ids[split:]
                seen.append(tuple(ids))
        rows = [(a, b) for a, each in zip(*data.dev[:2], strict=True) for b in each]
        want = [(*numbers(f"{a}\n{b}"), 1) for a, b in rows]
        assert sorted(seen) == sorted(want * 2)


def test_encoder_decoders_say_the_target_and_its_end(models, data):
    batches = PairEncoder(models["t5"]).batches(data.dev, 5)
    batch = batches(0)
    rows = [(a, b) for a, each in zip(*data.dev[:2], strict=True) for b in each]
    for i, row in enumerate(batches.rows(0)):
        source, target = (np.array([*numbers(text), 1]) for text in rows[row])
        assert batch["input_ids"][i][batch["attention_mask"][i]].tolist() == source.tolist()
        assert batch["labels"][i][: len(target)].tolist() == target.tolist()
        assert (batch["labels"][i][len(target) :] == -100).all()


def pairs_of(lengths):
    sources = [f"{i}:".ljust(n, "a") for i, (n, _) in enumerate(lengths)]
    targets = [("b" * n,) for _, n in lengths]
    return Pairs(sources, targets, None, [(f"row {i}",) for i in range(len(lengths))])


@pytest.mark.parametrize("seed", [None, 5])
def test_few_shapes_hold_all_pairs(models, seed):
    rng = np.random.default_rng(0)
    pairs = pairs_of(rng.integers(3, 60, (40, 2)).tolist())
    batches = PairEncoder(models["t5"]).batches(pairs, 3, shapes=3, seed=seed)
    shapes, seen = set(), []
    for step in range(len(batches)):
        batch = batches(step)
        shapes.add((batch["input_ids"].shape, batch["labels"].shape))
        for i, row in enumerate(batches.rows(step)):
            assert (batch["labels"][i] != -100).sum() == len(pairs.references[row][0]) + 1
            seen.append(row)
    assert sorted(seen) == list(range(40))
    assert len(shapes) <= 3


def test_too_long(models, tmp_path):
    pairs = pairs_of([(5, 4), (25, 4), (5, 31)])  # the model has 32 positions
    encoder = PairEncoder(models["gpt2"])
    with pytest.raises(fj.InputError, match=r"row 1: a source of 25.* a target of 5, above 30"):
        PairEncoder(models["gpt2"], 30).batches(pairs, 2)
    with pytest.raises(fj.InputError, match=r"row 2: a source of 5.* of 32, above 32; allow"):
        encoder.batches(pairs, 2)
    with pytest.raises(fj.InputError, match=r"row 2.* no place for any source"):
        PairEncoder(models["gpt2"], truncate=True).batches(pairs, 2)
    cut = PairEncoder(models["gpt2"], 20, truncate=True).batches(pairs_of([(25, 4)]), 1)(0)
    assert cut["input_ids"][0][:20].tolist() == [*numbers("0:" + "a" * 12 + "\nbbbb"), 1]
    with pytest.raises(fj.InputError, match="max_length 33 is above the model's 32"):
        PairEncoder(models["gpt2"], 33)
    with pytest.raises(fj.InputError, match="row 2: 32 tokens, above 30"):
        PairEncoder(models["t5"], 30).batches(pairs, 2)
    with pytest.raises(fj.InputError, match="row 1: a source of 26 tokens, above 20"):
        PairEncoder(models["t5"], 20).batches(pairs, 2)
    cut = PairEncoder(models["t5"], 20, truncate=True).batches(pairs_of([(25, 4)]), 1)(0)
    assert cut["input_ids"][0][:20].tolist() == [*numbers("0:" + "a" * 17), 1]
    with pytest.raises(
        fj.InputError, match=r"sources\[1\]: a source of 9.* max_new_tokens 24, above"
    ):
        fj.generate_texts(models["gpt2"], ["a", "a" * 9], max_new_tokens=24)
    with pytest.raises(fj.InputError, match=r"sources\[1\]: a source of 9 tokens and .*, above 9"):
        fj.generate_texts(models["gpt2"], ["a", "a" * 9], max_new_tokens=4, max_length=9)


@pytest.mark.parametrize("family", nlg.FAMILIES)
def test_sources_are_cut_to_the_length_that_training_had(family, models):
    model = models[family]
    kept = 9 - 1  # the line break, or the end token
    cut = PairEncoder(model, 9, truncate=True).sources(["a" * 20], ["x"], 8)[0]
    whole = PairEncoder(model).sources(["a" * kept], ["x"], 8)[0]
    np.testing.assert_array_equal(cut, whole)
    if model.reads_prompts and model.max_length is not None:
        few = PairEncoder(model, 9, truncate=True).sources(["a" * 20], ["x"], model.max_length - 4)
        assert len(few[0]) == 4


def test_models_that_do_not_fit(models, data, key, tmp_path):
    with pytest.raises(fj.InputError, match="does not generate text"):
        fj.finetune(fj.load(tiny.checkpoint(tmp_path / "bert")), data, CONFIG, key=key)
    for family, head in (("gpt2", "causal-lm"), ("t5", "seq2seq-lm")):
        bare = fj.load(nlg.checkpoint(tmp_path / family, family))
        with pytest.raises(fj.InputError, match=f"head='{head}'"):
            fj.generate_texts(bare, ["a"])
    folder = nlg.tokenizer(nlg.checkpoint(tmp_path / "flat", "gpt2"), chars="abc", unknown=False)
    with pytest.raises(fj.InputError, match="no token for the line break"):
        PairEncoder(fj.load(folder, head="causal-lm"))


# ------------------------------------------------------------------------------------------------
# Losses, generated texts and tuning


def nats_by_hand(model, source, target):
    """Minus the log-probabilities of a target's tokens, of one pair without padding."""
    if model.reads_prompts:
        prompt, said = numbers(f"{source}\n"), [*numbers(target), 1]
        logits = model(np.array([prompt + said], np.int32)).logits[0, len(prompt) - 1 : -1]
    else:
        said = [*numbers(target), 1]
        ids = np.array([[*numbers(source), 1]], np.int32)
        logits = model(ids, decoder_input_ids=np.array([[0, *said[:-1]]], np.int32)).logits[0]
    logits = np.asarray(logits, np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -scores[np.arange(len(said)), said]


@pytest.mark.parametrize("family", nlg.FAMILIES)
@pytest.mark.full(quick=1)
def test_nats_are_those_of_all_references(family, models, data):
    rows = [(a, b) for a, each in zip(*data.dev[:2], strict=True) for b in each]
    each = np.concatenate([nats_by_hand(models[family], *row) for row in rows])
    for size in (2, 32):
        got = measure_pairs(models[family], data.dev, batch_size=size)
        np.testing.assert_allclose(got["nats"], each.mean(), rtol=1e-5)
        np.testing.assert_allclose(got["perplexity"], np.exp(each.mean()), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "beams"), [*((family, None) for family in nlg.FAMILIES), ("gpt2", Beams(2))]
)
@pytest.mark.full(quick=1)
def test_texts_are_those_of_sources_alone(family, beams, models):
    model = models[family]
    sources = ["abcabcabc", "b", "cab", "c", "abc"]
    texts = fj.generate_texts(model, sources, max_new_tokens=6, beams=beams, batch_size=2, shapes=2)
    tokenizer = load_tokenizer(model.provenance.folder)
    for source, text in zip(sources, texts, strict=True):
        ids = numbers(f"{source}\n") if model.reads_prompts else [*numbers(source), 1]
        out = generate(
            model, np.array([ids], np.int32), max_new_tokens=6, beams=beams, eos=1, pad=1
        )
        said = out[0].tolist()
        said = said[: said.index(1)] if 1 in said else said
        assert text == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_sampled_texts_follow_the_key(models, key):
    def draw(key):
        return fj.generate_texts(
            models["gpt2"], ["a", "b"], max_new_tokens=12, sampling=Sampling(3.0), key=key
        )

    assert draw(key) == draw(key) != draw(jax.random.key(7))
    assert fj.generate_texts(models["gpt2"], []) == []


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.full(quick=1)
def test_learns_to_capitalize(family, models, data, key, tmp_path):
    steps = {"gpt2": 80, "t5": 300}[family]
    config = dataclasses.replace(
        CONFIG,
        max_steps=steps,
        epochs=steps,
        eval_every=steps // 2,
        checkpoint_every=steps,
        batch_size=12,
    )
    data = dataclasses.replace(data, dev=data.train)
    result = fj.finetune(models[family], data, config, key=key, folder=tmp_path / "run")
    assert [h["step"] for h in result.history] == [steps // 2, steps]
    best = min(h["nats"] for h in result.history)
    kept = fj.load(tmp_path / "run" / "best")
    np.testing.assert_allclose(measure_pairs(kept, data.dev)["nats"], best, rtol=1e-5)
    assert bit_equal(fj.load(tmp_path / "run" / "last"), result.model)
    assert np.exp(best) < 1.3
    texts = fj.generate_texts(kept, data.dev, max_new_tokens=6)
    right = [text in each for text, each in zip(texts, data.dev.references, strict=True)]
    assert np.mean(right) > 0.7
    before = fj.generate_texts(models[family], data.dev, max_new_tokens=6)
    assert not any(text in each for text, each in zip(before, data.dev.references, strict=True))


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.full
def test_matrices_grow_and_become_plain_again(family, models, data, key, tmp_path):
    model = models[family]
    config = dataclasses.replace(CONFIG, max_steps=5, warmup=0.0, eval_every=5)
    source, loss, *_ = data.prepare(model, config, key=key)
    growth = Chains(source=source, loss=loss, every=2, per_round=1, total=1, cores=3, batches=1)
    last = {}
    result = fj.finetune(
        model,
        data,
        config,
        key=key,
        folder=tmp_path / "run",
        recipe=Recipe(
            growth=growth,
            loss=lambda own: lambda model, batch, key: own(model, batch, key),
            about={"why": "a test"},
            on_step=lambda step, state: last.update(params=sorted(state.params)),
        ),
    )
    grown = find_forms(result.model)
    types = [type_of(path) for path in grown]
    assert sorted(types) == sorted(
        {type_of(path) for path in find_linears(model) if "layers" in path}
    )
    assert all(f"{path}.cores.{i}" in last["params"] for path in grown for i in range(3))
    for form in grown.values():
        assert not np.allclose(form.cores[1][:, 0, 0], np.eye(form.cores[1].shape[0]), atol=1e-5)
    batch = {k: v for k, v in tiny.batch(family).items() if k != "labels"}
    want = result.model(**batch).logits
    assert not np.allclose(want, model(**batch).logits, atol=1e-2)
    plain = fj.plain(result.model)
    assert not find_forms(plain)
    for after in (plain, fj.load(tmp_path / "run" / "last")):
        np.testing.assert_allclose(after(**batch).logits, want, atol=1e-5)


@pytest.mark.full
def test_resumes_with_the_same_bits(models, data, key, tmp_path):
    config = dataclasses.replace(CONFIG, max_steps=7, dropout=True, checkpoint_every=3)
    whole = fj.finetune(models["gpt2"], data, config, key=key)

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 5:
            raise Killed

    options = {"key": key, "folder": tmp_path / "run"}
    with pytest.raises(Killed):
        fj.finetune(models["gpt2"], data, config, recipe=Recipe(on_step=kill), **options)
    again = fj.finetune(models["gpt2"], data, config, **options)
    assert again.history == whole.history
    assert bit_equal(again.model, whole.model)


@pytest.mark.full
def test_hidden_states_of_both_stacks_equal_numpy(models):
    teacher = models["t5"]
    model = nnx.clone(teacher)
    for stack in (model.encoder, model.decoder):
        up = stack.layers[0].mlp.up.kernel
        up.set_value(up.get_value() * 1.5)
    pairs = pairs_of([(3, 7), (6, 2), (4, 4)])
    batch = PairEncoder(teacher).batches(pairs, 4)(0)
    got = losses.hidden_states(teacher, model, batch, None)
    total = count = 0.0
    for source, (target,) in zip(pairs.sources, pairs.references, strict=True):
        ids = np.array([[*numbers(source), 1]], np.int32)
        before = np.array([[0, *numbers(target)]], np.int32)
        outs = [
            m(ids, decoder_input_ids=before, output_hidden_states=True) for m in (teacher, model)
        ]
        for a, b in (outs, [out.encoder for out in outs]):
            for x, y in zip(a.hidden_states[1:], b.hidden_states[1:], strict=True):
                total += np.square(np.asarray(x, np.float64) - np.asarray(y)).mean(-1).sum()
        count += ids.shape[1] + before.shape[1]
    np.testing.assert_allclose(got, (total, count), rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.full
def test_tuning_on_pairs(family, models, data, key):
    teacher = models[family]
    smaller, _ = fj.compress(teacher, fj.Fusion(width=8), key=key)
    config = dataclasses.replace(CONFIG, max_steps=25)
    tuned = fj.tune(smaller, teacher, data.train, config, key=key).model
    batch = PairEncoder(teacher).batches(data.train, 12)(0)
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    before, after = (
        float(losses.hidden_states(teacher, m, batch, None).total) for m in (smaller, tuned)
    )
    assert after < 0.6 * before
    flat = [dict(nnx.to_flat_state(nnx.state(m))) for m in (smaller, tuned)]
    moved = [p for p in flat[0] if not np.array_equal(flat[0][p][...], flat[1][p][...])]
    assert moved
    assert all("mlp" in path for path in moved)
    if family == "t5":
        assert {path[0] for path in moved} == {"encoder", "decoder"}
        with pytest.raises(fj.InputError, match="give pairs of texts"):
            fj.tune(smaller, teacher, ["abc"], config, key=key)
    else:
        once = dataclasses.replace(config, max_steps=1)
        assert fj.tune(smaller, teacher, ["abc", "b"], once, key=key).finished


def test_tokenizers_without_padding(tmp_path):
    """GPT-2's and Llama's have no token for padding; calibration pads all the same."""
    tokenizer = load_tokenizer(str(nlg.tokenizer(tmp_path)))
    with_padding = tokenize(tokenizer, ["abc", "b"])
    tokenizer.pad_token = None
    without = tokenize(tokenizer, ["abc", "b"])
    np.testing.assert_array_equal(without.attention_mask, [[1, 1, 1], [1, 0, 0]])
    real = np.asarray(without.attention_mask)
    for batch in (with_padding, without):
        assert np.asarray(batch.input_ids)[real].tolist() == numbers("abcb")


# ------------------------------------------------------------------------------------------------
# Metrics


def ngrams(items, n):
    return collections.Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def bleu(texts, references):
    """BLEU by its definition, of words between spaces."""
    right, said, length, nearest = np.zeros(4), np.zeros(4), 0, 0
    for text, refs in zip(texts, references, strict=True):
        words, others = text.split(), [ref.split() for ref in refs]
        length += len(words)
        nearest += min((abs(len(r) - len(words)), len(r)) for r in others)[1]
        for n in range(1, 5):
            counts = ngrams(words, n)
            most = collections.Counter()
            for other in others:
                most |= ngrams(other, n)
            right[n - 1] += (counts & most).total()
            said[n - 1] += counts.total()
    brevity = min(1.0, np.exp(1 - nearest / length))
    return 100 * brevity * np.exp(np.log(right / said).mean())


def chrf(texts, references, word_order=0):
    """chrF2 and chrF2++ by their definition; of several references the best counts."""
    orders = 6 + word_order

    def counts(text, ref):
        for k in range(orders):
            n = k + 1 if k < 6 else k - 5
            pair = [t.replace(" ", "") if k < 6 else t.split() for t in (text, ref)]
            a, b = (ngrams(items, n) for items in pair)
            yield a.total(), b.total(), (a & b).total()

    def score(rows):
        shares = [(both / said, both / wanted) for said, wanted, both in rows if said and wanted]
        p, r = np.mean(shares, axis=0)
        return 100 * 5 * p * r / (4 * p + r) if p + r else 0.0

    totals = np.zeros((orders, 3))
    for text, refs in zip(texts, references, strict=True):
        each = [np.array(list(counts(text, ref))) for ref in refs]
        totals += max(each, key=score)
    return score(totals)


TEXTS = ["the cat sat on the mat today", "a dog ran in a big park", "birds sing"]
REFERENCES = [
    ("the cat sat on a mat today", "today the cat sat on the mat", "cats sit"),
    ("a dog ran in the big park",),
    ("birds sing", "the birds sing all day long"),
]


def test_bleu_and_chrf_follow_their_definitions():
    metrics = text_metrics.TEXT_METRICS
    for texts in (TEXTS, TEXTS[:2]):  # a text more, and a brevity penalty less
        references = REFERENCES[: len(texts)]
        np.testing.assert_allclose(metrics["bleu"](texts, references), bleu(texts, references))
        for name, words in (("chrf", 0), ("chrf++", 2)):
            np.testing.assert_allclose(
                metrics[name](texts, references), chrf(texts, references, words), rtol=1e-6
            )
    short = ["the cat sat on the", "a dog ran in the big"]
    assert metrics["bleu"](short, REFERENCES[:2]) == pytest.approx(bleu(short, REFERENCES[:2]))


def test_ter_counts_edits_by_hand():
    # A substitution; a block moved, which is one edit, and a word left out of seven.
    assert text_metrics.ter(["a b c d"], [("a b x d",)]) == pytest.approx(100 / 4)
    assert text_metrics.ter(["d e a b c f"], [("a b c d e f g",)]) == pytest.approx(200 / 7)
    # The nearest reference gives the edits, all references the mean length.
    found = text_metrics.ter(["A b", "x"], [("a b", "q q q q"), ("y",)])
    assert found == pytest.approx(100 * (0 + 1) / (3 + 1))


def test_groups_are_measured_alone():
    pairs = Pairs(["1", "2", "3"], REFERENCES, ["seen", "unseen", "seen"], [("",)] * 3)
    found = fj.measure_texts(pairs, TEXTS, ["bleu", "ter"])
    assert list(found) == ["all", "seen", "unseen"]
    for group, rows in (("all", [0, 1, 2]), ("seen", [0, 2]), ("unseen", [1])):
        want = bleu([TEXTS[i] for i in rows], [REFERENCES[i] for i in rows])
        assert found[group]["bleu"] == pytest.approx(want)
        assert set(found[group]) == {"bleu", "ter"}
    alone = fj.measure_texts(pairs._replace(groups=None), TEXTS)
    assert list(alone) == ["all"]
    assert list(alone["all"]) == list(text_metrics.TEXT_METRICS)
    with pytest.raises(fj.InputError, match="2 texts for 3 sources"):
        fj.measure_texts(pairs, TEXTS[:2])


def test_sacrebleu_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(fj.InputError, match=r"pip install 'fusion-jax\[nlg\]'"):
        fj.measure_texts(Pairs([], [], None, []), [])
