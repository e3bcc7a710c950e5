"""Tasks, tables, batches and metrics."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusion_jax as fj
from fusion_jax.training.engine.batches import Batches, Examples, padded_lengths
from fusion_jax.training.tasks import metrics, tables
from fusion_jax.training.tasks.classification import TextEncoder
from fusion_jax.training.tasks.glue import GLUE, load_task, read_task
from tests import glue, tiny

GLUE_FILES = {
    "sst2": ("SST-2", "sentence\tlabel", "a film\t1", 1),
    "cola": ("CoLA", None, 'gj04\t0\t*\tThey sang "loud', 0),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tone\ttwo", 1),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\ts\ts\tone\ttwo\t3.75",
        3.75,
    ),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tone\ttwo\t1", 1),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "1\tone\ttwo\tnot_entailment", 1),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "1\tone\ttwo\tentailment", 0),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "1\tone\ttwo\t1", 1),
}
MNLI = "index\tpromptID\tpairID\tgenre\tb1\tb2\tp1\tp2\tsentence1\tsentence2\tlabel1\tgold_label"


@pytest.mark.parametrize("name", GLUE_FILES)
def test_glue_files(name, tmp_path):
    folder, header, row, label = GLUE_FILES[name]
    (tmp_path / folder).mkdir()
    for part in ("train", "dev"):
        text = "".join(f"{line}\r\n" for line in (header, row, row) if line)
        (tmp_path / folder / f"{part}.tsv").write_text(text, encoding="utf-8-sig")
    data = load_task(name, tmp_path)
    assert data.spec == GLUE[name]
    for texts in (data.train, data.dev["dev"]):
        assert texts.labels.tolist() == [label, label]
        assert len(texts.texts[0]) == (1 if name in ("sst2", "cola") else 2)
    assert data.train.names[0] == f"{folder}/train.tsv:{2 if header else 1}"


def test_mnli_has_two_dev_sets(tmp_path):
    for i, part in enumerate(("train", "dev_matched", "dev_mismatched")):
        label = ("entailment", "neutral", "contradiction")[i]
        row = "\t".join(["0"] * 8 + ["one", "two", "x", label])
        (tmp_path / f"{part}.tsv").write_text(f"{MNLI}\n{row}\n")
    data = load_task("mnli", tmp_path)
    assert [data.train.labels[0], *(t.labels[0] for t in data.dev.values())] == [0, 1, 2]
    assert list(data.dev) == ["matched", "mismatched"]


def test_qqp_leaves_out_rows_that_are_broken_as_distributed(tmp_path):
    _, header, row, _ = GLUE_FILES["qqp"]
    for part in ("train", "dev"):
        (tmp_path / f"{part}.tsv").write_text(f"{header}\n{row}\n1\t2\t3\tone\n{row}\n")
    names = load_task("qqp", tmp_path).train.names
    assert [name.rpartition(":")[2] for name in names] == ["2", "4"]


def test_hub(monkeypatch):
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}
    parts = dict.fromkeys(("train", "validation_matched", "validation_mismatched"), rows)
    module: ModuleType = SimpleNamespace(load_dataset=lambda *name: parts)  # type: ignore
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = load_task("mnli", "hub")
    assert data.dev["mismatched"].texts == [("a", "c"), ("b", "d")]
    assert data.train.labels.tolist() == [2, 0]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(fj.InputError, match="fusion-jax"):
        load_task("sst2", "hub")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_files_of_ones_own(tmp_path):
    csv = write(tmp_path / "a.csv", 'text,label\n"one, ""two""\nthree",good\nfour,bad\n')
    jsonl = write(tmp_path / "b.jsonl", '{"text": "x", "label": "bad"}\n\n')
    data = read_task(csv, jsonl)
    assert data.spec.labels == ("bad", "good")
    assert data.train.texts == [('one, "two"\nthree',), ("four",)]
    assert data.train.labels.tolist() == [1, 0]
    assert data.train.names[1].endswith("a.csv:4")
    assert data.dev["dev"].labels.tolist() == [0]
    numbers = write(tmp_path / "c.jsonl", '{"text": "x", "label": 10}\n{"text": "y", "label": 9}\n')
    assert read_task(numbers).spec.labels == ("9", "10")
    data = read_task(numbers, regression=True)
    assert (data.spec.labels, data.spec.num_labels) == (None, 1)
    assert data.train.labels.tolist() == [10.0, 9.0]


def test_labels_that_say_the_same_are_one_class(tmp_path):
    rows = '"1"', '" 1 "', "1", "1.0", '"1.0"', "0", '"0.00"', '"²"'
    text = "".join(f'{{"text": "x", "label": {label}}}\n' for label in rows)
    data = read_task(write(tmp_path / "a.jsonl", text))
    assert data.spec.labels == ("0", "1", "²")
    assert data.train.labels.tolist() == [1, 1, 1, 1, 1, 0, 0, 2]
    digits = "1" * 5000
    long = read_task(write(tmp_path / "b.csv", f"text,label\nx,{digits}\ny,2\n"))
    assert long.spec.labels == (digits, "2")


@pytest.mark.parametrize("label", ["1e39", "-1e39", "inf", "nan", "x", "1" * 5000])
def test_numbers_that_are_not_of_float32(label, tmp_path):
    table = write(tmp_path / "a.csv", f"text,label\nx,1\ny,{label}\n")
    with pytest.raises(fj.InputError, match=r"a\.csv:3: (no label|label '.*' is not a number)"):
        read_task(table, regression=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentense\tlabel\nx\t1\n", "no column 'sentence'; did you mean 'sentense'?"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\t2\n", "a.tsv:3: label '2' is not one of 0, 1"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", "a.tsv:3: cells in the row: 1, columns: 2"),
        (
            "a.csv",
            "sentence,label\nso, so good,1\n",
            "a.csv:2: cells in the row: 3, columns: 2; put",
        ),
        ("a.csv", "sentence,label,label\nx,1,0\n", "a.csv:1: two columns have the name 'label'"),
        (
            "a.jsonl",
            '{"sentence": "x", "label": 1, "label": 0}',
            "a.jsonl:1: not valid JSON (the name",
        ),
        ("a.jsonl", '{"sentence": "x"}\n', "a.jsonl has no column 'label'"),
        ("a.jsonl", '{"sentence": "x", "label": NaN}\n', "a.jsonl:1: no label"),
        ("a.jsonl", '{"sentence": "x", "label": [0]}\n', "a.jsonl:1: label [0] is not a word"),
        ("a.csv", "sentence,label\nx,[0]\n", "a.csv:2: label '[0]' is not a word"),
        ("a.csv", "sentence,label\nx,nan\n", "a.csv:2: no label"),
        ("a.csv", "sentence,label\nx,²\n", "a.csv:2: label '²' is not one of 0, 1"),
        ("a.jsonl", '{"sentence": "\\ud800", "label": 1}\n', "a.jsonl:1: not valid JSON ('utf-8"),
        ("a.jsonl", '{"sentence": "x", "label": %s}\n' % ("1" * 5000), "a.jsonl:1: not valid JSON"),
        ("a.jsonl", '{"sentence": %s' % ("[" * 200_000), "a.jsonl:1: not valid JSON (too deep)"),
        ("a.tsv", "sentence\tlabel\n \t1\n", "a.tsv:2: no text in column 'sentence'"),
        ("a.tsv", b"sentence\tlabel\nx\t1\n\xff\t0\n", "a.tsv:3: broken UTF-8"),
        ("a.tsv", "sentence\tlabel\n", "has no rows"),
        ("a.csv", 'sentence,label\nx,1\n"y,0\n', "a.csv:3: unexpected end of data"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", "[]\n", "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"sentence": 3, "label": 1}\n', "a.jsonl:1: no text in column"),
        ("a.txt", "x", "not one of the known kinds of file: .tsv, .csv, .jsonl"),
    ],
)
def test_errors_name_file_and_line(name, text, message, tmp_path):
    good = write(tmp_path / "good.tsv", "sentence\tlabel\nx\t1\ny\t0\n")
    bad = write(tmp_path / name, text)
    with pytest.raises(fj.InputError) as error:
        read_task(good, bad, text=("sentence",))
    assert message in str(error.value)


def test_more_errors(tmp_path):
    with pytest.raises(fj.InputError, match="did you mean 'sst2'"):
        load_task("sst", tmp_path)
    with pytest.raises(fj.InputError, match=r"there is no file .*train\.tsv"):
        load_task("sst2", tmp_path)
    numbers = write(tmp_path / "a.tsv", "text\tlabel\nx\tmuch\n")
    with pytest.raises(fj.InputError, match="label 'much' is not a number"):
        read_task(numbers, regression=True)
    with pytest.raises(fj.InputError, match="fewer than two classes"):
        read_task(numbers)


def test_encode(tmp_path):
    model = fj.load(glue.vocabulary(tiny.checkpoint(tmp_path / "m")))
    path = write(tmp_path / "a.tsv", "a\tb\tlabel\nw0 w1\tw2\t1\nw3\tw4 w5 w6\t0\n")
    texts = read_task(path, text=("a", "b")).train
    examples = TextEncoder(model, 10)(texts)
    assert examples.tokens[0].tolist() == [2, 5, 6, 3, 7, 3]
    assert examples.types[0].tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.raises(fj.InputError, match=r"a\.tsv:3: 7 tokens, above 6"):
        TextEncoder(model, 6)(texts)
    cut = TextEncoder(model, 6, truncate=True)(texts)
    assert [len(t) for t in cut.tokens] == [6, 6]


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=60)


def examples(sizes):
    tokens = [np.full(n, 7 + i, np.int32) for i, n in enumerate(sizes)]
    labels = np.arange(len(sizes), dtype=np.int32)
    return Examples(tokens, None, labels, [str(i) for i in labels])


@given(lengths, st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 3]))
def test_an_epoch_has_every_example_once(sizes, shapes, batch_size, seed):
    batches = Batches(examples(sizes), batch_size, pad_id=0, shapes=shapes, seed=seed)
    for epoch in range(2):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        made = [batches(step) for step in steps]
        assert len({b["input_ids"].shape for b in made}) <= shapes
        assert {b["input_ids"].shape[0] for b in made} == {batch_size}
        assert sorted(i for step in steps for i in batches.rows(step)) == [*range(len(sizes))]
        for step, batch in zip(steps, made, strict=True):
            real = batch["weights"] == 1
            assert batch["labels"][real].tolist() == batches.rows(step).tolist()
            assert batch["attention_mask"][real].sum(1).tolist() == [
                sizes[i] for i in batches.rows(step)
            ]
            assert (batch["input_ids"][real][batch["attention_mask"][real]] >= 7).all()
        assert sum(b["input_ids"].astype(bool).sum() for b in made) == sum(sizes)


def test_order_depends_on_seed_and_epoch_alone():
    data = examples(np.random.RandomState(0).randint(1, 50, 40).tolist())
    order = [
        [batches.rows(step).tolist() for step in range(5, 10)]
        for batches in (Batches(data, 8, pad_id=0, seed=s) for s in (1, 1, 2))
    ]
    assert order[0] == order[1] != order[2]
    batches = Batches(data, 8, pad_id=0, seed=1)
    assert [batches.rows(step).tolist() for step in range(5)] != order[0]


@given(lengths, st.integers(1, 4))
def test_padded_lengths_need_the_smallest_number_of_tokens(sizes, shapes):
    from itertools import combinations

    sizes = np.array(sizes)
    rounded = -(-sizes // 8) * 8

    def cost(chosen):
        return np.array(sorted(chosen))[np.searchsorted(sorted(chosen), rounded)].sum()

    found = padded_lengths(sizes, shapes)
    assert len(found) <= shapes
    distinct = sorted(set(rounded.tolist()))[:-1]
    best = min(
        cost((*some, rounded.max()))
        for k in range(min(shapes, 3))
        for some in combinations(distinct[:8], k)
    )
    assert cost(found) <= best


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_equal_scikit_learn(classes):
    from sklearn import metrics as theirs

    rng = np.random.RandomState(classes)
    for _ in range(5):
        labels, said = rng.randint(0, classes, (2, 31)).astype(np.int32)
        assert metrics.accuracy(said, labels) == theirs.accuracy_score(labels, said)
        np.testing.assert_allclose(
            metrics.matthews(said, labels), theirs.matthews_corrcoef(labels, said), rtol=1e-12
        )
        if classes == 2:
            np.testing.assert_allclose(metrics.f1(said, labels), theirs.f1_score(labels, said))


def test_correlations_equal_scipy():
    from scipy import stats

    rng = np.random.RandomState(0)
    x = rng.standard_normal(50).astype(np.float32)
    y = rng.randint(0, 6, 50).astype(np.float32)  # with ties
    np.testing.assert_allclose(metrics.pearson(x, y), stats.pearsonr(x, y)[0], rtol=1e-6)
    np.testing.assert_allclose(metrics.spearman(x, y), stats.spearmanr(x, y)[0], rtol=1e-12)


def test_metrics_of_constant_predictions():
    zeros, labels = np.zeros(5, np.int32), np.array([0, 1, 0, 1, 1], np.int32)
    assert metrics.matthews(zeros, labels) == 0
    assert metrics.f1(zeros, zeros) == 0
    assert np.isnan(metrics.pearson(zeros, labels))


def test_lines_of_a_quoted_csv(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"a\nb",1\n\nc,0\n')
    assert tables.read(path).lines == [2, 5]


def test_task_json():
    for task in GLUE.values():
        assert type(task).from_json(json.loads(json.dumps(task.to_json()))) == task
