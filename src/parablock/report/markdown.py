"""A report as Markdown: the same tables as the page, for a README, an issue or a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.report.ablation import ablation_table
from parablock.report.reading import RunRecord
from parablock.report.tables import (
    blocks_table,
    clients_table,
    comparison_table,
    differences_table,
    environment_table,
    headline,
    settings_table,
    to_markdown,
)


def render_markdown(runs: Sequence[RunRecord], detailed: RunRecord | None) -> str:
    """Write the tables.

    Args:
        runs: All runs; more than one are compared.
        detailed: The run that is shown in detail, if any.
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
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _headline(run: RunRecord) -> str:
    return "\n".join(f"- {fact.label}: **{fact.value}**, {fact.detail}" for fact in headline(run))
