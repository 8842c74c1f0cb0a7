"""A hundred clients on this machine: what the virtual clock says, and what it costs.

Every client has a machine and a link of its own in simulated time, so a round of a hundred clients takes as
long as a round of four. With a given step time that holds exactly; with the measured one a hundred clients
have a slower slowest client than four, as a hundred machines would.

    .venv/bin/python benchmarks/clients.py
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import psutil
from _record import Bar, Material, fresh_folder, generated, make_console, make_parser, record, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.experiment.progress import PlainProgress
from parablock.experiment.run import run

Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console = make_console()
    folder = fresh_folder(options)
    found = []
    for step_time_s in (options.step_time_s, None):
        for num_clients in options.clients:
            material = generated(folder / f"material-{num_clients}", num_clients=num_clients)
            config = make_config(material, options, num_clients, step_time_s)
            name = f"{'measured' if step_time_s is None else 'given'}-{num_clients}"
            found.append(simulate(config, folder / name))
    show(console, found)
    config = make_config(material, options, num_clients, options.step_time_s).model_dump(mode="json")
    record(options, found, bars(found, options), config=config, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("clients", "Many clients under the virtual clock.", "--clients 4 200 --rounds 4")
    parser.add_argument("--clients", type=int, nargs=2, default=[4, 100], help="few clients, and many")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--step-time-s", type=float, default=0.5, help="simulated seconds of a local step")
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.steps = [2, 5], 1
    return options


def make_config(
    material: Material, options: argparse.Namespace, num_clients: int, step_time_s: float | None
) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": 64,
                "partition": {"scheme": "by_file"},
            },
            "federation": {"num_clients": num_clients, "num_rounds": options.rounds, "delay": 1},
            "train": {"num_local_steps": options.steps, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "link": {"upload_mbps": 200, "download_mbps": 500, "latency_s": 0.005},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": step_time_s},
            "evaluation": {"every_rounds": 0, "max_examples": 8},
            "checkpoint": {"every_rounds": 0},
        }
    )


def simulate(config: RunConfig, directory: Path) -> Found:
    """Run, counting the threads of this process at every round."""
    threads: list[int] = []

    def count_threads() -> bool:
        threads.append(threading.active_count())
        return False

    summary = run(
        config, directory, progress=PlainProgress(console=Console(quiet=True)), asked_to_stop=count_threads
    )
    return summary | {
        "step_time_s": config.engine.step_time_s,
        "host_s_per_round": summary["elapsed_s"] / summary["num_rounds"],
        "peak_python_threads": max(threads),
        "threads_afterwards": threading.active_count(),
        "resident_bytes": psutil.Process().memory_info().rss,
    }


def bars(found: list[Found], options: argparse.Namespace) -> list[Bar]:
    few, many, few_measured, many_measured = (run["wall_time_s"] for run in found)
    fewest, most = options.clients
    return [
        Bar(f"simulated time of {most} clients / {fewest}, step time given", many / few, 1.01),
        Bar(f"simulated time of {most} clients / {fewest}, step time measured", many_measured / few_measured, 1.5),
        Bar("threads of a client", (found[1]["peak_python_threads"] - 1) / most, 2),
    ]


def show(console: Console, found: list[Found]) -> None:
    columns = ("step time", "simulated", "sequential", "overlap", "host s / round", "threads", "memory")
    made = table("Clients on this machine, virtual clock, delay 1", "clients", *columns)
    for done in found:
        made.add_row(
            str(done["num_clients"]),
            "measured" if done["step_time_s"] is None else f"{done['step_time_s']:g} s",
            f"{done['wall_time_s']:.2f} s",
            f"{done['sequential_s']:.2f} s",
            f"{done['overlap_fraction']:.3f}",
            f"{done['host_s_per_round']:.2f}",
            str(done["peak_python_threads"]),
            f"{done['resident_bytes'] / 2**20:.0f} MiB",
        )
    console.print(made)


if __name__ == "__main__":
    main()
