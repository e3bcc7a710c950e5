"""Writes a self-contained HTML page on a compressed model: what changed, in numbers and charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from fusion_jax.models.provenance import history_in_words
from fusion_jax.report import EXPLANATIONS, Report, cell
from fusion_jax.verification import charts
from fusion_jax.verification.checks import KERNEL_NAMES, LOOSE, Verification, VerifiedArtefact
from fusion_jax.verification.outlook import step_table
from ntk import KernelKind
from ntk.bounds.certificates import Certificate

_STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1d2433;--soft:#5d6675;
--faint:#cfd4dc;--c0:#2456a6;--c1:#c8650f;--c2:#7a8794;--good:#1b7f4b;--warn:#8a5a00;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#14171d;--card:#1c2129;--ink:#e8ebf0;
--soft:#9aa4b2;--faint:#39414d;--c0:#7eb0ff;--c1:#ffb066;--c2:#98a4b3;--good:#63d297;
--warn:#ffcf70;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:32px 16px 64px;background:var(--paper);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 8px}h2{font-size:1.15rem;margin:40px 0 4px}
p{margin:4px 0 12px}ol{margin:8px 0;padding-left:2.4em}
.soft,figcaption,dl{color:var(--soft)}.good{color:var(--good)}.warn{color:var(--warn)}
.bad{color:var(--bad)}
.row{display:grid;gap:16px;margin-bottom:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.facts{grid-template-columns:repeat(auto-fit,minmax(min(100%,180px),1fr))}
figure,.fact{margin:0;background:var(--card);border:1px solid var(--faint);border-radius:10px;
padding:12px;min-width:0}
figcaption{font-size:.85rem;margin-bottom:8px}.fact b{display:block;font-size:1.2rem}
.fact span,dl{font-size:.85rem}.fact span{color:var(--soft)}
svg{display:block;width:100%;max-width:440px;height:auto;margin:0 auto}svg text{fill:var(--ink)}
table{border-collapse:collapse;font-size:.85rem;width:100%;margin-bottom:16px}
th,td{padding:5px 8px;border-bottom:1px solid var(--faint);text-align:right}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
dt{float:left;font-weight:600;margin-right:.5em}dd{margin:0 0 4px}
@media (max-width:760px){tr:first-child{display:none}tr,td{display:block}
tr{border-bottom:2px solid var(--faint)}td{border:0;display:flex;justify-content:space-between;
padding:2px 0}td:first-child{font-weight:600}td::before{content:attr(data-name);
color:var(--soft);font-weight:400;margin-right:1em}}
"""


def html_page(verified: VerifiedArtefact) -> str:
    """Returns an HTML page on a compressed model, which needs no other file.

    Args:
        verified: The result of `fusion_jax.verification.checks.verify_files`.
    """
    v, report = verified.verification, verified.report
    kinds = v.kinds()
    sections = [
        _facts(v, verified.num_params, kinds),
        *(_kernels(v, kind) for kind in kinds),
        "" if report is None else _report(report),
        _sites(v.certificates),
        _how(v),
        _texts(verified.texts),
    ]
    # The last folder of a path is often called "model"; with the one above, a hub id stays whole.
    model = "/".join(Path(verified.original).parts[-2:])
    title = f"{model}, {history_in_words(verified.history)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title).replace('/', '/<wbr>')}</h1>"
        f'<p class="soft">What changed in the folder {escape(verified.artefact.name)}. Neural '
        "tangent kernels predict how a model fine-tunes; these are exact, on the "
        f'<a href="#texts">{v.num_texts} texts</a> below.</p>'
        f"{''.join(sections)}</body></html>\n"
    )


def _facts(v: Verification, num_params: tuple[int, int], kinds: Sequence[KernelKind]) -> str:
    before, after = num_params
    facts = [(f"{_count(before)} → {_count(after)}", f"parameters, {after / before - 1:+.0%}")]
    for kind in kinds:
        c = v.comparisons[kind]
        other = v.scaling in kinds and kind != v.scaling
        note = f"; the scaling {v.scaling!r} keeps the other kernel" if other else ""
        facts.append((f"{c.frobenius:.1%}", f"change of the {KERNEL_NAMES[kind]} kernel{note}"))
        facts.append(
            (f"{c.alignment:.3f}", f"alignment of the {KERNEL_NAMES[kind]} kernels (1 is equal)")
        )
    outlook = "".join(
        f'<p>{escape(v.outlook(kind)[0])}</p><p class="soft">{escape(v.outlook(kind)[1])}</p>'
        f"{_table(step_table(v.steps[kind]))}"
        for kind in kinds
    )
    cards = "".join(f'<div class="fact"><b>{a}</b><span>{b}</span></div>' for a, b in facts)
    verdicts = [("bad", f"{failure}.") for failure in v.failures()]
    if not verdicts:
        loose = v.loose_bounds()
        if loose is not None:
            verdicts.append(("warn", f"No certified bound is violated, but {loose}."))
        elif v.certificates:
            verdicts.append(("good", "✓ Every certified bound holds, and none is above 100 %."))
        if v.engine_differences:
            verdicts.append(("good", "✓ All engines agree."))
    lines = "".join(f'<p class="{kind}">{escape(text)}</p>' for kind, text in verdicts)
    return (
        f"<h2>Will it train like the original?</h2>{outlook}"
        '<p class="soft">Half the sum of squared differences from random targets, all texts in one '
        "step, with SGD and the first step of Adam. Apart: the difference of the moves of the two "
        "models, relative to that of the original.</p>"
        f'<h2>At a glance</h2>{lines}<div class="row facts">{cards}</div>'
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}\u00a0M" if number >= 1e5 else f"{number:,}"


def _kernels(v: Verification, kind: KernelKind) -> str:
    first, second = v.kernels[kind]
    comparison = v.comparisons[kind]
    largest = float(max(np.abs(first).max(), np.abs(second).max()))
    change = second - first
    apart = float(np.abs(change).max())
    axes = ("text", "text")
    meaning = "Each square is the inner product of the gradients at two texts."
    if kind == "adam":
        axes = ("text, its gradient", "text, the sign of its gradient")
        meaning = (
            "Each square is the inner product of the gradient at the text of the row and the sign "
            "of the gradient at the text of the column. So the kernel is not symmetric."
        )
    pictures = [
        ("original", first, largest),
        ("compressed, colors as for the original", second, largest),
        ("compressed minus original, colors of its own", change, apart),
    ]
    maps = "".join(_figure(text, charts.heatmap(k, top, axes, text)) for text, k, top in pictures)
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
        f'<h2>{KERNEL_NAMES[kind]} kernel</h2><p class="soft">{meaning} A stronger color means a '
        "larger value: blue above zero, orange below; the bars have the numbers.</p>"
        f'<div class="row">{maps}</div><div class="row">{plots}</div>'
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
        chart = charts.dot_chart(rows, labels, "relative change (1 is 100 %)", limit=LOOSE)
        figures.append(_figure(name.capitalize().replace("Sgd", "SGD"), chart))
    return (
        "<h2>Each MLP, with certified bounds</h2>"
        '<p class="soft">Relative change at the inputs that the MLP has in the original, and upper '
        "bounds: without running the smaller MLP (a priori), or from a sketch of each input (data)."
        " Shaded and hollow: bounds above 100 %, which are loose, as an MLP that is gone has "
        f'changed by 100 %.</p><div class="row">{"".join(figures)}</div>'
    )


def _report(report: Report) -> str:
    names = list(dict.fromkeys(name for row in report.rows for name in row.facts))
    widths = any(row.width_before is not None for row in report.rows)
    head = ["site", *["width"] * widths, "parameters", *names]
    rows = [
        [
            row.site,
            *[f"{cell(row.width_before)} → {cell(row.width_after)}"] * widths,
            f"{row.params_before:,} → {row.params_after:,}",
            *(cell(row.facts.get(name)) for name in names),
        ]
        for row in report.rows
    ]
    methods = report.method
    if "method" in methods:
        methods = {"": methods}
    done = [f"{site}: {_fields(fields)}".removeprefix(": ") for site, fields in methods.items()]
    done += [] if report.calibration is None else [f"calibration: {report.calibration}"]
    done += ["the head is new and not trained"] if report.new_head else []
    lines = "".join(f'<p class="soft">{escape(text)}</p>' for text in done)
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(EXPLANATIONS[name])}.</dd>"
        for name in names
        if name in EXPLANATIONS
    )
    return f"<h2>What was done</h2>{lines}{_table([head, *rows])}<dl>{terms}</dl>"


def _fields(method: object) -> str:
    if not isinstance(method, dict):
        return str(method)
    return ", ".join(f"{name} {value}" for name, value in method.items())


def _how(v: Verification) -> str:
    engines = "neural-tangents is not installed, so engines were not compared."
    if v.engine_differences is not None:
        found = ", ".join(f"{name} {x:.0e}" for name, x in v.engine_differences.items())
        engines = f"Largest relative difference of other engines: {found or 'not measured'}."
    return (
        '<h2>How</h2><p class="soft">The kernels are those of a scalar, the softmax probability of '
        "class 0 (from a random head, if the model has none), with respect to all parameters. "
        f"{escape(engines)}</p>"
    )


def _texts(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<h2 id="texts">Texts</h2><ol class="soft">{items}</ol>'


def _figure(caption: str, picture: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table; on narrow screens each cell is a line with the name of its column."""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(
        f"<tr>{''.join(_cell(*pair) for pair in zip(rows[0], row, strict=True))}</tr>"
        for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(name: str, text: str) -> str:
    return f'<td data-name="{escape(name)}">{escape(text)}</td>'
