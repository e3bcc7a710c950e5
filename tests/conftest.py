"""Strict settings for all tests; eight devices, so that sharding is tested on any machine."""

import gc
import importlib.util
import itertools
import os
import shutil
import tempfile
from pathlib import Path

# Before NumPy and torch are imported: threads of linear algebra that wait for each other while
# other processes use the cores made a small eigenvalue problem hundreds of times slower, and a
# small model of torch twenty times.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

# Needs torch; doctest would import it.
collect_ignore = ["make_goldens.py"]

# JAX keeps so many objects that looking for garbage after every 700 new ones took a tenth of the
# time.
gc.set_threshold(20_000, 10, 10)

# Compiling takes most of the time, with XLA's newer code generator twice as much of it. Processes
# that tests start read the environment.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):  # a later jaxlib may not know the flag, and would stop
    _FLAG = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Lets tests and their processes share what they compile, as long as the session lasts."""
    if _PROGRAMS not in os.environ:  # neither a worker, which inherits the folder, nor given one
        os.environ[_PROGRAMS] = tempfile.mkdtemp(prefix="fusion-jax-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[_PROGRAMS], ignore_errors=True))
    for name, value in (
        ("jax_compilation_cache_dir", os.environ[_PROGRAMS]),
        ("jax_persistent_cache_min_compile_time_secs", 0.1),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_addoption(parser):
    parser.addoption(
        "--tier",
        choices=("quick", "rest", "full"),
        default="quick",
        help="quick leaves out what is marked full (default); rest runs that and what needs torch; "
        "full runs all",
    )


def pytest_collection_modifyitems(config, items):
    _select_tier(config, items)
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="torch is not installed")
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(skip)


def _select_tier(config, items):
    """Leaves out the tests of the other tier.

    ``@pytest.mark.full`` moves a test to the full tier; ``@pytest.mark.full(quick=2)`` leaves two
    of its cases, evenly spaced, in the quick tier. The rest has all tests that need torch, which
    the quick tier skips where it is not installed.
    """
    tier = config.getoption("--tier")
    if tier == "full":
        return
    cases = {}
    for item in items:
        if item.get_closest_marker("full"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    rest = set()
    for group in cases.values():
        quick = group[0].get_closest_marker("full").kwargs.get("quick", 0)
        kept = {i * len(group) // quick for i in range(quick)}
        rest |= {item for i, item in enumerate(group) if i not in kept}
    if tier == "rest":
        rest |= {item for item in items if item.get_closest_marker("torch")}
    left_out = [item for item in items if (item in rest) != (tier == "rest")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if (item in rest) == (tier == "rest")]


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


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 in one test."""
    with jax.enable_x64(True):
        yield
