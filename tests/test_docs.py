"""The documentation says what the code and the result files say."""

import ast
import functools
import importlib
import inspect
import re
import shlex
from decimal import Decimal
from pathlib import Path

import pytest

import fusion_jax as fj
import ntk
from benchmarks import tables
from fusion_jax.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("notebooks/*.md")])
PUBLIC = ("fusion_jax", "fusion_jax.training", "ntk", "ntk.bounds")
"""Packages whose re-exported names are public."""


def resolved(name):
    """Returns the object of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise AssertionError(f"there is no {name}")


def exported(package):
    """Returns the names that a package re-exports as ``from x import y as y``."""
    tree = ast.parse(inspect.getsource(importlib.import_module(package)))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.name == alias.asname]


def test_no_table_is_stale():
    assert not tables.stale()


def test_a_stale_table_is_found(monkeypatch):
    result = tables.result

    def changed(name):
        file = result(name)
        found = [{**row, "seconds": 2 * row.get("seconds", 0)} for row in file["rows"]]
        return {**file, "rows": found} if name == "step-cpu" else file

    monkeypatch.setattr(tables, "result", changed)
    assert [page.name for page in tables.stale()] == ["results.md"]


def test_the_papers_table_takes_what_is_there(monkeypatch):
    """It is made on an accelerator, of as many seeds as the time allows."""
    scores = {("dense", False, 0): 0.9, ("dense", False, 1): 0.92, ("fusion", True, 0): 0.875}
    found = [
        {"task": "sst2", "method": method, "tuned": tuned, "seed": seed, "accuracy": score}
        for (method, tuned, seed), score in scores.items()
    ]
    monkeypatch.setattr(tables, "result", lambda name: {"rows": found})
    _, *lines = tables.paper_table()
    assert lines[0] == ["dense", "94.6 ± 0.1", "91.0 ± 1.4", ""]
    assert ["`Fusion()`, calibrated, tuned", "", "87.5", ""] in lines and len(lines) == 7


def test_tables_are_rounded_right():
    assert [tables.short(x) for x in (168.149, 0.9404728, 0.5)] == ["168", "0.940", "0.500"]
    share = Decimal(tables.result("kmeans-cpu")["summary"]["inertia_vs_sklearn_30"])
    assert f"with {share.quantize(Decimal('0.0001'))} times" in tables.BLOCKS["kmeans"]()


def test_every_block_is_on_a_page():
    text = "".join((DOCS.parent / page).read_text(encoding="utf-8") for page in tables.PAGES)
    assert set(re.findall(r"<!-- begin ([\w-]+) -->", text)) == set(tables.BLOCKS)


@pytest.fixture(scope="module")
def documented():
    """Names by the API pages' entries."""
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("api/*.md")))
    return re.findall(r"^\.\. (?:auto|py:)\w+:: ([\w.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_has_an_entry(package, documented):
    known = [resolved(name) for name in documented]
    missing = [
        name
        for name in exported(package)
        if not any(resolved(f"{package}.{name}") is each for each in known)
        and f"{package}.{name}" not in ("ntk.bounds", "ntk.mlp")  # which have entries of their own
    ]
    assert not missing


def test_closed_forms_have_entries(documented):
    kernels = [name for name in vars(ntk.mlp) if name.endswith("_kernel") and name[0] != "_"]
    for name in ("MlpWeights", "mlp_weights", *kernels):
        assert f"ntk.mlp.{name}" in documented


def test_no_entry_is_there_twice(documented):
    assert len(set(documented)) == len(documented)


BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in PAGES
    if page.stem != "adding"  # test_adding.py runs that page
    for i, block in enumerate(
        re.findall(
            r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```",
            page.read_text(encoding="utf-8"),
            re.DOTALL | re.MULTILINE,
        )
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_use_names_and_arguments_that_exist(block):
    tree, names = ast.parse(block), {"fj": "fusion_jax", "ntk": "ntk"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("fusion_jax", "ntk"):
            names |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else node
        first, *rest = ast.unparse(called).split(".") if isinstance(node, ast.expr) else [""]
        if first in names and all(part.isidentifier() for part in rest):
            found = resolved(".".join([names[first], *rest]))
            if isinstance(node, ast.Call):
                given = [keyword.arg for keyword in node.keywords if keyword.arg]
                inspect.signature(found).bind_partial(*node.args, **dict.fromkeys(given))


def test_commands_use_options_that_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, DOCS.parent / "README.md"])
    shells = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = re.findall(r"^fusion-jax (.*)$", "".join(shells), re.MULTILINE)
    assert len(commands) > 10

    @functools.cache
    def help_of(*words):
        assert main([*words, "--help"]) == 0
        return capsys.readouterr().out

    for command in commands:
        words = shlex.split(command, comments=True)
        known = help_of(words[0])
        if words[0] == "compress":
            known += help_of(*(word for word in words if word == "compress" or word in fj.METHODS))
        for option in re.findall(r"--[\w-]+", " ".join(words)):
            assert re.search(rf"{option}[ ,\n]", known), f"{option} in fusion-jax {command}"
