"""Fuses a model, tunes it and fine-tunes it, on all devices of a TPU, GPU or CPU machine.

    python examples/tpu_finetune.py --data glue/SST-2 --out run

On several hosts, start it on each at the same time (docs/train.md says how); every process
moves the rows of its own devices only. The same command resumes a run that was stopped.
"""

import argparse
from pathlib import Path

import jax

import fusion_jax as fj


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="FacebookAI/roberta-base")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", default="hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model-axis", type=int, default=1, help="devices that share one MLP")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    arguments = parser.parse_args()
    if arguments.distributed:
        jax.distributed.initialize()  # a TPU pod tells each process who the others are

    key = jax.random.key(0)
    data = fj.load_task(arguments.task, arguments.data)
    teacher = fj.load(
        arguments.model, head="classification", num_labels=data.spec.num_labels, key=key
    )
    # Widths that are multiples of 128 fill the matrix units of a TPU.
    method = fj.Fusion(width=0.25, round_to=128)
    student, report = fj.compress(teacher, method, layers=slice(-8, None), key=key)
    if jax.process_index() == 0:
        print(report)

    config = fj.TrainConfig(compute_dtype="bfloat16", batch_size=64, max_length=128, truncate=True)
    once = fj.TrainConfig(
        epochs=1, compute_dtype="bfloat16", batch_size=64, max_length=128, truncate=True
    )
    n = arguments.model_axis
    with jax.set_mesh(jax.make_mesh((jax.device_count() // n, n), ("data", "model"))):
        tuned = fj.tune(student, teacher, data, once, key=key, folder=arguments.out / "tune")
        if not tuned.finished:
            return
        fit = fj.finetune(tuned.model, data, config, key=key, folder=arguments.out / "run")
    if jax.process_index() == 0:
        print(fit.history)


if __name__ == "__main__":
    main()
