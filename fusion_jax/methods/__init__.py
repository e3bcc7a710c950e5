"""The registry of compression methods. A new method adds its file and one line here."""

from __future__ import annotations

from fusion_jax.forms import Form, Scored
from fusion_jax.methods.base import Method as Method
from fusion_jax.methods.base import Solution as Solution
from fusion_jax.methods.base import method_from_json as method_from_json
from fusion_jax.methods.clustering import Clustering as Clustering
from fusion_jax.methods.factored import Factored
from fusion_jax.methods.fusion import Fusion
from fusion_jax.methods.mask_prune import MaskPrune
from fusion_jax.methods.mmd import MMD
from fusion_jax.methods.mpo import MPO
from fusion_jax.methods.prune import Prune
from fusion_jax.methods.sketch import Sketch
from fusion_jax.methods.svd import Svd
from fusion_jax.mlp import GatedMlp, Mlp
from fusion_jax.mpo import MpoEmbed

METHODS: dict[str, type[Method]] = {
    "clustering": Clustering,
    "fusion": Fusion,
    "mask-prune": MaskPrune,
    "mmd": MMD,
    "mpo": MPO,
    "prune": Prune,
    "sketch": Sketch,
    "svd": Svd,
}
"""Method classes by name, which is also their subcommand and their ``"method"`` in JSON."""

MODULES: dict[str, type[Mlp]] = {
    module.__name__: module
    for module in (Mlp, GatedMlp, *(m for cls in METHODS.values() for m in cls.modules))
}
"""The modules that can be in place of an MLP, by class name, for loading artefacts."""

FORMS: dict[str, type[Form]] = {
    form.kind: form
    for form in (
        *(cls.form for cls in METHODS.values() if issubclass(cls, Factored)),
        MpoEmbed,
        Scored,
    )
}
"""What can be in place of a linear layer or an embedding, by its name in files."""
