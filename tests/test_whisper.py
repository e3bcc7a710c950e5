"""Whisper: logits, greedy and beam search, and classes of sounds, against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from tests.test_towers import close, made, outputs, shrunk
from tests.tiny import PAD

WHISPER = {
    "model_type": "whisper",
    "vocab_size": 61,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "num_mel_bins": 5,
    "max_source_positions": 6,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
ODD = [
    {"d_model": 18, "encoder_attention_heads": 3, "decoder_attention_heads": 9,
     "max_source_positions": 7},
    {"scale_embedding": True, "activation_function": "relu", "encoder_layers": 1,
     "num_mel_bins": 3},
    {"decoder_layers": 3, "tie_word_embeddings": False, "vocab_size": 67},
    {"encoder_ffn_dim": 23, "decoder_ffn_dim": 1, "dropout": 0.3, "use_weighted_layer_sum": True},
    {"use_weighted_layer_sum": True, "encoder_layers": 3, "classifier_proj_size": 7,
     "num_labels": 5},
    {"d_model": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1,
     "max_target_positions": 14},
    {"activation_function": "silu", "activation_dropout": 0.5, "attention_dropout": 0.5,
     "classifier_proj_size": 1},
    {"activation_function": "gelu_new", "median_filter_width": 3, "decoder_start_token_id": 5,
     "num_labels": 1, "mask_time_prob": 0.9, "pad_token_id": None},
]  # fmt: skip
HEADS = (None, "seq2seq-lm", "classification")


def features(fields, count=3):
    shape = count, fields["num_mel_bins"], 2 * fields["max_source_positions"]
    return np.random.RandomState(5).standard_normal(shape).astype(np.float32)


def texts(padded):
    ids = np.random.RandomState(3).randint(4, 61, (3, 6)).astype(np.int32)
    mask = np.ones((3, 6), np.int32)
    for row, length in enumerate((6, 4, 1) if padded else ()):
        mask[row, length:] = 0
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


@jax.jit
def ours(model, batch):
    return model(**batch, output_hidden_states=True)


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize("number", range(len(ODD)))
@pytest.mark.parametrize("head", HEADS)
def test_odd_configurations_equal_transformers(head, number, tmp_path, key):
    """As loaded, and smaller and exported, with padding."""
    fields = {**WHISPER, **ODD[number]}
    folder, cls = made(tmp_path, fields, head)
    model = fj.load(folder, head=head)
    smaller = shrunk(model, number, key)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    batch = {"input_features": features(fields)}
    sounds = head == "classification"
    batch |= {} if sounds else texts(padded=number % 2)
    real = slice(None) if sounds else batch["decoder_attention_mask"].astype(bool)
    for mine, where in ((model, folder), (smaller, exported)):
        want, got = outputs(cls, where, batch), ours(mine, batch)
        if head is not None:
            close(np.asarray(got.logits)[real], want.logits[real])
        if sounds:
            continue
        for a, b in zip(got.hidden_states, want.decoder_hidden_states, strict=True):
            close(np.asarray(a)[real], b[real])
        states = zip(got.encoder.hidden_states, want.encoder_hidden_states, strict=True)
        for a, b in states:
            close(a, b)


@pytest.mark.torch
@pytest.mark.full(quick=1)
@pytest.mark.parametrize(("number", "beams"), [(0, 1), (2, 1), (5, 1), (7, 1), (2, 3)])
def test_generated_tokens_equal_transformers(number, beams, tmp_path):
    """Prompts of several tokens, as languages and tasks are, until an end that is found."""
    import torch
    from transformers import GenerationMixin

    fields = {**WHISPER, **ODD[number]}
    folder, cls = made(tmp_path, fields, "seq2seq-lm")
    model, other = fj.load(folder, head="seq2seq-lm"), cls.from_pretrained(folder).eval()
    x, prompt = features(fields), np.array([[3, 9, 11]] * 3, np.int32)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "num_beams": beams}

    def theirs(end):
        given = {"decoder_input_ids": torch.tensor(prompt).long(), "eos_token_id": end}
        out = GenerationMixin.generate(other, torch.tensor(x), **given, **options)[:, 3:].numpy()
        return np.pad(out, ((0, 0), (0, 8 - out.shape[1])), constant_values=PAD)

    end = int(theirs(-1)[0, 3])
    search = fj.Beams(beams) if beams > 1 else None
    more = {"beams": search, "inputs": {"input_features": x}}
    got = fj.generate(model, prompt, max_new_tokens=8, eos=end, pad=PAD, **more)
    np.testing.assert_array_equal(got, theirs(end))


@pytest.mark.torch
def test_smaller_and_saved(tmp_path, key):
    """Calibrated on sounds with texts; a prompt's padding on the left changes nothing."""
    folder, _ = made(tmp_path, WHISPER, "seq2seq-lm")
    model = fj.load(folder, head="seq2seq-lm")
    batch = {"input_features": features(WHISPER), **texts(padded=True)}
    seen = fj.calibrate(model, [batch], key=key)
    counts = {path: len(x) for path, x in seen.items()}
    assert counts == dict.fromkeys(counts, 18) | {"decoder.layers.0.mlp": 11}
    smaller, _ = fj.compress(model, fj.Fusion(width=9), key=key, calibration=[batch])
    saved = fj.save(smaller, tmp_path / "artefact")
    again = fj.load(saved)
    assert bit_equal(again, smaller)
    exported = fj.export_hf(smaller, tmp_path / "hf")
    card = (exported / "README.md").read_text()
    assert "from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor" in card
    inputs = {"input_features": batch["input_features"]}
    prompt, padded = jnp.array([[3, 9]] * 3), jnp.array([[0, 0, 3, 9]] * 3)
    plain = fj.generate(again, prompt, max_new_tokens=5, inputs=inputs)
    mask = (padded != 0).astype(int)
    other = fj.generate(again, padded, mask, max_new_tokens=5, inputs=inputs)
    np.testing.assert_array_equal(plain, other)
    for where in (folder, saved, exported):
        head = fj.load(where, head="classification", num_labels=4, key=key)
        assert head(batch["input_features"]).logits.shape == (3, 4)


@pytest.mark.torch
def test_what_is_not_a_sound_is_an_error(tmp_path, key, capsys):
    folder, _ = made(tmp_path, WHISPER, "seq2seq-lm")
    model = fj.load(folder, head="seq2seq-lm")
    ids = jnp.ones((3, 2), int)
    x = features(WHISPER)
    with pytest.raises(fj.InputError, match="give decoder_input_ids"):
        model(x)
    for wrong, said in ((None, "got none"), (x[:, :, :5], r"got \(3, 5, 5\)"),
                        (x.astype(np.int32), "must be floats")):  # fmt: skip
        with pytest.raises(fj.InputError, match=said):
            model(wrong, ids)
    with pytest.raises(fj.InputError, match="got none"):
        fj.generate(model, ids, max_new_tokens=2)
    with pytest.raises(fj.InputError, match="whisper has no input 'room' to generate"):
        fj.generate(model, ids, max_new_tokens=2, inputs={"room": 3})
    with pytest.raises(fj.InputError, match="has 20 positions; these texts need 21"):
        fj.generate(model, ids, max_new_tokens=19, inputs={"input_features": x})
    with pytest.raises(fj.InputError, match="this is a model of sounds, which cannot read text"):
        fj.calibrate(model, ["A text."], key=key)
    assert main(["generate", str(folder), "A text."]) == 1
    assert "this is a model of sounds" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"apply_spec_augment": True}, "apply_spec_augment true is not implemented"),
        ({"encoder_layerdrop": 0.1}, "a encoder_layerdrop other than 0"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder false"),
        ({"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3}, "d_model"),
        ({"decoder_attention_heads": 3}, "not a multiple of decoder_attention_heads"),
        ({"num_mel_bins": 0}, "num_mel_bins must be from 1"),
    ],
)
def test_configurations_that_are_an_error(changes, said, tmp_path):
    folder, _ = made(tmp_path, WHISPER, "seq2seq-lm")
    (folder / "config.json").write_text(json.dumps({**WHISPER, **changes}))
    with pytest.raises(fj.InputError, match=said):
        fj.load(folder)
