"""Write the report of one or several runs: `report.html` and `report.md`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parablock.errors import InputError
from parablock.report.html import render_html
from parablock.report.reading import RunRecord, has_ended, is_run, read_runs
from parablock.report.tables import (
    ablation_table,
    blocks_table,
    clients_table,
    comparison_table,
    differences_table,
    environment_table,
    headline,
    settings_table,
    to_markdown,
)
from parablock.storage.files import write_atomically

REPORT_NAME, TABLES_NAME = "report.html", "report.md"


def write_report(directories: Sequence[Path | str]) -> Path:
    """Write `report.html` and `report.md` into the first of the folders.

    Args:
        directories: A run directory, and the runs to compare it with. A folder that is no run stands for all
            ended runs in it, and gets a comparison alone.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: A folder holds no run that has ended, or a file is damaged.
        StorageError: The report cannot be written.
    """
    folders = [Path(directory) for directory in directories]
    runs = read_runs([path for folder in folders for path in _runs_in(folder)])
    detailed = runs[0] if is_run(folders[0]) else None
    page = folders[0] / REPORT_NAME
    write_atomically(folders[0] / TABLES_NAME, render_markdown(runs, detailed))
    write_atomically(page, render_html(runs, detailed, folders[0]))
    return page


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    inside = sorted(path for path in folder.iterdir() if has_ended(path)) if folder.is_dir() else []
    if not inside:
        raise InputError(
            f"{folder} holds no run that has ended" if folder.is_dir() else f"there is no folder {folder}",
            remedy="Give the --output-dir of a `parablock run`, or a folder of such folders.",
        )
    return inside


def render_markdown(runs: Sequence[RunRecord], detailed: RunRecord | None) -> str:
    """Return all tables as Markdown.

    Args:
        runs: All runs; several are compared.
        detailed: The run to show in detail, or None.
    """
    parts: list[str] = []
    if len(runs) > 1 or detailed is None:
        parts += ["# Comparison", to_markdown(comparison_table(runs))]
        if len(runs) > 1:
            parts += ["## What differs", to_markdown(differences_table(runs))]
        if (settings := ablation_table(runs)).rows:
            parts += ["## What each setting does", to_markdown(settings)]
    if detailed is not None:
        parts += [f"# {detailed.name}", _headline(detailed)]
        parts += ["## Clients", to_markdown(clients_table(detailed))]
        parts += ["## Blocks", to_markdown(blocks_table(detailed))]
        parts += ["## Settings other than the defaults", to_markdown(settings_table(detailed))]
        parts += ["## Environment", to_markdown(environment_table(detailed))]
    return "\n\n".join(parts) + "\n"


def _headline(run: RunRecord) -> str:
    return "\n".join(f"- {fact.label}: **{fact.value}**, {fact.detail}" for fact in headline(run))
