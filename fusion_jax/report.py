"""What a compression changed, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from fusion_jax.nn.mlp import Mlp
from fusion_jax.nn.uneven_experts import UnevenExperts


class Size(NamedTuple):
    """How large a model is.

    Args:
        params: Trainable numbers.
        bytes: Bytes of all its variables.
        mlp_params: Trainable numbers in its MLPs.
        mlp_flops: Operations of its MLPs' matrix products for one token.
    """

    params: int
    bytes: int
    mlp_params: int
    mlp_flops: int


def size_of(model: nnx.Module, mlps: Iterable[Mlp]) -> Size:
    """Counts a model, abstract or not.

    Args:
        model: The model.
        mlps: Its MLPs.

    Returns:
        Its size.
    """
    mlps = list(mlps)
    return Size(
        params=num_params(model),
        bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model))),
        mlp_params=sum(num_params(mlp) for mlp in mlps),
        mlp_flops=sum(mlp.flops for mlp in mlps),
    )


def num_params(module: nnx.Module) -> int:
    """The number of trainable numbers in a module."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    """What happened at one site.

    Args:
        site: Its path.
        width_before: Hidden units before; None for a single matrix.
        width_after: Hidden units after.
        params_before: Trainable numbers before.
        params_after: Trainable numbers after.
        facts: What the method tells of its work: for `Fusion` the share of the rows' sum of squares
            that stays inside clusters (inertia), the Lloyd iterations, whether they converged,
            and the number of empty clusters.
        seconds: Time taken; at the first site of its shape this includes compilation.
        use: Of experts, the share of the calibration text's routed positions that each one got;
            None if there was no text.
        widths: The width of each expert after, where they differ; ``width_after`` is the widest.
    """

    site: str
    width_before: int | None
    width_after: int | None
    params_before: int
    params_after: int
    facts: dict[str, Any]
    seconds: float
    use: list[float] | None = None
    widths: list[int] | None = None

    @classmethod
    def of(
        cls,
        site: str,
        old: Mlp,
        new: Mlp,
        facts: dict[str, Any],
        seconds: float,
        use: Sequence[float] | None = None,
    ) -> SiteReport:
        """The report of an MLP and what replaced it."""
        return cls(
            site=site or "(the model)",
            width_before=old.width,
            width_after=new.width,
            params_before=num_params(old),
            params_after=num_params(new),
            facts=facts,
            seconds=seconds,
            use=None if use is None else list(use),
            widths=list(new.widths) if isinstance(new, UnevenExperts) else None,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a compression changed; ``str()`` is a table.

    Args:
        method: The method's configuration.
        calibration: What was calibrated on, in words, or None.
        rows: One entry per compressed site.
        before: The size of the whole model before.
        after: The size of the whole model after.
    """

    method: dict[str, Any]
    calibration: str | None = None
    rows: tuple[SiteReport, ...]
    before: Size
    after: Size

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "method": self.method,
            "calibration": self.calibration,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "before": self.before._asdict(),
            "after": self.after._asdict(),
        }

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.facts))
        widths = any(row.width_before is not None for row in self.rows)
        header = ["site", *["width"] * widths, "parameters", *names, "seconds"]
        body = [
            [
                row.site,
                *[f"{row.width_before} -> {_widths(row)}"] * widths,
                f"{row.params_before:,} -> {row.params_after:,}",
                *(_cell(row.facts.get(name)) for name in names),
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
        return f"{head}{table([header, *body])}\n\n{more}{table(totals)}"


def _widths(row: SiteReport) -> str:
    return str(row.width_after) if row.widths is None else f"{min(row.widths)}-{row.width_after}"


def _shares(use: Sequence[float]) -> str:
    """All shares of a few experts, and of many the least, the median and the most."""
    if len(use) <= 16:
        return " ".join(f"{share:.1%}" for share in use)
    ordered = sorted(use)
    least, middle, most = ordered[0], ordered[len(use) // 2], ordered[-1]
    return f"{least:.1%} to {most:.1%}, median {middle:.1%}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _total(name: str, before: int | float, after: int | float) -> list[str]:
    form = "{:,}" if isinstance(before, int) else "{:,.1f}"
    change = 100 * (after / before - 1) if before else 0.0
    return [name, form.format(before), form.format(after), f"{change:+.1f} %"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row as the header.

    Args:
        rows: Equally long rows; the first column is aligned left, the others right.

    Returns:
        The lines, without a newline at the end.

    Example:
        >>> print(table([["site", "width"], ["a", "8"]]))
        site  width
        ----  -----
        a         8
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [rows[0], rule, *rows[1:]]
    ]
    return "\n".join(lines)
