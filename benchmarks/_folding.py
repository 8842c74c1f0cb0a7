"""What `wire.py` measures of aggregation: a round's updates through the server's `RoundFold`, memory and seconds.

Beside it the arithmetic alone, and a plain `add_` of the same vectors, in turns, so that a slow moment of the
machine hits all. Memory is the process's own, its peak above what it had before: not the system's cache of files.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import torch
from _record import Bar, fresh_folder, table
from rich.console import Console
from torch import Tensor

from parablock.algorithm.aggregate import fold, join
from parablock.algorithm.robust import RoundAggregation
from parablock.engine.round_fold import RoundFold
from parablock.wire.messages import Update
from parablock.wire.quantize import Encoding, Vector, pack

CHUNK_BYTES = 4_194_304
ORDERS = ("in turns", "one client late")
WORST, HALF = 3, 0.5


def measure_aggregation(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Fold all updates in every format and order, and the arithmetic alone."""
    sources = [torch.randn(options.block) for _ in range(3)]  # no update is in the cache when its turn comes
    folder = fresh_folder(options)
    gigabytes = 4e-9 * options.block * options.updates
    rows = [arithmetic(sources, options, gigabytes)]
    for name in options.formats:
        for order in ORDERS:
            rows.append(through_the_fold(sources, name, order, folder, options, gigabytes))
    shown = table(
        f"{options.updates} updates of {options.block / 1e6:g} M parameters",
        "",
        "GB/s of float32",
        "/ plain add_",
        "peak memory, blocks",
        "GB in a file",
        "GB/s of the disk",
    )
    for row in rows:
        shown.add_row(
            row["what"],
            f"{row['gigabytes_per_s']:.2f}",
            f"{row['relative_throughput']:.3f}",
            f"{row['peak_blocks']:.2f}",
            f"{row['file_gigabytes']:.2f}",
            f"{row['disk_gigabytes_per_s']:.2f}" if row["file_gigabytes"] else "",
        )
    console.print(shown)
    return {"updates": options.updates, "parameters": options.block, "rows": rows}


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """Hold the worst row of memory against its bar, and each row's throughput against its own."""
    alone, *folds = found["rows"]
    peak = Bar("peak memory of aggregation, blocks", max(row["peak_blocks"] for row in folds), WORST)
    speeds = [
        Bar(f"aggregation / plain add_, throughput: {row['what']}", row["relative_throughput"], HALF, at_most=False)
        for row in (alone, *(row for row in folds if row["order"] == ORDERS[0]))
    ]
    return [peak, *speeds]


def arithmetic(sources: list[Tensor], options: argparse.Namespace, gigabytes: float) -> dict[str, Any]:
    """Fold vectors that lie in memory; nothing comes, nothing is kept."""
    cuts = Encoding("float32", chunk_bytes=CHUNK_BYTES).cut(options.block)
    seconds, plain_s, peaks = [], [], []
    for _ in range(options.repeats):
        plain_s.append(plain_pass(sources, options))
        with PeakMemory() as memory:
            began = time.perf_counter()
            parts = [fold({k: (sources[k % 3][cut], 1) for k in range(options.updates)}) for cut in cuts]
            join(parts)
            seconds.append(time.perf_counter() - began)
        peaks.append(memory.peak_bytes)
        del parts
    return {
        "what": "the arithmetic alone",
        **speed(seconds, plain_s, gigabytes),
        "peak_blocks": max(peaks) / (4 * options.block),
        "file_gigabytes": 0.0,
    }


def through_the_fold(
    sources: list[Tensor], name: str, order: str, folder: Path, options: argparse.Namespace, gigabytes: float
) -> dict[str, Any]:
    """Let all updates come, in chunks, and fold each chunk as soon as everybody has delivered it."""
    cuts = Encoding(name, chunk_bytes=CHUNK_BYTES).cut(options.block)
    chunks = [[pack(source[cut], name) for cut in cuts] for source in sources]
    seconds, plain_s, peaks, file_bytes = [], [], [], 0
    for _ in range(options.fold_repeats):
        plain_s.append(plain_pass(sources, options))
        with PeakMemory() as memory:
            file_bytes, round_s = one_round(chunks, cuts, order, folder, options.updates)
            seconds.append(round_s)
        peaks.append(memory.peak_bytes)
    return {
        "what": f"{name}, {order}",
        "format": name,
        "order": order,
        **speed(seconds, plain_s, gigabytes),
        "peak_blocks": max(peaks) / (4 * options.block),
        "file_gigabytes": 1e-9 * file_bytes,
        "disk_gigabytes_per_s": disk_speed(folder, file_bytes),
    }


def one_round(
    chunks: list[list[Vector]], cuts: list[slice], order: str, folder: Path, num_updates: int
) -> tuple[int, float]:
    """Take and fold a round's updates; bytes that were kept in the file, and seconds of the server.

    Each chunk comes in bytes of its own, as a message does; making them is not counted.
    """
    fold = RoundFold(0, 0, dict.fromkeys(range(num_updates), 1), cuts, RoundAggregation, folder)
    first, seconds = Update(0, 0, 0, 1, -1, 1.0, 1, 1.0, 0, len(cuts), chunks[0][0]), 0.0
    for client_id, index in arrivals(order, num_updates, len(cuts)):
        delta = chunks[client_id % len(chunks)][index]
        delta = replace(delta, raw=delta.raw.clone())
        update = replace(first, client_id=client_id, chunk_index=index, delta=delta)
        began = time.perf_counter()
        problem = fold.take(client_id, update)
        if fold.is_next_ready:
            fold.fold_next()
        seconds += time.perf_counter() - began
        assert problem is None, problem
    assert fold.is_complete
    file_bytes, began = fold.file_bytes, time.perf_counter()
    aggregate = fold.aggregate()
    seconds += time.perf_counter() - began
    assert 0.2 < aggregate.rho < 0.5
    return file_bytes, seconds


def arrivals(order: str, num_updates: int, num_chunks: int) -> Iterator[tuple[int, int]]:
    """Give client_id and chunk_index in the order in which they come."""
    late = num_updates - 1 if order == "one client late" else num_updates
    yield from ((client_id, index) for index in range(num_chunks) for client_id in range(late))
    yield from ((client_id, index) for client_id in range(late, num_updates) for index in range(num_chunks))


def plain_pass(sources: list[Tensor], options: argparse.Namespace) -> float:
    """Add the updates to a vector one after another; seconds."""
    total = torch.zeros(options.block)
    began = time.perf_counter()
    for k in range(options.updates):
        total.add_(sources[k % len(sources)])
    return time.perf_counter() - began


def speed(seconds: list[float], plain_s: list[float], gigabytes: float) -> dict[str, Any]:
    """Give the medians, and the ratio to the plain pass of the same turn."""
    return {
        "gigabytes_per_s": gigabytes / statistics.median(seconds),
        "plain_gigabytes_per_s": gigabytes / statistics.median(plain_s),
        "relative_throughput": statistics.median(p / s for p, s in zip(plain_s, seconds, strict=True)),
        "seconds": seconds,
        "plain_s": plain_s,
    }


def disk_speed(folder: Path, num_bytes: int) -> float:
    """Write so many bytes into a file of the same folder, and no more; GB/s."""
    if not num_bytes:
        return 0.0
    content = os.urandom(CHUNK_BYTES)
    began = time.perf_counter()
    with TemporaryFile(buffering=0, dir=folder) as file:
        for _ in range(-(-num_bytes // CHUNK_BYTES)):
            file.write(content)
        seconds = time.perf_counter() - began
    return 1e-9 * num_bytes / seconds


class PeakMemory:
    """The most memory of this process while the block lasts, above what it had before.

    Linux keeps the peak (VmHWM) and sets it back on request; elsewhere it is what the process has at the end.
    """

    peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used unseen
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *error: object) -> None:
        self.peak_bytes = max(_peak_bytes(), psutil.Process().memory_info().rss) - self._before


def _peak_bytes() -> int:
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 0
