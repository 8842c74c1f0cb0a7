"""SIGKILL at random moments, then `parablock resume`: the model must be that of the run that nobody disturbed.

The command line runs in a process of its own, forked from one that has torch loaded. A moment is a round drawn at
random and a random part of a round after it, so that it lies in the run's life however fast the machine is just
then. A run that ends before its kill does not count, and another moment is drawn for it. Another seed is run too:
its model must differ.

    .venv/bin/python benchmarks/kill_resume.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from _record import Bar, fresh_folder, generated, make_console, make_parser, record, t0, table
from rich.console import Console

from parablock.cli.main import main as main_of_parablock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.seeding import generator_for

NUM_CLIENTS = 3
POLL_S = 0.005
Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    folder = fresh_folder(options)
    config = make_config(options, folder)
    undisturbed_s = run_to_the_end(config, folder / "undisturbed")
    expected = sha256(folder / "undisturbed")
    other = make_config(options, folder, seed=options.seed + 1)
    run_to_the_end(other, folder / "another-seed")
    console.print(f"undisturbed: {undisturbed_s:.1f} s after its first file, {expected}")
    trials = kill_until(options, config, folder, undisturbed_s / options.rounds, console)
    show(console, trials, expected, sha256(folder / "another-seed"))
    results = {
        "undisturbed": expected,
        "another_seed": sha256(folder / "another-seed"),
        "undisturbed_s": undisturbed_s,
        "trials": trials,
    }
    equal = sum(counts(trial) and trial["model_sha256"] == expected for trial in trials)
    bars = [
        Bar("killed runs that end with the undisturbed model", equal, options.kills, at_most=False),
        Bar("runs of another seed that do", float(results["another_seed"] == expected), 0),
    ]
    record(options, results, bars, config=config.model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("kill_resume", "SIGKILL at random moments and resume.", "--kills 50 --toy")
    parser.add_argument("--kills", type=int, default=5, help="runs to kill")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the moments")
    parser.add_argument("--toy", action="store_true", help="a generated model and text, not the pretrained one")
    options = parser.parse_args()
    options.toy = options.toy or options.smoke
    if options.smoke:
        options.kills, options.rounds, options.steps = 1, 8, 1
    return options


def make_config(options: argparse.Namespace, folder: Path, *, seed: int | None = None) -> RunConfig:
    material = (
        generated(folder / "material", num_clients=NUM_CLIENTS)
        if options.toy
        else t0("ag_news", "app_reviews", "glue_qqp")
    )
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": 96,
                "partition": {"scheme": "by_file"},
            },
            "federation": {"num_clients": NUM_CLIENTS, "num_rounds": options.rounds, "delay": 1},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "optimizer_state": "keep",
            },
            "wire": {"format": "bfloat16"},
            "link": {"upload_mbps": 50, "download_mbps": 100},
            "engine": {"num_threads": 1},
            "evaluation": {"every_rounds": 4, "max_examples": 32},
            "checkpoint": {"every_rounds": 2},
            "seed": options.seed if seed is None else seed,
        }
    )


def kill_until(
    options: argparse.Namespace, config: RunConfig, folder: Path, round_s: float, console: Console
) -> list[Found]:
    """Draw moments until so many runs were killed; twice as many moments are enough on any machine."""
    draw = generator_for(options.seed, "kill")
    trials: list[Found] = []
    while sum(map(counts, trials)) < options.kills and len(trials) < 2 * options.kills:
        after_rounds, part = int(draw.integers(0, options.rounds)), float(draw.uniform())
        directory = folder / f"killed-{len(trials)}"
        trials.append(kill_and_resume(config, directory, after_rounds, part * round_s))
        console.print(f"{len(trials)}: {json.dumps(trials[-1])}")
    return trials


def counts(trial: Found) -> bool:
    return bool(trial["was_running"])


def run_to_the_end(config: RunConfig, directory: Path) -> float:
    """Run undisturbed; give the seconds from its first file to its end."""
    process = start(config, directory)
    began = time.perf_counter()
    finish(process, directory)
    return time.perf_counter() - began


def kill_and_resume(config: RunConfig, directory: Path, after_rounds: int, after_s: float) -> Found:
    """Kill a run so many seconds after so many of its rounds, and resume it."""
    process = start(config, directory)
    while process.is_alive() and rounds_recorded(directory) < after_rounds:
        time.sleep(POLL_S)
    time.sleep(after_s)
    process.kill()
    process.join()
    was_running = process.exitcode != 0 and not is_complete(directory)
    rounds = rounds_recorded(directory)
    checkpoints = sorted(path.name for path in (directory / "checkpoints").glob("round-*"))
    if was_running:
        finish(parablock(directory, "resume", str(directory)), directory)
    return {
        "was_running": was_running,
        "rounds_recorded": rounds,
        "resumed_from": checkpoints[-1] if checkpoints else "the start",
        "model_sha256": sha256(directory),
    }


def rounds_recorded(directory: Path) -> int:
    return (directory / "metrics.jsonl").read_text(encoding="utf-8").count("\n")


def start(config: RunConfig, directory: Path) -> BaseProcess:
    """Start a run and wait until there is something of it to resume."""
    file = directory.with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    process = parablock(directory, "run", str(file), "--output-dir", str(directory))
    while process.is_alive() and not (directory / "config.yaml").exists():
        time.sleep(POLL_S)
    return process


def parablock(directory: Path, *arguments: str) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parablock.cli.main", "parablock.experiment.run"])
    process = context.Process(target=command_line, args=(arguments, str(directory.with_suffix(".log"))))
    process.start()
    return process


def command_line(arguments: tuple[str, ...], log: str) -> None:
    """Be the command line: what it says goes into a file."""
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["parablock", *arguments]
    main_of_parablock()


def finish(process: BaseProcess, directory: Path) -> None:
    process.join()
    if process.exitcode:
        sys.exit(f"parablock ended with {process.exitcode}:\n{directory.with_suffix('.log').read_text()}")


def is_complete(directory: Path) -> bool:
    """Tell whether a run has written its last file, though its process may not have ended yet."""
    summary = directory / "summary.json"
    return summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["status"] == "completed"


def sha256(directory: Path) -> str:
    return str(json.loads((directory / "summary.json").read_text(encoding="utf-8"))["model_sha256"])


def show(console: Console, trials: list[Found], expected: str, other: str) -> None:
    made = table("SIGKILL and resume", "killed after", "resumed from", "model_sha256", "the same")
    for trial in trials:
        same = trial["model_sha256"] == expected
        after = f"{trial['rounds_recorded']} rounds" if trial["was_running"] else "its end"
        made.add_row(after, trial["resumed_from"], trial["model_sha256"][:16], "yes" if same else "NO")
    made.add_row("never, another seed", "", other[:16], "yes" if other == expected else "no")
    console.print(made)


if __name__ == "__main__":
    main()
