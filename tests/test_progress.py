"""What long work says while it runs, on a terminal and in a log."""

import io
import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.main import main
from fusion_jax.training import Windows, fit, losses
from fusion_jax.training.engine import trainer
from fusion_jax.training.engine.step import CompiledStep
from ntk import progress
from ntk.progress import progress_shown, show_progress, show_stage
from tests import tiny


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_time_left_is_that_of_steps_after_the_first(clock, capsys):
    with show_progress("Work", 4, True, first="compiling") as advance:
        for seconds in (60.0, 3.0, 3.0, 3.0):
            clock[0] += seconds
            advance("step")
    assert capsys.readouterr().err.splitlines() == [
        "Work: 0/4 compiling (0.0 s)",
        "Work: 1/4 step (60 s)",
        "Work: 2/4 step (63 s, about 6.0 s left)",
        "Work: 3/4 step (66 s, about 3.0 s left)",
        "Work: 4/4 step (69 s)",
    ]


def test_steps_of_an_earlier_run_do_not_count_for_the_time_left(clock, capsys):
    with show_progress("Work", 1000, True, done=990, first="resumed") as advance:
        for _ in range(2):
            clock[0] += 1000
            advance("step", 2)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Work: 990/1000 resumed (0.0 s)"
    assert said[-1] == "Work: 994/1000 step (33 min, about 50 min left)"


def test_quick_steps_get_a_line_every_two_seconds(clock, capsys):
    with show_progress("Work", 100, True) as advance:
        for i in range(100):
            clock[0] += 0.25
            advance(f"step {i + 1}")
        advance("end", 0, begins=True)
    shown = [int(x) for x in re.findall(r"step (\d+)", capsys.readouterr().err)]
    assert shown == [*range(8, 97, 8), 100]


@pytest.mark.parametrize("around", [True, False])
def test_work_shows_what_the_work_around_it_shows(around, capsys):
    with show_progress("Outer", 1, around), show_stage("Stage"), show_progress("Inner", 1):
        pass
    said = capsys.readouterr().err.split()
    assert said == (["Outer:", "0/1", "(0.0", "s)", "Stage", "...", "Inner:", "0/1", "(0.0", "s)"]
                    if around else [])  # fmt: skip
    with progress_shown(True), show_stage("Quiet", False), show_progress("Inner", 1) as advance:
        advance("step")
    assert capsys.readouterr().err == ""
    with show_stage("After"):
        assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_work_inside_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("Outer[x]", 2) as advance:
        with show_stage("Stage"), show_progress("Inner", 3) as inner:
            inner("layers[0]", 2)
            shown = progress._BARS.get()
            notes = {task.description: task.fields["note"] for task in shown.tasks}
            assert notes == {"Outer[x]": "0/2 ", "Stage": "", "Inner": "2/3 layers[0]"}
            shown.refresh()
        advance("done", 2)
        assert [task.completed for task in shown.tasks] == [2]
        print("on standard output")
    assert progress._BARS.get() is None
    text = sys.stderr.getvalue()
    assert "Outer[x]" in text and "layers[0]" in text and "on standard output" not in text


class TwoShapes(Windows):
    """Batches of two windows, and of one window from the fourth step on."""

    def __call__(self, step):
        return {k: v if step < 3 else v[:1] for k, v in super().__call__(step).items()}


def test_tokens_per_second_leave_out_steps_that_compile(tmp_path, monkeypatch, capsys):
    now, seen = [0.0], set()
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now[0])
    run = CompiledStep.__call__

    def timed(self, state, batch, done):
        shape = batch["input_ids"].shape
        now[0] += 2 if shape in seen else 100
        seen.add(shape)
        return run(self, state, batch, done)

    def loss(model, batch, key):
        return losses.Total((model(batch["input_ids"]) ** 2).sum(), jax.numpy.float32(6))

    monkeypatch.setattr(CompiledStep, "__call__", timed)
    data = TwoShapes(np.arange(9), context=3, batch_size=2)
    config = fj.TrainConfig(max_steps=6, batch_size=2, log_every=2)
    embed = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
    key, folder = jax.random.key(0), tmp_path / "run"
    fit(embed, data, loss, config, key=key, folder=folder, progress=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # 6 tokens in 2 s, beside a step that compiles; then 3 tokens in 2 s.
    assert [line["tokens_per_second"] for line in lines] == [3.0, 3.0, 1.5]
    said = capsys.readouterr().err
    assert re.findall(r"compiling for batches of (\d x \d)", said) == ["2 x 3", "1 x 3"]
    assert "writing a checkpoint" in said
    config = fj.TrainConfig(max_steps=1, batch_size=2)
    fit(embed, data, loss, config, key=key, folder=tmp_path / "one", progress=True)
    assert "tokens_per_second" not in (tmp_path / "one" / "metrics.jsonl").read_text()
    assert "tokens/s" not in capsys.readouterr().err


def test_every_command_announces_its_stages(tmp_path, capsys):
    model, out = tiny.checkpoint(tmp_path / "model", "bert"), tmp_path / "out"
    words = ["compress", str(model), str(out), "prune", "--width", "8", "--layers", "0"]
    assert main(words) == 0
    said = capsys.readouterr()
    begun = re.findall(r"^(?:Loading|Compressing|Writing).*", said.err, re.M)
    assert f"Loading {model}: 0/" in begun[0]
    assert begun[2].startswith("Compressing: 0/1 compiling")
    assert begun[-1] == f"Writing {out} ..."
    assert "Loading" not in said.out
    assert main(["export", str(out), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert f"Loading {out}: 0/" in said and f"Writing {tmp_path / 'hf'} ..." in said
    fj.load(out)  # in Python, only on a terminal
    assert capsys.readouterr().err == ""


def test_calibrating_and_evaluating_count_batches(capsys):
    mlp = fj.Mlp(4, 8, act="relu", rngs=nnx.Rngs(0))
    x = jax.numpy.ones((2, 3, 4))
    with progress_shown(True):
        fj.calibrate(mlp, [{"x": x}, {"x": x}], key=jax.random.key(0))
    steps = re.findall(r"Calibrating: (\d/2)", capsys.readouterr().err)
    assert (steps[0], steps[-1]) == ("0/2", "2/2")
    fj.calibrate(mlp, [{"x": x}], key=jax.random.key(0))
    assert capsys.readouterr().err == ""
