"""Mistakes of newcomers end in one sentence that names the way out."""

import os
import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import fusion_jax as fj
import ntk
from fusion_jax.cli.main import main
from fusion_jax.training.engine.trainer import Fit
from tests import tiny
from tests.helpers import unchecked


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compres a b", "there is no command 'compres'; did you mean 'compress'?\n"),
        ("xyz", "there is no command 'xyz'; known: bench, calibrate,"),
        ("compress prun a b", "there is no method 'prun'; did you mean 'prune'?\n"),
        ("compress a b", "give a method after MODEL and OUT: "),
        ("compress sketch a b --keep 5", "--keep must be at least 0 and below 1; got 5.0; see "
         "fusion-jax compress sketch --help\n"),
        ("compress a b prune --width 0", "--width must be at least 1; got 0; see fusion-jax "
         "compress prune --help\n"),
        ("finetune a --out b --batch-size=0", "--batch-size must be at least 1; got 0; see "
         "fusion-jax finetune --help\n"),
    ],
)  # fmt: skip
def test_wrong_usage(line, message, capsys):
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1 and not said.out


def test_misspelled_options_are_still_explained(capsys):
    assert main(["evaluate", "model", "--taks", "sst2"]) == 2
    assert "--task TASK" in capsys.readouterr().err


def test_a_missing_folder_is_called_so(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("./nothing", "nothing/there", "nothing"):
        assert main(["inspect", name]) == 1
        assert capsys.readouterr().err.startswith(f"error: no such folder: {name}")


def test_nobody_reads_the_output():
    """As in `fusion-jax --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fusion_jax.cli", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode in (0, 141)


INTERRUPTED = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "fusion_jax.cli.main":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
import fusion_jax_cli
sys.exit(fusion_jax_cli.main())
"""


def test_interrupted_while_it_is_imported():
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("command", ["verify-ntk", "report"])
def test_nothing_is_compressed(command, tmp_path, capsys):
    folder = str(tiny.checkpoint(tmp_path / "model"))
    files = {"verify-ntk": [folder, folder], "report": [folder, "--out", str(tmp_path / "a.html")]}
    assert main([command, *files[command]]) == 1
    assert f"nothing in {folder} is compressed" in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()


class Network(nnx.Module):
    """A module that has nothing of this library."""

    def __init__(self, rngs, part):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.part = part
        self.last = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.part(self.first(x)))


def with_dropout():
    rngs = nnx.Rngs(0)
    return Network(rngs, nnx.Dropout(0.5, rngs=rngs))


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(2)(x)


X = jnp.ones((4, 3))


def test_modules_of_others(tmp_path):
    model = with_dropout()
    with pytest.raises(fj.InputError, match=r"Network has no MLP .*: adopt its MLPs with fusion"):
        fj.compress(model, fj.Fusion(width=4), key=jax.random.key(0))
    exported = pytest.raises(fj.InputError, match=r"fusion_jax.save saves any module")
    with unchecked(), exported:
        fj.export_hf(model, tmp_path / "out")
    wrong = pytest.raises(fj.InputError, match="model must be a Flax NNX module; got Linen")
    with unchecked(), wrong:
        fj.compress(Linen(), fj.Fusion(width=4), key=jax.random.key(0))  # type: ignore[arg-type]


def test_kernels_of_modules():
    model = with_dropout()
    with pytest.raises(
        fj.InputError, match=r"f, params = ntk.functional\(model\), then ntk.kernel"
    ):
        ntk.kernel(model, X)
    with pytest.raises(fj.InputError, match=r"call model.eval\(\) before ntk.functional"):
        ntk.kernel(*ntk.functional(model), X)
    normed = Network(nnx.Rngs(0), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    with pytest.raises(fj.InputError, match=r"call model.eval\(\) before ntk.functional"):
        ntk.kernel(*ntk.functional(normed), X)
    model.eval()
    f, params = ntk.functional(model)
    with pytest.raises(
        fj.InputError, match=r"returns shape \(2,\). One example alone is x\[None\]"
    ):
        ntk.kernel(f, params, X[0])
    assert ntk.kernel(f, params, X).shape == (4, 4, 2, 2)


def test_kernels_of_linen_modules():
    module = Linen()
    variables = module.init(jax.random.key(0), X)
    for call in (lambda: ntk.functional(module), lambda: ntk.kernel(module, variables, X)):
        with pytest.raises(fj.InputError, match=r"ntk.functional\(module.apply, variables\)"):
            call()
    f, params = ntk.functional(module.apply, variables)
    assert ntk.kernel(f, params, X).shape == (4, 4, 2, 2)


def test_results_are_shown_in_few_lines():
    mlp = fj.Mlp(3, 8, act="gelu", rngs=nnx.Rngs(0))
    result = Fit(model=mlp, step=3, finished=True, history=[])
    assert repr(result) == "Fit(step=3, finished=True, history=[], data={})"
    _, report = fj.compress(mlp, fj.Fusion(width=4), key=jax.random.key(0))
    assert len(repr(report)) < 1000
    found = ntk.compare(jnp.eye(40), jnp.eye(40))
    assert len(repr(found)) < 300
