"""What overlap costs in quality: ParaBlock (delay 1) against FL-BCD (delay 0) at equal rounds, on real text.

T0: eight instruction families, one a client, which is as uneven as real sites. GSM8K: four clients alike.
Both fine-tune the small pretrained model under the virtual clock, over a link on which an exchange takes as long as
the computation of a round. The loss is that of held-out rows, the same ones for either delay. Where ParaBlock has
not reached FL-BCD's last loss after as many rounds, a run that is a quarter longer tells how soon it does; the
learning rate is constant, so it goes on from the last checkpoint of the shorter run. Where the learning rate decays
over the rounds of a run, as most fine-tuning has it, that third run is one of its own, with one round more for
every twelve. On T0 the models at the end of equal rounds are also scored on each family apart: its loss and its
share of right answers.

A run that is complete is not run again and one that was stopped is resumed, as long as its configuration is
the same; remove the work folder to begin anew.

    .venv/bin/python benchmarks/quality.py
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _families import family_scores
from _record import (
    Bar,
    balanced_mbps,
    curve_of,
    ended_with,
    generated,
    gsm8k,
    kept_run,
    lengthened_run,
    make_console,
    make_parser,
    mean_and_deviation,
    record,
    t0,
    table,
)
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.storage.run_directory import RunDirectory

SETS = ("t0", "gsm8k")
DELAYS = (0, 1)
STEP_S = 0.25
LONGER_ONE_IN, LONGER_ONE_IN_OF_A_DECAY = 4, 12
"""One round more for so many, in the run that tells how soon the loss is reached."""
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    found: list[Found] = []
    for schedule, name, seed in product(options.schedules, options.only or SETS, options.seeds):
        found.append(outcome(name, schedule, seed, options, console))
        show(console, found)
        example = make_config(name, schedule, DELAYS[1], seed, options).model_dump(mode="json")
        record(options, found, bars(found), config=example, console=console)  # in case the rest is not reached


def parse_options() -> argparse.Namespace:
    parser = make_parser("quality", "Final loss of delay 1 against delay 0.", "--only t0 --seeds 0 --rounds 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--rounds", type=int, default=32, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument("--lr-scheduler-type", default="constant", help="constant, linear or cosine")
    parser.add_argument("--only", nargs="+", choices=SETS, help="which data; all when left out")
    parser.add_argument("--schedules", nargs="+", default=["shuffled"], help="orders of the blocks")
    parser.add_argument("--max-examples", type=int, default=384, help="held-out examples that the loss is of")
    parser.add_argument(
        "--task-examples", type=int, default=48, help="held-out examples of a family; 0: do not score families"
    )
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds, options.steps, options.max_examples = options.seeds[:1], 8, 1, 16
    return options


def make_config(
    name: str, schedule: str, delay: int, seed: int, options: argparse.Namespace, *, longer: bool = False
) -> RunConfig:
    num_clients = 2 if options.smoke else {"t0": 8, "gsm8k": 4}[name]
    if options.smoke:
        material = generated(Path(options.work_dir) / "material", num_clients=num_clients)
    else:
        material = {"t0": t0, "gsm8k": gsm8k}[name]()
    mbps = balanced_mbps(material.model, STEP_S * options.steps)
    one_in = LONGER_ONE_IN_OF_A_DECAY if decays(options) else LONGER_ONE_IN
    more = max(1, options.rounds // one_in) if longer else 0
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
            "federation": {"num_clients": num_clients, "num_rounds": options.rounds + more, "delay": delay},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
                "lr_scheduler_type": options.lr_scheduler_type,
            },
            "link": {"upload_mbps": mbps, "download_mbps": mbps},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": STEP_S},
            "evaluation": {"every_rounds": 2 if longer else 4, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": max(1, options.rounds // 4), "keep": 1},
            "seed": seed,
        }
    )


def outcome(name: str, schedule: str, seed: int, options: argparse.Namespace, console: Console) -> Found:
    """Run both, and ParaBlock for longer where it needs it, and put its curve beside FL-BCD's end."""
    configs = [make_config(name, schedule, delay, seed, options) for delay in DELAYS]
    directories = [kept_run(config, options.work_dir, label_of(name, config)) for config in configs]
    runs = [ended(directory, console) for directory in directories]
    found: Found = {"data": name, "schedule": schedule, "seed": seed, "runs": runs}
    serial, overlapped = runs
    reached = first_time(overlapped, serial)
    if reached is None:
        config = make_config(name, schedule, DELAYS[1], seed, options, longer=True)
        if decays(options):
            found["longer"] = ended(kept_run(config, options.work_dir, label_of(name, config)), console)
        else:
            longer = lengthened_run(config, directories[1], options.work_dir, label_of(name, config))
            found["longer"] = ended(longer, console, shorter=directories[1])
        reached = first_time(found["longer"], serial)
    found["time_ratio"] = None if reached is None else reached / serial["seconds"]
    if name == "t0" and options.task_examples and not options.smoke:
        for run, directory in zip(runs, directories, strict=True):
            run["scores"] = kept_scores(directory.path.name, str(directory.model), options)
        found["base_scores"] = kept_scores("base", t0().model, options)
    return found


def decays(options: argparse.Namespace) -> bool:
    return bool(options.lr_scheduler_type != "constant")


def first_time(run: Found, reference: Found) -> float | None:
    """Tell after how many seconds a run is first scored no worse than another at its end."""
    return next((s for s, loss in run["curve"] if loss <= reference["final_eval_loss"]), None)


def kept_scores(name: str, model: str, options: argparse.Namespace) -> Found:
    """Give the scores of a model on each family: those that are kept under a name, or new ones."""
    folder = Path(options.work_dir) / "scores"
    path = folder / f"{name}-{options.task_examples}.json"
    if not path.exists():
        made = family_scores(model, options.task_examples, folder / "choices")
        path.write_text(json.dumps(made), encoding="utf-8")
    kept: Found = json.loads(path.read_text(encoding="utf-8"))
    return kept


def label_of(name: str, config: RunConfig) -> str:
    federation = config.federation
    told = f"delay-{federation.delay}-rounds-{federation.num_rounds}-seed-{config.seed}"
    decay = "" if config.train.lr_scheduler_type == "constant" else f"-{config.train.lr_scheduler_type}"
    return f"{name}-{config.blocks.schedule}-{told}{decay}"


def ended(directory: RunDirectory, console: Console, shorter: RunDirectory | None = None) -> Found:
    """Give what a run ended with."""
    curve = curve_of(directory, shorter)
    return ended_with(directory, console) | {"seconds": curve[-1][0], "curve": curve}


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
        serial, overlapped = (fmean(final(rows, delay)) for delay in DELAYS)
        made.append(Bar(f"{name}, {schedule}: loss of ParaBlock / FL-BCD, means", overlapped / serial, 1.02))
        worse = max(serial, overlapped) / fmean(base(rows))
        made.append(Bar(f"{name}, {schedule}: loss of the worse of both / base model", worse, 0.9))
        times = [9.99 if row["time_ratio"] is None else row["time_ratio"] for row in rows]
        made.append(Bar(f"{name}, {schedule}: seconds to FL-BCD's last loss, mean ratio", fmean(times), 0.55))
    return made


def show(console: Console, found: list[Found]) -> None:
    columns = (
        "data",
        "schedule",
        "seed",
        "base",
        "FL-BCD",
        "ParaBlock",
        "ratio",
        "time to FL-BCD's loss / its time",
    )
    made = table("Held-out loss at equal rounds", *columns)
    for (name, schedule), rows in groups(found).items():
        values = (base(rows), final(rows, 0), final(rows, 1), ratios(rows))
        times = ["never" if row["time_ratio"] is None else f"{row['time_ratio']:.3f}" for row in rows]
        for row, time, *losses in zip(rows, times, *values, strict=True):
            made.add_row(name, schedule, str(row["seed"]), *(f"{loss:.4f}" for loss in losses), time)
        made.add_row("", "", "mean ± std", *(mean_and_deviation(v) for v in values), "", end_section=True)
    console.print(made)


if __name__ == "__main__":
    main()
