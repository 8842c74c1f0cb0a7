"""Tables of a report: of one run (headline to environment), and of several (comparison, differences, ablation).

A `Table` holds text; `to_markdown` and `report.html` lay it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import flatten
from parablock.config.methods import METHODS
from parablock.printable import as_markdown, counted
from parablock.report.reading import RunRecord
from parablock.report.units import format_bytes, format_duration
from parablock.trace import times_by_client

UNKNOWN = "–"
SEED = "seed"
"""The key in which repetitions of a run differ; an ablation has their mean."""


@dataclass(frozen=True)
class Fact:
    """A headline figure: its name, its value with the unit, and a figure to compare it with or its parts."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Table:
    """A table of text; its first `num_words` columns hold words, the others figures."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_words: int = 1


def headline(run: RunRecord) -> tuple[Fact, ...]:
    """Return the headline figures of a run: loss, time, bytes, and, over a link, hidden communication."""
    summary = run.summary
    loss, of = _newest_loss(run)
    base = summary["initial_eval_loss"]
    up, down = summary["uplink_bytes"], summary["downlink_bytes"]
    clock = "simulated" if summary["clock"] == "virtual" else "real"
    hidden = Fact(
        "communication hidden", f"{summary['overlap_fraction']:.0%}", "under the same client's computation"
    )
    return (
        Fact("eval loss", f"{base:.3f} → {UNKNOWN if loss is None else f'{loss:.3f}'}", f"base model → {of}"),
        *([hidden] if run.has_link else []),
        Fact(f"{clock} time", format_duration(summary["wall_time_s"]), instead_of(summary) or "of all rounds"),
        Fact("bytes", format_bytes(up + down), f"{format_bytes(up)} up, {format_bytes(down)} down, all clients"),
        Fact(
            "per client and round",
            format_bytes(summary["bytes_per_client_round"]),
            _sent(summary),
        ),
    )


def _newest_loss(run: RunRecord) -> tuple[float | None, str]:
    """Return the eval loss of the tuned model, or of the round that was scored last, and which of them it is."""
    if (tuned := run.summary["final_eval_loss"]) is not None:
        return tuned, "tuned model"
    if run.newest_loss is None:
        return None, "not scored"
    number, loss = run.newest_loss
    return loss, f"round {number}"


def _sent(summary: Mapping[str, Any]) -> str:
    """Say what an update is of."""
    if METHODS[summary["method"]].trains == "adapters":
        return "the adapters, not the model"
    blocks = summary["num_blocks"]
    return "the whole model" if blocks == 1 else f"one of {blocks} blocks at a time"


def instead_of(summary: Mapping[str, Any]) -> str:
    """Say how long the rounds would have taken without overlap; "" where the figures would be the same."""
    own, serial = (format_duration(summary[key]) for key in ("wall_time_s", "sequential_s"))
    saves = summary["sequential_s"] > summary["wall_time_s"] and own != serial
    return f"instead of {serial} one after the other" if saves else ""


def sentence(run: RunRecord) -> str:
    """Say in words what came of a run."""
    summary = run.summary
    rounds, (loss, of) = summary["rounds_done"], _newest_loss(run)
    clock = " of simulated time" if summary["clock"] == "virtual" else ""
    took = f"{counted(rounds, 'round')} of {counted(summary['num_clients'], 'client')} took "
    took += f"{format_duration(summary['wall_time_s'])}{clock}"
    if serial := instead_of(summary):
        took += f" {serial}"
    if run.has_link:
        took += f"; {summary['overlap_fraction']:.0%} of the communication was hidden under computation"
    learnt = "" if loss is None else f"On held-out text the loss {_change(summary['initial_eval_loss'], loss)}"
    if summary["final_eval_loss"] is None:
        ended = {"interrupted": "was stopped", "failed": "failed"}.get(summary["status"], "has not ended")
        until = f" {learnt}, until {of}." if learnt else ""
        return f"The run {ended} after {rounds} of {counted(summary['num_rounds'], 'round')}; {took}.{until}"
    return f"{learnt}. {took[0].upper()}{took[1:]}."


def _change(base: float, loss: float) -> str:
    change = (base - loss) / base if base else 0.0
    verb = "fell" if change > 0 else "rose" if change < 0 else "stayed"
    by = f" by {abs(change):.0%}" if abs(change) >= 0.005 else ""
    return f"{verb}{by}, from {base:.3f} to {loss:.3f}"


def clients_table(run: RunRecord) -> Table:
    """Show the data of each client, its losses, and how it spent its time."""
    counts = run.manifest.get("clients", [])
    times, losses = times_by_client(run.spans), client_losses(run)
    visits = {i: sum(i in row["participants"] for row in run.rows) for i in range(run.summary["num_clients"])}
    rows = []
    for client_id in range(run.summary["num_clients"]):
        own = counts[client_id] if client_id < len(counts) else {}
        if not own.get("examples"):
            own = {}  # rows that never leave a site are not counted at the server
        data = (f"{own[key]:,}" if key in own else UNKNOWN for key in ("examples", "tokens", "target_tokens"))
        known = [loss for _, loss in losses.get(client_id, ()) if loss is not None]
        loss = (f"{known[0]:.3f}", f"{known[-1]:.3f}") if known else (UNKNOWN,) * 2
        time = (UNKNOWN,) * 3
        if spent := times.get(client_id):
            time = f"{spent.compute_s:.1f}", f"{spent.communication_s:.1f}", f"{spent.hidden_fraction:.0%}"
        cells = (f"client {client_id}", *data, str(visits[client_id]), *loss, *time)
        rows.append(cells if run.has_link else cells[:-2])
    header = (
        *("client", "examples", "tokens", "with loss", "rounds", "first loss", "last loss"),
        *("compute, s", "communication, s", "hidden"),
    )
    return Table(header if run.has_link else header[:-2], tuple(rows))


def client_losses(run: RunRecord) -> dict[int, list[tuple[int, float | None]]]:
    """Return (round, train loss) of each client's rounds, counted from 1; empty for runs of earlier releases."""
    losses: dict[int, list[tuple[int, float | None]]] = {}
    for row in run.rows:
        for client_id, loss in zip(row["participants"], row.get("participant_losses", ()), strict=False):
            losses.setdefault(client_id, []).append((row["round_index"] + 1, loss))
    return dict(sorted(losses.items()))


def blocks_table(run: RunRecord) -> Table:
    """Show the visits of each block, and how far it moved at the first and the last one."""
    rows = []
    for block in run.manifest.get("blocks", []):
        visits = [row for row in run.rows if row["block_index"] == block["index"]]
        norms = [row.get("delta_norm") for row in visits] or [None]
        rhos = [row["rho"] for row in visits if "rho" in row]
        rows.append(
            (
                str(block["index"]),
                str(block["name"]),
                f"{block['parameters']:,}",
                str(len(visits)),
                *(UNKNOWN if norm is None else f"{norm:.3g}" for norm in (norms[0], norms[-1])),
                f"{sum(rhos) / len(rhos):.2f}" if rhos else UNKNOWN,
            )
        )
    header = ("block", "layers", "parameters", "visits", "first norm", "last norm", "mean ρ")
    return Table(header, tuple(rows), num_words=2)


def settings_table(run: RunRecord) -> Table:
    """Show the settings that differ from their defaults; what the run has chosen itself is told apart."""
    chosen = run.manifest.get("chosen_settings", ())
    defaults = _default_settings()
    own = flatten(run.config)
    rows = [
        (key, short(value) + " (chosen by the run)" * (key in chosen))
        for key, value in own.items()
        if key not in defaults or value != defaults[key]
    ]
    return Table(("setting", "value"), tuple(rows), num_words=2)


def environment_table(run: RunRecord) -> Table:
    """Show the versions, the machine and the hashes of a run."""
    manifest, summary = run.manifest, run.summary
    rows = [
        ("run directory", run.path.resolve()),
        *((name, manifest.get(name) or UNKNOWN) for name in ("parablock", "commit", "python")),
        *manifest.get("packages", {}).items(),
        *((name, value) for name, value in manifest.get("machine", {}).items() if value is not None),
        ("peak memory", format_bytes(summary["peak_memory_bytes"])),
        ("time of the whole command", format_duration(summary["elapsed_s"])),
        ("base model, sha256", manifest.get("base_sha256") or UNKNOWN),
        ("tuned model, sha256", summary["model_sha256"] or UNKNOWN),
    ]
    return Table(("item", "value"), tuple((name, str(value)) for name, value in rows), num_words=2)


def comparison_table(runs: Sequence[RunRecord]) -> Table:
    """Show the base model and the results of several runs, one below the other."""
    has_link = any(run.has_link for run in runs)
    bases = {f"{run.summary['initial_eval_loss']:.4f}" for run in runs}
    blank = ("",) * (7 if has_link else 6)
    rows = [("base model", "", base, *blank) for base in sorted(bases) if len(bases) == 1]
    for run in runs:
        summary = run.summary
        loss, of = _newest_loss(run)
        until = "" if summary["final_eval_loss"] is not None or loss is None else f" ({of})"
        hidden = (f"{summary['overlap_fraction']:.0%}" if run.has_link else UNKNOWN,) if has_link else ()
        rows.append(
            (
                run.name,
                str(summary["method"]),
                UNKNOWN if loss is None else f"{loss:.4f}{until}",
                f"{summary['wall_time_s']:.1f}",
                f"{summary['sequential_s']:.1f}",
                *hidden,
                format_bytes(summary["uplink_bytes"] + summary["downlink_bytes"]),
                str(summary["delay"]),
                f"{summary['rounds_done']} of {summary['num_rounds']}",
                str(summary["status"]),
            )
        )
    header = (
        *("run", "method", "eval loss", "time, s", "in turn, s"),
        *(*(("hidden",) if has_link else ()), "bytes", "delay", "rounds", "status"),
    )
    return Table(header, tuple(rows), num_words=2)


def differences_table(runs: Sequence[RunRecord]) -> Table:
    """Show the settings that are not the same in all runs."""
    settings = [flatten(run.config) for run in runs]
    keys = {key: None for own in settings for key in own}
    rows = [
        (key, *(short(own.get(key)) for own in settings))
        for key in keys
        if any(own.get(key) != settings[0].get(key) for own in settings)
    ]
    return Table(("setting", *(run.name for run in runs)), tuple(rows), num_words=len(runs) + 1)


def ablation_table(runs: Sequence[RunRecord]) -> Table:
    """Show the settings that differ beside loss, time and bytes: a row for each combination, averaged over seeds.

    Returns:
        The table, in the order of the runs; it has no rows if only the seed differs.
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
        UNKNOWN if None in losses else spread(losses),
        f"{fmean(summary['wall_time_s'] for summary in group):.1f}",
        f"{megabytes:.2f}",
        f"{fmean(summary['overlap_fraction'] for summary in group):.0%}",
    )


def to_markdown(table: Table) -> str:
    """Return a table as Markdown that can be read as it stands, with figures aligned to the right."""
    lines = [[as_markdown(cell) for cell in line] for line in (table.header, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + ("-" if n < table.num_words else ":") for n, width in enumerate(widths)]

    def lay_out(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        padded = (cell.ljust(width) if n < table.num_words else cell.rjust(width) for n, (cell, width) in places)
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(lay_out, (lines[0], rule, *lines[1:])))


def _default_settings() -> dict[str, Any]:
    required = {"model": {"name_or_path": "-"}, "data": {"train": ["-"]}}
    defaults = flatten(RunConfig.model_validate(required).model_dump(mode="json"))
    return {key: value for key, value in defaults.items() if key not in ("model.name_or_path", "data.train")}


def short(value: Any, *, most: int = 3) -> str:
    """Shorten a setting to the width of a cell."""
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        return str(value)
    items = [str(item) for item in value]
    return ", ".join(items[:most]) + (f", … {len(items)} in all" if len(items) > most else "")


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean and, of several values, their standard deviation."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
