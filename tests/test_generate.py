"""Generated text equals that of Hugging Face, token by token, and a cache changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.models.decoding import Beams, Sampling, filtered, generate
from tests import tiny

SEARCHES = {
    "greedy": {},
    "beam": {"beams": Beams(3)},
    "endless": {"beams": Beams(3), "eos": ()},
    "long": {"beams": Beams(3, 2.0, True)},
}


# Other families generate by the code of one of these.
SEARCHED = [*tiny.DISTINCT, *((name, dict(tiny.GENERATIVE)[name]) for name in ("mistral", "phi3"))]


@pytest.fixture(
    params=[case for case in SEARCHED if case in tiny.GENERATIVE], ids=lambda case: case[0]
)
def case(request, tmp_path):
    family, head = request.param
    return family, fj.load(tiny.checkpoint(tmp_path / "model", family, head), head=head)


def prompts(family):
    batch = tiny.batch(family)
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.full(quick=3)
def test_equals_hugging_face(case):
    family, model = case
    golden = tiny.read_golden(family, dict(tiny.GENERATIVE)[family])
    for name, want in golden.outputs.items():
        if name.startswith("generated."):
            options = {"eos": golden.eos, "pad": tiny.PAD, **SEARCHES[name.split(".")[1]]}
            ids = generate(model, *prompts(family), max_new_tokens=8, **options)
            np.testing.assert_array_equal(ids, want, err_msg=name)


@pytest.mark.full(quick=1)
@pytest.mark.parametrize(
    "family", ["gpt2", "mistral", "mixtral", "deepseek_v3", "llama4", "qwen3_next"]
)
def test_step_by_step_equals_at_once(family, tmp_path):
    """In any pieces, with padding on the left."""
    folder = tiny.checkpoint(tmp_path / "model", family, "causal-lm")
    model = fj.load(folder, head="causal-lm")
    ids, mask = prompts(family)
    real = mask.astype(bool)
    whole = model(ids, mask).logits
    cache = model.empty_cache(3, 11)
    pieces = []
    read = jax.jit(lambda m, i, a, c: m(i, a, cache=c))
    for piece in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        out = read(model, ids[:, piece], mask[:, piece], cache)
        pieces.append(out.logits)
        cache = out.cache
    assert int(cache.length) == 9
    together = np.concatenate(pieces, axis=1)
    np.testing.assert_allclose(together[real], np.asarray(whole)[real], atol=5e-5)


@pytest.mark.full
@pytest.mark.parametrize("family", ["t5-v1.1"])
def test_decoder_step_by_step_equals_at_once(family, tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, "seq2seq-lm"), head="seq2seq-lm")
    batch = tiny.batch(family)
    target = jnp.asarray(batch.pop("decoder_input_ids")).at[:, 0].set(0)
    whole = model(**batch, decoder_input_ids=target).logits
    logits, cache = model.begin(*(jnp.asarray(x) for x in batch.values()), room=7)
    steps = [logits]
    step = jax.jit(lambda m, x, c: m.step(x, c))
    for i in range(1, 7):
        logits, cache = step(model, target[:, i], cache)
        steps.append(logits)
    np.testing.assert_allclose(np.stack(steps, 1), whole, atol=1e-5)


@pytest.fixture
def gpt2(tmp_path):
    return fj.load(tiny.checkpoint(tmp_path / "model", "gpt2", "causal-lm"), head="causal-lm")


def test_sampling_follows_its_key_and_its_filter(gpt2, key):
    ids, mask = prompts("gpt2")

    def draw(key, **options):
        sampling = Sampling(**options)
        return generate(gpt2, ids, mask, max_new_tokens=8, sampling=sampling, key=key).tolist()

    assert draw(key) == draw(key) != draw(jax.random.key(1))
    greedy = generate(gpt2, ids, mask, max_new_tokens=8).tolist()
    assert draw(key, top_k=1, top_p=0.5, temperature=2.0) == greedy


def test_draws_have_the_filtered_probabilities(key):
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]))
    for sampling, kept in (
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_p=0.69), [1, 3]),
        (Sampling(top_p=0.71), [1, 3, 4]),
        (Sampling(temperature=2.0, top_k=2), [1, 3]),
    ):
        left = filtered(logits, sampling)[0]
        assert np.flatnonzero(np.isfinite(left)).tolist() == kept
        want = np.asarray(logits[0])[kept] / sampling.temperature
        np.testing.assert_allclose(left[jnp.array(kept)], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 30}, "has 32 positions; these texts need 39"),
        ({"sampling": Sampling()}, "needs key="),
        ({"sampling": Sampling(), "beams": Beams(2)}, "not both"),
    ],
)
def test_wrong_options(gpt2, options, message):
    with pytest.raises(fj.InputError, match=message):
        generate(gpt2, *prompts("gpt2"), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_sampling_out_of_range(options):
    with pytest.raises(fj.InputError, match=f"{next(iter(options))} must be"):
        Sampling(**options)
    with pytest.raises(fj.InputError, match="beams must be at least 1"):
        Beams(0)


def test_wrong_inputs(gpt2, tmp_path):
    ids, mask = prompts("gpt2")
    with pytest.raises(fj.InputError, match="pad them on the left"):
        generate(gpt2, ids, mask[:, ::-1], max_new_tokens=4)
    with pytest.raises(fj.InputError, match="has no token"):
        generate(gpt2, ids, 0 * mask, max_new_tokens=4)
    for family in ("gpt2", "bert"):
        model = fj.load(tiny.checkpoint(tmp_path / family, family))
        with pytest.raises(fj.InputError, match="head='causal-lm'"):
            generate(model, ids, mask, max_new_tokens=4)


def test_positions_of_an_encoder_decoder(tmp_path):
    """A text or a target that is too long would read the last position again and again."""
    folder = tiny.checkpoint(tmp_path / "model", "marian", "seq2seq-lm")
    model = fj.load(folder, head="seq2seq-lm")
    ids, mask = prompts("marian")
    with pytest.raises(fj.InputError, match="has 32 positions, which is fewer than the 33 tokens"):
        generate(model, ids, mask, max_new_tokens=33)
    long = np.ones((1, 33), np.int32)
    for arguments in ((long, long, ids[:1]), (ids[:1], mask[:1], long)):
        with pytest.raises(fj.InputError, match="33 tokens, but the model has 32 positions"):
            model(*arguments)
