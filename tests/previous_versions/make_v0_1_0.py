"""Makes the files of version 0.1.0 that ``test_previous_versions.py`` loads with later versions.

To run it, give a folder that does not exist yet, in a checkout of version 0.1.0, whose package and
tests are both imported:

    PYTHONPATH=. python .../make_v0_1_0.py FOLDER

It does not run with later versions, and its files are never made anew: it is kept because it says
how they were made, and what a test has to call to go on with the runs among them.

All paths in the files are relative to the folder, so that they can be read and gone on with in a
copy, as long as the working directory is the copy. Two that version 0.1.0 writes are absolute, and
are made relative afterwards: the base of masks, which it takes relative too, and what Orbax says in
``commit_success.txt``, which nobody reads.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import safetensors.numpy
from fusion_jax.finetune import (
    Chains,
    lightweight,
    lottery,
    scored,
    squeeze,
    task_source,
)
from fusion_jax.finetune.loop import Loop

import fusion_jax as fj
from fusion_jax.cli import main
from tests import glue, nlg, tiny

# As in tests, whose numbers these are compared with.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

KEY = jax.random.key(0)
CONFIG = fj.TrainConfig(
    epochs=99,
    max_steps=6,
    batch_size=8,
    learning_rate=1e-3,
    shapes=1,
    log_every=1,
    eval_every=6,
    checkpoint_every=2,
    keep_checkpoints=1,
)
SGD = dataclasses.replace(CONFIG, optimiser="sgd", learning_rate=1e-2)
COMMAND = "--epochs 99 --max-steps 6 --batch-size 8 --shapes 1 --log-every 1 --eval-every 3"
COMMAND += " --checkpoint-every 2 --keep-checkpoints 1"
LABELS = "--task sst2 --data data/SST-2"
TEXT = "--task text --data data/text.txt"
PAIRS = "--train-file data/pairs.csv --source source --target target"
STOP = 3
"""Steps after which runs are told to stop."""


# ------------------------------------------------------------------------------------------------
# Models and data


def models():
    """Checkpoints of two layers in Hugging Face's format, as nothing of ours writes them."""
    write("bert", "bert", "classification", "num_hidden_layers", {32: 8, 48: 16, 3: 2})
    glue.vocabulary(Path("models/bert"))
    write("gpt2", "gpt2", None, "n_layer")
    write("mixtral", "mixtral", "causal-lm", "num_hidden_layers", {16: 8, 24: 16, 8: 4})
    write("llama", "llama", "causal-lm", "num_hidden_layers", {16: 8, 24: 16, 8: 4})
    nlg.tokenizer(Path("models/llama"))


def write(name, family, head, layers, sizes=None):
    """A tiny checkpoint of two layers, with other sizes in place of some."""
    sizes = sizes or {}
    config = {k: sizes.get(v, v) if type(v) is int else v for k, v in tiny.CONFIGS[family].items()}
    config |= {layers: 2}
    if head == "classification":
        config |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    if family == "llama":
        config |= {"eos_token_id": 1}
    tensors = {
        key: tiny.weight(key, tuple(sizes.get(size, size) for size in x.shape))
        for key, x in tiny.weights(family, head).items()
        if not re.search(r"\b(layer|layers|h)\.2\.", key)
    }
    tiny.write_folder(Path("models") / name, config, tensors)


def data():
    """What runs train on, and inputs of the MLPs of BERT."""
    glue.sst2(Path("data/SST-2"), n=16)
    Path("data/text.txt").write_text("the cat sat on the mat. " * 9)
    nlg.csv(Path("data/pairs.csv"), nlg.pairs(12))
    texts = [" ".join(texts) for texts in fj.load_task("sst2", "data/SST-2").train.texts]
    seen = fj.calibrate(fj.load("models/bert"), texts, key=KEY, max_positions=64)
    safetensors.numpy.save_file(seen, "data/calibration.safetensors")


# ------------------------------------------------------------------------------------------------
# Artefacts


def artefacts():
    """Models in all the forms that are saved."""
    command(
        "compress models/bert artefacts/bert fusion --width 8 --head classification "
        "--calibration data/calibration.safetensors"
    )
    sgd = fj.Fusion(width=10, scaling="sgd")
    save(fj.load("models/llama", head="causal-lm"), "llama-sgd", method=sgd)
    gpt2, bert = fj.load("models/gpt2"), fj.load("models/bert", head="classification")
    texts = [tiny.batch("gpt2")]
    plan = fj.allocate(
        gpt2, fj.Fusion(round_to=4), total_width=0.5, calibration=texts, key=KEY, progress=False
    )
    save(gpt2, "gpt2-plan", method=plan, calibration=texts)
    factored = {"layers.0.mlp": fj.Svd(), "layers.1.mlp": fj.MPO(cores=3)}
    save(gpt2, "gpt2-factored", method=factored)
    save(fj.load("models/mixtral", head="causal-lm"), "mixtral-uneven",
         method=fj.Fusion(width=8, by_use=1.0), calibration=[tiny.batch("mixtral")])  # fmt: skip
    chains, _ = fj.compress_matrices(
        bert, fj.MPO(bond=None, cores=3), matrices=r"embeddings\.word|layers\.\d\.mlp\.up"
    )
    save(lightweight(chains), "bert-chains")
    save(scored(bert), "bert-scored")
    masked, _ = fj.compress(gpt2, fj.MaskPrune(keep=0.4), key=KEY, progress=False)
    save(masked, "gpt2-masked")
    fj.save_masks(masked, "artefacts/gpt2-masks")
    path = Path("artefacts/gpt2-masks/fusion.json")
    fields = json.loads(path.read_text())
    fields["masks"]["base"]["name"] = "models/gpt2"
    path.write_text(json.dumps(fields, indent=2) + "\n")


def save(model, name, *, method=None, **options):
    if method is not None:
        model, _ = fj.compress(model, method, key=KEY, progress=False, **options)
    fj.save(model, f"artefacts/{name}")


def inputs(family):
    return {k: x[:2] for k, x in tiny.batch(family).items()}


def outputs(model, family):
    """What a model says of fixed inputs."""
    found = model(**inputs(family))
    return np.asarray(found.last_hidden_state if found.logits is None else found.logits)


# ------------------------------------------------------------------------------------------------
# Runs


def bert():
    return fj.load("artefacts/bert")


def sst2():
    return fj.load_task("sst2", "data/SST-2")


def finetune(folder):
    return fj.finetune(
        bert(), sst2(), dataclasses.replace(CONFIG, eval_every=2), key=KEY, folder=folder
    )


def language(folder):
    ids = text_ids()
    return fj.finetune_language(
        fj.load("artefacts/llama-sgd"), ids, dataclasses.replace(SGD, momentum=0.5), key=KEY,
        context=8, dev=ids[:50], folder=folder,
    )  # fmt: skip


def text_ids():
    """The tokens of the text: characters."""
    return np.array([3 + nlg.CHARS.index(c) for c in Path("data/text.txt").read_text()], np.int32)


def pairs(folder):
    rows = fj.read_pairs("data/pairs.csv", "data/pairs.csv")
    return fj.finetune_pairs(fj.load("artefacts/llama-sgd"), rows, CONFIG, key=KEY, folder=folder)


def tune(folder):
    teacher = fj.load("models/bert", head="classification")
    return fj.tune(bert(), teacher, sst2().train, CONFIG, key=KEY, folder=folder)


def static_prune(folder):
    smp = fj.StaticPruning(keep=0.4, ramp=4, penalty=1.0, train_head=True)
    model = fj.load("models/bert", head="classification")
    return fj.static_prune(model, sst2(), CONFIG, smp, key=KEY, folder=folder)


def growth(folder):
    batches, loss = task_source(bert(), sst2(), CONFIG, key=KEY)
    grows = Chains(source=batches, loss=loss, every=2, per_round=1, total=2, cores=3, batches=2,
                   matrices=r"layers\.\d\.attention\.query")  # fmt: skip
    return fj.finetune(bert(), sst2(), SGD, key=KEY, growth=grows, folder=folder)


RUNS = {
    "finetune": (finetune, "bert"),
    "language": (language, "llama"),
    "pairs": (pairs, "llama"),
    "tune": (tune, "bert"),
    "static-prune": (static_prune, "bert"),
    "growth": (growth, "bert"),
}


def in_rounds(method, model, folder, stops=False, **options):
    """A method that trains two steps in each of three rounds; it stops in the second."""

    def train(model, folder):
        stop = stops and folder.name == "round-1"
        config = dataclasses.replace(SGD, max_steps=2, eval_every=9)
        with told_to_stop(1) if stop else contextlib.nullcontext():
            return fj.finetune(model, sst2(), config, key=KEY, folder=folder)

    if method is squeeze:
        options = {"measure": lambda model: 0.0, "step": 2, **options}
    return method(model, train, rounds=3, folder=folder, progress=False, **options)


ROUNDS = {"lottery": (lottery, "bert"), "squeeze": (squeeze, "bert-chains")}


@contextlib.contextmanager
def told_to_stop(after):
    """Sends this process a SIGTERM, as clouds do, when a run has done so many steps."""
    step = Loop.step

    def stopping(self, state, batch, done):
        result = step(self, state, batch, done)
        if done + 1 == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with mock.patch.object(Loop, "step", stopping):
        yield


def numbers(folder):
    """What a run's record says of every step and evaluation, but for the speed."""
    lines = [json.loads(x) for x in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def command(text):
    assert main(text.split()) == 0


def said(text):
    """What a command prints."""
    with tempfile.TemporaryFile("w+") as file:
        with contextlib.redirect_stdout(file):
            command(text)
        file.seek(0)
        return file.read()


def tidy():
    """Leaves out what no test needs, and this machine's paths."""
    for folder in ("models/llama", "models/mixtral"):
        shutil.rmtree(folder)
    for name in ("command-text", "command-pairs"):
        shutil.rmtree(f"runs/{name}/checkpoints")  # finished: users may do so, too
    # Orbax writes where it was; it looks only at whether the files are there.
    for path in Path("runs").rglob("commit_success.txt"):
        path.write_text(path.read_text().replace(f"{Path.cwd()}/", ""))


def everything():
    models()
    data()
    artefacts()
    tensors, runs, commands = {}, {}, {}
    for path in sorted(Path("artefacts").iterdir()):
        family = path.name.partition("-")[0]
        tensors |= {f"inputs.{path.name}.{k}": x for k, x in inputs(family).items()}
        tensors[f"artefacts.{path.name}"] = outputs(fj.load(path), family)
    for name, (run, family) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            whole = run(folder)
            runs[name] = {"history": whole.history, "metrics": numbers(folder)}
        tensors[f"runs.{name}"] = outputs(whole.model, family)
        with told_to_stop(STOP):
            assert not run(f"runs/{name}").finished
    for name, (method, start) in ROUNDS.items():
        model = fj.load(f"artefacts/{start}")
        tensors[f"runs.{name}"] = outputs(in_rounds(method, model, None).model, "bert")
        assert not in_rounds(method, model, f"runs/{name}", stops=True).finished
    start = f"finetune artefacts/bert {LABELS} {COMMAND} --out runs/command"
    commands["finetune"] = {
        "command": start,
        "says": said(start),
        "metrics": numbers("runs/command"),
    }
    start = start.replace("runs/command", "runs/command-stopped")
    with told_to_stop(STOP):
        command(start)
    rest = f"{COMMAND} --optimiser sgd --learning-rate 0.01 --out runs/command-"
    command(f"finetune artefacts/llama-sgd {TEXT} --context 8 {rest}text")
    command(f"finetune artefacts/llama-sgd {PAIRS} {rest}pairs")
    for name, text in {
        "evaluate": f"evaluate runs/command {LABELS}",
        "evaluate text": f"evaluate runs/command-text {TEXT}",
        "evaluate pairs": "evaluate runs/command-pairs --file data/pairs.csv --max-new-tokens 8",
    }.items():
        commands[name] = {"command": text, "says": said(text)}
    files = "--file data/SST-2/dev.tsv --text sentence"
    command(f"predict runs/command {files} --out expected-predictions.jsonl")
    tidy()
    expected = {"runs": runs, "commands": commands}
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    safetensors.numpy.save_file(tensors, "expected.safetensors")


if __name__ == "__main__":
    assert fj.__version__ == "0.1.0"
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    everything()
