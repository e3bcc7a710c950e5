"""The adapter for lm-evaluation-harness equals its own Hugging Face backend."""

import json

import pytest

import fusion_jax as fj
from tests import nlg

pytestmark = pytest.mark.torch
lm_eval = pytest.importorskip("lm_eval")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/text.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    model = fj.load(nlg.checkpoint(folder / "gpt2", "gpt2", n_positions=64), head="causal-lm")
    smaller, _ = fj.compress(model, fj.Prune(width=0.5), key=fj_key())
    fj.export_hf(smaller, folder / "hf")
    questions = ["the cat", "a mat", "on the", "sat", "the mat on a cat"]
    rows = [
        {"question": f"{text} ", "choices": ["sat on", "mat", "a cat the"], "answer": i % 3}
        for i, text in enumerate(questions)
    ]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": "the cat sat on the mat. " * n} for n in (1, 4, 9)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


def fj_key():
    import jax

    return jax.random.key(0)


def test_results_are_those_of_the_hugging_face_backend(folder):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from fusion_jax.integrations.lm_eval import FusionLM

    tasks = ["tiny_choice", "tiny_rolling", "tiny_writing"]
    models = [
        FusionLM(str(folder / "hf"), batch_size=2),
        HFLM(pretrained=str(folder / "hf"), device="cpu", batch_size=2),
    ]
    ours, theirs = (
        lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
        for model in models
    )
    for task in tasks:
        numbers = [
            {k: v for k, v in found["results"][task].items() if isinstance(v, float)}
            for found in (ours, theirs)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5) and numbers[0]
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            if task == "tiny_writing":
                assert a["resps"] == b["resps"]
            else:
                for x, y in zip(a["resps"], b["resps"], strict=True):
                    got, want = (z[0] if isinstance(z[0], tuple) else (z[0], None) for z in (x, y))
                    assert got[0] == pytest.approx(want[0], rel=1e-4)
                    assert got[1] == want[1]
