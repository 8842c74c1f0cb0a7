"""Word problems: ParaBlock against FL-BCD by how much clients differ, and how soon it reaches FL-BCD's loss.

Generated word problems with a line of reasoning, which a small model can learn, are dealt to four clients by topic
with a Dirichlet distribution; a small α gives each client few topics. The small pretrained model is trained under
the virtual clock, over a link on which an exchange takes as long as the computation of a round. The learning rate
decays over the rounds of a run, so that runs of equal rounds are compared where they have settled: one round of lag
is a fixed number of rounds, which a run whose loss still falls at its end would show as a worse loss. Where
ParaBlock has not reached FL-BCD's last loss by then, a third run, with one round more for every twelve, tells how
soon it does. The answers are those of the models at the end of each run.

A run that is complete is not run again, as long as its configuration is the same.

    .venv/bin/python benchmarks/words.py
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _record import (
    Bar,
    balanced_mbps,
    commit_of,
    curve_of,
    generated,
    kept_run,
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
from parablock.demo.material import TEST_FILE_NAME, make_word_problems
from parablock.evaluation.side_by_side import score_models

CLIENTS, STEP_S, MORE_ROUNDS_ONE_IN = 4, 0.25, 12
RUNS = {"fl_bcd": 0, "parablock": 1, "parablock, more rounds": 1}
"""The delay of each run."""
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    example = make_config(options.alphas[0], "parablock", options.seeds[0], options).model_dump(mode="json")
    found: list[Found] = []
    for alpha, seed in product(options.alphas, options.seeds):
        found.append(outcome(alpha, seed, options, console))
        show(console, found)
        record(options, found, bars(found), config=example, console=console)  # in case the rest is not reached


def parse_options() -> argparse.Namespace:
    parser = make_parser("words", "Loss at equal rounds and time to the same loss.", "--alphas 0.3 --seeds 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 0.1], help="Dirichlet α")
    parser.add_argument("--rounds", type=int, default=96, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=2, help="examples of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW")
    parser.add_argument(
        "--schedule", default="cosine", help="how the learning rate goes on: constant, linear, cosine"
    )
    parser.add_argument("--max-examples", type=int, default=64, help="held-out examples that the loss is of")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.alphas, options.rounds, options.steps = options.seeds[:1], [0.3], 8, 1
    return options


def make_config(alpha: float, name: str, seed: int, options: argparse.Namespace) -> RunConfig:
    more = max(1, options.rounds // MORE_ROUNDS_ONE_IN) if "more" in name else 0
    folder = Path(options.work_dir) / "material"
    train = make_word_problems(folder / "problems", num_clients=CLIENTS, examples_per_client=250, seed=0)
    model = generated(folder, num_clients=2).model if options.smoke else t0().model
    mbps = balanced_mbps(model, STEP_S * options.steps)  # both ways together take as long as K steps
    return parse_config(
        {
            "model": {"name_or_path": model},
            "data": {
                "train": [str(path) for path in train],
                "test": [str(folder / "problems" / TEST_FILE_NAME)],
                "max_length": 96,
                "partition": {"scheme": "dirichlet", "alpha": alpha, "field": "template"},
            },
            "federation": {
                "num_clients": CLIENTS,
                "num_rounds": options.rounds + more,
                "delay": RUNS[name],
            },
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": options.learning_rate,
                "lr_scheduler_type": options.schedule,
            },
            "link": {"upload_mbps": mbps, "download_mbps": mbps},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": STEP_S},
            "evaluation": {"every_rounds": 8, "max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 0},
            "seed": seed,
        }
    )


def outcome(alpha: float, seed: int, options: argparse.Namespace, console: Console) -> Found:
    """Run both, and ParaBlock for longer where it needs it, and put its curve beside FL-BCD's end."""
    found: Found = {"alpha": alpha, "seed": seed}
    reached: list[float] = []
    for name in RUNS:
        if reached:
            break
        config = make_config(alpha, name, seed, options)
        rounds = config.federation.num_rounds
        directory = kept_run(
            config, options.work_dir, f"alpha-{alpha:g}-{config.federation.method}-{rounds}-seed-{seed}"
        )
        summary = directory.read_summary()
        scored = curve_of(directory)
        found[name] = {
            "rounds": rounds,
            "initial": summary["initial_eval_loss"],
            "loss": summary["final_eval_loss"],
            "seconds": scored[-1][0],
            "curve": scored,
            "model_sha256": summary["model_sha256"],
            "commit": commit_of(directory),
        }
        if not options.smoke:
            found[name]["exact_match"] = exact_match(str(directory.path / "model"), options)
        console.print(f"α {alpha:g}, seed {seed}, {name}: {found[name]['initial']:.4f} → {found[name]['loss']:.4f}")
        if RUNS[name]:
            reached = [s for s, loss in scored if loss <= found["fl_bcd"]["loss"]]
    found["ratio"] = found["parablock"]["loss"] / found["fl_bcd"]["loss"]
    found["time_ratio"] = reached[0] / found["fl_bcd"]["seconds"] if reached else None
    return found


def exact_match(model: str, options: argparse.Namespace) -> float:
    """Tell the share of right answers."""
    problems = str(Path(options.work_dir) / "material" / "problems" / TEST_FILE_NAME)
    (score,) = score_models(model, [problems], task="exact_match", max_examples=32, max_new_tokens=48, device="cpu")
    return score.value


def groups(found: list[Found]) -> dict[float, list[Found]]:
    """Sort the seeds by α."""
    by_alpha: dict[float, list[Found]] = {}
    for row in found:
        by_alpha.setdefault(row["alpha"], []).append(row)
    return by_alpha


def bars(found: list[Found]) -> list[Bar]:
    made = []
    for alpha, rows in groups(found).items():
        ratio = fmean(row["parablock"]["loss"] for row in rows) / fmean(row["fl_bcd"]["loss"] for row in rows)
        if alpha >= 0.3:
            made.append(Bar(f"α {alpha:g}: loss of ParaBlock / FL-BCD at equal rounds, means", ratio, 1.02))
        times = [row["time_ratio"] for row in rows]
        reached = [time if time is not None else float("inf") for time in times]
        made.append(Bar(f"α {alpha:g}: seconds to FL-BCD's last loss, mean ratio", min(9.99, fmean(reached)), 0.55))
    return made


def show(console: Console, found: list[Found]) -> None:
    made = table("Word problems", "α", "FL-BCD", "ParaBlock", "ratio", "time to FL-BCD's loss / its time")
    for alpha, rows in groups(found).items():
        columns = [[row[name]["loss"] for row in rows] for name in ("fl_bcd", "parablock")]
        times = ", ".join("never" if row["time_ratio"] is None else f"{row['time_ratio']:.3f}" for row in rows)
        ratio = mean_and_deviation([row["ratio"] for row in rows])
        made.add_row(f"{alpha:g}", *(mean_and_deviation(values) for values in columns), ratio, times)
    console.print(made)


if __name__ == "__main__":
    main()
