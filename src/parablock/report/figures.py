"""Plotly figures of a report, as plain JSON: loss, blocks, clients.

A colour is `var(--name)`, a custom property of the page's style sheet, or `ramp(0.5)`, a place between the
two ends of its colour ramp: the page fills in the colours of the light or the dark theme. Fonts, margins and
grids are in the page's script.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from typing import Any

from parablock.printable import printable
from parablock.report.reading import RunRecord

Figure = dict[str, Any]
"""`data` and `layout` as in Plotly; `axes` if the reader can switch the x axis."""

MAX_LABELS = 7
MAX_NAMED_CLIENTS = 6
NUM_RUN_COLORS = 8


def loss_figure(runs: Sequence[RunRecord]) -> Figure:
    """Draw train and eval loss against rounds, seconds and bytes.

    Several runs show their eval losses, a colour for each; a click on the legend adds their train losses.
    """
    traces: list[Figure] = []
    axes: dict[str, list[list[float]]] = {"rounds": [], "seconds": [], "bytes": []}
    keys = ("train_loss", "eval_loss") if len(runs) == 1 else ("eval_loss", "train_loss")
    for key, (number, run) in product(keys, enumerate(runs)):
        points = [point for point in loss_points(run, key) if point["loss"] is not None]
        traces.append(_loss_trace(run, key, points, number, alone=len(runs) == 1))
        for axis, columns in axes.items():
            columns.append([point[axis] for point in points])
    for trace, x in zip(traces, axes["rounds"], strict=True):
        trace["x"] = x
    layout = {
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "round"}},
        "yaxis": {"title": {"text": "loss, nats per token"}},
    }
    return {"data": traces, "layout": layout, "axes": axes}


def loss_points(run: RunRecord, key: str) -> list[dict[str, Any]]:
    """List a loss with the rounds, seconds and bytes spent until then; the base model's loss comes first."""
    seconds = accumulate(row["round_s"] for row in run.rows)
    num_bytes = accumulate(row["uplink_bytes"] + row["downlink_bytes"] for row in run.rows)
    points = [
        {"loss": tidy(row[key]), "rounds": row["round_index"] + 1, "seconds": tidy(spent_s), "bytes": spent_bytes}
        for row, spent_s, spent_bytes in zip(run.rows, seconds, num_bytes, strict=True)
    ]
    if key == "eval_loss":
        points.insert(0, {"loss": tidy(run.summary["initial_eval_loss"]), "rounds": 0, "seconds": 0, "bytes": 0})
    return points


def _loss_trace(run: RunRecord, key: str, points: list[dict[str, Any]], number: int, *, alone: bool) -> Figure:
    is_eval, word = key == "eval_loss", key.replace("_", " ")
    color = f"var(--run-{number % NUM_RUN_COLORS})"
    return {
        "type": "scatter",
        "mode": "lines+markers" if is_eval else "lines",
        "name": word if alone else escape(run.name if is_eval else f"{run.name}, {word}"),
        "y": [point["loss"] for point in points],
        "visible": True if alone or is_eval else "legendonly",
        "line": {"color": color if is_eval or not alone else "var(--quiet)", "width": 2.25 if is_eval else 1.25},
        "marker": {"size": 7},
        "hovertemplate": "%{y:.4f}",
    }


def client_losses_figure(losses: Mapping[int, Sequence[tuple[int, float | None]]]) -> Figure:
    """Draw the train loss of each client at each of its rounds; more clients than have colours share a grey."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"client {client_id}",
            "x": [number for number, _ in points],
            "y": [tidy(loss) for _, loss in points],
            "line": {"color": f"var(--run-{n})" if n < NUM_RUN_COLORS else "var(--quiet)", "width": 1.5},
            "hovertemplate": "%{y:.4f}",
        }
        for n, (client_id, points) in enumerate(losses.items())
    ]
    layout = {
        "hovermode": "x unified" if len(traces) <= NUM_RUN_COLORS else "closest",
        "showlegend": len(traces) <= NUM_RUN_COLORS,
        "xaxis": {"title": {"text": "round"}},
        "yaxis": {"title": {"text": "train loss"}},
    }
    return {"data": traces, "layout": layout}


def blocks_figure(run: RunRecord) -> Figure:
    """Draw the norm of each block's mean delta at each visit, and a bar for its number of visits.

    Lines and bars of a block share a colour, from shallow blocks to deep ones.
    """
    visits: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in run.rows:
        visits[row["block_index"]].append(row)
    num_blocks = max(run.summary["num_blocks"], *visits, 1) if visits else run.summary["num_blocks"]
    colors = [f"ramp({block / max(1, num_blocks - 1):.3f})" for block in range(num_blocks)]
    names = [f"{block} · {escape(run.block_name(block))}" for block in range(num_blocks)]
    counts = [len(visits[block]) for block in range(num_blocks)]
    lines = [_block_trace(names[b], colors[b], visits[b]) for b in range(num_blocks)]
    bars = {
        "type": "bar",
        "orientation": "h",
        "xaxis": "x2",
        "yaxis": "y2",
        "y": list(range(num_blocks)),
        "x": counts,
        "customdata": names,
        "marker": {"color": colors},
        "hovertemplate": "block %{customdata}<br>%{x} visits<extra></extra>",
    }
    layout = {
        "height": max(360, 16 * num_blocks + 110),
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": {"title": {"text": "round"}, "domain": [0, 0.58], "rangemode": "tozero"},
        "yaxis": {"title": {"text": "norm of the mean delta"}, "rangemode": "tozero"},
        "xaxis2": {
            "title": {"text": "visits"},
            "domain": [0.82, 1],
            "anchor": "y2",
            "dtick": math.ceil(max(counts, default=0) / 5) or 1,
        },
        "yaxis2": {"anchor": "x2", "autorange": "reversed", "showgrid": False, **_ticks(names, most=40)},
        "bargap": 0.25,
    }
    return {"data": [*lines, bars], "layout": layout}


def _block_trace(name: str, color: str, rows: Sequence[dict[str, Any]]) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [row["round_index"] + 1 for row in rows],
        "y": [tidy(row.get("delta_norm")) for row in rows],
        "customdata": [tidy(row.get("rho")) for row in rows],
        "line": {"color": color, "width": 1},
        "marker": {"color": color, "size": 7},
        "hovertemplate": "block %{fullData.name}<br>round %{x}: norm %{y:.4g}, ρ %{customdata:.2f}<extra></extra>",
    }


def clients_figure(run: RunRecord) -> Figure:
    """Draw the number of examples of each client, stacked by label if a client has several labels."""
    clients: list[dict[str, Any]] = run.manifest.get("clients", [])
    total = Counter[str]()
    for client in clients:
        total.update(client["labels"])
    shown = [label for label, _ in total.most_common(MAX_LABELS)]
    if all(len(client["labels"]) <= 1 for client in clients):
        shown = []
    stacks = [_client_trace(label, [client["labels"].get(label, 0) for client in clients]) for label in shown]
    rest = [client["examples"] - sum(client["labels"].get(label, 0) for label in shown) for client in clients]
    if any(rest):
        stacks.append(_client_trace("other" if shown else "examples", rest))
    for number, trace in enumerate(stacks):
        trace["marker"] = {"color": "var(--quiet)" if trace["name"] == "other" else f"var(--run-{number})"}
        trace["customdata"] = [escape(_only_label(client)) for client in clients]
    names = [str(client_id) for client_id in range(len(clients))]
    if len(clients) <= MAX_NAMED_CLIENTS and not shown:
        names = [f"{name}<br>{escape(_only_label(client))}" for name, client in zip(names, clients, strict=True)]
    layout = {
        "barmode": "stack",
        "bargap": 0.3,
        "hovermode": "closest",
        "showlegend": bool(shown),
        "xaxis": {"title": {"text": "client"}, "showgrid": False, "zeroline": False, **_ticks(names, most=25)},
        "yaxis": {"title": {"text": "examples"}},
    }
    return {"data": stacks, "layout": layout}


def _client_trace(label: str, counts: list[int]) -> Figure:
    return {
        "type": "bar",
        "name": escape(label),
        "y": counts,
        "hovertemplate": "client %{x} %{customdata}<br>%{fullData.name}: %{y}<extra></extra>",
    }


def _only_label(client: dict[str, Any]) -> str:
    labels = list(client["labels"])
    return labels[0] if len(labels) == 1 else ""


def _ticks(names: Sequence[str], *, most: int) -> dict[str, Any]:
    """Name the positions 0, 1, … of an axis; leave names out if there are too many to read."""
    step = math.ceil(len(names) / most) or 1
    return {"tickvals": list(range(0, len(names), step)), "ticktext": list(names[::step])}


def escape(text: str) -> str:
    """Escape the characters that Plotly reads as HTML, and those that would act."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def tidy(value: float | None) -> float | None:
    """Round to the digits that a figure shows; None if the value is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
