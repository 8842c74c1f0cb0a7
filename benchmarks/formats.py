"""What few bits on the wire cost in quality: int4 against float32, and every way of rounding to few bits.

ParaBlock on the T0 families, one a client, under the virtual clock, at equal rounds: the loss of held-out rows
with `wire.format: int4` (and its defaults) over that with float32, for several seeds; and for one seed the table
of int8, int4 and int2, stochastic or to nearest, with and without error feedback. A complete run is not run again.

    .venv/bin/python benchmarks/formats.py
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

from _record import Bar, ended_with, generated, kept_run, make_console, make_parser, record, t0, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config

FLOAT, DEFAULT = {"format": "float32"}, {"format": "int4"}
CELLS = [
    {"format": name, "rounding": rounding, "error_feedback": feedback}
    for name, rounding, feedback in product(("int8", "int4", "int2"), ("nearest", "stochastic"), (False, True))
]
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    seeds = [
        {"seed": seed} | {wire["format"]: ended(wire, seed, options, console) for wire in (FLOAT, DEFAULT)}
        for seed in options.seeds
    ]
    first = options.seeds[0]
    chosen = CELLS[4:6] if options.smoke else [] if options.no_table else CELLS
    cells = [wire | ended(wire, first, options, console) for wire in chosen]
    show(console, seeds, cells)
    ratio = mean_loss(seeds, "int4") / mean_loss(seeds, "float32")
    bars = [Bar(f"final loss of int4 / float32, means of {len(seeds)} seeds", ratio, 1.01)]
    example = make_config(DEFAULT, first, options).model_dump(mode="json")
    record(options, {"seeds": seeds, "cells": cells}, bars, config=example, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("formats", "Final loss with few bits on the wire.", "--seeds 0 --no-table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; the table is of the first")
    parser.add_argument("--rounds", type=int, default=24, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--max-length", type=int, default=96, help="tokens of an example")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--max-examples", type=int, default=192, help="held-out examples that the loss is of")
    parser.add_argument("--no-table", action="store_true", help="int4 against float32 only")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds, options.steps, options.max_examples = options.seeds[:1], 8, 1, 16
    return options


def make_config(wire: Found, seed: int, options: argparse.Namespace) -> RunConfig:
    folder = Path(options.work_dir) / "material"
    material = generated(folder, num_clients=2) if options.smoke else t0()
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": options.max_length,
                "partition": {"scheme": "by_file"},
            },
            "federation": {"num_clients": len(material.train), "num_rounds": options.rounds},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
            },
            "wire": wire,
            "engine": {"clock": "virtual", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 0},
            "seed": seed,
        }
    )


def ended(wire: Found, seed: int, options: argparse.Namespace, console: Console) -> Found:
    name = "-".join(
        [wire["format"], wire.get("rounding", "stochastic"), "feedback" * wire.get("error_feedback", False)]
    )
    directory = kept_run(make_config(wire, seed, options), options.work_dir, f"{name}-seed-{seed}")
    return ended_with(directory, console)


def mean_loss(seeds: list[Found], name: str) -> float:
    return statistics.fmean(row[name]["final_eval_loss"] for row in seeds)


def show(console: Console, seeds: list[Found], cells: list[Found]) -> None:
    made = table("Held-out loss at equal rounds", "seed", "base", "float32", "int4", "int4 / float32")
    for row in seeds:
        exact, few = row["float32"], row["int4"]
        losses = (exact["initial_eval_loss"], exact["final_eval_loss"], few["final_eval_loss"])
        made.add_row(str(row["seed"]), *(f"{loss:.4f}" for loss in losses), f"{losses[2] / losses[1]:.4f}")
    console.print(made)
    if not cells:
        return
    exact = seeds[0]["float32"]["final_eval_loss"]
    made = table(f"Seed {seeds[0]['seed']}", "format, rounding", "loss / float32", "with error feedback")
    for without, with_feedback in zip(cells[::2], cells[1::2], strict=True):
        ratios = [cell["final_eval_loss"] / exact for cell in (without, with_feedback)]
        made.add_row(f"{without['format']}, {without['rounding']}", *(f"{ratio:.4f}" for ratio in ratios))
    console.print(made)


if __name__ == "__main__":
    main()
