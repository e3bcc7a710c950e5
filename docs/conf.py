"""The documentation site: ``sphinx-build -W -b html docs docs/_build/html``."""

import dataclasses
import inspect
import os
import re

from docutils import nodes

import fusion_jax

# For notebooks: there need not be torch, nor widgets for tqdm's bars.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

project = "fusion-jax"
author = "the authors of fusion-jax"
copyright = "2026, the authors of fusion-jax; Apache-2.0"
release = version = fusion_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path: list[str] = []

# `name` in a docstring is a link where the name is documented, else code.
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # of names that two packages have, such as Sketch
add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True}
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Proof"]
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "furo"
html_title = "fusion-jax"
html_static_path = ["_static"]
html_css_files = ["wide.css"]


METHOD_INTERNALS = {"build", "calibrated", "check", "formed", "graded", "kept", "name", "solve"}
METHOD_INTERNALS |= {"any_mlp", "factor", "modules", "spec", "verify", "within"}
"""What a method does inside of `fusion_jax.compress`; "Add a method" has it."""
_LITERAL = re.compile(r"(``.*?``|`.*?`|(?<![\w*])\*[\w ]+\*(?![\w*]))")
_texts: dict[str, list[str]] = {}


def skip(app, what, name, obj, skipped, options):
    """Leaves out fields of tuples, which are arguments already, and internals of methods."""
    field = type(obj).__name__ == "_tuplegetter"
    return True if field or name in METHOD_INTERNALS else None


def plain(app, what, name, obj, options, lines):
    """Takes docstrings as plain text: |x| is not a substitution and v_ not a link."""
    in_example = False
    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            parts = _LITERAL.split(line)
            parts[::2] = [re.sub(r"([|*]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)
    if (
        "Returns:" in lines
    ):  # whose text may have a colon: Napoleon would make the first part a type
        start = lines.index("Returns:")
        lines[start : start + 2] = [f":returns: {lines[start + 1].strip()}"]
    _texts[name] = list(lines)


def attribute(app, what, name, obj, options, lines):
    """Undoes what Napoleon makes of a field's description that has a colon: a type."""
    if what == "attribute":
        lines[:] = _texts[name]


def signature(app, what, name, obj, options, text, returns):
    """Shows the fields of a dataclass, also where a base has a constructor of its own."""
    if what == "class" and dataclasses.is_dataclass(obj):
        found = inspect.signature(obj.__init__)
        own = [p.replace(annotation=p.empty) for p in list(found.parameters.values())[1:]]
        return str(inspect.Signature(own)), ""
    return None


def short(app, doctree):
    """Writes JAX's own class of arrays as users know it."""
    for node in doctree.findall(nodes.Text):
        if "jaxlib._jax.Array" in node:
            node.parent.replace(node, nodes.Text(node.replace("jaxlib._jax.Array", "Array")))


def setup(app):
    """Connects the functions above; Napoleon's priority is 500."""
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-docstring", plain, priority=400)
    app.connect("autodoc-process-docstring", attribute, priority=600)
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-read", short)
