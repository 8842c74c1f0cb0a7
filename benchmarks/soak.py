"""A long run in which something goes wrong every few rounds, and runs in which many clients drop in each round.

Soak: faults of all kinds at random, two machines that die for good among them, under the virtual clock. Nothing may
be lost: every round ends, every update counts once or is refused with a reason, and the loss is that of a run that
nobody disturbed, or close. Drops: each client gives each round up with probability 0.3. What is complete in the
work folder is not run again.

    .venv/bin/python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from operator import truediv
from pathlib import Path
from statistics import fmean
from typing import Any

from _record import (
    Bar,
    Material,
    generated,
    kept_run,
    make_console,
    make_parser,
    record,
    t0,
    table,
)
from rich.console import Console

from parablock.config.load import parse_config
from parablock.config.section import KINDS_AT
from parablock.seeding import generator_for

NUM_CLIENTS = 8
STEP_TIME_S = 1.0
DROPPED = 0.3
PARTS = ("soak", "drops")
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    material = t0() if options.real else generated(Path(options.work_dir) / "material", num_clients=NUM_CLIENTS)
    found: Found = {}
    bars = []
    if "soak" in options.only:
        seed = options.seeds[0]
        faults = random_faults(options.rounds, seed)
        soak = found["soak"] = compared(options, material, "soak", options.rounds, faults, seed)
        bars += [
            Bar("rounds of the soak that ended", soak["rounds_done"], options.rounds, at_most=False),
            Bar("final loss of the soak / undisturbed", soak["loss_ratio"], 1.03),
            Bar("updates that counted twice, or without having been asked for", soak["not_accounted_for"], 0),
        ]
    if "drops" in options.only:
        drops = found["drops"] = []
        for seed in options.seeds:
            faults = dropping(options.drop_rounds, seed)
            drops.append(compared(options, material, "drops", options.drop_rounds, faults, seed))
            console.print(f"drops, seed {seed}: loss ratio {drops[-1]['loss_ratio']:.4f}")
        ended = sum(run["rounds_done"] for run in drops)
        asked = options.drop_rounds * len(drops)
        losses = (fmean(run[key] for run in drops) for key in ("final_eval_loss", "final_eval_loss_undisturbed"))
        bars += [
            Bar("rounds with 30 % dropping that ended", ended, asked, at_most=False),
            Bar("final loss with 30 % dropping / undisturbed, means", truediv(*losses), 1.03),
        ]
    show(console, found)
    config = tree(options, material, options.rounds, [], options.seeds[0])
    record(options, found, bars, config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("soak", "Faults at random over many rounds.", "--rounds 100 --seeds 7")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the soak")
    parser.add_argument("--drop-rounds", type=int, default=64, help="rounds in which clients drop")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=4, help="examples of a step")
    parser.add_argument("--schedule", default="constant", help="of the learning rate: constant, cosine, linear")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of runs and faults; the soak's: the first"
    )
    parser.add_argument("--max-examples", type=int, default=64, help="held-out examples that the loss is of")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="which part")
    parser.add_argument("--real", action="store_true", help="the pretrained model on the T0 families, not a toy")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.drop_rounds, options.steps = 12, 6, 1
    return options


def tree(options: argparse.Namespace, material: Material, rounds: int, faults: list[Found], seed: int) -> Found:
    return {
        "model": {"name_or_path": material.model},
        "data": {
            "train": material.train,
            "test": material.test,
            "max_length": 96,
            "partition": {"scheme": "by_file"},
        },
        "blocks": {"allow_unvisited": True},
        "federation": {
            "num_clients": NUM_CLIENTS,
            "num_rounds": rounds,
            "delay": 1,
            "min_updates": 2,
            "deadline_factor": 3.0,
        },
        "train": {
            "num_local_steps": options.steps,
            "per_device_train_batch_size": options.batch_size,
            "learning_rate": 1e-3,
            "lr_scheduler_type": options.schedule,
        },
        "link": {"upload_mbps": 5, "download_mbps": 20, "latency_s": 0.02},
        "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": STEP_TIME_S},
        "evaluation": {"every_rounds": 0, "max_examples": options.max_examples},
        "checkpoint": {"every_rounds": 16},
        "faults": faults,
        "seed": seed,
    }


def random_faults(rounds: int, seed: int) -> list[Found]:
    """Draw a fault for two rounds in five, of any kind at any point; two of the machines never come back."""
    draw = generator_for(seed, "soak")
    points = [(at, kind) for at, kinds in KINDS_AT.items() for kind in kinds]
    faults: list[Found] = []
    for t in range(1, rounds):
        if draw.random() >= 0.4:
            continue
        at, kind = points[int(draw.integers(len(points)))]
        fault = {"client": int(draw.integers(NUM_CLIENTS)), "round": t, "at": at, "kind": kind}
        if kind == "scale":
            fault["value"] = float(draw.choice([-1.0, 3.0, 1e6]))
        elif kind in ("kill", "delay") or (kind == "drop" and at in ("upload", "download")):
            fault["value"] = round(float(draw.uniform(0.5, 60.0)), 1)
        faults.append(fault)
    for client_id, t in ((6, rounds // 2), (7, 3 * rounds // 4)):
        faults.append({"client": client_id, "round": t, "at": "train", "kind": "kill"})
    return faults


def dropping(rounds: int, seed: int) -> list[Found]:
    draws = generator_for(seed, "drops").random(size=(rounds, NUM_CLIENTS))
    return [
        {"client": client_id, "round": t, "at": "train", "kind": "drop"}
        for t in range(rounds)
        for client_id in range(NUM_CLIENTS)
        if draws[t, client_id] < DROPPED
    ]


def compared(
    options: argparse.Namespace, material: Material, name: str, rounds: int, faults: list[Found], seed: int
) -> Found:
    """Run with and without the faults; say what happened."""
    names = (f"{name}-seed-{seed}", f"{name}-undisturbed-seed-{seed}")
    directories = [
        kept_run(parse_config(tree(options, material, rounds, injected, seed)), options.work_dir, run_name)
        for run_name, injected in zip(names, (faults, []), strict=True)
    ]
    disturbed, undisturbed = (directory.read_summary() for directory in directories)
    lines = directories[0].metrics.read_text(encoding="utf-8").splitlines()
    participants = [json.loads(line)["participants"] for line in lines]
    return {
        "seed": seed,
        "rounds_done": disturbed["rounds_done"],
        "status": disturbed["status"],
        "faults_injected": len(faults),
        "faults": disturbed["faults"],
        "refused_updates": disturbed["refused_updates"],
        "participants_per_round": dict(sorted(Counter(map(len, participants)).items())),
        "not_accounted_for": sum(len(row) - len(set(row) & set(range(NUM_CLIENTS))) for row in participants),
        "wall_time_s": disturbed["wall_time_s"],
        "wall_time_undisturbed_s": undisturbed["wall_time_s"],
        "initial_eval_loss": disturbed["initial_eval_loss"],
        "final_eval_loss": disturbed["final_eval_loss"],
        "final_eval_loss_undisturbed": undisturbed["final_eval_loss"],
        "loss_ratio": disturbed["final_eval_loss"] / undisturbed["final_eval_loss"],
    }


def show(console: Console, found: Found) -> None:
    columns = {"soak": found["soak"]} if "soak" in found else {}
    columns |= {f"drops, seed {run['seed']}": run for run in found.get("drops", [])}
    made = table("What happened", "", *columns)
    for key in next(iter(columns.values())):
        made.add_row(key, *(_short(run[key]) for run in columns.values()))
    console.print(made)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count}× {name}" for name, count in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
