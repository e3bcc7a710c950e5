"""The places of a model where its MLPs are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from flax import nnx
from jaxtyping import Array

from fusion_jax.errors import InputError
from fusion_jax.meshes import on_auto_axes
from fusion_jax.nn.linear_forms import multiplied_out
from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.submlps import SubMLPs
from fusion_jax.nn.surgery import at
from fusion_jax.nn.surgery import replaced as replaced


@dataclass(frozen=True)
class Site:
    """One MLP in a model.

    Args:
        index: Its number in the order of the model's layers.
        path: Where it is, such as ``"layers.3.mlp"``.
        mlp: The module.
    """

    index: int
    path: str
    mlp: Mlp


Layers = str | SupportsIndex | slice | Iterable[SupportsIndex] | Callable[[Site], bool] | None


def sites(model: nnx.Module) -> list[Site]:
    """The MLPs of a model, in the order of its layers.

    Args:
        model: Any Flax NNX module that holds its MLPs as `Mlp` or `GatedMlp`.

    Returns:
        The sites; empty if there are none.

    Example:
        >>> from fusion_jax.nn.mlp import Mlp
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(2)])
        >>> [site.path for site in sites(block)]
        ['0', '1']
    """
    found = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, Mlp)]
    # Groups of experts are parts of one site.
    whole = {path for path, _ in found}
    found = [f for f in found if not any(f[0][:i] in whole for i in range(len(f[0])))]
    # Layer 10 after layer 9, not after layer 1.
    found.sort(key=lambda item: [(isinstance(p, str), p) for p in item[0]])
    return [Site(i, ".".join(map(str, path)), m) for i, (path, m) in enumerate(found)]


def select(found: Sequence[Site], layers: Layers) -> list[Site]:
    r"""The sites that a choice of layers means.

    Args:
        found: All sites of the model.
        layers: A regular expression that matches whole paths; indices (negative ones count from
            the end) or a slice; a function of a `Site`; None for all.

    Returns:
        The chosen sites, in order.

    Raises:
        InputError: The choice matches nothing or an index is out of range; lists the sites.

    Example:
        >>> block = nnx.List([Mlp(4, 8, act="relu", rngs=nnx.Rngs(0)) for _ in range(12)])
        >>> [[site.path for site in select(sites(block), layers)] for layers in (r"1\d", -1)]
        [['10', '11'], ['11']]
    """
    listing = ", ".join(f"{s.index}: {s.path or '(the model)'}" for s in found)
    if not found:
        raise InputError("the model has no MLP that can be compressed")
    if layers is None:
        return list(found)
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as error:
            raise InputError(f"layers {layers!r} is no regular expression: {error}") from None
        chosen = [s for s in found if pattern.fullmatch(s.path)]
    elif isinstance(layers, slice):
        chosen = list(found[layers])
    elif callable(layers):
        chosen = [s for s in found if layers(s)]
    else:
        indices = [layers] if isinstance(layers, SupportsIndex) else list(layers)
        for i in indices:
            whole = isinstance(i, SupportsIndex) and not isinstance(i, bool)
            if not whole or not -len(found) <= int(i) < len(found):
                raise InputError(f"layers: no site {i!r}; the sites are {listing}")
        wanted = {int(i) % len(found) for i in indices}
        chosen = [s for s in found if s.index in wanted]
    if not chosen:
        raise InputError(
            f"layers {layers!r} matches no site (a pattern must match a whole path); "
            f"the sites are {listing}"
        )
    return chosen


@on_auto_axes
def plain(model: Any) -> Any:
    """The same function in plain layers and MLPs, for inference; the model is left as it is.

    Matrices in other forms are multiplied out, cluster sizes folded into output weights. What that
    is trained like is another thing: see `FusedMlp`. Quantise this, and not a fused model, whose
    stored rows differ in scale.

    Args:
        model: The model.

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
    """The gradients of a site's parameters, laid out as its sub-MLPs.

    Args:
        site: The site.
        gradients: By path of a parameter, of the whole model.

    Returns:
        As many rows as the MLP has sub-MLPs.

    Raises:
        InputError: One is missing or of another shape.
    """
    holder = nnx.clone(site.mlp)
    start = f"{site.path}." if site.path else ""
    for path, variable in nnx.to_flat_state(nnx.state(holder, nnx.Param)):
        *parents, last = map(str, path)
        name, shape = start + ".".join(map(str, path)), variable.get_value().shape
        if name not in gradients:
            raise InputError(f"no gradient of {name}; fusion_jax.mean_gradients gives all")
        if gradients[name].shape != shape:
            raise InputError(
                f"the gradient of {name} has shape {gradients[name].shape}, should be {shape}"
            )
        setattr(at(holder, ".".join(parents)), last, nnx.Param(gradients[name]))
    return holder.sub_mlps()
