"""The HTML report: one page that holds its style, scripts, Plotly and figures.

The page's content security policy names its two scripts by their hashes; nothing else is loaded or run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from urllib.parse import quote

import yaml

from parablock import __version__
from parablock.printable import as_argument, as_html
from parablock.report import tables
from parablock.report.figures import Figure, blocks_figure, client_losses_figure, clients_figure, loss_figure
from parablock.report.gantt import gantt_figure
from parablock.report.reading import RunRecord, cut_note
from parablock.report.tables import Table

MOST_CHARACTERS = 3000
"""Longest text of a prompt or an answer on the page; `answers.json` has all of it."""

SCRIPTS = ("plotly-basic.min.js", "report.js")


def render_html(runs: Sequence[RunRecord], detailed: RunRecord | None, folder: Path) -> str:
    """Return the page: a comparison of several runs, then the details of one, if any.

    Its links to the reports of other runs start in `folder`, where the page will be.
    """
    figures: dict[str, Figure] = {}
    sections: list[str] = []
    if len(runs) > 1 or detailed is None:
        sections += _comparison(runs, figures, folder)
    if detailed is not None:
        sections += _details(detailed, figures)
    name = "Comparison" if detailed is None else detailed.name
    return _page(title=f"{name} · ParaBlock", body="\n".join(sections), figures=figures)


def _comparison(runs: Sequence[RunRecord], figures: dict[str, Figure], folder: Path) -> list[str]:
    figures["compared"] = loss_figure(runs)
    pages = {run.name: run.path / "report.html" for run in runs}
    links = {name: os.path.relpath(page, folder) for name, page in pages.items() if page.exists()}
    note = "Eval loss of each run; a click on a name in the legend shows or hides a curve."
    parts = [
        _header("Comparison", f"{len(runs)} runs"),
        _section("Results", "", _table(tables.comparison_table(runs), links)),
        _section("Loss", note, _figure("compared", "Loss of all runs")),
    ]
    if len(runs) > 1:
        note = "Settings that are not the same in all runs."
        parts.append(_section("What differs", note, _table(tables.differences_table(runs))))
    if (settings := tables.ablation_table(runs)).rows:
        note = "A row for each setting; runs that differ in their seed alone share one, with mean ± deviation."
        parts.append(_section("What each setting does", note, _table(settings)))
    return parts


def _details(run: RunRecord, figures: dict[str, Figure]) -> list[str]:
    summary = run.summary
    has_blocks = summary["num_blocks"] > 1  # one is all that is trained
    subtitle = (
        f"{summary['method']}, delay {summary['delay']} · {summary['num_clients']} clients · "
        + f"{summary['num_blocks']} blocks · " * has_blocks
        + f"{summary['rounds_done']} of {summary['num_rounds']} rounds · {summary['status']}"
    )
    figures["loss"] = loss_figure([run])
    figures["gantt"] = gantt = gantt_figure(run.spans)
    clients = _table(tables.clients_table(run))
    if run.manifest.get("clients"):
        figures["clients"] = clients_figure(run)
        clients = _figure("clients", "Examples of each client") + clients
    clients_note = "How the loss of each client fell, what it trained on, and how it spent its time."
    configuration = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)
    settings = _table(tables.settings_table(run)) + _fold("config.yaml", f"<pre>{as_html(configuration)}</pre>")
    loss_note, timeline = (
        "Train loss of each round, and eval loss of the committed model.",
        "Timeline of the clients",
    )
    losses = tables.client_losses(run)
    if losses:
        figures["client_losses"] = client_losses_figure(losses)
        clients = _figure("client_losses", "Train loss of each client") + clients
    return [
        _header(run.name, subtitle),
        _facts(run),
        f'<p class="sentence">{as_html(tables.sentence(run))}</p>',
        *_answers(run),
        *_use(run),
        _section("Loss", loss_note, _figure("loss", "Loss")),
        _section("What each client did when", _about_gantt(run, gantt), _figure("gantt", timeline)),
        _section("Clients", clients_note, clients),
        *(_blocks(run, figures) if has_blocks else []),
        _section("Settings other than the defaults", "", settings),
        _section("Environment", "", _table(tables.environment_table(run))),
    ]


def _blocks(run: RunRecord, figures: dict[str, Figure]) -> list[str]:
    figures["blocks"] = blocks_figure(run)
    chart = _figure("blocks", "Norms and visits of the blocks") + _fold("Table", _table(tables.blocks_table(run)))
    note = "How far each visit moved its block, and how often each was visited. Lines and bars share colours."
    return [_section("Blocks", note, chart)]


def _answers(run: RunRecord) -> list[str]:
    """Show test prompts with the answers of both models, side by side."""
    if not run.answers:
        return []
    cards = "".join(
        f"<article><h3>{_clipped(record['prompt'])}</h3><dl>"
        + "".join(
            f'<div class="{label}"><dt>{title}</dt>'
            f"<dd>{_clipped(record[label], cut_note(record, label))}</dd></div>"
            for label, title in (("base", "base model"), ("tuned", "tuned model"), ("reference", "reference"))
            if label in record
        )
        + "</dl></article>"
        for record in run.answers
    )
    note = "Prompts of test rows; both models take the likeliest token at each place."
    return [_section("What it says", note, f'<div class="answers">{cards}</div>')]


def _clipped(text: str, note: str = "") -> str:
    """Return the begin of a text for the page; a `note` on its end always stands behind it."""
    shown = text.strip()
    if len(shown) > MOST_CHARACTERS:
        note = f"(cut here; {len(shown):,} characters in answers.json)"
    if note:
        shown = f"{shown[:MOST_CHARACTERS].rstrip()} … {note}"
    return as_html(shown) or "<i>nothing</i>"


def _use(run: RunRecord) -> list[str]:
    """Show how the tuned model is used, if there is one."""
    if run.summary["model_sha256"] is None:
        return []
    folder = run.path.resolve()
    several = sorted((folder / "model").glob("client_*"))  # of clients that keep their own
    model = several[0] if several else folder / "model"
    talk = f"parablock chat {as_argument(model if several else folder)}"
    code = (
        "from transformers import pipeline\n\n"
        f"tuned = pipeline('text-generation', {str(model)!r})\n"
        "print(tuned([{'role': 'user', 'content': 'Hello'}], max_new_tokens=64))"
    )
    return [
        _section(
            "Use this model",
            "Talk to it, with the base model beside it; or load it like any other model of Hugging Face.",
            f'<div class="use"><pre>{as_html(talk)}</pre><pre>{as_html(code)}</pre></div>',
        )
    ]


def _about_gantt(run: RunRecord, gantt: Figure) -> str:
    text = (
        "Three rows for each client: computing, sending, receiving. Computation did not hide the orange transfers. "
        "Drag to zoom in, double-click to go back."
    )
    left_out = []
    if gantt["num_clients"] < run.summary["num_clients"]:
        left_out.append(f"the first {gantt['num_clients']} of {run.summary['num_clients']} clients")
    if gantt["num_rounds"] < len(run.rows):
        left_out.append(f"the first {gantt['num_rounds']} of {len(run.rows)} rounds")
    return f"{text} Drawn: {' and '.join(left_out)}; trace.json has all." if left_out else text


def _header(name: str, subtitle: str) -> str:
    return f"<header><h1>{as_html(name)}</h1><p>{as_html(subtitle)}</p></header>"


def _facts(run: RunRecord) -> str:
    cells = "".join(
        f"<div><dt>{as_html(fact.label)}</dt><dd>{as_html(fact.value)}</dd><dd>{as_html(fact.detail)}</dd></div>"
        for fact in tables.headline(run)
    )
    return f'<dl class="facts">{cells}</dl>'


def _section(title: str, note: str, content: str) -> str:
    about = f"<p>{as_html(note)}</p>" if note else ""
    return f"<section><h2>{as_html(title)}</h2>{about}{content}</section>"


def _figure(name: str, label: str) -> str:
    return f'<div class="figure" id="{name}" role="img" aria-label="{as_html(label)}"></div>'


def _table(table: Table, links: Mapping[str, str] | None = None) -> str:
    if not table.rows:
        return "<p>None.</p>"
    links = links or {}
    classes = ["" if column < table.num_words else ' class="number"' for column in range(len(table.header))]
    rows = [[_cell(text, links) for text in row] for row in table.rows]
    head = "".join(f"<th{kind}>{as_html(name)}</th>" for kind, name in zip(classes, table.header, strict=True))
    cells = ("".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str, links: Mapping[str, str]) -> str:
    return (
        f'<a href="{as_html(quote(os.fsencode(links[text])))}">{as_html(text)}</a>'
        if text in links
        else as_html(text)
    )


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{as_html(title)}</summary>{content}</details>"


def _page(*, title: str, body: str, figures: dict[str, Figure]) -> str:
    scripts = [_asset(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "form-action 'none'; base-uri 'none'"
    )
    # `<` could end the element that holds the figures, so it is written as an escape of JSON.
    content = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{as_html(title)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<main>
{body}
<footer>Made by ParaBlock {__version__} from the files of the run. The page loads nothing from elsewhere.</footer>
</main>
<noscript>The pictures need JavaScript; the tables do not.</noscript>
<script type="application/json" id="figures">{content}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return resources.files("parablock.report").joinpath("assets", name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
