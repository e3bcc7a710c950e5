"""docs/adding.md, followed to the letter: its examples pass the conformance tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/adding.md").read_text(encoding="utf-8")
OPENING = {
    "methods/registry.py": r"^    for method in \(\n",
    "models/registry.py": r"^FAMILIES.* = {\n",
    "tests/tiny.py": r"^CONFIGS.* = {\n",
    "tests/helpers.py": r"^OPTIONS.* = {\n",
}
"""The line of each file after which its registry begins."""
METHOD, ARCHITECTURE = PAGE.split("\n## ")[1:]


@pytest.fixture
def copy(tmp_path):
    for name in ("fusion_jax", "ntk", "tests"):
        # With what Python compiled, which is valid as long as a file does not change.
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def followed(copy, section):
    """Follows a section: a block that names its file becomes the file, others are added."""
    said = re.findall(r"`([\w/]+\.py)`|```(?:python|text)\n(.*?)```", section, re.DOTALL)
    file = None
    for name, block in said:
        if name:
            file = copy / name
        elif block.startswith("# "):
            (copy / block.splitlines()[0][2:]).write_text(block)
        elif block.startswith(("from ", "import ")):
            # After the last import of the file that the text named last.
            text = file.read_text()
            end = [m.end() for m in re.finditer(r"^from .*\n", text, re.MULTILINE)][-1]
            file.write_text(text[:end] + block + text[end:])
        else:
            text = file.read_text()
            start = re.search(OPENING[f"{file.parent.name}/{file.name}"], text, re.MULTILINE).end()
            file.write_text(text[:start] + block + text[start:])


def run(copy, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tier", "full"]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
def test_the_method(copy):
    followed(copy, METHOD)
    of_method = "first or test_every_method_is_in_the_suite"
    out = run(copy, "-vv", "tests/test_compress.py", "tests/test_together.py", "-k", of_method)
    passed = [line.partition("::")[0] for line in out.splitlines() if " PASSED " in line]
    assert passed.count("tests/test_compress.py") >= 20
    assert passed.count("tests/test_together.py") == 2
    help_ = subprocess.run(
        [sys.executable, "-m", "fusion_jax.cli", "compress", "first", "--help"],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert "--width" in help_.stdout and "first hidden units" in help_.stdout


@pytest.mark.full
def test_the_architecture(copy):
    followed(copy, ARCHITECTURE)
    out = run(copy, "tests/test_models.py", "-k", "data2vec")
    assert int(re.search(r"(\d+) passed", out)[1]) >= 4
