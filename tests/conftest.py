"""Strict settings for all tests; eight devices, so that sharding is tested on any machine."""

import contextlib
import importlib.util
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest

# Needs torch; doctest would import it.
collect_ignore = ["make_goldens.py"]

# Compiling takes most of the time.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Lets tests and their processes share what they compile, as long as the session lasts."""
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
        os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="fusion-jax-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[_PROGRAMS], ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[_PROGRAMS])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="torch is not installed")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)


_PROGRAMS = "FUSION_JAX_TEST_PROGRAMS"
_MAPS = Path("/proc/self/maps")
_count = itertools.count()


@pytest.fixture(autouse=True)
def _few_programs():
    """Forgets compiled programs before Linux runs out of maps for their code.

    Each program takes several, a process may have 65,530 (vm.max_map_count), and XLA crashes there.
    """
    yield
    if next(_count) % 8 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@contextlib.contextmanager
def unchecked():
    """What users get for arguments of a wrong type, where no types are checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 in one test."""
    with jax.enable_x64(True):
        yield
