"""A model as a function of chosen parameters and outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ntk
from tests.ntk_models import classifier, mlp, tokens


def names(params):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return [
        jax.tree_util.keystr(p, simple=True, separator=".").removesuffix(".value") for p in paths
    ]


def test_module_equals_the_model():
    model, x = classifier(jnp.float32), tokens(3, jax.random.key(0))
    f, params = ntk.functional(model, outputs="logits")
    np.testing.assert_array_equal(f(params, x), model(**x).logits)
    # In order, by position or alone, as x says.
    np.testing.assert_array_equal(f(params, tuple(x.values())), f(params, x))
    del x["attention_mask"]
    np.testing.assert_array_equal(f(params, x["input_ids"]), f(params, x))


@pytest.mark.full(quick=4)
@pytest.mark.parametrize(
    ("wrt", "count"),
    [
        (None, 41),
        (r"layers\.0\.mlp\..*", 4),
        (r".*kernel", 14),
        (nnx.Param, 41),
        (nnx.PathContains("attention"), 16),
        (lambda path, value: value.get_value().ndim == 1, 24),
        (lambda path: path.endswith("kernel"), 14),
        (slice(3), 3),
    ],
)
def test_wrt(wrt, count):
    model, x = classifier(jnp.float32), tokens(2, jax.random.key(0))
    f, params = ntk.functional(model, wrt=wrt, outputs="logits")
    assert len(names(params)) == count
    np.testing.assert_array_equal(f(params, x), model(**x).logits)


def test_variables_that_are_no_params_never_count():
    class Scaled(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((2, 1)))
            self.sizes = nnx.Variable(jnp.full((1, 1), 3.0))

        def __call__(self, x):
            return x @ self.w[...] * self.sizes[...]

    for wrt in (None, ".*", nnx.Variable):
        f, params = ntk.functional(Scaled(), wrt=wrt)
        assert names(params) == ["w"]
        assert float(f(params, jnp.ones((1, 2)))[0, 0]) == 6.0


def test_plain_function():
    f, params, inputs = mlp(jnp.float32)
    x = inputs(3, jax.random.key(0))
    g, every = ntk.functional(f, params)
    assert sorted(every) == ["down.0", "down.1", "up.0", "up.1"]
    h, some = ntk.functional(f, params, wrt=r"up\..*")
    assert sorted(some) == ["up.0", "up.1"]
    np.testing.assert_array_equal(g(every, x), f(params, x))
    np.testing.assert_array_equal(h(some, x), f(params, x))
    assert not np.allclose(h(jax.tree.map(lambda a: 2 * a, some), x), f(params, x))


def test_outputs():
    model, x = classifier(jnp.float32), tokens(3, jax.random.key(0))
    out = model(**x)

    def chosen(outputs):
        f, params = ntk.functional(model, outputs=outputs)
        return f(params, x)

    np.testing.assert_array_equal(chosen("last_hidden_state"), out.last_hidden_state)
    np.testing.assert_array_equal(
        chosen(ntk.token(-1, of="last_hidden_state")), out.last_hidden_state[:, -1]
    )
    np.testing.assert_array_equal(chosen(lambda out: out.logits[:, 1]), out.logits[:, 1])
    np.testing.assert_array_equal(
        chosen(ntk.probability(0)), jax.nn.softmax(out.logits, axis=-1)[:, 0]
    )
    f, params = ntk.functional(lambda p, x: {"a": x @ p}, jnp.ones((2, 2)), outputs="a")
    assert f(params, jnp.ones((1, 2))).shape == (1, 2)


def test_errors():
    model, x = classifier(jnp.float32), tokens(2, jax.random.key(0))
    with pytest.raises(ntk.InputError, match=r"matches no parameter.*whole path.*embeddings"):
        ntk.functional(model, wrt="mlp")
    with pytest.raises(ntk.InputError, match="not a regular expression"):
        ntk.functional(model, wrt="(")
    with pytest.raises(ntk.InputError, match="has no parameter"):
        ntk.functional(nnx.Dropout(0.1))
    with pytest.raises(ntk.InputError, match="holds its own"):
        ntk.functional(model, {})
    with pytest.raises(ntk.InputError, match="needs params"):
        ntk.functional(jnp.tanh)
    f, params = ntk.functional(model, outputs="logit")
    with pytest.raises(ntk.InputError, match="did you mean 'logits'"):
        f(params, x)
    f, params = ntk.functional(model, outputs="pooler_output")
    with pytest.raises(ntk.InputError, match="None as 'pooler_output'"):
        f(params, x)
    f, params = ntk.functional(model)
    with pytest.raises(ntk.InputError, match=r"must return one array.*EncoderOutput.*outputs="):
        ntk.kernel(f, params, x)
