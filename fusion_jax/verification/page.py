"""Writes a self-contained HTML page on a compressed model: what changed, in numbers and charts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fusion_jax.report import cell
from fusion_jax.verification import charts
from fusion_jax.verification.checks import KERNEL_NAMES, Verification, VerifiedArtefact
from ntk import KernelKind
from ntk.bounds.certificates import Certificate

_STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2433;--soft:#5d6675;--faint:#cfd4dc;--c0:#2456a6;
--c1:#d9822b;--c2:#7a8794;--good:#1b7f4b;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#14171d;--card:#1c2129;--ink:#e8ebf0;
--soft:#9aa4b2;--faint:#39414d;--c0:#7eb0ff;--c1:#ffb066;--c2:#98a4b3;--good:#63d297;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:32px 20px 64px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.15rem;margin:40px 0 4px}p{margin:4px 0 12px}
.soft,figcaption{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.row{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(220px,1fr))}
.two{grid-template-columns:repeat(auto-fit,minmax(380px,1fr))}
figure,.fact{margin:0;background:var(--card);border:1px solid var(--faint);border-radius:10px;
padding:14px}
figcaption{font-size:.85rem;margin-bottom:8px}.fact b{display:block;font-size:1.5rem}
.fact span{font-size:.85rem;color:var(--soft)}
svg{display:block;width:100%;height:auto}svg text{fill:var(--ink)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;width:100%}
th,td{padding:5px 10px;border-bottom:1px solid var(--faint);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
"""


def html_page(verified: VerifiedArtefact) -> str:
    """Returns an HTML page on a compressed model, which needs no other file.

    Args:
        verified: The result of `fusion_jax.verification.checks.verify_files`. If the artefact has
            a ``report.json``, it is shown as well.
    """
    v, artefact, original, num_params = verified
    file = artefact / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    scaling = None if report is None else report["method"].get("scaling")
    kinds = sorted(v.kernels, key=lambda kind: kind != scaling)  # first the optimizer of the method
    sections = [
        _facts(v, num_params, kinds, scaling),
        *(_kernels(v, kind) for kind in kinds),
        "" if report is None else _report(report),
        _sites(v.certificates),
        _how(v),
    ]
    title = f"{artefact.name}: what compressing changed"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">Original: {escape(Path(original).name or original)}. Neural tangent '
        f"kernels predict how a model fine-tunes; these are exact, on {v.num_texts} texts.</p>"
        f"{''.join(sections)}</body></html>\n"
    )


def _facts(
    v: Verification, num_params: tuple[int, int], kinds: Sequence[KernelKind], scaling: str | None
) -> str:
    before, after = num_params
    facts = [
        (f"{before / 1e6:.1f} M → {after / 1e6:.1f} M", f"parameters, {after / before - 1:+.0%}")
    ]
    for kind in kinds:
        c = v.comparisons[kind]
        other = scaling in kinds and kind != scaling
        note = f"; the scaling {scaling!r} keeps the other kernel" if other else ""
        facts.append((f"{c.frobenius:.1%}", f"change of the {KERNEL_NAMES[kind]} kernel{note}"))
        facts.append(
            (f"{c.alignment:.3f}", f"alignment of the {KERNEL_NAMES[kind]} kernels (1 is equal)")
        )
    cards = "".join(f'<div class="fact"><b>{a}</b><span>{b}</span></div>' for a, b in facts)
    failures = v.failures()
    if failures:
        verdict = f'<p class="bad">{escape("; ".join(failures))}.</p>'
    else:
        checks = ["every certified bound holds"] if v.certificates else []
        checks += ["all engines agree"] if v.engine_differences else []
        verdict = f'<p class="good">✓ {escape(" and ".join(checks))}</p>' if checks else ""
    return f'<h2>At a glance</h2>{verdict}<div class="row">{cards}</div>'


def _kernels(v: Verification, kind: KernelKind) -> str:
    first, second = v.kernels[kind]
    comparison = v.comparisons[kind]
    largest = float(max(np.abs(first).max(), np.abs(second).max()))
    pictures = [
        (first, "original"),
        (second, "compressed"),
        (first - second, "difference, same colors"),
    ]
    maps = "".join(_figure(text, charts.heatmap(k, largest, text)) for k, text in pictures)
    ranks = np.arange(1, len(first) + 1)
    spectra = [
        charts.Line(name, ranks, values)
        for name, values in zip(("original", "compressed"), comparison.spectra, strict=True)
    ]
    values = "eigenvalue" if comparison.symmetric else "singular value"
    plots = _figure(
        f"Spectrum: the {values}s in descending order",
        charts.line_chart(spectra, "rank", values, log_y=True),
    )
    training = comparison.training
    if training is not None:
        losses = [
            charts.Line(name, training.times, loss)
            for name, loss in zip(("original", "compressed"), training.losses, strict=True)
        ]
        losses.append(charts.Line("difference of outputs", training.times, training.apart))
        flow = training.dynamics == "gradient flow"
        plots += _figure(
            f"Predicted training (linearized {training.dynamics}, random targets)",
            charts.line_chart(losses, "learning rate times steps", "loss, relative", log_x=flow),
        )
    return (
        f"<h2>{KERNEL_NAMES[kind]} kernel</h2>"
        '<p class="soft">One square for each pair of texts; darker means larger.</p>'
        f'<div class="row">{maps}</div><p></p><div class="row two">{plots}</div>'
    )


def _sites(certificates: dict[str, Certificate]) -> str:
    if not certificates:
        return ""
    figures = []
    names = [line.quantity for line in next(iter(certificates.values())).lines]
    labels = ("measured", "bound from data", "bound a priori")
    for i, name in enumerate(names):
        rows = [
            (site, (c.lines[i].measured, c.lines[i].data, c.lines[i].a_priori))
            for site, c in certificates.items()
        ]
        figures.append(_figure(name.capitalize().replace("Sgd", "SGD"),
                               charts.dot_chart(rows, labels, "relative change")))  # fmt: skip
    return (
        "<h2>Each MLP, with certified bounds</h2>"
        '<p class="soft">Relative change at the inputs that the MLP has in the original, and upper '
        "bounds: from norms of the weights alone (a priori), or from a sketch of each input (data)."
        f'</p><div class="row two">{"".join(figures)}</div>'
    )


def _report(report: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["facts"]))
    head = ["site", "width", "parameters", *names]
    rows = [
        [
            row["site"],
            f"{row['width_before']:,} → {row['width_after']:,}",
            f"{row['params_before']:,} → {row['params_after']:,}",
            *(cell(row["facts"].get(name)) for name in names),
        ]
        for row in report["rows"]
    ]
    method = ", ".join(f"{name} {value}" for name, value in report["method"].items())
    return f'<h2>What was done</h2><p class="soft">{escape(method)}</p>{_table([head, *rows])}'


def _how(v: Verification) -> str:
    engines = "neural-tangents is not installed, so engines were not compared."
    if v.engine_differences is not None:
        found = ", ".join(f"{name} {x:.0e}" for name, x in v.engine_differences.items())
        engines = f"Largest relative difference of other engines: {found or 'not measured'}."
    return (
        '<h2>How</h2><p class="soft">The kernels are those of a scalar, the softmax probability of '
        "class 0 (from a random head, if the model has none), with respect to all parameters. SGD: "
        "inner products of gradients. Adam: inner products of gradients and signs of gradients. "
        f"{escape(engines)}</p>"
    )


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table>{line(rows[0], "th")}{body}</table></div>'
