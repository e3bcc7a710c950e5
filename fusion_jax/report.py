"""Reports what a compression changed, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from fusion_jax.errors import InputError
from fusion_jax.nn.mlp import AnyMlp
from ntk.tables import table

EXPLANATIONS = {
    "inertia": "the share of the differences among hidden units (their sum of squares about the "
    "mean) that is lost when each becomes its cluster's centroid, as the clustering measures it: "
    "on the calibration text if there is one; with members in place of centroids, the share of the "
    "squares of the units' values on that text that their members do not explain. 0 is nothing, "
    "1 everything",
    "raw_inertia": "the same share, of the weights themselves",
    "singletons": "clusters of a single hidden unit, which lose nothing",
    "largest": "the number of hidden units in the largest cluster",
    "steps": "how often the clustering was improved, by a round of k-means or by moving one unit",
    "converged": "whether nothing was left to improve at the end",
    "error": "the change of the matrices, relative to their own size (Frobenius norms)",
    "kept": "the share of the weights that are not zero",
    "bound": "the largest error that the singular values that were cut off allow",
    "entropy": "the largest entanglement entropy of a bond, in nats: how much a chain of small "
    "tensors has to carry",
    "excess": "by how much an error is above its bound; more than rounding would be a fault",
    "start": "the squared distance (MMD) of the chosen units from all units at the start",
    "end": "the same distance after optimizing",
    "experts": "the number of experts that stay",
    "kept_score": "the share of the scores of all experts that those that stay have",
    "kept_importance": "the share of the scores of all hidden units that the kept ones have",
}
"""An explanation of each fact of the methods, by name."""

_WRONG_VALUES = (
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    AssertionError,
)


class Size(NamedTuple):
    """The size of a model.

    Args:
        params: Parameters, which are the numbers that can train.
        bytes: Bytes of all variables.
        mlp_params: Parameters of the MLPs.
        mlp_flops: Operations of the MLPs' matrix products for one token.
    """

    params: int
    bytes: int
    mlp_params: int
    mlp_flops: int


def size_of(model: nnx.Module, mlps: Iterable[AnyMlp]) -> Size:
    """Returns the size of a model, which may be abstract, with the given MLPs."""
    mlps = list(mlps)
    return Size(
        params=num_params(model),
        bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model))),
        mlp_params=sum(num_params(mlp) for mlp in mlps),
        mlp_flops=sum(mlp.flops for mlp in mlps),
    )


def num_params(module: nnx.Module) -> int:
    """Returns the number of parameters of a module."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """The change at one site.

    Args:
        site: Its path.
        width_before: Hidden units before; None for a single matrix.
        width_after: Hidden units after.
        params_before: Parameters before.
        params_after: Parameters after.
        facts: The method's own figures, such as `FusionFacts`.
        seconds: Time taken; at the first site of its shape this includes compilation.
        use: The share of the calibration text's routed positions that each expert got; None if
            there are no experts or was no text.
        widths: The width of each expert after, where they differ; ``width_after`` is the widest.
        experts: The experts that stay, by their numbers before, where others were dropped.
    """

    site: str
    width_before: int | None
    width_after: int | None
    params_before: int
    params_after: int
    facts: dict[str, bool | int | float]
    seconds: float
    use: list[float] | None = None
    widths: list[int] | None = None
    experts: list[int] | None = None

    @classmethod
    def of(
        cls,
        site: str,
        old: AnyMlp,
        new: AnyMlp,
        facts: dict[str, bool | int | float],
        seconds: float,
        use: Sequence[float] | None = None,
        experts: Sequence[int] | None = None,
    ) -> SiteReport:
        """Returns the report of an MLP and the module that replaced it."""
        return cls(
            site=site or "(the model)",
            width_before=old.width,
            width_after=new.width,
            params_before=num_params(old),
            params_after=num_params(new),
            facts=facts,
            seconds=seconds,
            use=None if use is None else list(use),
            widths=None if new.widths is None else list(new.widths),
            experts=None if experts is None else list(experts),
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The changes of a compression; ``str()`` is a table.

    Args:
        method: The method's configuration, or the configurations by site where methods differ.
        calibration: The source of the calibration, in words, or None.
        new_head: Whether the head of the model has random weights and was not trained.
        rows: One entry per compressed site.
        before: The size of the whole model before.
        after: The size of the whole model after.
    """

    method: Mapping[str, object]
    calibration: str | None = None
    new_head: bool = False
    rows: tuple[SiteReport, ...]
    before: Size
    after: Size

    def to_json(self) -> dict[str, object]:
        """Returns the report as JSON values."""
        return {
            "method": self.method,
            "calibration": self.calibration,
            "new_head": self.new_head,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "before": self.before._asdict(),
            "after": self.after._asdict(),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Report:
        """Returns the report with these JSON values, as `to_json` gives them.

        Raises:
            InputError: The values are not those of a report.
        """
        try:
            report = cls(
                method={**fields["method"]},
                calibration=fields.get("calibration"),
                new_head=bool(fields.get("new_head", False)),
                rows=tuple(SiteReport(**row) for row in fields["rows"]),
                before=Size(**fields["before"]),
                after=Size(**fields["after"]),
            )
            # Every value has to be of the type that its form in a table takes.
            widths = [cell(w) for row in report.rows for w in (row.width_before, row.width_after)]
            assert widths and str(report)
        except _WRONG_VALUES as error:
            kind = type(error).__name__
            raise InputError(f"this is not the report of a compression ({kind})") from None
        return report

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.facts))
        widths = any(row.width_before is not None for row in self.rows)
        header = ["site", *["width"] * widths, "parameters", *names, "seconds"]
        body = [
            [
                row.site,
                *[f"{row.width_before} -> {_widths(row)}"] * widths,
                f"{row.params_before:,} -> {row.params_after:,}",
                *(cell(row.facts.get(name)) for name in names),
                f"{row.seconds:.2f}",
            ]
            for row in self.rows
        ]
        before, after = self.before, self.after
        totals = [
            ["model", "before", "after", "change"],
            _total("parameters", before.params, after.params),
            _total("megabytes", before.bytes / 1e6, after.bytes / 1e6),
            _total("MLP parameters", before.mlp_params, after.mlp_params),
            _total("MLP MFLOPs per token", before.mlp_flops / 1e6, after.mlp_flops / 1e6),
        ]
        used = [row for row in self.rows if row.use is not None]
        experts = [["experts", "share of the text that the router gives to each"]]
        experts += [[row.site, _shares(row.use or [])] for row in used]
        more = f"{table(experts)}\n\n" if used else ""
        head = "" if self.calibration is None else f"Calibration: {self.calibration}\n\n"
        if self.new_head:
            head += "The head is new: its weights are random until it is trained.\n\n"
        return f"{head}{table([header, *body])}\n\n{more}{table(totals)}"


def _widths(row: SiteReport) -> str:
    return str(row.width_after) if row.widths is None else f"{min(row.widths)}-{row.width_after}"


def _shares(use: Sequence[float]) -> str:
    """Returns all shares of a few experts; the smallest, the median and the largest of many."""
    if len(use) <= 16:
        return " ".join(f"{share:.1%}" for share in use)
    ordered = sorted(use)
    return f"{ordered[0]:.1%} to {ordered[-1]:.1%}, median {ordered[len(use) // 2]:.1%}"


def cell(value: object) -> str:
    """Returns a figure as text for a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _total(name: str, before: int | float, after: int | float) -> list[str]:
    form = "{:,}" if isinstance(before, int) else "{:,.1f}"
    change = 100 * (after / before - 1) if before else 0.0
    return [name, form.format(before), form.format(after), f"{change:+.1f} %"]
