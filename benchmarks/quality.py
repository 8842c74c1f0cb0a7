"""What overlap costs in quality: ParaBlock (delay 1) against FL-BCD (delay 0) at equal rounds, on real text.

T0: eight instruction families, one a client, which is as uneven as real sites. GSM8K: four clients alike.
Both fine-tune the small pretrained model under the virtual clock, which gives the numbers of real machines.
The loss is that of held-out rows, the same ones for either delay.

A run that is complete is not run again and one that was stopped is resumed, as long as its configuration is
the same; remove the work folder to begin anew.

    .venv/bin/python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from _record import (
    Bar,
    generated,
    gsm8k,
    kept_run,
    make_console,
    make_parser,
    mean_and_deviation,
    record,
    t0,
    table,
)
from rich.console import Console

from parablock.config import RunConfig, parse_config

SETS = ("t0", "gsm8k")
DELAYS = (0, 1)
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    found = []
    for schedule in options.schedules:
        for name in options.only or SETS:
            for seed in options.seeds:
                losses = [outcome(name, schedule, delay, seed, options, console) for delay in DELAYS]
                found.append({"data": name, "schedule": schedule, "seed": seed, "runs": losses})
    show(console, found)
    example = make_config(name, schedule, DELAYS[1], seed, options).model_dump(mode="json")
    record(options, found, bars(found), config=example, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("quality", "Final loss of delay 1 against delay 0.", "--only t0 --seeds 0 --rounds 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--rounds", type=int, default=32, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--only", nargs="+", choices=SETS, help="which data; all when left out")
    parser.add_argument("--schedules", nargs="+", default=["shuffled"], help="orders of the blocks")
    parser.add_argument("--max-examples", type=int, default=384, help="held-out examples that the loss is of")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds, options.steps, options.max_examples = options.seeds[:1], 8, 1, 16
    return options


def make_config(name: str, schedule: str, delay: int, seed: int, options: argparse.Namespace) -> RunConfig:
    num_clients = 2 if options.smoke else {"t0": 8, "gsm8k": 4}[name]
    if options.smoke:
        material = generated(Path(options.work_dir) / "material", num_clients=num_clients)
    else:
        material = {"t0": t0, "gsm8k": gsm8k}[name]()
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": options.max_length,
                "partition": {"scheme": "by_file" if name == "t0" else "iid"},
            },
            "blocks": {"schedule": schedule},
            "federation": {"num_clients": num_clients, "num_rounds": options.rounds, "delay": delay},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
            },
            "engine": {"clock": "virtual", "num_threads": 2},
            "evaluation": {"every_rounds": 0, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 8, "keep": 1},
            "seed": seed,
        }
    )


def outcome(
    name: str, schedule: str, delay: int, seed: int, options: argparse.Namespace, console: Console
) -> Found:
    """Give the losses of a run."""
    config = make_config(name, schedule, delay, seed, options)
    return finished(config, f"{name}-{schedule}-delay-{delay}-seed-{seed}", Path(options.work_dir), console)


def finished(config: RunConfig, name: str, work_dir: Path, console: Console) -> Found:
    """Give what a run ended with: one that is there, or one that is run or resumed now."""
    directory = kept_run(config, str(work_dir), name)
    summary = directory.read_summary()
    first, last = summary["initial_eval_loss"], summary["final_eval_loss"]
    console.print(f"{name}: {first:.4f} → {last:.4f} in {summary['elapsed_s']:.0f} s")
    kept = ("delay", "initial_eval_loss", "final_eval_loss", "uplink_bytes", "model_sha256", "elapsed_s")
    commit = json.loads(directory.manifest.read_text(encoding="utf-8"))["commit"]
    return {key: summary[key] for key in kept} | {"directory": directory.path.name, "commit": commit}


def final(rows: list[Found], delay: int) -> list[float]:
    return [row["runs"][delay]["final_eval_loss"] for row in rows]


def base(rows: list[Found]) -> list[float]:
    return [row["runs"][0]["initial_eval_loss"] for row in rows]


def ratios(rows: list[Found]) -> list[float]:
    return [late / now for now, late in zip(final(rows, 0), final(rows, 1), strict=True)]


def groups(found: list[Found]) -> dict[tuple[str, str], list[Found]]:
    """Sort the seeds by data and schedule."""
    sorted_rows: dict[tuple[str, str], list[Found]] = {}
    for row in found:
        sorted_rows.setdefault((row["data"], row["schedule"]), []).append(row)
    return sorted_rows


def bars(found: list[Found]) -> list[Bar]:
    made = []
    for (name, schedule), rows in groups(found).items():
        serial, overlapped = (statistics.fmean(final(rows, delay)) for delay in DELAYS)
        made.append(Bar(f"{name}, {schedule}: loss of ParaBlock / FL-BCD, means", overlapped / serial, 1.02))
        worse = max(serial, overlapped) / statistics.fmean(base(rows))
        made.append(Bar(f"{name}, {schedule}: loss of the worse of both / base model", worse, 0.9))
    return made


def show(console: Console, found: list[Found]) -> None:
    made = table(
        "Held-out loss at equal rounds", "data", "schedule", "seed", "base", "FL-BCD", "ParaBlock", "ratio"
    )
    for (name, schedule), rows in groups(found).items():
        columns = (base(rows), final(rows, 0), final(rows, 1), ratios(rows))
        for row, *values in zip(rows, *columns, strict=True):
            made.add_row(name, schedule, str(row["seed"]), *(f"{value:.4f}" for value in values))
        made.add_row("", "", "mean ± std", *(mean_and_deviation(values) for values in columns), end_section=True)
    console.print(made)


if __name__ == "__main__":
    main()
