"""A round on a hospital's link: what it takes, over what it computes, for every wire format.

The small pretrained model is fine-tuned under the virtual clock. Its block stands for a layer of Llama-3-8B: the
link is slower than 30 Mbit/s by as much as the block is smaller, so that every transfer takes as long as that of
the large layer would. A round computes for 40 s. Printed is the median round over the computation; 1 is all that
overlap can do, and with delay 0 nothing overlaps.

    .venv/bin/python benchmarks/slow_link.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _record import (
    Bar,
    Material,
    fresh_folder,
    generated,
    make_console,
    make_parser,
    record,
    run_quietly,
    t0,
    table,
)
from rich.console import Console
from transformers import LlamaConfig

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.model.blocks import partition_blocks
from parablock.model.load import outline_model
from parablock.wire.quantize import CHUNK_PIECE, bytes_per_element

LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
CASES = (("int4", 1), ("int8", 1), ("bfloat16", 1), ("float32", 1), ("int4", 0))
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    folder = fresh_folder(options)
    material = generated(folder / "material", num_clients=2) if options.smoke else t0("ag_news", "rotten_tomatoes")
    LLAMA_3_8B.save_pretrained(folder / "llama-3-8b")
    full, small = (layer_parameters(model) for model in (str(folder / "llama-3-8b"), material.model))
    found = []
    for wire_format, delay in CASES[::3] if options.smoke else CASES:
        config = make_config(material, wire_format, delay, small / full, options)
        found.append(measured(config, folder / f"{wire_format}-delay-{delay}"))
    show(console, found, options)
    bars = [Bar("round / compute with int4", found[0]["ratio"], 1.05)]
    results = {"layer_parameters": full, "block_parameters": small, "runs": found}
    record(options, results, bars, config=config.model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("slow_link", "A round on a slow link, over what it computes.", "--mbps 10")
    parser.add_argument("--mbps", type=float, default=30.0, help="each way")
    parser.add_argument("--compute-s", type=float, default=40.0, help="simulated seconds that a round computes")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a run; at least 8, one for each block")
    options = parser.parse_args()
    if options.smoke:
        options.rounds = 8
    return options


def layer_parameters(model: str) -> int:
    return partition_blocks(outline_model(model, dtype="float32"), layers_per_block=1)[0].num_parameters


def make_config(
    material: Material, wire_format: str, delay: int, scale: float, options: argparse.Namespace
) -> RunConfig:
    """Configure a run whose link is slower by the factor by which its blocks are smaller."""
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {"train": material.train, "test": material.test, "max_length": 64 if options.smoke else 32},
            "federation": {"num_clients": 2, "num_rounds": options.rounds, "delay": delay},
            "train": {"num_local_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "wire": {
                "format": wire_format,
                "chunk_bytes": round(CHUNK_PIECE * bytes_per_element(wire_format)),
            },
            "link": {"upload_mbps": scale * options.mbps, "download_mbps": scale * options.mbps},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": options.compute_s},
            "evaluation": {"every_rounds": 0, "max_examples": 16},
            "checkpoint": {"every_rounds": 0},
        }
    )


def measured(config: RunConfig, directory: Path) -> Found:
    """Run, and give the median round, without the first, which waits for nobody, and the last, with its drain."""
    summary = run_quietly(config, directory)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    round_s = statistics.median(row["round_s"] for row in rows[1:-1])
    return {
        "format": config.wire.format,
        "delay": config.federation.delay,
        "round_s": round_s,
        "compute_s": config.engine.step_time_s,
        "communication_s": statistics.median(row["communication_s"] for row in rows[1:-1]),
        "ratio": round_s / float(config.engine.step_time_s or 1),
        "overlap_fraction": summary["overlap_fraction"],
        "final_eval_loss": summary["final_eval_loss"],
    }


def show(console: Console, found: list[Found], options: argparse.Namespace) -> None:
    title = f"A layer of Llama-3-8B at {options.mbps:g} Mbit/s each way, {options.compute_s:g} s of computation"
    made = table(title, "format, delay", "up and down", "round", "round / compute")
    for row in found:
        made.add_row(
            f"{row['format']}, {row['delay']}",
            f"{row['communication_s']:.1f} s",
            f"{row['round_s']:.1f} s",
            f"{row['ratio']:.3f}",
        )
    console.print(made)


if __name__ == "__main__":
    main()
