"""Finds the MLPs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.linear_forms import multiplied_out
from fusion_jax.nn.mlp import AnyMlp
from fusion_jax.nn.submlps import SubMLPs
from fusion_jax.nn.surgery import ModuleT, at, find_modules, path_name, replaced
from ntk.selection import Selection, select


@dataclass(frozen=True)
class Site:
    """One MLP in a model.

    Args:
        index: Its number in the order of the model's layers.
        path: Its place, such as ``"layers.3.mlp"``.
        mlp: The module.
    """

    index: int
    path: str
    mlp: AnyMlp

    @property
    def prefix(self) -> str:
        """The start of the paths of its variables, such as ``"layers.3.mlp."``."""
        return f"{self.path}." if self.path else ""


def sites(model: nnx.Module) -> list[Site]:
    """Returns the MLPs of a model, in the order of its layers.

    Args:
        model: A Flax NNX module that holds its MLPs as `Mlp` or `GatedMlp`.

    Returns:
        The sites; empty if there are none.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> [site.path for site in sites(block)]
        ['0', '1']
    """
    found: list[Site] = []
    for path, mlp in find_modules(model, AnyMlp).items():
        # Groups of experts are parts of one site; a module comes before what is inside it.
        if not any(path.startswith(site.prefix) for site in found):
            found.append(Site(len(found), path, mlp))
    return found


def select_sites(found: Sequence[Site], layers: Selection) -> list[Site]:
    r"""Returns the chosen ones of some sites, in their order.

    Args:
        found: The sites to choose from.
        layers: A regular expression that matches whole paths; indices (negative ones count from
            the end) or a slice; a function of a `Site`; None for all.

    Raises:
        InputError: No site is chosen, or an index is out of range; the message lists the sites.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(12)])
        >>> [[site.path for site in select_sites(sites(block), c)] for c in (r"1\d", -1)]
        [['10', '11'], ['11']]
    """
    paths = [site.path for site in found]
    chosen = select(layers, paths, argument="layers", noun="MLP", items=found)
    return [found[i] for i in chosen]


@on_auto_axes
def plain(model: ModuleT) -> ModuleT:
    """Returns the same function with plain layers and MLPs, for inference.

    Matrices in other forms are multiplied out, and cluster sizes are folded into output weights.
    The result trains differently from a fused model: see `FusedMlp`. Quantize the result and not
    the fused model, whose stored rows differ in scale.

    Args:
        model: The model; not changed.

    Returns:
        A clone, which shares all other arrays with the model.

    Example:
        >>> import jax
        >>> import fusion_jax as fj
        >>> mlp = fj.Mlp(4, 64, act="gelu", rngs=nnx.Rngs(0))
        >>> fused, _ = fj.compress(mlp, fj.Fusion(), key=jax.random.key(0))
        >>> type(fused).__name__, type(plain(fused)).__name__
        ('FusedMlp', 'Mlp')
    """
    model = multiplied_out(model)
    for site in sites(model):
        model = replaced(model, site.path, site.mlp.plain())
    return model


def gradients_of(site: Site, gradients: Mapping[str, Array]) -> SubMLPs:
    """Returns a site's part of a model's gradients by path, laid out as its sub-MLPs.

    Raises:
        InputError: A gradient is missing or has another shape.
    """
    holder = nnx.clone(site.mlp)
    for path, variable in nnx.to_flat_state(nnx.state(holder, nnx.Param)):
        name, shape = site.prefix + path_name(path), variable.get_value().shape
        if name not in gradients:
            raise InputError(f"no gradient of {name}; fusion_jax.mean_gradients gives all")
        if gradients[name].shape != shape:
            raise InputError(
                f"the gradient of {name} has shape {gradients[name].shape}, should be {shape}"
            )
        setattr(at(holder, path_name(path[:-1])), str(path[-1]), nnx.Param(gradients[name]))
    return holder.sub_mlps()
