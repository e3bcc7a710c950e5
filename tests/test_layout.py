"""Where things are: the files at the root, and names of modules."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import fusion_jax
import fusion_jax.training
import ntk

PACKAGES = [fusion_jax, ntk]
PUBLIC = [fusion_jax, fusion_jax.training, ntk, ntk.bounds]


def modules(package):
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [module.name for module in found if not module.name.endswith("__main__")]
    # Adapters need the tools that they are for.
    return [name for name in names if not name.startswith("fusion_jax.integrations.")]


def test_root_of_the_library():
    root = Path(fusion_jax.__file__).parent
    files = {path.stem for path in root.glob("*.py")}
    assert files == {"__init__", "errors", "meshes", "progress", "report"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_module_has_the_name_of_a_public_function(package):
    functions = {
        name for place in PUBLIC for name, value in vars(place).items() if inspect.isfunction(value)
    }
    for name in modules(package):
        parent, _, leaf = name.rpartition(".")
        assert leaf not in functions
        # `import package.module as x` binds this attribute.
        module = importlib.import_module(name)
        assert getattr(importlib.import_module(parent), leaf) is module
