"""Folders of runs: who may use them, what stops a run, and what is damaged or left over."""

import dataclasses
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.checkpoint import files
from fusion_jax.cli.demo import bit_equal
from fusion_jax.cli.main import main
from fusion_jax.cli.options import DataOptions
from fusion_jax.training import Recipe, Windows, fit, losses, lottery
from fusion_jax.training.engine import trainer
from fusion_jax.training.engine.fingerprints import bit_sums, fingerprint_of_all_bits
from fusion_jax.training.engine.locks import FolderLock
from fusion_jax.training.engine.step import CompiledStep
from tests import glue, tiny

CONFIG = fj.TrainConfig(max_steps=6, epochs=9, batch_size=2, checkpoint_every=2, log_every=1)
KEY = jax.random.key(0)


def length(model, batch, key):
    return losses.Total((model(batch["input_ids"]) ** 2).sum(), jnp.float32(6))


def train(folder, config=CONFIG, text=(0, 1, 2, 3, 4, 5, 6, 7, 8), **recipe):
    """A run of a model that compiles at once."""
    windows = Windows(np.array(text), context=3, batch_size=2)
    model = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
    return fit(model, windows, length, config, key=KEY, folder=folder, recipe=Recipe(**recipe))


@pytest.fixture(scope="module")
def whole():
    return train(None)


# ------------------------------------------------------------------------------------------------
# The same data and model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "bool"])
def test_one_bit_changes_a_checksum(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (3, 4, 5))).astype(dtype)
    raw = np.asarray(x)
    sums = {bit_sums([x])[0]}
    size = 1 if dtype == "bool" else 8 * x.dtype.itemsize
    for place in range(0, x.size, 7):
        for bit in range(size):
            words = raw.copy().reshape(-1).view(np.uint8)
            words[place * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            sums |= set(bit_sums([jnp.asarray(words.view(raw.dtype).reshape(raw.shape))]))
    assert len(sums) == 1 + size * len(range(0, x.size, 7))


def test_a_checksum_sees_places_shapes_and_names():
    x = jnp.arange(6.0)
    assert bit_sums([x]) != bit_sums([x[::-1]])
    assert bit_sums([x]) != bit_sums([-x])
    models = []
    for names, array in ((("a",), x), (("b",), x), (("a",), x.reshape(2, 3)), (("a", "b"), x)):
        models.append(nnx.Module())
        for name in names:
            setattr(models[-1], name, nnx.Param(array))
    assert len({fingerprint_of_all_bits(model) for model in models}) == 4


def test_a_checksum_does_not_depend_on_the_devices():
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.random.normal(KEY, (16, 3))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    assert bit_sums([spread]) == bit_sums([x])


def test_rounds_are_on_the_same_data(tmp_path):
    """A method of several runs sees its data only through them."""
    model = fj.load(tiny.checkpoint(tmp_path / "model", num_hidden_layers=3))
    texts = [(0, 1, 2, 3, 4, 5, 6, 7, 8)]
    rounds = []

    def round_of(ticket, folder):
        rounds.append(folder.name)
        if rounds[-1] == "round-1" and len(rounds) == 2:
            raise RuntimeError
        return dataclasses.replace(train(folder, text=texts[-1]), model=ticket)

    def again():
        return lottery(model, round_of, rounds=2, layers=-1, folder=tmp_path / "run")

    with pytest.raises(RuntimeError):
        again()
    texts.append((0, 1, 2, 3, 4, 5, 6, 8, 7))
    with pytest.raises(fj.InputError, match="settings \\(training data "):
        again()
    texts.pop()
    assert again().finished and rounds == ["round-0", "round-1", "round-1", "round-1"]


# ------------------------------------------------------------------------------------------------
# One process at a time


def test_two_runs_in_one_folder(whole, tmp_path):
    def second(step, state):
        if step == 3:
            lines = (tmp_path / "metrics.jsonl").read_text()
            owner = rf"in use by process {os.getpid()} on {platform.node()} \(since "
            with pytest.raises(fj.InputError, match=owner):
                train(tmp_path)
            assert (tmp_path / "metrics.jsonl").read_text() == lines

    assert bit_equal(train(tmp_path, on_step=second).model, whole.model)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    train(tmp_path)  # and it is free again


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = "import sys, time, pathlib\nfrom fusion_jax.training.engine.locks import FolderLock\n"
    code += "lock = FolderLock(pathlib.Path(sys.argv[1]))\nprint(flush=True)\ntime.sleep(99)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline()
        with pytest.raises(fj.InputError, match=f"process {process.pid} on"):
            FolderLock(tmp_path)
        process.kill()
    FolderLock(tmp_path).release()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


# ------------------------------------------------------------------------------------------------
# Told to stop


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: in the background, a process starts without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_what_was_done(interruptible, whole, tmp_path, capfd):
    def press(step, state):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 6"):
        train(tmp_path, on_step=press)
    assert "press Ctrl-C again to stop without saving" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert bit_equal(train(tmp_path).model, whole.model)


def test_ctrl_c_twice_stops_at_once(interruptible, tmp_path):
    def press(step, state):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=press)
    assert not (tmp_path / "checkpoints" / "3").exists()
    with pytest.raises(KeyboardInterrupt):  # nothing to save
        train(None, on_step=press)


def test_checkpoints_by_time(tmp_path, monkeypatch):
    clock = [0.0]

    def minute(step, state):
        clock[0] += 60

    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    config = dataclasses.replace(
        CONFIG, checkpoint_every=99, checkpoint_minutes=2.0, keep_checkpoints=9
    )
    train(tmp_path / "run", config, on_step=minute)
    found = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [2, 4, 6]
    config = dataclasses.replace(config, checkpoint_minutes=None)
    train(tmp_path / "none", config, on_step=minute)
    assert [path.name for path in (tmp_path / "none" / "checkpoints").iterdir()] == ["6"]
    assert fj.TrainConfig().checkpoint_minutes == 10


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command that fine-tunes a tiny model, without the run folder."""
    folder = tmp_path_factory.mktemp("command")
    data, model = glue.sst2(folder / "SST-2", n=16), glue.checkpoint(folder / "model")
    options = "--max-steps 4 --batch-size 8 --shapes 1 --log-every 1 --eval-every 9"
    return ["finetune", str(model), "--task", "sst2", "--data", str(data), *options.split()]


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_signals_before_and_in_the_steps_of_a_command(
    number, code, interruptible, command, tmp_path, monkeypatch, capsys
):
    command = [*command, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(DataOptions, "read", lambda self: signal.raise_signal(number))
        assert main(command) == code
    said = "".join(capsys.readouterr())
    assert said.endswith(". To resume, give the same command again.\n") and "step" not in said
    take_step = CompiledStep.__call__

    def stopped(self, state, batch, step):
        if step == 2:
            signal.raise_signal(number)
        return take_step(self, state, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "__call__", stopped)
        assert main(command) == code
    said = "".join(capsys.readouterr())
    assert "topped after step 3" in said
    assert ". To resume, give the same command again.\n" in said
    assert main(command) == 0
    assert "resumed" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.full
def test_a_finished_command_is_extended_by_an_option(command, tmp_path, capsys):
    command = [*command, "--out", str(tmp_path), "--schedule", "constant"]
    assert main(command) == 0
    longer = [*command, "--max-steps", "5"]
    assert main(longer) == 1
    assert "to resume with these on purpose: --resume-with max_steps" in capsys.readouterr().err
    assert main([*longer, "--resume-with", "max_steps"]) == 0
    assert (tmp_path / "checkpoints" / "5").is_dir()


def test_sigterm_leaves_nothing_of_an_output(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        files, "copy_companions", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "new" / "out"
    assert main(["compress", command[1], str(out), "fusion", "--width", "12"]) == 143
    assert capsys.readouterr().err.endswith("terminated\n")
    assert list(out.parent.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_killed_process_left_is_removed(tmp_path):
    """By the next of the same name, unless it is still being written."""
    model = fj.load(tiny.checkpoint(tmp_path / "model"))
    place = tmp_path / "out"

    def killed(save):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as with kill -9
            patch.setattr(files, "copy_companions", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save()

    killed(lambda: fj.save(model, place / "artefact"))
    killed(lambda: fj.save(model, place / "arte"))
    (place / ".artefact.settings").mkdir()
    assert len(list(place.iterdir())) == 3
    with files.new_folder(place / "artefact") as new:
        assert len(list(place.iterdir())) == 3  # the new one for the old one
        with pytest.raises(ZeroDivisionError), files.new_folder(place / "artefact"):
            raise ZeroDivisionError
        assert new.is_dir()
    assert {path.name for path in place.iterdir()} >= {"artefact", ".artefact.settings"}
    assert len(list(place.iterdir())) == 3  # and what was left of "arte"


def test_a_run_removes_what_a_killed_one_left(tmp_path):
    for name in (".best.new.abcdefgh", "last.new", ".last.new.0.new", "best.old", "mine"):
        (tmp_path / name).mkdir()
    train(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "checkpoints",
        "best",  # there was no other
        "mine",
    }


# ------------------------------------------------------------------------------------------------
# Outputs


def test_outputs_are_written_where_links_lead(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model"))
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    fj.save(model, tmp_path / "link")
    assert (tmp_path / "far" / "fusion.json").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "page").symlink_to(tmp_path / "far" / "page.html")
    files.write_text(tmp_path / "page", "x")
    assert (tmp_path / "far" / "page.html").read_text() == "x"


def test_the_longest_names(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "model"))
    for name in ("x" * 250, "\u00e9" * 125):
        fj.save(model, tmp_path / name)
        assert (tmp_path / name / "fusion.json").is_file()
        files.write_text(tmp_path / f"f{name}", "x")
    with pytest.raises(fj.InputError, match=r"cannot write .*: File name too long"):
        files.check_new_folder(tmp_path / ("x" * 256))
    with pytest.raises(fj.InputError, match=r"cannot write .*: File name too long"):
        files.check_new_file(tmp_path / ("x" * 256))


def test_mount_points_are_refused_at_once(tmp_path, monkeypatch):
    place = tmp_path / "a mount"
    place.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == place)
    message = r"is a mount point, .*; give a folder in it, such as .*/a mount/model"
    with pytest.raises(fj.InputError, match=message):
        files.check_new_folder(place)
    assert files.check_new_folder(place, in_place=True) == place  # a run folder
    monkeypatch.undo()
    escaped = str(place).replace(" ", "\\040")
    read = Path.read_text
    line = f"1 2 0:1 / {escaped} rw - ext4 /dev/x rw\n"
    monkeypatch.setattr(
        Path, "read_text", lambda p, **o: line if "mountinfo" in str(p) else read(p, **o)
    )
    with pytest.raises(fj.InputError, match=message):
        files.check_new_folder(place)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "MODEL", "--file", "x.csv", "--out", "no/x.jsonl"],
            "no folder no for x.jsonl",
        ),
        (["predict", "MODEL", "--file", "x.csv", "--out", "file/x.jsonl"], "no folder file for x"),
        (["report", "MODEL", "--out", "."], "is not a file; give the name of a file"),
        (["report", "MODEL", "--out", "/dev/null"], "/dev/null is not a file"),
        (["verify-ntk", "MODEL", "MODEL", "--json", "."], "is not a file"),
        (
            ["compress", "MODEL", "file", "fusion", "--width", "9"],
            "file exists and is not an empty",
        ),
        (["compress", "MODEL", "file/x", "fusion", "--width", "9"], "cannot write to"),
        (["compress", "MODEL", "circle", "fusion", "--width", "9"], "cannot write circle"),
    ],
)
def test_outputs_that_cannot_be_are_found_before_the_work(
    arguments, message, tmp_path, monkeypatch, capsys
):
    """Before the model is looked for, which there is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_text_that_cannot_be_written_names_its_file(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    message = r"could not write .*/page\.html: No space left on device"
    with pytest.raises(OSError, match=message):
        files.write_text(tmp_path / "page.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


# ------------------------------------------------------------------------------------------------
# Full disks and damaged files


def test_a_disk_without_room_for_a_checkpoint(whole, tmp_path, monkeypatch):
    def fill(step, state):
        if step == 4:
            usage = shutil._ntuple_diskusage(10, 10, 0)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    message = (
        r"the disk is full: the checkpoint of step 4 needs .* MB, and .* has 0.0 MB; step 2 is"
    )
    with pytest.raises(OSError, match=message):
        train(tmp_path, on_step=fill)
    monkeypatch.undo()
    assert bit_equal(train(tmp_path).model, whole.model)


# Under load, futures of orbax report what failed once more when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(whole, tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, state):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))

    try:
        with pytest.raises(OSError, match=r"could not write .*: File too large") as error:
            train(tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert bit_equal(train(tmp_path).model, whole.model)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 16
    path.write_bytes(raw)


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoints after 2 and 4 of 6 steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"

    def stop(step, state):
        if step == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(folder, on_step=stop)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip, lambda path: path.write_text("")])
def test_a_damaged_checkpoint_is_never_used(damage, stopped, whole, tmp_path, capsys):
    """Whatever file is damaged: the run ends with the right bits."""
    said = 0
    for i, name in enumerate(files_of(stopped / "checkpoints" / "4")):
        run = shutil.copytree(stopped, tmp_path / str(i))
        damage(run / "checkpoints" / "4" / name)
        assert bit_equal(train(run).model, whole.model), name
        said += "of step 4 is damaged" in capsys.readouterr().err
    assert said > 2


def test_a_wrong_number_in_a_checkpoint_is_noticed(stopped, whole, tmp_path, capsys):
    """As if the disk had changed bits under the compression, and again in the record."""
    import orbax.checkpoint as ocp

    run = shutil.copytree(stopped, tmp_path / "run")
    folder = run / "checkpoints" / "4"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as files:
        state = files.restore(folder / "state")
        name = next(name for name, x in state.items() if x.ndim == 2)
        state[name] = state[name].at[1, 2].add(1e-6)
        shutil.rmtree(folder / "state")
        files.save(folder / "state", args=ocp.args.StandardSave(state))
    assert bit_equal(train(run).model, whole.model)
    assert "step 4 is damaged (its numbers do not have the checksums" in capsys.readouterr().err

    run = shutil.copytree(stopped, tmp_path / "again")
    meta = run / "checkpoints" / "4" / "meta" / "metadata"
    fields = json.loads(meta.read_text())
    fields["history"].append({"step": 1, "x": 1.0})
    meta.write_text(json.dumps(fields))
    train(run)
    assert "step 4 is damaged (its record does not have" in capsys.readouterr().err


def test_no_checkpoint_is_left_undamaged(stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    for step in ("2", "4"):
        truncate(run / "checkpoints" / step / "meta" / "metadata")
    with pytest.raises(fj.InputError, match=r"every checkpoint in .* is damaged \(4: .*; 2: "):
        train(run)
    assert (run / "checkpoints" / "4").is_dir()  # nothing was removed
