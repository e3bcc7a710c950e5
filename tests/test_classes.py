"""Classes of heads are matched by their names, and what is trained says what it was trained for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.models.provenance import class_names
from fusion_jax.training import TrainConfig, losses, predict, read_task
from fusion_jax.training.tasks.classes import check_head
from fusion_jax.training.tasks.glue import GLUE, load_task
from tests import glue, tiny

CONFIG = TrainConfig(max_steps=2, batch_size=8, shapes=1, dropout=False, learning_rate=1e-3)
KEY = jax.random.key(0)


def head(folder, *names, **config):
    """A tiny BERT with a classification head whose classes have these names."""
    tensors = tiny.weights("bert", "classification")
    tensors = {
        n: x[: len(names)] if n.startswith("classifier") else x
        for n, x in tensors.items()
        if ".layer.2." not in n
    }
    fields = {**tiny.CONFIGS["bert"], "num_hidden_layers": 2, **config}
    fields["id2label"] = {str(i): name for i, name in enumerate(names)}
    fields["label2id"] = {name: i for i, name in enumerate(names)}
    return glue.vocabulary(tiny.write_folder(folder, fields, tensors))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return glue.sst2(tmp_path_factory.mktemp("data") / "SST-2", n=16)


def swapped(model):
    """The model with the two classes of its head exchanged, as is, without their names."""
    new = fj.load(model.provenance.folder, head="classification")
    new.head.out.kernel[...] = model.head.out.kernel[...][:, ::-1]
    new.head.out.bias[...] = model.head.out.bias[...][::-1]
    return new


def table(folder, rows, name="own.csv"):
    path = folder / name
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def accuracy(arguments, capsys):
    assert main(["evaluate", *map(str, arguments)]) == 0
    return float(capsys.readouterr().out.split("accuracy ")[1].split()[0])


def test_evaluate_by_names(data, tmp_path, capsys):
    """A head in the order positive, negative scores as its names say, by each kind of file."""
    folder = head(tmp_path / "model", "Positive", "Negative")
    logits = predict(fj.load(folder, head="classification"), load_task("sst2", data).dev["dev"])
    labels = load_task("sst2", data).dev["dev"].labels
    right = float((1 - logits.argmax(-1) == labels).mean())
    assert right != 0.5
    assert accuracy([folder, "--task", "sst2", "--data", data], capsys) == right
    texts = load_task("sst2", data).dev["dev"].texts
    own = table(tmp_path, [(t[0], ("negative", "Positive")[i]) for t, i in zip(texts, labels)])  # noqa: B905
    assert main(["evaluate", str(folder), "--file", str(own)]) == 1
    assert "label 'negative' is not one of Positive, Negative" in capsys.readouterr().err
    own = table(tmp_path, [(t[0], ("Negative", "Positive")[i]) for t, i in zip(texts, labels)])  # noqa: B905
    assert accuracy([folder, "--file", own], capsys) == right


def test_predict_prints_names(data, tmp_path, capsys):
    folder, out = head(tmp_path / "model", "good", "bad"), tmp_path / "out.jsonl"
    arguments = ["predict", folder, "--file", f"{data}/dev.tsv", "--text", "sentence", "--out", out]
    assert main([*map(str, arguments)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    logits = predict(fj.load(folder, head="classification"), load_task("sst2", data).dev["dev"])
    assert [row["label"] for row in rows] == [("good", "bad")[i] for i in logits.argmax(-1)]
    assert list(rows[0]["probabilities"]) == ["good", "bad"]


def test_a_head_of_one_output_predicts_a_number(data, tmp_path):
    folder, out = head(tmp_path / "model", "LABEL_0"), tmp_path / "out.jsonl"
    arguments = ["predict", folder, "--file", f"{data}/dev.tsv", "--text", "sentence", "--out", out]
    assert main([*map(str, arguments)]) == 0
    assert json.loads(out.read_text().splitlines()[0]).keys() == {"value"}


def test_other_classes_are_refused(data, tmp_path, capsys):
    folder = head(tmp_path / "model", "ham", "spam")
    assert main(["evaluate", str(folder), "--task", "sst2", "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert "(ham, spam) are not those of sst2 (negative, positive)" in said
    with pytest.raises(fj.InputError, match=r"classes of the model's head \(ham, spam\)"):
        fj.training.static_prune(
            fj.load(folder, head="classification"),
            load_task("sst2", data),
            teacher=fj.load(folder, head="classification"),
            key=KEY,
        )


def test_fine_tuning_on_from_a_head_in_another_order(data, tmp_path):
    """The same as fine-tuning the exchanged head by position; names and order stay."""
    model = fj.load(head(tmp_path / "model", "positive", "negative"), head="classification")
    task = load_task("sst2", data)
    got = fj.finetune(model, task, CONFIG, key=KEY)
    other = swapped(model)
    other.provenance = fj.load(
        head(tmp_path / "named", "negative", "positive"), head="classification"
    ).provenance
    want = fj.finetune(other, task, CONFIG, key=KEY)
    assert got.history == want.history
    a, b = (np.asarray(fit.model.head.out.kernel[...]) for fit in (got, want))
    np.testing.assert_allclose(a, b[:, ::-1], atol=1e-6)
    assert got.model.provenance.labels == ("positive", "negative")


def test_a_teacher_in_another_order(data, tmp_path):
    """Its probabilities are those of the same classes."""
    model = fj.load(head(tmp_path / "a", "negative", "positive"), head="classification")
    teacher = fj.load(head(tmp_path / "b", "positive", "negative"), head="classification")
    ids = jnp.array([[5, 6, 7]])
    batch = {"input_ids": ids, "labels": jnp.array([1]), "weights": jnp.ones(1)}
    other = swapped(teacher)
    other.provenance = model.provenance
    got = losses.distilled(teacher, losses.classification)(model, batch, None)
    want = losses.distilled(other, losses.classification)(model, batch, None)
    np.testing.assert_allclose(got.total, want.total, rtol=1e-6)
    by_position = losses.distilled(model, losses.classification)(model, batch, None)
    assert abs(float(got.total - by_position.total)) > 1e-3
    third = fj.load(head(tmp_path / "c", "ham", "spam"), head="classification")
    with pytest.raises(fj.InputError, match=r"teacher's classes \(ham, spam\) are not the model's"):
        losses.distilled(third, losses.classification)(model, batch, None)


def test_what_is_trained_is_exported(tmp_path, caplog):
    """Fields of config.json that the training made wrong are written anew."""
    old = {"problem_type": "multi_label_classification", "num_labels": 2}
    model = fj.load(head(tmp_path / "m", "negative", "positive", **old), head="classification")
    assert model.provenance.problem_type == "multi_label_classification"
    task = read_task(table(tmp_path, [("w1 w2", "spam"), ("w3", "ham")]))
    trained = fj.finetune(model, task, CONFIG, key=KEY).model
    assert "the head's classes negative, positive become ham, spam" in caplog.text
    artefact = fj.save(trained, tmp_path / "artefact")
    for each in (trained, fj.load(artefact)):
        folder = fj.export_hf(each, tmp_path / f"hf-{each is trained}")
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {"0": "ham", "1": "spam"}
        assert config["label2id"] == {"ham": 0, "spam": 1}
        assert (config["num_labels"], config["problem_type"]) == (2, "single_label_classification")
    assert model.provenance.labels == ("negative", "positive")  # it is not changed
    regression = read_task(table(tmp_path, [("w1 w2", 0.5), ("w3", 2)], "r.csv"), regression=True)
    new = fj.load(tmp_path / "m", head="classification", num_labels=1, key=KEY, new_head=True)
    number = fj.finetune(new, regression, CONFIG, key=KEY).model
    config = json.loads((fj.export_hf(number, tmp_path / "hf-r") / "config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "LABEL_0"})


def test_numbers_are_the_classes_of_a_head(tmp_path):
    model = fj.load(head(tmp_path / "model", "bad", "good"), head="classification")
    task = read_task(table(tmp_path, [("w1 w2", 1), ("w3", 0)]))
    assert check_head(model, task.spec).tolist() == [0, 1]
    assert fj.finetune(model, task, CONFIG, key=KEY).model.provenance.labels == ("bad", "good")


def test_names_of_a_config():
    names = {"id2label": {"0": "CONTRADICTION", "1": "NEUTRAL", "2": "ENTAILMENT"}}
    assert class_names(names) == ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    assert class_names({}) is None
    assert class_names({"id2label": None}) is None
    for wrong in ([], {"1": "a"}, {"a": "b"}, 3):
        with pytest.raises(fj.InputError, match="id2label is not a JSON object with the keys"):
            class_names({"id2label": wrong})
    assert GLUE["mnli"].labels == ("entailment", "neutral", "contradiction")


def test_a_new_head_is_made_only_when_asked_for(tmp_path, capsys):
    folder, out = str(tiny.checkpoint(tmp_path / "body")), str(tmp_path / "out")
    command = ["compress", "prune", folder, out, "--width", "12", "--head", "masked-lm"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "the files have no masked-lm head" in said and "--new-head" in said
    assert not (tmp_path / "out").exists()
    assert main([*command, "--new-head"]) == 0
    assert "The head is new: its weights are random until it is trained." in capsys.readouterr().out
    model = fj.load(out)
    assert model.provenance.new_head
    assert json.loads((tmp_path / "out" / "report.json").read_text())["new_head"]
    with pytest.raises(fj.InputError, match="new_head needs head= and key="):
        fj.load(folder, new_head=True)


def test_a_head_of_another_size_is_replaced(tmp_path):
    folder = head(tmp_path / "model", "a", "b", "c")
    with pytest.raises(
        fj.InputError, match=r"of another shape \(new_head=True, or --new-head, rep"
    ):
        fj.load(folder, head="classification", num_labels=2)
    options = {"head": "classification", "num_labels": 2, "new_head": True}
    model = fj.load(folder, key=KEY, **options)
    old = fj.load(folder, head="classification")
    assert model.config.num_labels == 2
    assert model.head.out.kernel.shape == (32, 2)
    assert model.provenance.labels is None
    # Only the head is new: the pooler and the layers are those of the files.
    np.testing.assert_array_equal(model.pooler.kernel[...], old.pooler.kernel[...])
    same = fj.load(folder, key=KEY, head="classification", new_head=True)
    assert (same.head.out.kernel[...] != old.head.out.kernel[...]).any()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "qa_outputs.weight"),
        ("bert", "classifier.weight"),
        ("llama", "score.weight"),
        ("llama", "qa_outputs.bias"),
        ("gpt2", "score.weight"),
        ("t5", "classifier.dense.weight"),
    ],
)
def test_heads_of_other_tasks_are_left_out_and_named(family, name, tmp_path, caplog):
    tensors = {**tiny.weights(family, None), name: np.ones((2, 16), np.float32)}
    folder = tiny.write_folder(tmp_path / "model", tiny.CONFIGS[family], tensors)
    fj.load(folder)
    assert f"the head {name.partition('.')[0]} is left out" in caplog.text


def test_a_language_model_head_that_is_left_out_is_named(tmp_path, caplog):
    fj.load(tiny.checkpoint(tmp_path / "untied", "llama", "causal-lm"))
    assert "the head lm_head is left out" in caplog.text
    caplog.clear()
    fj.load(tiny.checkpoint(tmp_path / "with", "llama", "causal-lm"), head="causal-lm")
    assert not caplog.text
