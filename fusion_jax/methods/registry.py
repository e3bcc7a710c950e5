"""The registry of compression methods: a new method adds its file and one line here."""

from __future__ import annotations

from typing import Any

from fusion_jax.errors import InputError, nearest
from fusion_jax.methods.base import Method
from fusion_jax.methods.clustering import Clustering
from fusion_jax.methods.drop_experts import DropExperts
from fusion_jax.methods.factored import Factored
from fusion_jax.methods.fusion import Fusion
from fusion_jax.methods.mask_prune import MaskPrune
from fusion_jax.methods.mmd import MMD
from fusion_jax.methods.mpo import MPO
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.sketch import Sketch
from fusion_jax.methods.svd import Svd
from fusion_jax.mpo import MpoEmbed
from fusion_jax.nn.linear_forms import LinearForm, Scored
from fusion_jax.nn.mlp import GatedMlp, Mlp

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Clustering,
        DropExperts,
        Fusion,
        MaskPrune,
        MMD,
        MPO,
        Prune,
        Sketch,
        Svd,
    )
}
"""Method classes by name, which is also the subcommand and the ``"method"`` in JSON."""

MODULES: dict[str, type[Mlp]] = {
    module.__name__: module
    for module in (Mlp, GatedMlp, *(m for cls in METHODS.values() for m in cls.modules))
}
"""The modules that can replace an MLP, by class name, for loading artefacts."""

LINEAR_FORMS: dict[str, type[LinearForm]] = {
    form.kind: form
    for form in (
        *(cls.form for cls in METHODS.values() if issubclass(cls, Factored)),
        MpoEmbed,
        Scored,
    )
}
"""The forms that can replace a linear layer or an embedding, by their names in files."""


def method_from_json(fields: dict[str, Any]) -> Method:
    """Returns the method that `Method.to_json` wrote.

    Raises:
        InputError: The method or one of its fields is unknown.

    Example:
        >>> method_from_json({"method": "fusion", "width": 768}).width
        768
    """
    fields = dict(fields)
    name = fields.pop("method", None)
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}{nearest(str(name), METHODS)}")
    return METHODS[name](**fields)
