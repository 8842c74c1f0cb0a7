"""What secure aggregation costs and what it keeps: bytes and seconds of the protocol, and the loss on real text.

The protocol alone, eight clients of which two drop, on a vector as long as a large block: is the masked sum the
plain one, does a masked update look like noise (chi-square), how long does masking take beside writing on the grid.

Whole runs on T0, eight families of which two drop in some rounds: masked and plain grid have to end bitwise alike,
and near the float32 run in which nobody drops. A run that is complete is not run again as long as its configuration
is the same; remove the work folder to begin anew.

    .venv/bin/python benchmarks/secure_aggregation.py
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import Bar, generated, make_console, make_parser, record, run_quietly, t0, table
from rich.console import Console
from torch import Tensor

from parablock.algorithm.fixed_point import EXTRA_WORDS, FixedPointAggregation, FixedPointGrid
from parablock.algorithm.robust import Rule
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.masking import Cohorts
from parablock.storage.run_directory import RunDirectory
from parablock.wire.messages import Mark, Update, from_bytes, to_bytes
from parablock.wire.quantize import pack
from parablock.wire.transport import Parcel

CLIENTS, DROPPING = 8, (2, 5)
GRIDS = ("none", "plain", "masked")
Found = dict[str, Any]


class Stopwatch:
    """Adds up the seconds of each activity."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._what, self._since = "", time.perf_counter()

    def now(self, what: str) -> None:
        """Begin an activity, which ends the one before."""
        here = time.perf_counter()
        self.seconds[self._what] = self.seconds.get(self._what, 0.0) + here - self._since
        self._what, self._since = what, here


class Wires:
    """Couriers and collector in one thread, joined by lists of bytes that are counted."""

    def __init__(self, cohorts: Cohorts) -> None:
        self.couriers = [MaskedClient(i, cohorts) for i in range(cohorts.num_clients)]
        self.up = deque[tuple[int, bytes]]()
        self.wire_bytes = 0
        self.collector = MaskedServer(self, cohorts, stall_timeout_s=1.0)
        for client_id, courier in enumerate(self.couriers):
            self.take(client_id, courier.opening())

    def take(self, client_id: int, parcels: Sequence[Parcel]) -> None:
        self.wire_bytes += sum(len(parcel.message) for parcel in parcels)
        self.up.extend((client_id, parcel.message) for parcel in parcels)

    def send(self, client_id: int, parcel: Parcel) -> None:
        self.wire_bytes += len(parcel.message)
        self.take(client_id, self.couriers[client_id].incoming(parcel) or ())

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        del timeout_s, from_clients
        if not self.up:
            raise RuntimeError(f"nobody sends {waiting_for}")
        return self.up.popleft()

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        del deadline_s, from_clients
        return self.up.popleft() if self.up else None


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    protocol = measure(options.size, options.num_rounds)
    runs = {grid: outcome(grid, options, console) for grid in options.grids}
    show(console, protocol, runs)
    example = make_config("masked", options).model_dump(mode="json")
    record(options, {"protocol": protocol, "runs": runs}, bars(protocol, runs), config=example, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("secure_aggregation", "Cost and quality of secure aggregation.", "--rounds 8")
    parser.add_argument("--size", type=int, default=4_000_000, help="elements of the protocol's updates")
    parser.add_argument("--num-rounds", type=int, default=64, help="rounds that the protocol makes secrets for")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, K")
    parser.add_argument("--clip-norm", type=float, default=10.0, help="bound of an update's norm")
    parser.add_argument("--max-examples", type=int, default=256, help="held-out examples that the loss is of")
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=GRIDS, help="runs that are made")
    options = parser.parse_args()
    if options.smoke:
        options.size, options.num_rounds, options.rounds = 1 << 17, 4, 8
        options.steps, options.max_examples = 1, 16
    return options


def measure(size: int, num_rounds: int) -> Found:
    """Let eight clients agree, six of them send, and the server take the masks off."""
    everybody, watch = tuple(range(CLIENTS)), Stopwatch()
    generator = torch.Generator().manual_seed(0)
    grid = FixedPointGrid(1.0, CLIENTS)
    deltas = {
        i: torch.randn(size, generator=generator) / math.sqrt(4 * size) for i in everybody if i not in DROPPING
    }
    watch.now("agree")
    wires = Wires(Cohorts(CLIENTS, dict.fromkeys(range(num_rounds), everybody)))
    wires.collector.send(0, Parcel(to_bytes(Mark(0, False)), 0))
    setup_bytes = wires.wire_bytes
    watch.now("encode")
    words = {i: (grid.encode(delta), 1) for i, delta in deltas.items()}
    watch.now("to bytes")
    messages = {i: message(i, one) for i, (one, _) in words.items()}
    watch.now("mask")
    for client_id, raw in messages.items():
        wires.take(client_id, wires.couriers[client_id].outgoing(Parcel(raw, 0)))
    watch.now("receive")
    came = {}
    for _ in messages:
        client_id, raw = wires.collector.receive(1.0, "the updates")
        came[client_id] = words_of(raw), 1
    before = wires.wire_bytes
    watch.now("unmask")
    masks = wires.collector.masks_of(0, sorted(came), size + EXTRA_WORDS)
    watch.now("fold masked")
    masked_fold = FixedPointAggregation(grid, Rule())
    masked_fold.unmask(masks)
    masked = masked_fold.fold(came)
    watch.now("fold plain")
    plain = FixedPointAggregation(grid, Rule()).fold(words)
    watch.now("")
    exact = torch.stack(list(deltas.values())).double().mean(dim=0)
    first = min(came)
    return {
        "elements": size,
        "clients": CLIENTS,
        "dropping": len(DROPPING),
        "seconds": {what: seconds for what, seconds in watch.seconds.items() if what},
        "setup_bytes_per_client": setup_bytes / CLIENTS,
        "reveal_bytes_per_client": (wires.wire_bytes - before) / CLIENTS,
        "update_bytes": len(messages[first]),
        "is_bitwise_the_plain_sum": bool(torch.equal(masked, plain)),
        "relative_error_of_the_grid": float((plain.double() - exact).norm() / exact.norm()),
        "deviations_of_masked_from_uniform": deviations(came[first][0]),
        "deviations_of_plain_from_uniform": deviations(words[first][0]),
    }


def message(client_id: int, words: Tensor) -> bytes:
    return to_bytes(Update(0, 0, client_id, 1, -1, 0.0, 1, 0.0, 0, 1, pack(words, "word32")))


def words_of(raw: bytes) -> Tensor:
    update = from_bytes(raw)
    assert isinstance(update, Update)
    return update.delta.values


def deviations(words: Tensor) -> float:
    """Give how many standard deviations chi-square of all four bytes of the words lies above an even spread's."""
    found = words.numpy().view(np.uint32)
    expected, degrees = len(found) / 256, 4 * 255
    statistic = 0.0
    for shift in (0, 8, 16, 24):
        counts = np.bincount((found >> np.uint32(shift)) & np.uint32(255), minlength=256)
        statistic += float(((counts - expected) ** 2 / expected).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


def make_config(grid: str, options: argparse.Namespace) -> RunConfig:
    if options.smoke:
        material = generated(Path(options.work_dir) / "material", num_clients=CLIENTS)
    else:
        material = t0()
    drops = [(t, client) for t in range(2, options.rounds, 4) for client in DROPPING]
    faults = [{"client": client, "round": t, "at": "train", "kind": "drop"} for t, client in drops]
    secure = {"clip_norm": options.clip_norm, "secure_aggregation": grid}
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": 128,
                "partition": {"scheme": "by_file"},
            },
            "federation": {"num_clients": CLIENTS, "num_rounds": options.rounds},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
            },
            "wire": {"streaming": False},
            "engine": {"clock": "virtual", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 0},
            "privacy": {} if grid == "none" else secure,
            "faults": [] if grid == "none" else faults,
        }
    )


def outcome(grid: str, options: argparse.Namespace, console: Console) -> Found:
    """Give what a run ended with: the one that is there, or one that is run now."""
    config = make_config(grid, options)
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()[:10]
    directory = RunDirectory(Path(options.work_dir) / f"{grid}-{digest}")
    summary = directory.read_summary() if directory.summary.exists() else run_quietly(config, directory.path)
    console.print(
        f"{grid}: {summary['initial_eval_loss']:.4f} → {summary['final_eval_loss']:.4f} "
        f"in {summary['elapsed_s']:.0f} s"
    )
    kept = ("initial_eval_loss", "final_eval_loss", "model_sha256", "elapsed_s", "uplink_bytes", "downlink_bytes")
    return {key: summary[key] for key in kept}


def bars(protocol: Found, runs: dict[str, Found]) -> list[Bar]:
    made = [
        Bar(
            "masked sum is bitwise the plain one, two of eight drop", protocol["is_bitwise_the_plain_sum"], 1, False
        ),
        Bar("masked update against uniform, deviations", protocol["deviations_of_masked_from_uniform"], 4),
        Bar("plain grid against uniform, deviations", protocol["deviations_of_plain_from_uniform"], 100, False),
    ]
    if set(runs) == set(GRIDS):
        alike = int(runs["masked"]["model_sha256"] == runs["plain"]["model_sha256"])
        ratio = runs["masked"]["final_eval_loss"] / runs["none"]["final_eval_loss"]
        made += [
            Bar("masked run is bitwise the plain one", alike, 1, False),
            Bar("loss masked, with drops / float32", ratio, 1.02),
        ]
    return made


def show(console: Console, protocol: Found, runs: dict[str, Found]) -> None:
    made = table(f"Seconds, {protocol['elements']:,} elements, six updates of eight clients", *protocol["seconds"])
    made.add_row(*(f"{seconds:.3f}" for seconds in protocol["seconds"].values()))
    console.print(made)
    console.print(
        f"keys and shares: {protocol['setup_bytes_per_client']:,.0f} bytes a client, once; to take masks off: "
        f"{protocol['reveal_bytes_per_client']:,.0f} bytes a client and round; an update: "
        f"{protocol['update_bytes']:,} bytes, masked or not"
    )
    if runs:
        rows = table("T0, eight families", "grid", "base", "final", "seconds", "bytes up", "bytes down")
        for grid, run in runs.items():
            rows.add_row(
                grid,
                *(f"{run[key]:.4f}" for key in ("initial_eval_loss", "final_eval_loss")),
                f"{run['elapsed_s']:.0f}",
                *(f"{run[key]:,}" for key in ("uplink_bytes", "downlink_bytes")),
            )
        console.print(rows)


if __name__ == "__main__":
    main()
