"""Print a plan: tables of blocks, bytes, times and memory, then the verdict and the advice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from parablock.config.keys import RunConfig
from parablock.config.methods import METHODS
from parablock.experiment.outlook import warn_of_little_memory
from parablock.plan.forecast import Plan
from parablock.printable import as_argument, counted
from parablock.report.reading import LEAST_COMMUNICATION
from parablock.report.units import format_bytes, format_duration
from parablock.training.memory import Place, adapter_rank

MEMORY_ROWS = {"block": "blocks", "lora": "LoRA, r = {}", "full": "all at once"}


def show_plan(plan: Plan, config: RunConfig) -> Iterator[RenderableType]:
    """Yield the tables and lines of a plan, in order; the method to take comes first."""
    if plan.recommended_method["reason"]:
        yield _advice(plan.recommended_method, config)
    federation = config.federation
    yield (
        f"{_rounds(config)} of {counted(federation.num_clients, 'client')}: {_hours(plan.hours)}, "
        f"{format_bytes(plan.total_bytes)} over all links. {_of_a_round(plan)}. "
        f"The learning rate is {plan.learning_rate:g}."
    )
    yield plan.verdict
    yield _blocks(plan, config)
    yield _bytes(plan, config)
    yield _speeds(plan)
    yield _memory(plan, config)
    yield from _of_one_process(plan, config)
    yield _methods(plan)
    if any(row["never_visited"] for row in plan.methods):
        yield f"*: with {_rounds(config)} not every block is reached; larger blocks or more rounds cure it."
    advised = plan.recommended
    chosen = (config.blocks.layers_per_block, config.train.num_local_steps, config.wire.format)
    unchanged = ", as configured" if tuple(advised.values()) == chosen else ""
    size = (
        f"blocks.layers_per_block: {advised['layers_per_block']}, " if federation.traits.trains == "blocks" else ""
    )
    yield (
        f"Sizes that go with {federation.method}: {size}train.num_local_steps: {advised['num_local_steps']}, "
        f"wire.format: {advised['format']}{unchanged}."
    )
    if federation.traits.trains != "adapters":
        yield f"A round sends what adapters of rank {plan.equal_rank:.3g} would ({_of_each(config)})."
    if plan.never_visited:
        names = ", ".join(plan.blocks[b]["name"] for b in plan.never_visited)
        yield (
            f"Never trained in {_rounds(config)}: {names}. Raise federation.num_rounds to at least "
            f"{plan.num_blocks}, or blocks.layers_per_block."
        )
    for assumption in plan.assumptions:
        yield f"Note: {assumption}."


def next_step(plan: Plan, config: RunConfig, path: Path) -> tuple[str, ...]:
    """Say once more what the run takes, below all tables, and which command starts it."""
    place = plan.process_memory_bytes
    warning = warn_of_little_memory(Place(**place), config) if place else ""
    return (
        f"{_rounds(config)}: {_hours(plan.hours)}, {format_bytes(plan.total_bytes)}.",
        *([warning] if warning else []),
        f"next: parablock {_start(config)} {as_argument(path)} --output-dir runs/mine",
    )


def _start(config: RunConfig) -> str:
    """Return the command that starts a run; without data here, they are at real sites."""
    return "run" if config.data.train else "deploy server --keys KEYS"


def _rounds(config: RunConfig) -> str:
    return counted(config.federation.num_rounds, "round")


def _of_a_round(plan: Plan) -> str:
    """Say what a round takes, and of what, where there is something to overlap."""
    takes = format_duration(plan.round_s)
    if plan.communication_s < LEAST_COMMUNICATION * plan.round_s:
        return f"A round takes {takes}"
    computes, communicates, serial = map(format_duration, (plan.compute_s, plan.communication_s, plan.serial_s))
    parts = f"computes for {computes}, communicates for {communicates}"
    return f"A round {parts} and takes {takes} ({serial} without overlap)"


def _blocks(plan: Plan, config: RunConfig) -> Table:
    title = counted(plan.num_blocks, "block")
    table = _table(title, "blocks", "layers", "parameters each", f"{config.wire.format} each")
    for (_, parameters), group in groupby(
        plan.blocks, key=lambda block: (len(block["layers"]), block["parameters"])
    ):
        same = list(group)
        table.add_row(
            _range([str(block["index"]) for block in same]),
            _range([block["name"] for block in same]),
            f"{parameters:,}",
            format_bytes(same[0]["bytes"]),
        )
    return table


def _bytes(plan: Plan, config: RunConfig) -> Table:
    table = _table("Bytes", "wire.format", "a client's round", "all up", "all down")
    for name, per_round in plan.bytes_per_client_round.items():
        traffic = plan.traffic[name]
        label = f"{name} (configured)" if name == config.wire.format else name
        sizes = (per_round, traffic["uplink_bytes"], traffic["downlink_bytes"])
        table.add_row(label, *map(format_bytes, sizes))
    return table


def _speeds(plan: Plan) -> Table:
    table = _table("Time of a round", "Mbit/s up, down", "exchange", "in turn", "overlapped", "saved")
    for row in plan.links:
        seconds = (row["exchange_s"], row["serial_s"], row["overlapped_s"])
        table.add_row(
            f"{_mbps(row['upload_mbps'])}, {_mbps(row['download_mbps'])}",
            *(format_duration(value or 0.0) for value in seconds),
            f"{row['saving'] or 0.0:.0%}",
        )
    return table


def _memory(plan: Plan, config: RunConfig) -> Table:
    table = _table(
        "Memory of a client", "training", "all", "model", "gradients, optimizer", "copies", "activations"
    )
    for name, parts in plan.memory_parts.items():
        table.add_row(
            MEMORY_ROWS[name].format(adapter_rank(config)),
            format_bytes(plan.memory_bytes[name]),
            format_bytes(parts["parameters"]),
            format_bytes(parts["gradients"] + parts["optimizer_state"]),
            format_bytes(parts["fp32_copies"] + parts["base_copy"] + parts["updates"]),
            f"~ {format_bytes(parts['activations'])}",
        )
    return table


def _of_one_process(plan: Plan, config: RunConfig) -> Iterator[str]:
    """Say what all clients take where `parablock run` has them."""
    if (place := plan.process_memory_bytes) is None:
        return
    count = 1 if config.federation.traits.pools_data else config.federation.num_clients
    models = "share a model" if config.engine.clock == "virtual" else "have a model each"
    who = f"all {count} clients and the server, which {models}, take" if count > 1 else "client and server take"
    on_gpu = f" and {format_bytes(place['device'])} of its GPU" if place["device"] else ""
    yield (
        f"In the one process of a run here {who} about {format_bytes(place['host'])} of this machine's "
        f"memory{on_gpu}, if rows are as long as data.max_length."
    )


def _methods(plan: Plan) -> Table:
    columns = ("method", "delay", "a client's round", "a round", "the run", "memory")
    table = _table("Methods, with these settings", *columns)
    for row in plan.methods:
        figures = (
            format_bytes(row["bytes_per_client_round"]),
            format_duration(row["round_s"]),
            _hours(row["hours"]),
            format_bytes(row["memory_bytes"]),
        )
        name = (METHODS[row["method"]].without_delay if row["delay"] == 0 else "") or row["method"]
        figures = ("–",) * 4 if row["problem"] else figures
        table.add_row(f"{name} *" if row["never_visited"] else name, str(row["delay"]), *figures)
    return table


def _of_each(config: RunConfig) -> str:
    return "A and B of " + (", ".join(config.lora.target_modules) or "every matrix of the layers")


def _advice(advised: Mapping[str, Any], config: RunConfig) -> str:
    chosen = (config.federation.method, config.federation.delay)
    unchanged = " (as configured)" if (advised["method"], advised["delay"]) == chosen else ""
    return (
        f"Recommended: federation.method: {advised['method']}, federation.delay: {advised['delay']}{unchanged}. "
        f"Why: {advised['reason']}. It is another where {advised['unless']}."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _range(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _mbps(speed: Any) -> str:
    return "unlimited" if speed is None else f"{speed:g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 2 else format_duration(hours * 3600)
