"""The compiled programs that commands keep, and the compiler options of compression."""

import os
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.cli.programs import MOST_BYTES, keep_programs, shrink
from fusion_jax.compression import batching
from fusion_jax.nn.programs import quick_options

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def settings(monkeypatch):
    """JAX without a folder, and a function that returns the one that it has."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("FUSION_JAX_CACHE", raising=False)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_folder(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    (folder,) = (tmp_path / "fusion_jax" / "programs").iterdir()
    assert settings() == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0  # programs of others would be run
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert settings() == str(tmp_path / "home/.cache/fusion_jax/programs" / folder.name)


@pytest.mark.parametrize("value", ["off", "0", "OFF"])
def test_the_cache_can_be_switched_off(settings, value, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FUSION_JAX_CACHE", value)
    keep_programs()
    assert settings() is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_jax_was_given_stays(settings, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    monkeypatch.setenv("FUSION_JAX_CACHE", str(tmp_path / "other"))
    keep_programs()
    assert settings() == str(tmp_path / "own")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written_is_one_warning(settings, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSION_JAX_CACHE", str(tmp_path / "file"))
    keep_programs()
    assert settings() is None
    (said,) = capsys.readouterr().err.splitlines()
    assert "not kept" in said and "FUSION_JAX_CACHE=off" in said


def test_what_was_not_used_for_longest_goes(tmp_path):
    (tmp_path / "deeper").mkdir()
    for i, name in enumerate(("a", "deeper/b", "c")):
        (tmp_path / name).write_bytes(b"1234")
        os.utime(tmp_path / name, (100 - i, 50))
    shrink(tmp_path, 12)
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 3
    shrink(tmp_path, 7)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a"]
    assert MOST_BYTES > 2**30


COMMAND = """
import sys
from fusion_jax.cli.main import main
import jax
heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
code = main(["inspect", sys.argv[1]])
code = code or main(["compress", sys.argv[1], sys.argv[2], "svd", "--rank", "2"])
hits, misses = (heard.count(f"/jax/compilation_cache/cache_{x}") for x in ("hits", "misses"))
print(hits, misses, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.full
def test_a_second_command_compiles_nothing(tmp_path):
    from tests import tiny

    model = str(tiny.checkpoint(tmp_path / "model"))
    environment = {**os.environ, "FUSION_JAX_CACHE": str(tmp_path / "cache")}
    for name in ("DIR", "MAX_SIZE"):
        environment.pop(f"JAX_COMPILATION_CACHE_{name}", None)
    counts = []
    for i in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, model, str(tmp_path / f"out{i}")],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        counts.append([int(x) for x in done.stderr.splitlines()[-1].split()])
    (_, misses), again = counts
    assert misses > 3
    assert again == [misses + counts[0][0], 0]


def test_compiled_in_less_time(key, monkeypatch):
    """XLA knows the options of each platform, and with those of a CPU solutions are the same."""
    assert quick_options("cpu") is None  # as tests compile without optimizations anyway
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        options = {name: quick_options.__wrapped__(name) for name in ("cpu", "gpu", "tpu")}
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert options["cpu"] is not None
    assert options["gpu"] is not None, "this version of XLA has no such options"
    assert options["tpu"] is None
    subs = fj.Mlp(6, 24, act="gelu", rngs=nnx.Rngs(0)).sub_mlps()
    x = jax.random.normal(key, (64, 6))
    solutions = []
    for found in (None, options["cpu"]):
        monkeypatch.setattr(batching, "quick_options", lambda platform, found=found: found)
        method = fj.Fusion(width=12)
        batching._program.cache_clear()
        solutions.append(fj.compress_mlp(subs, method, key=key, act="gelu", calibration=x))
    first, second = map(jax.tree.leaves, solutions)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
