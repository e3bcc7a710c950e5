"""Images and other arrays: calibrated from files, and classes of them trained and measured."""

import jax
import numpy as np
import pytest

import fusion_jax as fj
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.training import measure, predict
from tests import tiny
from tests.test_vision import checkpoint

CLASSES = ("no", "maybe", "yes")
CONFIG = fj.TrainConfig(
    max_steps=12, batch_size=8, learning_rate=1e-2, log_every=4, checkpoint_every=4, eval_every=6
)


def vit(folder):
    return fj.load(checkpoint(folder, head="classification"), head="classification")


def bright(count):
    """Images whose class is how bright they are, more than one batch of them."""
    labels = np.arange(count) % 3
    return fj.Arrays(
        {"pixel_values": 0.3 * tiny.images(tiny.VIT, count) + labels[:, None, None, None] - 1},
        labels,
    )


@pytest.fixture(scope="module")
def data():
    return fj.ArrayClassification(labels=CLASSES, train=bright(21), dev={"dev": bright(10)})


def test_a_file_of_images_on_the_command_line(tmp_path, capsys):
    """As in Python, by name, as the first argument, and in a folder."""
    folder = checkpoint(tmp_path / "m", head="classification")
    x = tiny.images(tiny.VIT, 40)
    np.savez(tmp_path / "x.npz", pixel_values=x)
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder/a.npy", x[:32])
    np.save(tmp_path / "folder/b.npy", x[32:])
    for i, source in enumerate(("x.npz", "folder")):
        out = str(tmp_path / f"out{i}")
        options = ["--head", "classification", "--calibration", str(tmp_path / source)]
        assert main(["compress", str(folder), out, *options, "fusion", "--width", "9"]) == 0
        assert f"{40 * 7} positions of the given batches" in capsys.readouterr().out
    batches = [{"pixel_values": x[:32]}, {"pixel_values": x[32:]}]
    method = {"calibration": batches, "key": jax.random.key(0)}
    want, _ = fj.compress(vit(tmp_path / "n"), fj.Fusion(width=9), **method)
    for i in range(2):
        assert bit_equal(fj.load(tmp_path / f"out{i}"), want)
    seen = str(tmp_path / "seen.safetensors")
    assert main(["calibrate", str(folder), str(tmp_path / "x.npz"), seen]) == 0


def test_files_that_do_not_fit_are_one_error(tmp_path, key, capsys):
    folder = checkpoint(tmp_path / "m")
    x = tiny.images(tiny.VIT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "text.txt").write_text("A text.\n")
    np.savez(tmp_path / "rows.npz", pixel_values=x, other=x[:2])
    np.savez(tmp_path / "name.npz", pixels=x)
    np.save(tmp_path / "object.npy", np.array([{}, {}]))
    np.save(tmp_path / "single.npy", x[0])
    np.save(tmp_path / "integers.npy", (255 * x).astype(np.uint8))
    for file, said in (
        ("empty", "has no .npy or .npz files; np.savez"),
        ("damaged.npz", "cannot read calibration from"),
        ("missing.npy", "cannot read calibration from"),
        ("text.txt", "cannot read text; in Python .* or a file .npz of such arrays"),
        ("rows.npz", "same number of rows; pixel_values has 3, other has 2"),
        ("name.npz", "takes pixel_values, images; got pixels"),
        ("object.npy", "cannot read calibration from"),
        ("single.npy", r"got \(3, 8, 12\)"),
        ("integers.npy", "must be floats"),
    ):
        model = fj.load(folder)
        with pytest.raises(fj.InputError, match=said):
            fj.compress(model, fj.Fusion(width=9), key=key, calibration=tmp_path / file)
    out = tmp_path / "out"
    options = ["--calibration", str(tmp_path / "text.txt"), "fusion"]
    assert main(["compress", str(folder), str(out), *options]) == 1
    assert "error: this is a model of images" in capsys.readouterr().err and not out.exists()


def test_a_smaller_model_learns_classes_of_images(tmp_path, key, data):
    model = vit(tmp_path / "m")
    smaller, _ = fj.compress(model, fj.Fusion(width=9), key=key)
    fit = fj.finetune(smaller, data, CONFIG, key=key, folder=tmp_path / "run")
    assert fit.history[-1]["accuracy"] == 1
    best = fj.load(tmp_path / "run/best")
    assert best.provenance.labels == CLASSES
    dev = data.dev["dev"]
    logits = predict(best, dev)
    np.testing.assert_allclose(logits, best(**dev.inputs).logits, atol=1e-5)
    assert measure(data.spec, logits, dev) == {"accuracy": 1}
    again = fj.finetune(smaller, data, CONFIG, key=key, folder=tmp_path / "run")
    assert bit_equal(again.model, fit.model)


def test_tuned_and_healed(tmp_path, key, data):
    """Without labels, with the original as the teacher."""
    model = vit(tmp_path / "m")
    smaller, _ = fj.compress(model, fj.Prune(width=4), key=key)
    tuned = fj.tune(smaller, model, data, CONFIG, key=key).model
    healed = fj.heal(smaller, model, data, steps=6, key=key).model
    images = data.train.inputs["pixel_values"]
    want = model(pixel_values=images, output_hidden_states=True)

    def away(other):
        got = other(pixel_values=images, output_hidden_states=True)
        states = zip(got.hidden_states, want.hidden_states, strict=True)
        return sum(float(np.square(a - b).mean()) for a, b in states), float(
            np.square(got.logits - want.logits).mean()
        )

    assert away(tuned)[0] < away(smaller)[0]
    assert away(healed)[1] < away(smaller)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x, y[:-1]), "as many labels as examples; pixel_values has 21, labels has"),
        (lambda x, y: (x[:0], y[:0]), "as many labels as examples; pixel_values has 0"),
        (lambda x, y: (x, y + 1), "label 3 is not from 0 to 2"),
        (lambda x, y: (x, y + 0.5), "labels must be integers; got float64"),
        (lambda x, y: (x[:, :1], y), r"got \(8, 1, 8, 12\)"),
    ],
)
def test_data_that_does_not_fit_is_an_error(change, said, tmp_path, key, data):
    x, y = change(data.train.inputs["pixel_values"], data.train.labels)
    task = fj.ArrayClassification(labels=CLASSES, train=fj.Arrays({"pixel_values": x}, y))
    with pytest.raises(fj.InputError, match=said):
        fj.finetune(vit(tmp_path / "m"), task, CONFIG, key=key)


def test_numbers_and_other_heads(tmp_path, key):
    """A new head for a number; a head for other classes is an error."""
    model = fj.load(checkpoint(tmp_path / "m"), head="classification", num_labels=1, key=key)
    train = bright(9)
    train = train._replace(labels=train.labels - 0.5)
    task = fj.ArrayClassification(labels=None, train=train, dev={"dev": train},
                                  metrics=("pearson",))  # fmt: skip
    fit = fj.finetune(model, task, CONFIG, key=key)
    assert fit.history[-1]["pearson"] > 0.9
    assert fit.model.provenance.problem_type == "regression"
    with pytest.raises(fj.InputError, match="head has 1 outputs, the task needs 2"):
        fj.finetune(model, fj.ArrayClassification(labels=("a", "b"), train=bright(3)), key=key)
