"""The heads of T5 beside that of its language model: what they read, and how they are used."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.models.t5_config import T5Config
from fusion_jax.models.t5_heads import T5WithHead
from fusion_jax.training import Classification, TaskSpec, Texts, losses
from fusion_jax.training.engine.partition import Partition
from tests import nlg, tiny
from tests.helpers import run

HEADS = ("classification", "token-classification", "question-answering")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a T5 with a language-model head, an end token, and a tokenizer."""
    return nlg.checkpoint(tmp_path_factory.mktemp("t5") / "model", "t5")


@pytest.fixture(scope="module")
def models(base):
    """A T5 with each of the heads, which are new."""
    return {head: fj.load(base, head=head, key=KEY) for head in HEADS}


def logits(model, ids, mask=None):
    return np.asarray(run(model, np.array(ids), None if mask is None else np.array(mask)).logits)


def test_classification_reads_the_last_end_token(models):
    """Whatever follows it, and if texts have different numbers of end tokens."""
    model, text = models["classification"], [7, 1, 9, 8, 1]
    out = run(model, np.array([text]))
    alone = np.asarray(out.logits)
    np.testing.assert_allclose(alone, model.head(out.last_hidden_state[:, 4], None), atol=1e-6)
    ids = [[*text, 0, 0], [*text, 5, 6], [5, 6, 7, 8, 9, 10, 1]]
    mask = [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1] * 7]
    have = logits(model, ids, mask)
    np.testing.assert_allclose(have[:2], np.repeat(alone, 2, axis=0), atol=1e-5)
    assert np.abs(have[2] - have[0]).max() > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_padding_on_the_right_changes_nothing(head, models):
    text = [7, 9, 8, 1]
    wide = logits(models[head], [[*text, 0, 0, 0]], [[1] * 4 + [0] * 3])
    wide = wide[:, :4] if wide.ndim == 3 else wide
    np.testing.assert_allclose(wide, logits(models[head], [text]), atol=1e-5)


def test_a_text_without_an_end_token_is_an_error(models, base, tmp_path):
    model, bad = models["classification"], np.array([[7, 1, 0], [7, 9, 8]])
    with pytest.raises(fj.InputError, match=r"text 1: there is no end token \(1\); the head reads"):
        model(bad)
    jax.eval_shape(model, bad)  # compiled functions cannot raise
    for head in HEADS[1:]:
        assert np.isfinite(logits(models[head], bad)).all()
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((base / name).read_bytes())
    nlg.tokenizer(folder, ends=False)
    data = Texts([("ab",)], np.zeros(1, np.int32), ["train.csv:2"])
    task = Classification(TaskSpec(name="a", labels=("x", "y"), metrics=("accuracy",)), data, {})
    with pytest.raises(fj.InputError, match=r"train.csv:2: there is no end token \(1\)"):
        fj.finetune(task.load(str(folder), key=KEY), task, key=KEY)


def test_classification_needs_to_know_the_end_token(tmp_path):
    folder = tiny.checkpoint(tmp_path / "t5", "t5")
    with pytest.raises(fj.InputError, match="the configuration has no eos_token_id"):
        fj.load(folder, head="classification", key=KEY)
    assert fj.load(folder, head="question-answering", key=KEY).needed_tokens == ()


def test_new_heads_leave_the_rest_as_it_is(models, base):
    original = fj.load(base)
    state = {p: v for p, v in _flat(original).items() if p.partition(".")[0] != "head"}
    for head, model in models.items():
        assert model.provenance.new_head
        own = _flat(model)
        assert (model.decoder is None) == (head == "token-classification")
        kept = [p for p in state if not (model.decoder is None and p.startswith("decoder."))]
        assert set(own) == {*kept, *(p for p in own if p.startswith("head."))}
        for path in kept:
            np.testing.assert_array_equal(own[path], state[path])
    with pytest.raises(fj.InputError, match="the files have no classification head"):
        fj.load(base, head="classification")


def _flat(model):
    leaves = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in leaves}


def test_a_compressed_model_without_a_head_gets_each(base, tmp_path):
    """Token classification leaves the decoder out, with its MLPs and matrices in other forms."""
    model, _ = fj.compress(fj.load(base), fj.Fusion(width=12), key=KEY)
    model, _ = fj.compress_matrices(model, fj.Svd(rank=2), matrices=r"(en|de)coder\..*query")
    folder = fj.save(model, tmp_path / "fused")
    for head in HEADS:
        loaded = fj.load(folder, head=head, num_labels=3 if head in HEADS[:2] else None, key=KEY)
        again = fj.load(fj.save(loaded, tmp_path / head))
        assert type(again.encoder.layers[0].attention.query).__name__ == "LowRank"
        ids = [[5, 9, 1], [7, 1, 0]]
        np.testing.assert_array_equal(logits(again, ids), logits(loaded, ids))
    with pytest.raises(fj.InputError, match="was saved with the head 'token-classification'"):
        fj.load(tmp_path / "token-classification", head="question-answering", key=KEY)


@pytest.mark.parametrize(("head", "rate"), list(zip(HEADS, (0.3, 0.3, 0.0), strict=True)))
def test_dropout_of_the_heads(head, rate):
    """None for answers, as in transformers."""
    config = T5Config.from_json(
        {**tiny.CONFIGS["t5"], "eos_token_id": 1, "classifier_dropout": 0.3}
    )
    make = partial(T5WithHead, config, head=head)
    model = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert model.head.dropout.rate == rate


def test_layerwise_losses_compare_both_stacks(models):
    """At positions that are not padding; the decoder reads the same text as the encoder."""
    batch = {
        "input_ids": np.array([[7, 9, 8, 1], [7, 1, 0, 0]]),
        "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool),
        "weights": np.ones(2, np.float32),
        "labels": np.zeros(2, np.int32),
    }
    mask = batch["attention_mask"]
    for head, model in models.items():
        other = jax.tree.map(lambda x: x * 1.1, model)
        stacks = []
        for m in (model, other):
            out = m(batch["input_ids"], mask, output_hidden_states=True)
            stacks.append(
                (*out.hidden_states[1:], *(out.encoder.hidden_states[1:] if out.encoder else ()))
            )
        want = sum(np.square(a - b).mean(-1)[mask].sum() for a, b in zip(*stacks, strict=True))
        assert len(stacks[0]) == (2 if head == "token-classification" else 4)
        count = 6 if head == "token-classification" else 12
        total = losses.hidden_states(model, other, batch, None)
        np.testing.assert_allclose(total.total, want, rtol=1e-5)
        assert total.count == count


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("head", ["seq2seq-lm", "classification"])
def test_layers_can_be_computed_again_in_the_backward_pass(head, models, base):
    """Though the keys of the decoder's attention to the encoder are computed outside its layers."""
    model = models.get(head) or fj.load(base, head=head)
    ids = np.array([[7, 9, 8, 1]])
    batch = {"input_ids": ids, "attention_mask": ids > 0, "weights": np.ones(1, np.float32)}
    loss = losses.sequence_to_sequence if head == "seq2seq-lm" else losses.classification
    batch["labels"] = ids if head == "seq2seq-lm" else np.ones(1, np.int32)
    plain, again = (Partition(model, remat=remat) for remat in (False, True))
    params, rest = plain.split(model)

    def total(params, parts):
        return loss(parts.compute(params, rest), batch, None).total

    np.testing.assert_allclose(total(params, again), total(params, plain), rtol=1e-5)
    assert "remat" in str(jax.make_jaxpr(jax.grad(lambda p: total(p, again)))(params))


@pytest.mark.full
@pytest.mark.parametrize("head", HEADS)
def test_calibration_with_text(head, models):
    """On that text, the states are nearer to those of the original than without."""
    ids = np.array([[3, 4, 5, 1], [5, 3, 1, 0]])
    batch, apart = {"input_ids": ids, "attention_mask": ids > 0}, []
    model = models[head]
    for calibration in ([batch], ["abc", "ca"], None):
        smaller, _ = fj.compress(model, fj.Fusion(width=6), calibration=calibration, key=KEY)
        assert {site.mlp.width for site in fj.sites(smaller)} == {6}
        states = [m(**batch).last_hidden_state for m in (model, smaller)]
        apart.append(np.abs(np.asarray(states[0] - states[1])[ids > 0]).max())
    assert max(apart[:2]) < apart[2] / 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of labels, tags and questions, which a small model learns."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.RandomState(0)
    texts = ["".join(rng.choice(list("abc"), rng.randint(1, 9))) for _ in range(96)]
    rows = [f"{text},{'yes' if text[-1] == 'a' else 'no'}" for text in texts]
    (folder / "labels.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "tags.conll").write_text(
        "".join(f"{a} O\n{b} B-X\n\n" for a in "ac" for b in "bd") * 8
    )
    answers = {"text": ["b"], "answer_start": [2]}
    rows = [
        {"question": q, "context": f"{c} b {c}", "answers": answers} for q in "ab" for c in "cd"
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return folder


COMMANDS = [
    ("token-classification", "tags.conll", ["--task", "token-classification"], "f1", 0.9),
    ("classification", "labels.csv", [], "accuracy", 0.9),
    ("question-answering", "answers.jsonl", ["--task", "question-answering"], "f1", 90.0),
]


@pytest.mark.full
@pytest.mark.parametrize(("head", "name", "task", "metric", "least"), COMMANDS)
def test_commands(head, name, task, metric, least, base, files, tmp_path, capsys):
    """Compress, fine-tune, measure, export, and measure what was exported."""
    fused, run, exported = (str(tmp_path / part) for part in ("fused", "run", "hf"))
    assert main(["compress", str(base), fused, "fusion", "--width", "16"]) == 0
    data = ["--train-file", str(files / name), "--dev-file", str(files / name)]
    options = ["--max-steps", "45", "--batch-size", "32", "--shapes", "1", "--no-dropout"]
    options += ["--learning-rate", "5e-3", "--eval-every", "45", "--max-length", "16"]
    assert main(["finetune", fused, "--out", run, *task, *data, *options]) == 0
    capsys.readouterr()
    found = []
    assert main(["export", f"{run}/best", exported]) == 0
    capsys.readouterr()
    for model, more in ((run, []), (exported, task)):
        assert main(["evaluate", model, "--file", str(files / name), *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        found.append({line.split()[1]: float(line.split()[2]) for line in lines})
    assert found[0] == found[1]
    assert found[0][metric] > least
    assert fj.load(run + "/best").provenance.head == head
