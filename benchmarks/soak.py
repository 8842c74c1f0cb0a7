"""A long run in which something goes wrong every few rounds, and one in which many clients drop in each round.

Soak: faults of all kinds at random, two machines that die for good among them, under the virtual clock. Nothing may
be lost: every round ends, every update counts once or is refused with a reason, and the loss is that of a run that
nobody disturbed, or close. Drops: each client gives each round up with probability 0.3.

    .venv/bin/python benchmarks/soak.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
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

from parablock.config import parse_config
from parablock.fault_section import KINDS_AT
from parablock.seeding import generator_for

NUM_CLIENTS = 8
STEP_TIME_S = 1.0
DROPPED = 0.3
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console, folder = make_console(), fresh_folder(options)
    material = t0() if options.real else generated(folder / "material", num_clients=NUM_CLIENTS)
    soak, drops = random_faults(options.rounds, options.seed), dropping(options.drop_rounds, options.seed)
    found = {
        "soak": compared(options, material, folder, "soak", options.rounds, soak),
        "drops": compared(options, material, folder, "drops", options.drop_rounds, drops),
    }
    bars = [
        Bar("rounds of the soak that ended", found["soak"]["rounds_done"], options.rounds, at_most=False),
        Bar("final loss of the soak / undisturbed", found["soak"]["loss_ratio"], 1.03),
        Bar("updates that counted twice, or without having been asked for", found["soak"]["not_accounted_for"], 0),
        Bar(
            "rounds with 30 % dropping that ended",
            found["drops"]["rounds_done"],
            options.drop_rounds,
            at_most=False,
        ),
        Bar("final loss with 30 % dropping / undisturbed", found["drops"]["loss_ratio"], 1.03),
    ]
    show(console, found)
    config = tree(options, material, options.rounds, [])
    record(options, found, bars, config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("soak", "Faults at random over many rounds.", "--rounds 100 --seed 7")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the soak")
    parser.add_argument("--drop-rounds", type=int, default=64, help="rounds in which clients drop")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the faults")
    parser.add_argument("--real", action="store_true", help="the pretrained model on the T0 families, not a toy")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.drop_rounds, options.steps = 12, 6, 1
    return options


def tree(options: argparse.Namespace, material: Material, rounds: int, faults: list[Found]) -> Found:
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
        "train": {"num_local_steps": options.steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        "link": {"upload_mbps": 5, "download_mbps": 20, "latency_s": 0.02},
        "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": STEP_TIME_S},
        "evaluation": {"every_rounds": 0, "max_examples": 64},
        "checkpoint": {"every_rounds": 50},
        "faults": faults,
        "seed": options.seed,
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
    options: argparse.Namespace, material: Material, folder: Path, name: str, rounds: int, faults: list[Found]
) -> Found:
    """Run with and without the faults; say what happened."""
    summaries, directories = [], [folder / name, folder / f"{name}-undisturbed"]
    for directory, injected in zip(directories, (faults, []), strict=True):
        summaries.append(run_quietly(parse_config(tree(options, material, rounds, injected)), directory))
    disturbed, undisturbed = summaries
    lines = (directories[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    participants = [json.loads(line)["participants"] for line in lines]
    return {
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
    made = table("What happened", "", *found)
    for key in next(iter(found.values())):
        made.add_row(key, *(_short(part[key]) for part in found.values()))
    console.print(made)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count}× {name}" for name, count in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
