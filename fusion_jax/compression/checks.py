"""Checks the arguments of compressing, before any long work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Key

from fusion_jax.calibration.calibrator import Calibrator
from fusion_jax.calibration.sources import CalibrationSource
from fusion_jax.errors import InputError, nearest
from fusion_jax.methods.base import Method, check_method
from fusion_jax.models.moe import Moe, mixtures
from fusion_jax.nn.adopted import adopted_sites
from fusion_jax.nn.linear_forms import check_plain
from fusion_jax.nn.mlp import AnyMlp, GatedMlp, Mlp
from fusion_jax.nn.site import Site, gradients_of, select_sites, sites
from fusion_jax.nn.surgery import ModuleT
from ntk import arrays
from ntk.activations import outside
from ntk.selection import Selection


@dataclass(frozen=True)
class Checked(Generic[ModuleT]):
    """The arguments of `fusion_jax.compress`, checked.

    Args:
        model: The model.
        chosen: The sites to compress.
        methods: The method of each chosen site, by path.
        key: Random key.
        calibrator: The source of calibration, or None.
        gradients: The gradients of a loss by path of a parameter, or None.
    """

    model: ModuleT
    chosen: list[Site]
    methods: dict[str, Method]
    key: Key[Array, ""]
    calibrator: Calibrator | None
    gradients: Mapping[str, Array] | None

    @property
    def calibration(self) -> str | None:
        """The source of the calibration, in words."""
        return None if self.calibrator is None else self.calibrator.description

    @property
    def described(self) -> Mapping[str, object]:
        """The method as JSON values, or the methods by site where they differ."""
        found = {site.path: self.methods[site.path].to_json() for site in self.chosen}
        same = len(set(self.methods.values())) == 1
        return found[self.chosen[0].path] if same else found


def checked(
    model: ModuleT,
    method: Method | Mapping[str, Method],
    key: object,
    layers: Selection,
    budget: float | None,
    calibration: CalibrationSource | None,
    gradients: Mapping[str, Array] | None,
) -> Checked[ModuleT]:
    """Checks the arguments of `compress`, without any long work."""
    if not isinstance(model, nnx.Module):
        raise InputError(f"model must be a Flax NNX module; got {type(model).__name__}")
    if not sites(model):
        raise InputError(
            f"{type(model).__name__} has no MLP that can be compressed: adopt its MLPs with "
            "fusion_jax.adopt, build them of fusion_jax.Mlp, GatedMlp or experts, or load a model "
            "with fusion_jax.load"
        )
    known = mixtures(model)
    found = sites(model)
    if isinstance(method, Method) and method.model_needs.router and layers is None:
        # A method for mixtures leaves the other MLPs as they are.
        found = [site for site in found if site.path in known]
        if not found:
            raise InputError(
                f"{type(method).__name__} is for mixtures of experts with a router, and "
                f"{type(model).__name__} has none"
            )
    chosen, methods = _chosen(found, method, layers)
    key = checked_key(key)
    if budget is not None and isinstance(method, Mapping):
        raise InputError("methods by site have their sizes; give a budget, or those")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget must be in (0, 1]; got {budget}")
    # Where methods differ, an argument is for the methods that take it, if there are any.
    calibrated = any(m.takes_calibration for m in methods.values())
    graded = any(m.takes_gradients for m in methods.values())
    for site in chosen:
        with naming(site):
            own = methods[site.path]
            _check_module(own, site.mlp)
            subs = jax.eval_shape(site.mlp.sub_mlps)
            if budget is not None:
                methods[site.path] = own = own.within(subs, budget)
            own.check(subs, calibrated=calibration is not None)
            own.check_given(
                calibration=calibration is not None and (own.takes_calibration or not calibrated),
                gradients=gradients is not None and (own.takes_gradients or not graded),
            )
    routed = _check_routers(chosen, methods, known)
    if routed and calibration is not None:
        others = [site for site in chosen if site.path not in routed]
        if any(methods[site.path].takes_calibration for site in others):
            raise InputError(
                "dropping experts changes what other MLPs see: drop them first, then compress the "
                "result with calibration"
            )
    needs = [methods[site.path].model_needs for site in chosen]
    option = next((need.expert_use for need in needs if need.expert_use), None)
    if option and not any(site.mlp.stack for site in chosen):
        raise InputError(f"{option} is for experts, and no chosen site has any")
    _check_values(chosen, gradients)
    calibrator = None
    if calibration is not None:
        calibrator = Calibrator(
            model,
            chosen,
            calibration,
            sequential=any(need.earlier_sites for need in needs),
            upstream=any(methods[site.path].takes_upstream for site in chosen),
            text_alone=bool(routed),
            # Sites are counted from 0, so that no site has the key of the calibration.
            key=jax.random.fold_in(key, 2**31 - 1),
        )
        if not calibrator.on_text:
            _check_needs_no_text(chosen, methods)
    stacks = adopted_sites(model)
    for site in chosen:
        if (
            methods[site.path].takes_upstream
            and calibrator is not None
            and not calibrator.has_upstream(site)
        ):
            raise InputError(
                f"{site.path or 'the model'}: {_named(methods[site.path])} needs calibration text "
                "or tokens, or what calibrate(..., upstream=True) returns: the gradients of the "
                "model's loss are not in the inputs"
            )
        if methods[site.path].model_needs.expert_use and site.mlp.stack and site.path in stacks:
            raise InputError(f"{site.path}: {option} is for experts; this is a stack of layers")
    return Checked(model, chosen, methods, key, calibrator, gradients)


def _check_routers(
    chosen: list[Site], methods: Mapping[str, Method], known: Mapping[str, Moe]
) -> list[str]:
    """Returns the sites whose routers change; raises `InputError` if they cannot."""
    found: list[str] = []
    counts: dict[int, str] = {}
    for site in chosen:
        name = methods[site.path].model_needs.router
        if not name:
            continue
        moe = known.get(site.path)
        if moe is None:
            raise InputError(f"{site.path or 'the model'}: {name} is for experts with a router")
        found.append(site.path)
        count = methods[site.path].kept_count(moe.router.out_features)
        counts.setdefault(count, site.path)
        if count < moe.top_k:
            raise InputError(
                f"{site.path}: the router sends each position to {moe.top_k} experts, so that at "
                f"least {moe.top_k} must stay; {name} would keep {count} of "
                f"{moe.router.out_features}"
            )
        try:
            moe.rule.check(count, moe.top_k)
        except InputError as error:
            raise InputError(f"{site.path}: {name} would keep {count} experts: {error}") from None
    if len(counts) > 1:
        (a, first), (b, second) = list(counts.items())[:2]
        raise InputError(
            f"{first} would keep {a} experts and {second} {b}; a model's configuration has one "
            "number of experts"
        )
    if found and len(found) < len(known):
        raise InputError(
            f"{', '.join(path for path in known if path not in found)}: experts are dropped in all "
            "mixtures of a model at once, as its configuration has one number of experts"
        )
    return found


def _chosen(
    found: list[Site], method: Method | Mapping[str, Method], layers: Selection
) -> tuple[list[Site], dict[str, Method]]:
    """Returns the sites to compress, and the method of each by path."""
    chosen = select_sites(found, layers)
    if not isinstance(method, Mapping):
        check_method(method)
        return chosen, {site.path: method for site in chosen}
    if not method:
        raise InputError("no site is given a method: the mapping is empty")
    paths = [site.path for site in found]
    for path, own in method.items():
        if path not in paths:
            raise InputError(f"no site {path!r}{nearest(path, paths)}")
        check_method(own)
    chosen = [site for site in chosen if site.path in method]
    if not chosen:
        raise InputError(f"layers {layers!r} matches no site that is given a method")
    return chosen, {site.path: method[site.path] for site in chosen}


def _named(method: Method) -> str:
    """Returns what in a method needs something, for messages: its score, or the method."""
    score = getattr(method, "score", None)
    return type(method).__name__ if score is None else f"score {score!r}"


def _check_module(method: Method, mlp: AnyMlp) -> None:
    """Raises `InputError` if a method does not take such a module."""
    if method.accepts_compressed and not isinstance(mlp, Mlp):
        hint = "fusion_jax.compress_matrices takes their matrices"
        if method.model_needs.router:
            hint = "drop experts before their widths are made to differ"
        raise InputError(f"has experts of different widths; {hint}")
    if not method.accepts_compressed and type(mlp) not in (Mlp, GatedMlp):
        raise InputError(f"is a {type(mlp).__name__} already; compress the original model")
    if method.scales_units and outside(mlp.act) is not None:
        raise InputError(
            f"has units that are not linear outside the activation, which {type(method).__name__} "
            "scales; use Fusion"
        )
    for name, linear in mlp.linears().items():
        check_plain(linear, name)


def _check_values(chosen: list[Site], gradients: Mapping[str, Array] | None) -> None:
    """Raises `InputError` for a NaN or infinite weight or gradient, and for a missing gradient."""
    finite = jax.device_get([all_finite(site.mlp) for site in chosen])
    bad = [site.path or "(the model)" for site, ok in zip(chosen, finite, strict=True) if not ok]
    if bad:
        raise InputError(f"NaN or infinite weights in {', '.join(bad)}")
    if gradients is None:
        return
    for site in chosen:
        with naming(site):
            if not all_finite(gradients_of(site, gradients)):
                raise InputError("NaN or infinite gradients")


def _check_needs_no_text(chosen: list[Site], methods: Mapping[str, Method]) -> None:
    """Raises `InputError` if a method needs text, where the inputs of the sites are given."""
    for site in chosen:
        needs = methods[site.path].model_needs
        if needs.earlier_sites:
            raise InputError(
                f"{needs.earlier_sites} needs calibration text or tokens; inputs by site do not "
                "follow the compression of earlier sites"
            )
        if needs.expert_use and site.mlp.stack:
            raise InputError(
                f"{site.path}: {needs.expert_use} needs calibration text or tokens; inputs of "
                "experts do not show how often the router uses each"
            )


@contextmanager
def naming(*found: Site) -> Iterator[None]:
    """Puts the paths of sites in front of an `InputError` from inside the block."""
    try:
        yield
    except InputError as error:
        paths = ", ".join(site.path or "the model" for site in found)
        raise InputError(f"{paths}: {error}") from None


def checked_key(key: object) -> Key[Array, ""]:
    """Returns a random key, also for one of the old kind; raises `InputError` for anything else."""
    array = isinstance(key, jax.Array)
    if array and key.dtype == jnp.uint32 and key.shape == (2,):
        return jax.random.wrap_key_data(key)
    if not array or key.shape or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise InputError(f"key must be one random key, such as jax.random.key(0); got {key!r}")
    return key


def all_finite(tree: object) -> Bool[Array, ""] | bool:
    """Returns whether all floating-point numbers of a tree are finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    if all(arrays.on_host(x) for x in leaves):
        return all(arrays.all_finite(x) for x in leaves)
    return _all_finite(leaves)


@jax.jit
def _all_finite(leaves: list[Array]) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
