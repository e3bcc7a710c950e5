"""Loading, saving and exporting: every way in which files can be wrong."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from huggingface_hub import ModelCard

import fusion_jax as fj
from fusion_jax.checkpoint import files, tensor_files
from fusion_jax.cli.demo import bit_equal
from fusion_jax.models.bert import Bert, BertConfig
from fusion_jax.models.registry import FAMILIES
from fusion_jax.models.tokens import load_tokenizer
from fusion_jax.nn.surgery import path_name
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.checkpoint(tmp_path / "model")


def rewritten(folder, change):
    """The folder with its tensors changed."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def fails(folder, *patterns, **arguments):
    with pytest.raises(fj.InputError) as error:
        fj.load(folder, **arguments)
    for pattern in patterns:
        assert pattern in str(error.value), str(error.value)
    return str(error.value)


def test_no_folder(tmp_path):
    fails(tmp_path / "nothing", "no such folder")
    fails("./nothing", "no such folder")


def test_no_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "has no config.json")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    fails(folder, "config.json cannot be read: not valid JSON")
    (folder / "config.json").write_text("[]")
    fails(folder, "does not hold a JSON object")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "has no model.safetensors")
    (folder / "pytorch_model.bin").touch()
    fails(folder, "convert them to safetensors")


def test_unknown_model_type_lists_the_known(tmp_path):
    known = ", ".join(sorted(FAMILIES))
    unknown = tiny.checkpoint(tmp_path / "a", model_type="xyz")
    fails(unknown, f"'xyz' is not supported; supported: {known}")
    fails(tiny.checkpoint(tmp_path / "b", model_type="bertt"), "did you mean 'bert'?")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "only absolute position"),
        ({"is_decoder": True}, "only encoders"),
        ({"hidden_act": "gellu"}, "did you mean 'gelu'?"),
        ({"num_attention_heads": 5}, "not a multiple"),
    ],
)
def test_variants_that_are_not_implemented(tmp_path, fields, message):
    fails(tiny.checkpoint(tmp_path / "model", **fields), message)


def test_all_problems_in_one_message(folder):
    def change(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        tensors["encoder.layer.7.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["pooler.dense.weight"] = np.zeros((32, 31), np.float32)

    fails(
        rewritten(folder, change),
        "missing: encoder.layer.1.output.dense.bias",
        "not part of the model: encoder.layer.7.output.dense.bias",
        "pooler.dense.weight is (32, 31), should be (32, 32)",
    )


def test_a_name_must_match_as_a_whole(folder):
    def change(tensors):
        tensors["encoder.layer.1.output.dense.bias.old"] = np.zeros(32, np.float32)

    fails(rewritten(folder, change), "not part of the model: encoder.layer.1.output.dense.bias.old")


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    fails(folder, "truncated or corrupt", str(path))


def test_corrupt_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    fails(folder, "truncated or corrupt")


def test_integer_weights(folder):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.int32)

    fails(rewritten(folder, change), "no floating-point weights")


def sharded(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    weight_map = {}
    for i, names in enumerate(np.array_split(sorted(tensors), 3)):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def test_sharded_weights(folder, tmp_path):
    want = fj.load(folder)
    assert bit_equal(want, fj.load(sharded(folder)))
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails(folder, "lacks model-00002-of-00003.safetensors")


def test_prefix_and_old_names_are_read(tmp_path):
    """As in the original bert-base-uncased: a prefix, gamma and beta, and a next-sentence head."""
    plain = tiny.checkpoint(tmp_path / "plain")
    old = tiny.checkpoint(tmp_path / "old")

    def change(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            renamed = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors["bert." + renamed.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)
        tensors["cls.predictions.bias"] = np.zeros(99, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(40)[None]

    assert bit_equal(fj.load(plain), fj.load(rewritten(old, change)))


def test_model_without_pooler(folder):
    def change(tensors):
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    model = fj.load(rewritten(folder, change))
    out = model(**tiny.batch("bert"))
    assert out.pooler_output is None
    fails(folder, "missing", "pooler.dense.weight", head="classification")


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.full(quick=1)
def test_new_head_needs_a_key(tmp_path, family, key):
    folder = tiny.checkpoint(tmp_path / "model", family)
    fails(folder, "to make a new one: key= in Python", head="classification")
    fails(folder, "to make a new one: key= in Python", head="masked-lm")
    model = fj.load(folder, head="classification", num_labels=5, key=key)
    assert model(**tiny.batch(family)).logits.shape == (3, 5)
    same = fj.load(folder, head="classification", num_labels=5, key=key)
    other = fj.load(folder, head="classification", num_labels=5, key=jax.random.key(1))
    assert bit_equal(model, same)
    assert not bit_equal(model, other)
    weights = model.head.out.kernel[...]
    assert 0.01 < weights.std() < 0.04
    base = fj.load(folder)
    assert (base.layers[0].mlp.up.kernel[...] == model.layers[0].mlp.up.kernel[...]).all()


def test_num_labels(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "bert", "classification")
    assert fj.load(folder, head="classification").config.num_labels == 3
    fails(folder, "classifier.weight is (3, 32), should be (5, 32)", head="classification",
          num_labels=5)  # fmt: skip
    fails(folder, "num_labels is for head='classification'", num_labels=3)
    fails(folder, "at least 1", head="classification", num_labels=0)
    # The base model of a fine-tuned checkpoint.
    assert fj.load(folder)(**tiny.batch("bert")).logits is None


def test_dtype(folder):
    assert fj.load(folder).embeddings.word.embedding.dtype == jnp.float32
    assert fj.load(folder, dtype="bfloat16").embeddings.word.embedding.dtype == jnp.bfloat16
    fails(folder, "jax_enable_x64", dtype=jnp.float64)
    fails(folder, "floating-point", dtype=jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_of_the_files_is_kept(folder, dtype):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    model = fj.load(rewritten(folder, change))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {x.dtype for x in leaves} == {jnp.dtype(dtype)}


def test_float64_files_become_float32(folder):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float64)

    assert fj.load(rewritten(folder, change)).embeddings.word.embedding.dtype == jnp.float32


def test_artefact_of_a_fused_classifier(tmp_path, key):
    folder = tiny.checkpoint(tmp_path / "model", "bert", "classification")
    model = fj.load(folder, head="classification", dtype=jnp.bfloat16)
    smaller, _ = fj.compress(model, fj.Fusion(width=0.25, scaling="sgd"), layers=[0, 2], key=key)
    smaller, _ = fj.compress(smaller, fj.Fusion(width=7), layers=1, key=key)
    again = fj.load(fj.save(smaller, tmp_path / "artefact"))
    assert bit_equal(smaller, again)
    assert [site.mlp.width for site in fj.sites(again)] == [12, 7, 12]
    assert again.provenance.head == "classification"
    assert again.provenance.name == os.fspath(folder)
    assert len(again.provenance.history) == 2
    original = (folder / "config.json").read_bytes()
    assert (tmp_path / "artefact" / "config.json").read_bytes() == original


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_artefact_and_export_of_fused_experts(family, tmp_path, key):
    """The experts of a layer are one site; routers stay, and shards are read back."""
    head = dict(tiny.GENERATIVE)[family]
    model = fj.load(tiny.checkpoint(tmp_path / "model", family, head), head=head)
    layers = [site.path for site in fj.sites(model) if site.mlp.stack]
    assert all(path.endswith(".mlp.experts") for path in layers)
    smaller, report = fj.compress(model, fj.Fusion(width=12), layers=".*experts", key=key)
    assert [row.site for row in report.rows] == layers
    for site in fj.sites(smaller):
        if site.mlp.stack:
            assert site.mlp.sizes[...].sum(-1).tolist() == [24] * 4
    again = fj.load(fj.save(smaller, tmp_path / "artefact"))
    assert bit_equal(smaller, again)
    exported = fj.load(fj.export_hf(smaller, tmp_path / "hf"), head=head)
    batch = tiny.batch(family)
    a, b = (jax.jit(lambda m, x: m(**x))(m, batch) for m in (again, exported))
    for x, y in zip(a.router_logits, b.router_logits, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    np.testing.assert_allclose(a.logits, b.logits, atol=1e-4)


@pytest.mark.full
def test_export_has_a_width_for_each_kind_of_mlp(tmp_path, key):
    """Dense layers, experts and the shared expert of Qwen2-MoE have fields of their own."""
    model = fj.load(tiny.checkpoint(tmp_path / "model", "qwen2-moe", "causal-lm"), head="causal-lm")
    plan = {
        "layers.0.mlp": fj.Fusion(width=5),
        "layers.1.mlp.experts": fj.Fusion(width=6),
        "layers.1.mlp.shared": fj.Fusion(width=7),
        "layers.2.mlp": fj.Fusion(width=8),
        "layers.3.mlp": fj.Fusion(width=3),
    }
    smaller, _ = fj.compress(model, plan, key=key)
    folder = fj.export_hf(smaller, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    assert [config[name] for name in names] == [8, 8, 7]
    batch = tiny.batch("qwen2-moe")
    a, b = (m(**batch).logits for m in (smaller, fj.load(folder, head="causal-lm")))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_large_models_are_written_in_shards(folder, tmp_path, monkeypatch):
    model = fj.load(folder)
    monkeypatch.setattr(files, "SHARD_BYTES", 40_000)
    for write in (fj.save, fj.export_hf):
        new = write(model, tmp_path / write.__name__)
        shards = sorted(new.glob("*.safetensors"))
        assert len(shards) > 2
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
        assert all(shard.stat().st_size < 50_000 for shard in shards)
        assert bit_equal(fj.load(new), model)


def test_missing_experts_are_listed(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", "mixtral", "causal-lm")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    fails(rewritten(folder, lambda t: t.pop(name)), f"missing: {name}", head="causal-lm")


@pytest.mark.full
def test_artefact_gets_a_new_head(folder, tmp_path, key):
    smaller, _ = fj.compress(fj.load(folder), fj.Fusion(width=12), key=key)
    artefact = fj.save(smaller, tmp_path / "artefact")
    fails(artefact, "key= in Python", head="classification")
    tuned = fj.load(artefact, head="classification", num_labels=4, key=key)
    assert tuned(**tiny.batch("bert")).logits.shape == (3, 4)
    again = fj.load(fj.save(tuned, tmp_path / "tuned"))
    assert bit_equal(tuned, again)
    exported = json.loads((fj.export_hf(tuned, tmp_path / "hf") / "config.json").read_text())
    assert len(exported["id2label"]) == 4
    assert exported["intermediate_size"] == 12
    assert exported["architectures"] == ["BertForSequenceClassification"]


def test_newer_or_damaged_artefact(folder, tmp_path):
    artefact = fj.save(fj.load(folder), tmp_path / "artefact")
    fields = json.loads((artefact / "fusion.json").read_text())

    def write(**changes):
        (artefact / "fusion.json").write_text(json.dumps({**fields, **changes}))

    write(format=99)
    fails(artefact, "newer version of fusion-jax")
    write(sites={})
    fails(artefact, "cannot read site layers.0.mlp")
    write(sites={p: {"module": "Nothing", "width": 3} for p in fields["sites"]})
    fails(artefact, "cannot read site layers.0.mlp")
    write()
    rewritten(artefact, lambda tensors: tensors.pop("pooler.bias"))
    fails(artefact, "missing: pooler.bias")


def test_templates_and_pooling_come_along(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    files = {
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "modules.json": "[]",
        "sentence_bert_config.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "generation_config.json": '{"temperature": 0.6}',
    }
    for name, text in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "1_Pooling" / "run.py").write_text("")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 8}}))
    artefact = fj.save(fj.load(source), tmp_path / "artefact")
    exported = fj.export_hf(fj.load(artefact), tmp_path / "hf")
    for name, text in files.items():
        assert (artefact / name).read_text() == (exported / name).read_text() == text
    assert not (exported / "1_Pooling" / "run.py").exists()
    assert (exported / "1_Pooling").stat().st_mode & 0o777 == exported.stat().st_mode & 0o777
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    head = fj.load(source, head="classification", key=jax.random.key(0))
    assert not (fj.export_hf(head, tmp_path / "head") / "modules.json").exists()


def test_code_in_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    """Not even if someone would type y."""
    source = shutil.copytree(folder, tmp_path / "source")
    ran = tmp_path / "ran"
    fields = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    (source / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with contextlib.suppress(fj.InputError):
        load_tokenizer(str(source))
    assert not ran.exists()


def test_model_card_carries_on_what_holds_for_the_smaller_model(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "source")
    (source / "LICENSE").write_text("Do good.")
    (source / "README.md").write_text(
        "---\nlicense: mit\nbase_model: someone/original\nmetrics: [accuracy]\ntags: [tiny]\n---\n"
        "# Tiny\nAll about it.\n"
        "## How to cite\n```bibtex\n# not a heading\n@misc{tiny}\n```\n## More\nNothing.\n"
    )
    model = fj.load(source)
    smaller, report = fj.compress(model, fj.Prune(width=3), layers=[1], key=jax.random.key(0))
    artefact = fj.save(smaller, tmp_path / "artefact", report=report)
    exported = fj.export_hf(fj.load(artefact), tmp_path / "hf")
    for new, library in ((artefact, "fusion-jax"), (exported, "transformers")):
        card = ModelCard.load(new / "README.md")
        assert card.data.to_dict() == {
            "license": "mit",
            "base_model": "someone/original",
            "library_name": library,
            "tags": ["tiny", "fusion-jax"],
        }
        assert "# not a heading\n@misc{tiny}\n```" in card.text
        assert "All about it" not in card.text and "Nothing" not in card.text
        assert str(report) in card.text
        assert card.text.count("## License") == card.text.count("arxiv.org") == 1
        assert (new / "LICENSE").read_text() == "Do good."
    wide, narrow = report.rows[0].params_before, report.rows[0].params_after
    assert f"{wide - narrow:,} of the numbers in the file are such zeros" in card.text

    (source / "README.md").write_text("---\n: : [\n---\n")  # nothing depends on what others write
    assert (fj.save(fj.load(source), tmp_path / "again") / "README.md").is_file()


def test_tokenizer_files_come_along(folder, tmp_path):
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "notes.txt").write_text("not a tokenizer file")
    model = fj.load(folder)
    for new in (fj.save(model, tmp_path / "a"), fj.export_hf(model, tmp_path / "b")):
        assert (new / "vocab.txt").read_text() == "[PAD]\n"
        assert not (new / "notes.txt").exists()
    again = fj.load(tmp_path / "a")
    assert (fj.save(again, tmp_path / "c") / "vocab.txt").is_file()


@pytest.mark.parametrize("write", [fj.save, fj.export_hf])
def test_folder_that_is_not_empty(write, folder, tmp_path):
    model = fj.load(folder)
    taken = tmp_path / "taken"
    taken.mkdir()
    write(model, taken)
    before = sorted(p.name for p in taken.iterdir())
    with pytest.raises(fj.InputError, match="not an empty folder"):
        write(model, taken)
    assert sorted(p.name for p in taken.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(fj.InputError, match="not an empty folder"):
        write(model, tmp_path / "file")


def test_models_that_were_not_loaded(tmp_path):
    first, second = (Bert(BertConfig.from_json(tiny.BERT), rngs=nnx.Rngs(i)) for i in range(2))
    with pytest.raises(fj.InputError, match=r"came from fusion_jax\.load"):
        fj.export_hf(first, tmp_path / "a")
    restored = fj.load_into(second, fj.save(first, tmp_path / "a"))
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (restored, first)), strict=True):
        np.testing.assert_array_equal(a, b)
    loaded = fj.load(tiny.checkpoint(tmp_path / "b"))
    with pytest.raises(fj.InputError, match=r"for fusion_jax\.load, not for load_into"):
        fj.load_into(loaded, fj.save(loaded, tmp_path / "c"))


def test_text_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.write_text(path, "new and longer")
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [fj.save, fj.export_hf])
def test_a_full_disk_leaves_nothing(write, folder, tmp_path, monkeypatch):
    model = fj.load(folder)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*No space left.*nothing was left"):
        write(model, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


LIMITED = """
import resource, sys
import fusion_jax as fj
model = fj.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    fj.save(model, sys.argv[2])
except OSError as error:
    print(error)
"""
KILLED = """
import os, signal, sys
import fusion_jax as fj
from fusion_jax.checkpoint import files
model = fj.load(sys.argv[1])
files.copy_companions = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
fj.save(model, sys.argv[2])
"""


def child(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.full
def test_a_real_limit_on_file_size_leaves_nothing(folder, tmp_path):
    done = child(LIMITED, folder, tmp_path / "out" / "artefact")
    assert "could not write" in done.stdout, done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.full
def test_a_killed_save_leaves_no_half_artefact(folder, tmp_path):
    done = child(KILLED, folder, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    fj.save(fj.load(folder), tmp_path / "out")


HUB = """
import sys
import fusion_jax as fj
for name in sys.argv[1:]:
    try:
        model = fj.load(name)
        print(name, model.provenance.name, len(fj.sites(model)))
    except fj.InputError as error:
        print("error:", error)
"""


@pytest.mark.full
def test_hub_cache_and_offline_mode(folder, tmp_path):
    """The real download code, on a cache as `huggingface_hub` lays it out, without a network."""
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--someone--tiny-bert"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, "someone/tiny-bert", "someone/missing"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    first, second = done.stdout.splitlines()
    assert first == "someone/tiny-bert someone/tiny-bert 3"
    assert second.startswith("error: no such folder: someone/missing; as a model of the hub")
    assert "HF_HUB_OFFLINE=0" in second


@pytest.mark.full
def test_no_second_copy_of_the_model(tmp_path):
    """Loading reads tensor by tensor: peak memory is about the model's own size."""
    code = """
import resource, sys
import jax
import numpy as np
import fusion_jax as fj
from fusion_jax.checkpoint import open_checkpoint
opened = open_checkpoint(sys.argv[1])
opened.abstract
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = opened.read()
jax.block_until_ready(jax.tree.leaves(model))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    config = {**tiny.BERT, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    config["num_attention_heads"] = 4
    family = FAMILIES["bert"]
    abstract = nnx.eval_shape(
        lambda: family.model(family.config(config), rngs=nnx.Rngs(0), pooler=True)
    )
    tensors, rules = {}, family.rules(abstract.config, None)
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        location = rules.locate(path_name(path))
        shape = variable.get_value().shape
        shape = shape[::-1] if location.transposed else shape
        tensors[location.names[0]] = np.ones(shape, np.float32)
    size = sum(x.nbytes for x in tensors.values())
    folder = tiny.write_folder(tmp_path / "model", config, tensors)
    done = child(code, folder)
    # The file's pages may count too where it is mapped into memory.
    assert int(done.stdout) < 1.6 * size, done.stderr


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_read_into_an_array(dtype, transposed, tmp_path, monkeypatch):
    """Of any size beside those of the chunks, cast, transposed, and from any row on."""
    monkeypatch.setattr(tensor_files, "_CHUNK", 1)
    values = np.random.RandomState(0).standard_normal((333, 7)).astype(dtype)
    safetensors.numpy.save_file({"x": values, "y": values[:1]}, tmp_path / "model.safetensors")
    found = tensor_files.TensorFiles(tmp_path)
    for first, end in ((0, 333), (5, 134), (332, 333)):
        for out_dtype in (dtype, np.float32):
            shape = (7, end - first) if transposed else (end - first, 7)
            out = tensor_files.aligned(shape, out_dtype)
            assert out.ctypes.data % 64 == 0
            found.read_into("x", out, transposed=transposed, first=first)
            want = values[first:end].astype(out_dtype)
            assert (out == (want.T if transposed else want)).all()
    assert found.equal("x", "x")
    assert not found.equal("x", "y")


@pytest.mark.parametrize("rows", [0, 3, 3000])
def test_jax_takes_aligned_arrays_as_they_are(rows):
    """On a CPU: a copy would take as much memory again."""
    values = tensor_files.aligned((rows, 512), np.float32)
    values[...] = np.arange(rows * 512, dtype=np.float32).reshape(rows, 512)
    taken = jax.device_put(values, jax.devices("cpu")[0])
    if rows:
        assert taken.unsafe_buffer_pointer() == values.ctypes.data
    del values
    assert (np.asarray(taken).reshape(-1) == np.arange(rows * 512)).all()


@pytest.mark.parametrize("shape", [(130, 3, 5), (70, 128), (130,), (0, 3), (3, 0)])
def test_tensors_of_any_shape_are_transposed(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CHUNK", 1)
    values = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    safetensors.numpy.save_file({"x": values}, tmp_path / "model.safetensors")
    for dtype in (np.float32, np.float16):
        out = tensor_files.aligned(shape[::-1], dtype)
        tensor_files.TensorFiles(tmp_path).read_into("x", out, transposed=True)
        assert (out == values.astype(dtype).T).all()


def test_a_file_that_gets_shorter_while_it_is_read(tmp_path):
    """Threads read it: the error of one of them is that of the caller."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones((4096, 1024), np.float32)}, path)
    found = tensor_files.TensorFiles(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(fj.InputError, match="truncated"):
        found.read_into("x", np.zeros((4096, 1024), np.float32))


def test_versions_of_a_copy_that_was_never_installed(monkeypatch):
    def found(name):
        if name == "fusion-jax":
            raise files.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr(files, "version", found)
    assert files.versions() == {"fusion_jax": "not installed", "jax": "1.2", "flax": "1.2"}


def test_a_text_model_is_read_from_files_of_a_larger_model(tmp_path):
    """Qwen3.5's files also have a model of images and one that predicts further tokens."""
    tensors = tiny.weights("qwen3_5", "causal-lm")
    usual = tiny.write_folder(tmp_path / "usual", tiny.CONFIGS["qwen3_5"], tensors)
    inner = {name.replace("model.", "model.language_model."): x for name, x in tensors.items()}
    inner |= {
        name: np.ones(3, np.float32) for name in ("model.visual.norm.weight", "mtp.fc.weight")
    }
    larger = tiny.write_folder(tmp_path / "larger", tiny.CONFIGS["qwen3_5"], inner)
    assert bit_equal(*(fj.load(folder, head="causal-lm") for folder in (usual, larger)))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    """DeepSeek's files have as many after the last layer as ``num_nextn_predict_layers`` says."""
    tensors = tiny.weights("deepseek_v3", "causal-lm")
    config = tiny.CONFIGS["deepseek_v3"]
    usual = tiny.write_folder(tmp_path / "usual", config, tensors)
    tensors["model.layers.3.eh_proj.weight"] = np.ones((16, 32), np.float32)
    more = tiny.write_folder(tmp_path / "more", config, tensors)
    assert bit_equal(*(fj.load(folder, head="causal-lm") for folder in (usual, more)))
    none = tiny.write_folder(tmp_path / "none", {**config, "num_nextn_predict_layers": 0}, tensors)
    with pytest.raises(fj.InputError, match=r"model\.layers\.3\.eh_proj\.weight"):
        fj.load(none, head="causal-lm")
