"""Write the report of one or several runs: `report.html` and `report.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from parablock.errors import InputError
from parablock.printable import as_markdown
from parablock.report import tables
from parablock.report.html import render_html
from parablock.report.reading import RunRecord, answer_of, has_ended, is_run, read_runs
from parablock.report.tables import Table
from parablock.storage import FIGURES_NAME
from parablock.storage.files import write_atomically

REPORT_NAME, TABLES_NAME = "report.html", "report.md"


def write_report(directories: Sequence[Path | str]) -> Path:
    """Write `report.html` and `report.md` into the first of the folders; return the path of the page.

    Args:
        directories: A run directory, and the runs to compare it with. A folder that is no run stands for all
            ended runs in it, and gets a comparison alone.

    Raises:
        InputError: A folder holds no run that has ended, or a file is damaged.
    """
    folders = [Path(directory) for directory in directories]
    runs = read_runs([path for folder in folders for path in _runs_in(folder)])
    detailed = runs[0] if is_run(folders[0]) else None
    page = folders[0] / REPORT_NAME
    write_atomically(folders[0] / TABLES_NAME, render_markdown(runs, detailed))
    write_atomically(page, render_html(runs, detailed, folders[0]))
    return page


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder) or (folder / "summary.json").exists():  # a run that has lost its config.yaml is told so
        return [folder]
    inside = sorted(path for path in folder.iterdir() if has_ended(path)) if folder.is_dir() else []
    order = {name: n for n, name in enumerate(_compared(folder))}
    inside.sort(key=lambda path: order.get(path.name, len(order)))
    if not inside:
        raise InputError(
            f"{folder} holds no run that has ended" if folder.is_dir() else f"there is no folder {folder}",
            remedy="Give the --output-dir of a `parablock run`, or a folder of such folders.",
        )
    return inside


def _compared(folder: Path) -> list[str]:
    """Return the names of the runs of a comparison, in the order in which they were given."""
    try:
        return [summary["name"] for summary in json.loads((folder / FIGURES_NAME).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _answers(run: RunRecord) -> list[str]:
    labels = {"prompt": "prompt", "base": "base model", "tuned": "tuned model", "reference": "reference"}
    parts = [
        "\n".join(
            f"- {title}: {as_markdown(answer_of(record, label))}"
            for label, title in labels.items()
            if label in record
        )
        for record in run.answers
    ]
    return ["## What it says", *parts] if parts else []


def render_markdown(runs: Sequence[RunRecord], detailed: RunRecord | None) -> str:
    """Return all tables as Markdown: a comparison of several runs, then the details of one, if any."""
    parts: list[str | Table] = []
    if len(runs) > 1 or detailed is None:
        parts += ["# Comparison", tables.comparison_table(runs)]
        if len(runs) > 1:
            parts += ["## What differs", tables.differences_table(runs)]
        if (settings := tables.ablation_table(runs)).rows:
            parts += ["## What each setting does", settings]
    if detailed is not None:
        facts = (f"- {fact.label}: **{fact.value}**, {fact.detail}" for fact in tables.headline(detailed))
        parts += [f"# {as_markdown(detailed.name)}", as_markdown(tables.sentence(detailed)), "\n".join(facts)]
        parts += _answers(detailed)
        parts += ["## Clients", tables.clients_table(detailed)]
        if detailed.summary["num_blocks"] > 1:
            parts += ["## Blocks", tables.blocks_table(detailed)]
        parts += ["## Settings other than the defaults", tables.settings_table(detailed)]
        parts += ["## Environment", tables.environment_table(detailed)]
    texts = (part if isinstance(part, str) else tables.to_markdown(part) for part in parts)
    return "\n\n".join(texts) + "\n"
