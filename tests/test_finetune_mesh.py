"""Training on meshes: the same numbers on eight devices, and in two processes, as on one."""

import dataclasses
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import fusion_jax as fj
from fusion_jax.nn.linear_forms import find_forms
from fusion_jax.training import Chains, Recipe, fit, lightweight
from fusion_jax.training.engine import losses
from fusion_jax.training.engine.batches import Batches, Examples
from tests import glue

pytestmark = pytest.mark.full

STEPS = 20
CONFIG = fj.TrainConfig(
    max_steps=STEPS, epochs=99, batch_size=8, learning_rate=1e-4, shapes=1, compute_dtype="float32"
)
MESHES = {"data": (8,), "fsdp": (8,), "data,model": (2, 4), "data,fsdp,model": (2, 2, 2)}


def fused(folder):
    key = jax.random.key(5)
    model = fj.load(glue.checkpoint(folder), head="classification", num_labels=2, key=key)
    return fj.compress(model, fj.Fusion(width=12), layers=-1, key=key)[0]


def batches():
    tokens = np.random.RandomState(1).randint(5, 99, (24, 8)).astype(np.int32)
    labels = np.arange(24, dtype=np.int32) % 2
    examples = Examples(list(tokens), None, labels, [str(i) for i in labels])
    return Batches(examples, 8, pad_id=0, seed=3)


def train(model, config=CONFIG, folder=None, **more):
    return fit(
        model,
        batches(),
        losses.classification,
        config,
        key=jax.random.key(0),
        folder=folder,
        recipe=Recipe(**more),
    )


def numbers(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(v.get_value()) for path, v in flat}


def assert_close(a, b):
    for path, x in a.items():
        # Softmax ignores the key's bias: its gradient is rounding, which AdamW makes large.
        if not path.endswith("attention.key.bias"):
            np.testing.assert_allclose(b[path], x, atol=1e-5, rtol=0, err_msg=path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return fused(tmp_path_factory.mktemp("mesh") / "model")


@pytest.fixture(scope="module")
def alone(model):
    return numbers(train(model).model)


@pytest.mark.parametrize("axes", MESHES)
def test_eight_devices_equal_one(axes, model, alone):
    """With dropout: its masks do not depend on how batches are split."""
    specs = {}

    def look(step, state):
        specs.update({path: x.sharding.spec for path, x in state.params.items()})
        moments = jax.tree.leaves(state.opt_state)
        assert all(len(x.sharding.device_set) == 8 for x in moments)

    with jax.set_mesh(jax.make_mesh(MESHES[axes], tuple(axes.split(",")))):
        ours = numbers(train(model, on_step=look).model)
    assert_close(alone, ours)
    up = specs["layers.1.mlp.up.kernel"]
    assert ("model" in up) == ("model" in axes)
    assert ("fsdp" in up) == ("fsdp" in axes)


def test_devices_have_dropout_masks_of_their_own(model):
    """Equal rows on eight devices are dropped out differently."""
    layers = nnx.Dropout(0.5)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        x = jax.device_put(np.ones((8, 64), np.float32), jax.P("data"))
        out = jax.jit(lambda x, key: layers(x, rngs=key, deterministic=False))(x, jax.random.key(0))
    assert len({row.tobytes() for row in np.asarray(out)}) == 8


def both_ways(model, **more):
    """What a run gives on one device and on a mesh, and the specs of what trains there."""
    specs, axes = {}, "data,fsdp,model"

    def look(step, state):
        specs.update({path: x.sharding.spec for path, x in state.params.items()})

    config = dataclasses.replace(CONFIG, max_steps=5)
    growth = more.pop("growth", lambda: None)
    found = [train(model, config, growth=growth(), **more).model]
    with jax.set_mesh(jax.make_mesh(MESHES[axes], tuple(axes.split(",")))):
        found.append(train(model, config, growth=growth(), on_step=look, **more).model)
    return *found, specs


def test_chains_grow_on_a_mesh_as_on_one_device(model):
    def growth():
        return Chains(
            source=batches(),
            loss=losses.classification,
            every=2,
            per_round=1,
            total=1,
            matrices=r"layers\.\d\.(mlp\.up|attention\.query)",
            cores=3,
            batches=2,
        )

    alone, ours, specs = both_ways(model, growth=growth)
    assert len(find_forms(alone)) == 2 and find_forms(alone).keys() == find_forms(ours).keys()
    assert_close(numbers(fj.plain(alone)), numbers(fj.plain(ours)))
    assert any("fsdp" in specs[f"{path}.cores.{i}"] for path in find_forms(ours) for i in range(3))


def test_auxiliary_tensors_train_on_a_mesh_as_on_one_device(model):
    made, _ = fj.compress_matrices(
        model, fj.MPO(bond=8, cores=3), matrices=r"layers\.0\.(mlp|attention)\..*"
    )
    light = lightweight(made)
    alone, ours, _ = both_ways(light)
    assert_close(numbers(alone), numbers(ours))
    before, after = numbers(light), numbers(ours)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    cores = {path for path in moved if ".cores." in path}
    assert len(cores) == 12 and not [path for path in cores if path.endswith("cores.1")]


def test_a_run_resumes_on_another_mesh(model, alone, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=5)

    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 12:
            raise Killed

    with pytest.raises(Killed):
        train(model, config, folder=tmp_path, on_step=kill)
    with jax.set_mesh(jax.make_mesh((2, 4), ("fsdp", "model"))):
        result = train(model, config, folder=tmp_path)
    assert_close(numbers(result.model), alone)


PROCESS = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
from tests import test_finetune_mesh as t
model = t.fused(Path(sys.argv[3]) / f"model{sys.argv[2]}")
with jax.set_mesh(jax.make_mesh((2, 2), ("data", "fsdp"))):
    found = t.train(model, folder=Path(sys.argv[3]) / "run")
if jax.process_index() == 0:
    np.savez(Path(sys.argv[3]) / "found.npz", **t.numbers(found.model))
"""


def test_two_processes_equal_one(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen([*command, str(i), str(tmp_path)], env=os.environ) for i in range(2)
    ]
    assert [p.wait() for p in processes] == [0, 0]
    with np.load(tmp_path / "found.npz") as found:
        assert_close(alone, found)
