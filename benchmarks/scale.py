"""A thousand clients that exchange blocks of Llama-3-8B, and what bandwidth keeps a client busy.

The first part runs the engine under the virtual clock: the real server, a thousand clients with two threads each,
real messages. A block stands for one of Llama-3-8B: it has a few thousand parameters, and the link is slower by as
much as it is smaller, so that every transfer takes its full-size time while nothing of that size is allocated. The
simulated time is held against the plan of the same run, which is made from the full-size bytes. The real seconds of
a simulated round are measured for several cohorts.

The second part is arithmetic: the bandwidth, the same both ways, at which a client computes for a given part of the
time, in the form of Streaming DiLoCo (Douillard et al., 2025, arXiv 2501.18512). Blocks are single layers; a round
is K steps on a GPU of ordinary speed; an exchange is streamed.

    .venv/bin/python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import psutil
import torch
from _record import Bar, make_console, make_parser, record, table
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from parablock.clock import VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.engine.contract import Hooks
from parablock.engine.inprocess import run_in_process
from parablock.experiment.engines import server_plan
from parablock.model.blocks import partition_blocks
from parablock.plan.itinerary import walk
from parablock.plan.timing import time_rounds
from parablock.plan.traffic import Sizes
from parablock.trace import Trace
from parablock.training.flops import FlopModel, Tokens
from parablock.training.step_time import ASSUMED_FLOPS
from parablock.training.trainer import Trained
from parablock.wire.quantize import CHUNK_PIECE, Encoding
from parablock.wire.transport import Link

SHAPES = {  # hidden, MLP, layers, heads, key-value heads: Llama 3.2 1B, Llama 3 8B and 70B
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
    "70B": (8192, 28672, 80, 64, 8),
}
VOCABULARY = 128_256
UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
WAYS = {
    "FL-BCD, bf16": "bfloat16",
    "ParaBlock, bf16": "bfloat16",
    "ParaBlock, int8": "int8",
    "ParaBlock, int4": "int4",
}
NUM_BLOCKS, CHUNKS = 2, 4
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    llama = outline("8B")
    full_size = partition_blocks(llama, layers_per_block=1)[0].num_parameters
    found = [simulate(cohort, full_size, options) for cohort in options.cohorts]
    show_cohorts(console, found)
    rows = [row for size in SHAPES for row in bandwidths(size, options)]
    show_bandwidths(console, rows)
    few, many = found[0], found[-1]
    growth = many["real_s_per_client"] / few["real_s_per_client"]
    worst = max(abs(row["simulated_s"] / row["planned_s"] - 1) for row in found)
    bars = [
        Bar(f"cost of a client's round, cohort {many['cohort']} / cohort {few['cohort']}", growth, 1.5),
        Bar("simulated / planned time, largest deviation", worst, 0.02),
        Bar("memory of the largest / one full-size copy a client", max(map(share_of_copies, found)), 0.01),
    ]
    config = make_config(options.cohorts[-1], full_size, options).model_dump(mode="json")
    record(options, {"cohorts": found, "bandwidths": rows}, bars, config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("scale", "Many clients with blocks of Llama-3-8B under the virtual clock.", "--cohorts 50")
    parser.add_argument("--clients", type=int, default=1000, help="clients of the run")
    parser.add_argument("--cohorts", type=int, nargs="+", default=[10, 25, 50, 100], help="clients of a round")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of a run")
    parser.add_argument("--mbps", type=float, default=30.0, help="each way")
    parser.add_argument("--compute-s", type=float, default=40.0, help="simulated seconds that a round computes")
    parser.add_argument("--steps", type=int, default=8, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a step, in the table of bandwidths")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example, there")
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.cohorts, options.rounds = 8, [2, 4], 4
    return options


def outline(size: str) -> PreTrainedModel:
    """Make a Llama of these shapes without values."""
    hidden, mlp, layers, heads, key_value_heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=size == "1B",
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


# ── a thousand clients ──────────────────────────────────────────────────────────────────────────────


class Stand:
    """A trainer whose steps cost simulated time only."""

    num_examples = 1

    def __init__(self, step_time_s: float) -> None:
        self.step_time_s = step_time_s

    def train(
        self,
        round_index: int,
        block_index: int,
        num_local_steps: int,
        steps_before: int,
        working: tuple[Tensor, ...],
    ) -> Trained:
        del num_local_steps, steps_before
        return Trained(working[block_index].float() + 0.001 * (1 + round_index), 1.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        del memory


def make_config(cohort: int, full_size: int, options: argparse.Namespace) -> RunConfig:
    """Configure a run whose link is slower by as much as its blocks are smaller than the real ones."""
    mbps = options.mbps * CHUNKS * CHUNK_PIECE / full_size
    return parse_config(
        {
            "model": {"name_or_path": "none", "dtype": "bfloat16"},
            "data": {"train": ["none"]},
            "blocks": {"schedule": "cyclic"},
            "federation": {
                "num_clients": options.clients,
                "participation": cohort / options.clients,
                "num_rounds": options.rounds,
            },
            "train": {"num_local_steps": options.steps},
            "wire": {"format": "int4", "chunk_bytes": CHUNK_PIECE // 2},
            "link": {"upload_mbps": mbps, "download_mbps": mbps},
            "engine": {"clock": "virtual", "step_time_s": options.compute_s / options.steps},
            "checkpoint": {"every_rounds": 0},
        }
    )


def simulate(cohort: int, full_size: int, options: argparse.Namespace) -> Found:
    config = make_config(cohort, full_size, options)
    params = [torch.zeros(CHUNKS * CHUNK_PIECE, dtype=torch.bfloat16) for _ in range(NUM_BLOCKS)]
    clock, trainer = VirtualClock(), Stand(options.compute_s / options.steps)
    process = psutil.Process()
    before, peaks, real_s = process.memory_info().rss, [0], [time.perf_counter()]

    def on_commit(*_: object) -> None:
        real_s.append(time.perf_counter())
        peaks.append(process.memory_info().rss)

    run_in_process(
        params,
        [trainer] * options.clients,
        server_plan(config),
        Trace(clock),
        Hooks(on_commit, lambda _: None),
        link=Link(**config.link.model_dump()),
        in_flight="aligned",
    )
    per_round = statistics.median(later - earlier for earlier, later in pairwise(real_s[1:]))
    return {
        "cohort": cohort,
        "clients": options.clients,
        "simulated_s": clock.now(),
        "planned_s": planned_s(config, full_size, options),
        "real_s_per_round": per_round,
        "real_s_per_client": per_round / cohort,
        "grown_bytes": max(*peaks, process.memory_info().rss) - before,
        "full_size_bytes": 2 * full_size,
    }


def planned_s(config: RunConfig, full_size: int, options: argparse.Namespace) -> float:
    """Plan the same run with the real sizes, on the real link, in as many chunks."""
    chunk = full_size // CHUNKS // CHUNK_PIECE * CHUNK_PIECE
    sizes = Sizes([full_size] * NUM_BLOCKS, dtype="bfloat16", wire_format="int4", chunk_bytes=chunk // 2)
    timing = time_rounds(
        walk(config, NUM_BLOCKS, config.federation.delay),
        sizes,
        lambda *_: options.compute_s,
        Link(options.mbps, options.mbps),
        delay=config.federation.delay,
    )
    return timing.wall_s


def share_of_copies(row: Found) -> float:
    """Give what a run needed, as a part of one full-size block for each client."""
    return float(row["grown_bytes"] / (row["clients"] * row["full_size_bytes"]))


# ── bandwidth and utilisation ───────────────────────────────────────────────────────────────────────


def bandwidths(size: str, options: argparse.Namespace) -> list[Found]:
    """Give the Mbit/s at which a client of each way computes for each part of the time."""
    model = outline(size)
    flops, blocks = FlopModel(model), partition_blocks(model, layers_per_block=1)
    tokens = Tokens.at_most(num_examples=options.batch_size, max_length=options.length)
    speed = ASSUMED_FLOPS["cuda", "bfloat16"]
    compute_s = options.steps * statistics.fmean(flops.step(block, tokens) for block in blocks) / speed
    rows = []
    for name, wire_format in WAYS.items():
        encoding = Encoding(wire_format, chunk_bytes=4_194_304)
        elements = blocks[0].num_parameters
        first = encoding.cut(elements)[0]
        # streamed: one direction in full, and the other's last chunk
        moved = encoding.payload_bytes(elements) + encoding.payload_bytes(first.stop)
        mbps = {}
        for part in UTILISATIONS:
            most_s = compute_s / part - (compute_s if name.startswith("FL-BCD") else 0)
            mbps[f"{part:.0%}"] = 8e-6 * moved / most_s
        rows.append(
            {"model": size, "way": name, "compute_s": compute_s, "block_parameters": elements, "mbps": mbps}
        )
    return rows


def show_cohorts(console: Console, found: list[Found]) -> None:
    columns = ("simulated", "planned", "real s / round", "real ms / client", "memory", "a copy a client")
    made = table(f"{found[0]['clients']} clients, blocks of Llama-3-8B, virtual clock", "cohort", *columns)
    for row in found:
        made.add_row(
            str(row["cohort"]),
            f"{row['simulated_s']:.0f} s",
            f"{row['planned_s']:.0f} s",
            f"{row['real_s_per_round']:.3f}",
            f"{1e3 * row['real_s_per_client']:.2f}",
            f"{row['grown_bytes'] / 1e9:.2f} GB",
            f"{row['clients'] * row['full_size_bytes'] / 1e9:.0f} GB",
        )
    console.print(made)


def show_bandwidths(console: Console, rows: list[Found]) -> None:
    made = table(
        "Mbit/s each way for a client to compute …", "model, way", *(f"{part:.0%}" for part in UTILISATIONS)
    )
    for row in rows:
        made.add_row(
            f"{row['model']} ({row['compute_s']:.1f} s), {row['way']}", *(f"{v:,.1f}" for v in row["mbps"].values())
        )
    console.print(made)


if __name__ == "__main__":
    main()
