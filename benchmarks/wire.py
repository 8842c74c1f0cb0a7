"""The wire: bytes and speed of every format, what streaming saves, what aggregation of many updates needs.

.venv/bin/python benchmarks/wire.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _folding import bars_of, measure_aggregation
from _record import Bar, make_console, make_parser, record, table
from rich.console import Console
from torch import Tensor

from parablock.clock import RealClock
from parablock.engine.contract import Hooks
from parablock.engine.inprocess import run_in_process
from parablock.engine.local_steps import FixedSteps
from parablock.engine.server import ServerPlan
from parablock.seeding import generator_for
from parablock.trace import Trace
from parablock.training.trainer import Trained
from parablock.wire.quantize import CHUNK_PIECE, FORMATS, Encoding, pack, payload_bytes
from parablock.wire.transport import Link


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    formats = measure_formats(console, options)
    streaming = measure_streaming(console, options)
    aggregation = measure_aggregation(console, options)
    slowest = min(row["megabytes_per_s"] for row in formats if row["format"].startswith("int"))
    bars = [
        Bar("int4 bytes / float32 bytes", payload_bytes(10**6, "int4") / payload_bytes(10**6, "float32"), 0.14),
        Bar("encode and decode of the slowest quantised format, MB/s of float32", slowest, 400, at_most=False),
        Bar("streamed exchange / (upload + download)", streaming["ratio"], 0.58),
        *bars_of(aggregation),
    ]
    found = {"formats": formats, "streaming": streaming, "aggregation": aggregation}
    record(options, found, bars, config=None, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("wire", "bytes and speed of the wire", "--repeats 5")
    parser.add_argument("--elements", type=int, default=4_000_000, help="length of the vector of the format table")
    parser.add_argument("--repeats", type=int, default=5, help="repeats; medians are shown")
    parser.add_argument("--updates", type=int, default=64, help="updates that are aggregated")
    parser.add_argument("--block", type=int, default=50_000_000, help="parameters of the aggregated block")
    parser.add_argument("--formats", nargs="*", default=["float32", "int8", "int4"], help="of aggregated updates")
    parser.add_argument("--fold-repeats", type=int, default=1, help="repeats of what goes through a file")
    options = parser.parse_args()
    if options.smoke:
        options.elements, options.repeats, options.updates, options.block = 200_000, 1, 4, 400_000
    return options


def measure_formats(console: Console, options: argparse.Namespace) -> list[dict[str, Any]]:
    values = torch.from_numpy(generator_for(0, "benchmark").normal(size=options.elements)).float() * 1e-3
    shown = table("formats", "format", "rounding", "bytes / float32", "encode + decode, MB/s", "relative error")
    rows = []
    for name in FORMATS:
        for rounding in ("stochastic", "nearest") if name.startswith("int") else ("nearest",):
            encoding = Encoding(name, rounding)
            seconds = []
            for t in range(options.repeats + 1):
                began = time.perf_counter()
                seen = pack(values, name, encoding.noise(t, 0)).values.float()
                seconds.append(time.perf_counter() - began)
            row = {
                "format": name,
                "rounding": rounding,
                "bytes_ratio": payload_bytes(options.elements, name) / (4 * options.elements),
                "megabytes_per_s": 4e-6 * options.elements / statistics.median(seconds[1:]),
                "relative_error": float((seen - values).norm() / values.norm()),
            }
            rows.append(row)
            shown.add_row(
                name,
                rounding,
                f"{row['bytes_ratio']:.4f}",
                f"{row['megabytes_per_s']:,.0f}",
                f"{row['relative_error']:.4f}",
            )
    console.print(shown)
    return rows


class Instant:
    """A trainer that computes nothing, so that an exchange is all that a round costs."""

    num_examples, step_time_s = 1, None

    def train(
        self,
        round_index: int,
        block_index: int,
        num_local_steps: int,
        steps_before: int,
        working: tuple[Tensor, ...],
    ) -> Trained:
        del num_local_steps, steps_before
        return Trained(working[block_index] + round_index, 0.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        del memory


def measure_streaming(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Exchange one block of 24 chunks between two clients and the server, whole and streamed, in real time."""
    chunks, chunk_bytes = 24, 4 * CHUNK_PIECE
    link = Link(upload_mbps=40.0, download_mbps=40.0)
    params = [torch.zeros(chunks * CHUNK_PIECE) for _ in range(2)]
    seconds: dict[str, list[float]] = {"whole": [], "streamed": []}
    for _ in range(max(1, options.repeats // 2)):
        for name, encoding in (
            ("whole", Encoding("float32")),
            ("streamed", Encoding("float32", chunk_bytes=chunk_bytes)),
        ):
            plan = ServerPlan(2, 2, 0, "cyclic", 1.0, 0, encoding, FixedSteps(1), 60.0, 0)
            clock = RealClock()
            hooks = Hooks(lambda *_: None, lambda _: None)
            run_in_process(params, [Instant(), Instant()], plan, Trace(clock), hooks, link=link, in_flight="own")
            seconds[name].append(clock.now() / 2)
    up_and_down = 2 * link.upload_s(4 * chunks * CHUNK_PIECE)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    shown = table("an exchange of 24 chunks at 40 Mbit/s each way", "", "seconds", "/ (upload + download)")
    for name, value in found.items():
        shown.add_row(name, f"{value:.3f}", f"{value / up_and_down:.3f}")
    console.print(shown)
    return {"up_and_down_s": up_and_down, **found, "ratio": found["streamed"] / up_and_down}


if __name__ == "__main__":
    main()
