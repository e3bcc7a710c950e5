"""The documentation says what the code and the result files say."""

import ast
import functools
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import fusion_jax as fj
import ntk
from benchmarks import tables

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
    file = tables.result("step-cpu")
    changed = [{**row, "seconds": 2 * row["seconds"]} for row in file["rows"]]
    monkeypatch.setattr(tables, "result", lambda name: {**file, "rows": changed})
    assert "3.29" in tables.BLOCKS["step"]()


def test_tables_are_rounded_right():
    assert tables.short(168.149) == "168"
    assert tables.short(0.9404728) == "0.940"
    assert "0.9405" in tables.BLOCKS["kmeans"]()


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
    names = {"fj": "fusion_jax", "ntk": "ntk", "losses": "fusion_jax.training.losses"}
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("fusion_jax", "ntk"):
            for alias in node.names:
                found = resolved(f"{node.module}.{alias.name}")
                if not inspect.ismodule(found):
                    names[alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in ("fj", "ntk"):
            first, *rest = ast.unparse(node).split(".")
            resolved(".".join([names[first], *rest]))
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            if first in names and all(part.isidentifier() for part in rest):
                called = inspect.signature(resolved(".".join([names[first], *rest])))
                given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                called.bind_partial(*node.args, **given)


def test_commands_use_options_that_exist(capsys, monkeypatch):
    from fusion_jax.cli.main import main

    monkeypatch.setenv("COLUMNS", "200")
    pages = [*PAGES, DOCS.parent / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = re.findall(r"^fusion-jax (.*)$", text, re.MULTILINE)
    assert len(commands) > 10

    @functools.cache
    def help_of(*words):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return capsys.readouterr().out

    for command in commands:
        words = shlex.split(command, comments=True)
        known = help_of(words[0])
        method = next((word for word in words if word in fj.METHODS), None)
        if words[0] == "compress" and method:
            known += help_of(words[0], method)
        for option in re.findall(r"--[\w-]+", command.partition("#")[0]):
            assert f"{option} " in known or f"{option}," in known, command
