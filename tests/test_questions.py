"""Question answering: files, windows of contexts, metrics of SQuAD, and training."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.training import Answer, Questions, answer_questions, losses, measure_answers
from fusion_jax.training.tasks import question_answering
from fusion_jax.training.tasks.classification import TextEncoder
from fusion_jax.training.tasks.questions import normalized, questions_of
from tests import glue, helpers, nlg

ROW = {
    "question": "Who?",
    "context": "It was Ada.",
    "answers": {"text": ["Ada"], "answer_start": [7]},
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines(tmp_path):
    listed = {
        **ROW,
        "answers": [{"text": "Ada", "answer_start": 7}, {"text": "It", "answer_start": 0}],
    }
    none = {**ROW, "answers": {"text": [], "answer_start": []}}
    data = fj.read_questions(write(tmp_path / "a.jsonl", ROW, listed, none))
    assert data.train.answers == ((("Ada", 7),), (("Ada", 7), ("It", 0)), ())
    assert data.train.contexts[0] == "It was Ada."
    assert data.train.names[1].endswith("a.jsonl:2")
    assert data.empty
    assert not fj.read_questions(write(tmp_path / "b.jsonl", ROW, listed)).empty
    bare = write(tmp_path / "c.jsonl", {"question": "Who?", "context": "Ada."})
    assert questions_of(bare, answered=False).answers is None


def test_files_of_squad(tmp_path):
    qas = [{"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 7}]}]
    qas += [{"id": "q2", "question": "Why?", "answers": [], "is_impossible": True}]
    paragraphs = [{"context": "It was Ada.", "qas": qas}]
    path = write(
        tmp_path / "train-v2.0.json", {"version": "v2.0", "data": [{"paragraphs": paragraphs}]}
    )
    train = fj.read_questions(path).train
    assert train.questions == ("Who?", "Why?")
    assert train.answers == ((Answer("Ada", 7),), ())
    assert train.names[1].endswith("train-v2.0.json, question q2")
    qas[0]["answers"][0]["answer_start"] = 6
    path = write(tmp_path / "a.json", {"data": [{"paragraphs": paragraphs}]})
    with pytest.raises(fj.InputError, match=r"a\.json, question q1: the answer 'Ada' is not at"):
        fj.read_questions(path)
    with pytest.raises(fj.InputError, match="neither in the form of SQuAD"):
        fj.read_questions(write(tmp_path / "b.json", {"data": [{"paragraphs": [{}]}]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "no text in field 'question'"),
        ({"context": None}, "no text in field 'context'"),
        ({"answers": None}, "no answers; a question that its context does not answer has an empty"),
        ({"answers": ["Ada"]}, "no answers; a question"),
        ({"answers": {"text": ["Ada"], "answer_start": []}}, "answers needs the lists text and"),
        ({"answers": {"text": ["Ada"], "answer_start": ["7"]}}, "answer_start must be an index"),
        ({"answers": {"text": ["Ada"], "answer_start": [-4]}}, "answer_start must be an index"),
        ({"answers": {"text": [""], "answer_start": [7]}}, "an answer has no text"),
        (
            {"answers": {"text": ["Ada"], "answer_start": [6]}},
            "the answer 'Ada' is not at answer_start 6; it is at 7",
        ),
        (
            {"answers": {"text": ["Eve"], "answer_start": [7]}},
            "the answer 'Eve' is not at answer_start 7; the context does not have it",
        ),
    ],
)
def test_bad_rows(changes, message, tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, **changes})
    with pytest.raises(fj.InputError, match=re.escape(f"a.jsonl:2: {message}")):
        fj.read_questions(path)


def test_bad_files(tmp_path):
    with pytest.raises(fj.InputError, match=r"a\.csv is not a \.jsonl or \.json file"):
        fj.read_questions(tmp_path / "a.csv")
    with pytest.raises(fj.InputError, match="there is no file"):
        fj.read_questions(tmp_path / "a.jsonl")
    with pytest.raises(fj.InputError, match=r"a\.jsonl:1: no text in field 'question'"):
        fj.read_questions(write(tmp_path / "a.jsonl", {"context": "It was Ada."}))


def test_metrics_by_hand():
    """As the script of SQuAD 2.0 computes them."""
    assert normalized("  The (best) of A the 1990s! ") == "best of 1990s"
    assert measure_answers(["Ada"], [["the ada."]]) == {"f1": 100, "exact_match": 100}
    # Two of three words are right, and two of four are found.
    found = measure_answers(["in old London"], [["Old London Town Hall"]])
    assert found["exact_match"] == 0
    assert found["f1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    # A word counts as often as it is in both.
    assert measure_answers(["x x x y"], [["x z"]])["f1"] == pytest.approx(100 * 2 / 6)
    # The best of several; the mean over questions.
    found = measure_answers(["blue", "red sky"], [["red", "blue"], ["sky"]])
    assert found["exact_match"] == 50
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    # No answer is right only where there is none.
    assert measure_answers(["", "x", "", "x"], [[], [], ["x"], ["x"]]) == {
        "f1": 50,
        "exact_match": 50,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return glue.checkpoint(tmp_path_factory.mktemp("questions") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return fj.load(folder, head="question-answering", key=jax.random.key(0))


def question(context, answer, name="q"):
    return Questions(["w80 w81"], [context], [(Answer(answer, context.index(answer)),)], [name])


def test_windows_overlap_and_have_their_answers(model):
    """[CLS] w80 w81 [SEP], six words of the context, [SEP]; four words are in the next window."""
    context = " ".join(f"w{i}" for i in range(10))
    asked = question(context, "w5 w6")
    encoder = TextEncoder(model, 11)
    found = list(question_answering.windows(encoder, asked, 4))
    words = [window.tokens[4:-1] - 5 for window in found]
    assert [each.tolist() for each in words] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9],
    ]
    assert found[0].types.tolist() == [0] * 4 + [1] * 7
    assert found[0].spans[:6].tolist() == [[-1, -1]] * 4 + [[0, 2], [3, 5]]
    places = [question_answering._place(window.spans, asked.answers[0]) for window in found]
    assert places == [(0, 0), (7, 8), (5, 6)]
    # A part of a word is in its token.
    assert question_answering._place(found[0].spans, [Answer("3 w", context.index("3 w"))]) == (
        7,
        8,
    )
    assert question_answering._place(found[0].spans, ()) == (0, 0)
    # Spaces around an answer are none of its tokens.
    assert question_answering._place(found[0].spans, [Answer(" w3 ", 8)]) == (7, 7)
    # A character that the tokenizer leaves out.
    gap = np.array([[-1, -1], [0, 2], [4, 6], [7, 9]])
    assert question_answering._place(gap, [Answer("xabc", 3)]) == (2, 2)
    data = fj.QuestionAnswering(asked, stride=4)
    config = fj.TrainConfig(batch_size=4, shapes=1, max_length=11)
    batch = data.prepare(model, config, key=jax.random.key(0)).batches(0)
    assert sorted(map(tuple, batch["labels"].tolist())) == [(0, 0), (0, 0), (5, 6), (7, 8)]
    assert batch["weights"].tolist() == [1, 1, 1, 0]
    assert "labels" not in data.inputs(model, config, key=jax.random.key(0))(0)


def test_answers_that_are_in_no_window(model, key, caplog):
    context = " ".join(f"w{i}" for i in range(12))
    asked = question(context, context, "train.jsonl:1")
    config = fj.TrainConfig(batch_size=4, shapes=1, max_length=11)
    fj.QuestionAnswering(asked, stride=4).prepare(model, config, key=key)
    assert "no window has the whole answer of 1 questions, such as train.jsonl:1" in caplog.text


def test_answers_are_the_best_places_of_all_windows(model, monkeypatch):
    """Against all pairs of a start and an end that are allowed."""
    asked = question(" ".join(f"w{i}" for i in range(12)), "w5")
    found = list(question_answering.windows(TextEncoder(model, 11), asked, 2))
    rng = np.random.RandomState(0)
    for trial in range(20):
        logits = [rng.standard_normal((len(window.tokens), 2)) for window in found]
        monkeypatch.setattr(question_answering, "logits_of", lambda *_, x=logits: x)
        longest = 1 + trial % 5
        scores = {
            asked.contexts[0][window.spans[i, 0] : window.spans[j, 1]]: rows[i, 0] + rows[j, 1]
            for rows, window in zip(logits, found, strict=True)
            for i in range(4, len(rows) - 1)
            for j in range(i, min(i + longest, len(rows) - 1))
        }
        for rows, window in zip(logits, found, strict=True):
            for i in range(4, len(rows) - 1):
                for j in range(i, min(i + longest, len(rows) - 1)):
                    text = asked.contexts[0][window.spans[i, 0] : window.spans[j, 1]]
                    scores[text] = max(scores[text], rows[i, 0] + rows[j, 1])
        best = max(scores, key=scores.__getitem__)
        options = {"stride": 2, "longest": longest, "max_length": 11}
        assert answer_questions(model, asked, **options) == [best]
        none = min(rows[0].sum() for rows in logits)
        want = "" if none > scores[best] else best
        assert answer_questions(model, asked, empty=True, **options) == [want]
    assert answer_questions(model, Questions([], [], None, [])) == []


def test_what_does_not_fit(model, folder, key):
    asked = question("w1 w2", "w2", "squad.jsonl:7")
    prepare = fj.QuestionAnswering(asked, stride=4).prepare
    with pytest.raises(
        fj.InputError, match=r"squad\.jsonl:7: a question of 2 tokens leaves too li"
    ):
        prepare(model, fj.TrainConfig(max_length=9), key=key)
    with pytest.raises(fj.InputError, match="truncate does not apply to questions"):
        prepare(model, fj.TrainConfig(truncate=True), key=key)
    other = fj.load(folder, head="classification", num_labels=2, key=key)
    with pytest.raises(fj.InputError, match="the model has no question-answering head"):
        prepare(other, fj.TrainConfig(), key=key)
    with pytest.raises(fj.InputError, match="the model has no question-answering head"):
        answer_questions(other, asked)
    with pytest.raises(fj.InputError, match="the dev questions have no answers"):
        fj.QuestionAnswering(asked, asked._replace(answers=None))
    with pytest.raises(fj.InputError, match="longest must be at least 1"):
        fj.QuestionAnswering(asked, longest=0)


def toy(n, seed, empty=False):
    """The answer is the only word below 10; some contexts have none."""
    rng = np.random.RandomState(seed)
    contexts, answers = [], []
    for i in range(n):
        words = [f"w{j}" for j in rng.randint(10, 20, rng.randint(2, 7))]
        word, at = f"w{rng.randint(10)}", rng.randint(len(words))
        if empty and i % 4 == 0:
            answers.append(())
        else:
            words[at] = word
            answers.append((Answer(word, len(" ".join([*words[:at], ""]))),))
        contexts.append(" ".join(words))
    return Questions(["w80"] * n, contexts, answers, [f"{seed}:{i}" for i in range(n)])


CONFIG = dataclasses.replace(
    helpers.TRAIN_CONFIG,
    max_steps=60,
    batch_size=32,
    learning_rate=3e-3,
    checkpoint_every=None,
    eval_every=60,
    max_length=16,
)


@pytest.mark.full
def test_training_learns_answers_and_that_there_are_none(model, key):
    data = fj.QuestionAnswering(toy(96, 0, empty=True), toy(32, 1, empty=True))
    fit = fj.finetune(model, data, CONFIG, key=key)
    (measured,) = fit.history
    assert list(measured) == ["step", "f1", "exact_match"]
    assert measured["f1"] > 90 and measured["exact_match"] > 90
    found = answer_questions(fit.model, data.dev, empty=True, max_length=16)
    assert measure_answers(found, data.dev.answers)["f1"] == measured["f1"]
    assert "" in found
    assert "" not in answer_questions(fit.model, data.dev, max_length=16)


@pytest.mark.full
def test_a_run_resumes_to_the_same_bits(model, key, tmp_path):
    data = fj.QuestionAnswering(toy(16, 0), toy(8, 1))
    config = dataclasses.replace(CONFIG, max_steps=4, batch_size=8, checkpoint_every=2)

    def stop(step, state):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fj.finetune(
            model, data, config, key=key, folder=tmp_path / "run", recipe=fj.Recipe(on_step=stop)
        )
    resumed = fj.finetune(model, data, config, key=key, folder=tmp_path / "run")
    whole = fj.finetune(model, data, config, key=key)
    assert not helpers.moved(resumed.model, whole.model)
    assert resumed.history == whole.history
    other = fj.QuestionAnswering(data.train, toy(8, 2))
    with pytest.raises(fj.InputError, match="dev data"):
        fj.finetune(model, other, config, key=key, folder=tmp_path / "run")


@pytest.mark.full
def test_decoders_learn_answers(key, tmp_path):
    """GPT-2 reads the question, a line break and the context, of which it sees the part before."""
    folder = nlg.checkpoint(tmp_path / "gpt2", "gpt2")
    rng = np.random.RandomState(0)
    contexts = ["".join(rng.choice(list("abc"), 6)) for _ in range(64)]
    places = rng.randint(6, size=64)
    contexts = [c[:i] + "1" + c[i + 1 :] for c, i in zip(contexts, places, strict=True)]
    answers = [(Answer("1", int(i)),) for i in places]
    asked = Questions(["q"] * 64, contexts, answers, ["x"] * 64)
    model = fj.load(folder, head="question-answering", key=key)
    (window, *_) = question_answering.windows(TextEncoder(model, 16), asked, 2)
    assert model.provenance.head == "question-answering"
    assert (window.spans[:2] == -1).all() and window.spans[2].tolist() == [0, 1]
    fit = fj.finetune(model, fj.QuestionAnswering(asked, asked), CONFIG, key=key)
    assert fit.history[0]["f1"] > 90


def test_the_loss_of_answers_is_the_mean_of_both_ends(model):
    """Against the formula in float64."""
    ids = np.array([[2, 6, 7, 3], [2, 8, 3, 0]], np.int32)
    batch = {
        "input_ids": ids,
        "attention_mask": ids > 0,
        "labels": np.array([[1, 2], [1, 1]], np.int32),
        "weights": np.ones(2, np.float32),
    }
    logits = np.asarray(model(ids, ids > 0).logits, np.float64)
    total = 0.0
    for row, length, label in zip(logits, (4, 3), batch["labels"], strict=True):
        for end in range(2):
            x = row[:length, end]
            total += (np.log(np.exp(x).sum()) - x[label[end]]) / 2
    loss = losses.question_answering(model, batch, None)
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)
    assert loss.count == 2
