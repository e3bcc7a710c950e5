"""Tokens and positions that a model does not have are named before anything is computed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.models.tokens import check_tokens, continuation
from fusion_jax.training import PlainText, nats_per_token, predict, read_task
from tests import glue, tiny


def short(folder, family="bert", head="classification", rows=50):
    """A tiny model with fewer embeddings than its tokenizer has tokens."""
    tensors = tiny.weights(family, head)
    word = next(n for n in tensors if n.endswith(("word_embeddings.weight", "wte.weight")))
    tensors[word] = tensors[word][:rows]
    return glue.vocabulary(
        tiny.write_folder(folder, {**tiny.CONFIGS[family], "vocab_size": rows}, tensors)
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "own.csv"
    path.write_text("text,label\nw1 w2,no\nw3 w89,yes\nw4,maybe\n")
    return path


MESSAGE = r"own.csv:3: token 94 \('w89'\) has no embedding: the model has 50"


@pytest.mark.parametrize("command", ["evaluate", "predict", "finetune"])
def test_a_token_without_an_embedding(command, table, tmp_path, capsys):
    folder, out = str(short(tmp_path / "model")), str(tmp_path / "out")
    options = {
        "evaluate": ["--file", str(table)],
        "predict": ["--file", str(table), "--out", out],
        "finetune": ["--out", out, "--train-file", str(table)],
    }[command]
    assert main([command, folder, *options]) == 1
    said = capsys.readouterr()
    assert "token 94 ('w89') has no embedding: the model has 50" in said.err
    assert "own.csv:3" in said.err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_calibration_and_kernels_name_the_token(tmp_path):
    model = fj.load(short(tmp_path / "model"))
    with pytest.raises(fj.InputError, match="token 94 has no embedding"):
        fj.calibrate(model, ["w1 w2", "w89"], key=jax.random.key(0))
    # Random tokens are drawn from those that the model has.
    assert fj.calibrate(model, ["w1 w2", "w3"], key=jax.random.key(0))


def test_token_types_that_a_model_does_not_have(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model"))
    check_tokens(model, [[5, 6]], [[0, 1]])
    with pytest.raises(fj.InputError, match=r"a\.csv:1: token type 2 has no embedding"):
        check_tokens(model, [[5, 6]], [[0, 2]], names=["a.csv:1"])
    with pytest.raises(fj.InputError, match="token -1 has no embedding"):
        check_tokens(model, [[5, -1]])


@pytest.mark.parametrize(("family", "most"), [("bert", 40), ("roberta", 38), ("gpt2", 32)])
def test_more_tokens_than_positions(family, most, tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model", family))
    graph = jax.eval_shape(model, jnp.ones((1, most), jnp.int32))
    assert graph.last_hidden_state.shape[1] == most
    with pytest.raises(fj.InputError, match=f"{most + 1} tokens, but the model has {most} posit"):
        model(jnp.ones((1, most + 1), jnp.int32))


def broken(folder, family="bert", head="classification"):
    tensors = tiny.weights(family, head)
    name = next(n for n in tensors if n.endswith(("LayerNorm.weight", "ln_f.weight")))
    tensors[name] = np.full_like(tensors[name], np.nan)
    return glue.vocabulary(tiny.write_folder(folder, tiny.CONFIGS[family], tensors))


def test_logits_that_are_not_finite_are_refused(table, tmp_path, capsys):
    folder, out = str(broken(tmp_path / "model")), tmp_path / "out.jsonl"
    assert main(["evaluate", folder, "--file", str(table)]) == 1
    assert "own.csv:2: the logits are NaN or infinite" in capsys.readouterr().err
    assert main(["predict", folder, "--file", str(table), "--out", str(out)]) == 1
    assert not out.exists()
    with pytest.raises(FloatingPointError, match="are NaN or infinite"):
        predict(fj.load(folder, head="classification"), read_task(table).train)


@pytest.mark.parametrize("beams", [None, fj.Beams(2)])
def test_generating_and_measuring_what_is_not_finite(beams, tmp_path):
    model = fj.load(broken(tmp_path / "model", "gpt2", "causal-lm"), head="causal-lm")
    ids = np.array([[5, 6, 7]], np.int32)
    with pytest.raises(FloatingPointError, match="the logits are NaN or infinite"):
        fj.generate(model, ids, max_new_tokens=2, beams=beams)
    with pytest.raises(fj.InputError, match="token 61 has no embedding: the model has 61"):
        fj.generate(model, ids + 54, max_new_tokens=2, beams=beams)
    if beams is None:
        with pytest.raises(FloatingPointError, match="log-probabilities of the text are NaN"):
            nats_per_token(model, np.arange(5, 30, dtype=np.int32), 8)
        with pytest.raises(fj.InputError, match="token 61 has no embedding"):
            PlainText(np.arange(50, 62), context=4).inputs(
                model, fj.TrainConfig(), key=jax.random.key(0)
            )


def tokenizer_of(words, pre_tokenizer, decoder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_a_text_continues_with_its_spaces_and_whole_characters():
    from tokenizers import decoders, pre_tokenizers

    space = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = tokenizer_of(["<unk>", "▁Once", "▁upon", "▁a", "she", "!"], *space)
    assert words.decode([3, 4]) == "ashe"  # the space is lost
    assert continuation(words, [1, 2], [3, 4, 5]) == " ashe!"
    assert continuation(words, [1, 2], [4]) == "she"
    assert continuation(words, [], [3]) == "a"
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = tokenizer_of(["<unk>", "caf", "Ã", "©", "Ġau"], *bytes_of)
    assert continuation(pieces, [1], [2, 3, 4]) == "é au"
    assert continuation(pieces, [1, 2], [3, 4]) == "é au"


def test_end_tokens_of_the_generation_config(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", "gpt2", "causal-lm")
    model = fj.load(folder, head="causal-lm")
    ids = np.array([[5, 6, 7]], np.int32)
    free = np.asarray(fj.generate(model, ids, max_new_tokens=8))[0].tolist()
    ends = [free[2], free[4]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = fj.load(folder, head="causal-lm")
    assert model.config.eos_token_id == tuple(ends)
    first = next(i for i, token in enumerate(free) if token in ends)
    got = np.asarray(fj.generate(model, ids, max_new_tokens=8))[0].tolist()
    assert got == free[: first + 1] + [0] * (7 - first)
