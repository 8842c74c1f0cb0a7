"""The wire: bytes and speed of every format, what streaming saves, what aggregation of many updates needs.

.venv/bin/python benchmarks/wire.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import psutil
import torch
from _record import Bar, make_console, make_parser, record, table
from rich.console import Console
from torch import Tensor

from parablock.algorithm.aggregate import fold, join
from parablock.clock import RealClock
from parablock.engine.client import Trained
from parablock.engine.inprocess import Hooks, run_in_process
from parablock.engine.server import ServerPlan
from parablock.engine.steps import FixedSteps
from parablock.seeding import generator_for
from parablock.trace import Trace
from parablock.wire.link import Link
from parablock.wire.messages import RoundStart
from parablock.wire.quantize import CHUNK_PIECE, FORMATS, Encoding, pack, payload_bytes


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
        Bar("peak memory of aggregation, blocks", aggregation["peak_blocks"], 3),
        Bar("aggregation / plain add_, throughput", aggregation["relative_throughput"], 0.5, at_most=False),
    ]
    found = {"formats": formats, "streaming": streaming, "aggregation": aggregation}
    record(options, found, bars, config=None, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("wire", "bytes and speed of the wire", "--repeats 5")
    parser.add_argument("--elements", type=int, default=4_000_000, help="length of the vector of the format table")
    parser.add_argument("--repeats", type=int, default=5, help="repeats; medians are shown")
    parser.add_argument("--updates", type=int, default=64, help="updates that are aggregated")
    parser.add_argument("--block", type=int, default=50_000_000, help="parameters of the aggregated block")
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

    def train(self, start: RoundStart, working: tuple[Tensor, ...]) -> Trained:
        return Trained(working[start.block_index] + start.round_index, 0.0)

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


def measure_aggregation(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Fold updates chunk by chunk, as the server does, against `add_` of the same vectors one after another."""
    cuts = Encoding("float32", chunk_bytes=4_194_304).cut(options.block)
    sources = [torch.randn(options.block) for _ in range(3)]  # no update is in the cache when its turn comes
    plain_s, fold_s, peaks = [], [], []
    for _ in range(options.repeats):  # in turns, so that a slow moment of the machine hits both
        plain_s.append(plain_pass(sources, options))
        seconds, peak = fold_pass(sources, cuts, options)
        fold_s.append(seconds)
        peaks.append(peak)
    gigabytes = 4e-9 * options.block * options.updates
    found = {
        "updates": options.updates,
        "parameters": options.block,
        "fold_gigabytes_per_s": gigabytes / statistics.median(fold_s),
        "plain_gigabytes_per_s": gigabytes / statistics.median(plain_s),
        "relative_throughput": statistics.median(p / f for p, f in zip(plain_s, fold_s, strict=True)),
        "peak_blocks": max(peaks) / (4 * options.block),
        "fold_s": fold_s,
        "plain_s": plain_s,
    }
    shown = table("aggregation", "", "GB/s of updates", "peak memory, blocks")
    shown.add_row("plain add_", f"{found['plain_gigabytes_per_s']:.2f}", "1")
    shown.add_row("fold (mean and norms)", f"{found['fold_gigabytes_per_s']:.2f}", f"{found['peak_blocks']:.2f}")
    console.print(shown)
    return found


def plain_pass(sources: list[Tensor], options: argparse.Namespace) -> float:
    """Add the updates to a vector one after another; seconds."""
    total = torch.zeros(options.block)
    began = time.perf_counter()
    for k in range(options.updates):
        total.add_(sources[k % len(sources)])
    return time.perf_counter() - began


def fold_pass(sources: list[Tensor], cuts: list[slice], options: argparse.Namespace) -> tuple[float, int]:
    """Fold the updates piece by piece; seconds, and the most memory in bytes.

    It is the arithmetic alone: the server also keeps the updates of a round, in their bytes, until it is committed.
    """
    process = psutil.Process()
    before, peak, parts = process.memory_info().rss, 0, []
    began = time.perf_counter()
    for part in cuts:
        parts.append(fold({k: (sources[k % len(sources)][part], 1) for k in range(options.updates)}))
        peak = max(peak, process.memory_info().rss)
    aggregate = join(parts)
    seconds = time.perf_counter() - began
    assert 0.2 < aggregate.rho < 0.5
    return seconds, max(peak, process.memory_info().rss) - before


if __name__ == "__main__":
    main()
