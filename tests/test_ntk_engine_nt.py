"""neural-tangents on this jax: all three implementations against brute force."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

import ntk
from tests.helpers import unchecked
from tests.ntk_models import contracted, reference, relative

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 14),
    reason="neural-tangents requires TensorFlow, without wheels there",
)

IMPLEMENTATIONS = ["structured-derivatives", "jacobian-contraction", "ntk-vector-products"]


@pytest.mark.full(quick=2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mlp", "module", "bert", "zoo"])
def test_equals_brute_force(name, implementation, x64):
    f, params, (x1, x2), (j1, j2) = reference(name)
    for other, axes in ((None, ()), (x2, (-1,))) if name != "bert" else ((x2, ()),):
        options = {
            "trace_axes": axes,
            "engine": "neural-tangents",
            "implementation": implementation,
        }
        if name == "zoo" and implementation == "structured-derivatives":
            with pytest.raises(ntk.InputError, match="cannot do an operation"):
                ntk.kernel(f, params, x1, other, **options)
            continue
        got = ntk.kernel(f, params, x1, other, **options)
        want = contracted(j1, j1 if other is None else j2, trace_axes=axes)
        assert relative(got, want) < 1e-10


def test_refusals():
    x = jnp.ones((2, 2))
    with pytest.raises(ntk.InputError, match="does not have the Adam kernel"):
        ntk.kernel(lambda p, x: x @ p, x, x, engine="neural-tangents", kind="adam")
    with unchecked(), pytest.raises(ntk.InputError, match="did you mean 'structured-derivatives'"):
        ntk.kernel(lambda p, x: x @ p, x, x, engine="neural-tangents", implementation="structured")
    with pytest.raises(ntk.InputError, match="too small for one example"):
        ntk.kernel(lambda p, x: x @ p, x, x, engine="neural-tangents", memory_limit=1)


CODE = """
import sys, jax, jax.core, jax.lax, jax.interpreters.ad as ad, jax.extend
modules = jax, jax.core, jax.lax, ad, jax.numpy
before = [set(vars(m)) for m in modules]
import ntk
assert "neural_tangents" not in sys.modules
x = jax.numpy.ones((2, 2))
ntk.kernel(lambda p, x: x @ p, x, x, engine="neural-tangents")
assert "neural_tangents" in sys.modules
assert not {"tensorflow", "tf2jax", "jax.util"} & set(sys.modules), sys.modules.keys()
for m, names in zip(modules, before):
    assert not {n for n in set(vars(m)) - names if n[0] != "_" and type(vars(m)[n]) != type(m)}, m
"""


def test_jax_is_left_as_found_and_tensorflow_is_not_imported():
    subprocess.run([sys.executable, "-W", "error", "-c", CODE], check=True)


MISSING = """
import sys
sys.modules["neural_tangents"] = None
import jax.numpy as jnp, ntk
try:
    ntk.kernel(lambda p, x: x @ p, jnp.ones((2, 2)), jnp.ones((2, 2)), engine="neural-tangents")
except ntk.InputError as error:
    assert "not installed" in str(error)
else:
    raise AssertionError
"""


def test_package_not_installed():
    subprocess.run([sys.executable, "-W", "error", "-c", MISSING], check=True)
