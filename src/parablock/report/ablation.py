"""What each setting does: runs that differ in some of their settings, with what they came to beside these."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from parablock.report.reading import RunRecord
from parablock.report.tables import UNKNOWN, Table, flatten, short

SEED = "seed"
"""Runs that differ in nothing else are repetitions: a row has their mean."""


def ablation_table(runs: Sequence[RunRecord]) -> Table:
    """Put the settings that differ beside loss, time and bytes; one row for each setting, a mean over its seeds.

    Args:
        runs: Any number; rows come in their order.

    Returns:
        A table without rows where nothing but the seed differs.
    """
    settings = [flatten(run.config) for run in runs]
    known = {key: None for own in settings for key in own if key != SEED}
    keys = [key for key in known if any(own.get(key) != settings[0].get(key) for own in settings)]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run, own in zip(runs, settings, strict=True):
        groups.setdefault(tuple(short(own.get(key)) for key in keys), []).append(run.summary)
    header = (*keys, "seeds", "base loss", "eval loss", "time, s", "MB, all clients", "hidden")
    rows = tuple((*place, *_results(group)) for place, group in groups.items())
    return Table(header, rows if keys else (), num_words=len(keys))


def _results(group: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    losses = [summary["final_eval_loss"] for summary in group]
    megabytes = fmean(summary["uplink_bytes"] + summary["downlink_bytes"] for summary in group) / 1e6
    return (
        str(len(group)),
        f"{fmean(summary['initial_eval_loss'] for summary in group):.4f}",
        UNKNOWN if None in losses else _spread(losses),
        f"{fmean(summary['wall_time_s'] for summary in group):.1f}",
        f"{megabytes:.2f}",
        f"{fmean(summary['overlap_fraction'] for summary in group):.0%}",
    )


def _spread(values: Sequence[float]) -> str:
    """Write a mean and, of several values, their standard deviation."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
