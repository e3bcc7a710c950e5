"""Matrices in other forms, anywhere in a model: same function, saved, exported, made plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
import ntk
from fusion_jax import mpo
from fusion_jax.cli.demo import bit_equal
from fusion_jax.compression.matrices import weight_matrices
from fusion_jax.nn.linear_forms import find_forms, find_linears
from fusion_jax.training.engine.partition import Partition
from fusion_jax.training.methods.squeezing import lightweight
from ntk.mlp import mlp_weights
from tests import tiny
from tests.helpers import inputs, make, run

EXACT = fj.MPO(bond=None, cores=3)
HEADS = {
    "bert": "masked-lm",
    "gpt2": "causal-lm",
    "llama": "causal-lm",
    "mixtral": "causal-lm",
    "t5": "seq2seq-lm",
    "switch": "seq2seq-lm",
}
families = pytest.mark.parametrize("family", HEADS)


def load(folder, family):
    head = HEADS[family]
    return fj.load(tiny.checkpoint(folder / family, family, head), head=head)


def logits(model, family):
    return run(model, **tiny.batch(family)).logits


def all_but_routers(path):
    return "router" not in path


@families
@pytest.mark.full(quick=1)
def test_every_matrix_as_a_chain_is_the_same_function(family, tmp_path):
    model = load(tmp_path, family)
    chained, report = fj.compress_matrices(model, EXACT, matrices=all_but_routers)
    assert find_forms(chained).keys() == {p for p in weight_matrices(model) if all_but_routers(p)}
    assert not find_forms(model)
    np.testing.assert_allclose(logits(chained, family), logits(model, family), atol=1e-4)
    assert all(row.facts["error"] < 1e-5 for row in report.rows)
    again = fj.load(fj.save(chained, tmp_path / "artefact", report=report))
    assert bit_equal(chained, again)
    assert (logits(again, family) == logits(chained, family)).all()
    exported = fj.load(fj.export_hf(chained, tmp_path / "hf"), head=HEADS[family])
    assert not find_forms(exported)
    np.testing.assert_allclose(logits(exported, family), logits(model, family), atol=1e-4)


def test_plain_and_a_forms_arrays(tmp_path):
    model = load(tmp_path, "bert")
    smaller, _ = fj.compress_matrices(model, fj.Svd(rank=4), matrices=r"layers\.\d\.attention\..*")
    plain = fj.plain(smaller)
    assert not find_forms(plain) and len(find_forms(smaller)) == 12
    np.testing.assert_allclose(logits(plain, "bert"), logits(smaller, "bert"), atol=1e-4)
    kernel = np.asarray(model.layers[1].attention.query.kernel)
    left, values, right = np.linalg.svd(kernel)
    nearest = (left[:, :4] * values[:4]) @ right[:4]
    np.testing.assert_allclose(plain.layers[1].attention.query.kernel, nearest, atol=1e-4)


@pytest.mark.full
def test_generation_with_chains(tmp_path, key):
    model = load(tmp_path, "gpt2")
    chained, _ = fj.compress_matrices(model, EXACT, matrices=".*")
    prompts = np.array([[5, 6, 7]], np.int32)
    a, b = (fj.generate(m, prompts, max_new_tokens=8) for m in (model, chained))
    assert (a == b).all()


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 33])
def test_embedding_as_a_chain(n):
    embed = nnx.Embed(23, 10, rngs=nnx.Rngs(0))
    (embeds, report) = fj.compress_matrices(
        nnx.List([embed]), fj.MPO(bond=None, cores=3), matrices="0"
    )
    chain = embeds[0]
    ids = jax.random.randint(jax.random.key(1), (n, 2), 0, 23)
    np.testing.assert_allclose(chain(ids), embed(ids), atol=1e-5)
    x = jax.random.normal(jax.random.key(2), (n, 2, 10))
    np.testing.assert_allclose(chain.attend(x), embed.attend(x), atol=1e-5)
    np.testing.assert_array_equal(chain.plain().embedding, chain.matrix())
    assert report.rows[0].width_before is None and "width" not in str(report)


@pytest.mark.full(quick=1)
@pytest.mark.parametrize("method", [fj.Svd(rank=2), EXACT, fj.MaskPrune(keep=0.5)])
@pytest.mark.parametrize("kind", [fj.Mlp, fj.GatedMlp])
def test_fused_mlps_can_be_factored(method, kind, key):
    fused, _ = fj.compress(make(kind), fj.Fusion(width=12), key=key)
    both, _ = fj.compress(fused, method, key=key)
    assert type(both) is type(fused) and len(find_forms(both)) == len(find_linears(fused))
    np.testing.assert_array_equal(both.sizes, fused.sizes)
    np.testing.assert_allclose(both(inputs()), both.plain()(inputs()), atol=1e-4)
    if method is EXACT:
        np.testing.assert_allclose(both(inputs()), fused(inputs()), atol=1e-4)


def test_what_is_factored_is_not_factored_again(key):
    chained, _ = fj.compress(make(fj.Mlp), EXACT, key=key)
    for method in (fj.Svd(rank=2), fj.Fusion(width=4)):
        with pytest.raises(fj.InputError, match="up is mpo already"):
            fj.compress(chained, method, key=key)
    with pytest.raises(fj.InputError, match=r"up: the layer is mpo already.*fusion_jax\.plain"):
        fj.compress_matrices(chained, EXACT, matrices="up")


def test_wrong_choices_of_matrices(tmp_path):
    model = load(tmp_path, "bert")
    for chosen, message in (
        ("layers", r"matches no matrix \(an expression .*\d: embeddings\.word, "),
        ("layers.[", "is not a regular expression"),
    ):
        with pytest.raises(fj.InputError, match=message):
            fj.compress_matrices(model, EXACT, matrices=chosen)
    with pytest.raises(fj.InputError, match=r"embeddings\.word: Svd takes no embeddings"):
        fj.compress_matrices(model, fj.Svd(), matrices=r"embeddings\.word")
    with pytest.raises(fj.InputError, match=r"query: rank 40 is above"):
        fj.compress_matrices(model, fj.Svd(rank=40), matrices=r".*query")


def test_matrices_by_index_slice_and_function(key):
    mlp = make(fj.GatedMlp)
    for chosen, expected in (
        (None, {"down", "gate", "up"}),
        (-1, {"up"}),
        ([0, 2], {"down", "up"}),
        (slice(1, None), {"gate", "up"}),
        (lambda path: path == "gate", {"gate"}),
    ):
        smaller, _ = fj.compress_matrices(mlp, fj.Svd(rank=2), matrices=chosen)
        assert find_forms(smaller).keys() == expected


def test_experts_are_factored_one_by_one(tmp_path, key):
    model = load(tmp_path, "mixtral")
    smaller, _ = fj.compress(model, fj.Svd(rank=3), key=key)
    for site, old in zip(fj.sites(smaller), fj.sites(model), strict=True):
        assert site.mlp.stack == (4,) and site.mlp.up.rank == 3
        for e in range(4):
            one = jax.tree.map(lambda x, e=e: x[e], old.mlp)
            alone, _ = fj.compress(one, fj.Svd(rank=3), key=key)
            np.testing.assert_allclose(site.mlp.up.matrix()[e], alone.up.matrix(), atol=1e-5)


@pytest.mark.full
def test_flops_and_parameters_of_forms(key):
    mlp = fj.Mlp(96, 384, act="gelu", rngs=nnx.Rngs(0))
    _, report = fj.compress(mlp, fj.Svd(rank=0.25), key=key)
    assert report.after.mlp_flops == 2 * 2 * 19 * (96 + 384)
    chained, report = fj.compress(mlp, fj.MPO(bond=0.25, cores=3), key=key)
    plan = mpo.plan(1024, chained.up.layout), mpo.plan(1024, chained.down.layout)
    assert report.after.mlp_flops == sum(round(p.flops / 1024) for p in plan)
    assert report.after.mlp_params < 0.26 * report.before.mlp_params
    light = lightweight(chained)
    counts = [v.size for v in jax.tree.leaves(nnx.state(light, nnx.Param))]
    assert sum(counts) < 0.5 * report.after.mlp_params
    np.testing.assert_array_equal(light(inputs(96)), chained(inputs(96)))


@pytest.mark.full
def test_bfloat16_and_frozen_cores_compute_in_the_inputs_dtype(key):
    mlp = make(fj.Mlp, dtype=jnp.bfloat16)
    light = lightweight(fj.compress(mlp, EXACT, key=key)[0])
    assert light(inputs(dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert light(inputs()).dtype == jnp.float32


@pytest.mark.full
@pytest.mark.parametrize("method", [fj.Svd(rank=2), EXACT, fj.MaskPrune(keep=0.5)])
def test_kernels_are_by_a_forms_own_parameters(method, key):
    mlp, _ = fj.compress(make(fj.Mlp), method, key=key)
    with pytest.raises(ntk.InputError, match="is not a plain linear layer"):
        mlp_weights(mlp)
    f, params = ntk.functional(mlp)
    x = inputs(n=4)
    jacobian = jax.jacobian(lambda p: f(p, x))(params)
    flat = np.concatenate([j.reshape(4, 3, -1) for j in jax.tree.leaves(jacobian)], axis=-1)
    assert flat.shape[-1] == sum(v.size for v in jax.tree.leaves(nnx.state(mlp, nnx.Param)))
    expected = np.einsum("iou,jpu->ijop", flat, flat)
    np.testing.assert_allclose(ntk.kernel(f, params, x), expected, rtol=1e-4, atol=1e-4)


def test_a_factored_pooler_loads_back(tmp_path):
    model = fj.load(tiny.checkpoint(tmp_path / "bert"))
    smaller, _ = fj.compress_matrices(model, fj.Svd(rank=4), matrices=r"layers\..*|pooler")
    again = fj.load(fj.save(smaller, tmp_path / "artefact"))
    assert bit_equal(smaller, again) and "pooler" in find_forms(again)


def test_nan_in_a_matrix_names_it(tmp_path):
    model = load(tmp_path, "bert")
    kernel = model.layers[1].mlp.up.kernel
    kernel.set_value(kernel[...].at[0, 0].set(jnp.nan))
    with pytest.raises(fj.InputError, match=r"NaN or infinite weights in layers\.1\.mlp\.up$"):
        fj.compress_matrices(model, EXACT, matrices=".*")


def test_embedding_with_frozen_cores_in_bfloat16():
    embed = nnx.Embed(23, 10, rngs=nnx.Rngs(0))
    embeds, _ = fj.compress_matrices(
        nnx.List([embed]), fj.MPO(bond=None, cores=3), matrices="0", progress=False
    )
    parts = Partition(lightweight(embeds), compute_dtype=jnp.bfloat16)
    computed = parts.compute(*parts.split(lightweight(embeds)))
    assert computed[0](jnp.array([[1, 2]])).dtype == jnp.bfloat16


class Twice(nnx.Module):
    """One MLP at two places, as ALBERT has them."""

    def __init__(self):
        self.first = fj.Mlp(12, 48, act="gelu", rngs=nnx.Rngs(0))
        self.others = nnx.List([self.first, fj.Mlp(12, 48, act="gelu", rngs=nnx.Rngs(1))])


def test_shared_modules_stay_shared(key):
    model = Twice()
    smaller, report = fj.compress(model, fj.Prune(width=0.25), layers=0, key=key)
    assert len(report.rows) == 1 and smaller.first is smaller.others[0]
    assert smaller.first.width == 12 and smaller.others[1].width == model.first.width == 48
    low, _ = fj.compress_matrices(model, fj.Svd(rank=4), matrices="first.up|others.0.up")
    assert low.first is low.others[0] and len(find_forms(low)) == 1
    plain = fj.plain(low)
    assert plain.first is plain.others[0] and not find_forms(plain)
