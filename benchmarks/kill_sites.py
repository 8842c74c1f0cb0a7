"""SIGKILL at random moments to the parts of a deployment: a site's trainer, its SuperNode, the SuperLink.

SuperLink, SuperNodes and trainers are real processes. In each run one of each is killed, at moments drawn at
random: a number of rounds done, and some seconds after it. A SuperNode is started again at once; a trainer by the
next ClientApp; after the SuperLink's end `parablock resume` goes on. The model must be that of one process that
nobody disturbs. A kill that comes after the run's end does not count.

Needs the extra `flower`.

    .venv/bin/python benchmarks/kill_sites.py
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from _deployed import Watched, deployed_config, in_one_process, quiet
from _record import Bar, fresh_folder, generated, make_console, make_parser, record, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.deploy.one_machine import Deployment, resume_local
from parablock.seeding import generator_for

SITES = 2
ROUND_S = 8.0
"""About what a round over Flower takes here: kills come up to so long after one."""

Found = dict[str, Any]


def main() -> None:
    options = parse_options()
    console, folder = make_console(), fresh_folder(options)
    material = generated(folder / "material", num_clients=SITES)
    config = deployed_config(material, sites=SITES, rounds=options.rounds, seed=options.seed, chunk_bytes=131_072)
    expected = in_one_process(config, folder / "one-process")
    other = in_one_process(config, folder / "another-seed", seed=options.seed + 1)
    draw, runs = generator_for(options.seed, "kill sites"), list[Found]()
    while sum(len(run["kills"]) for run in runs) < options.kills and len(runs) < options.kills:
        runs.append(killed(config, folder / f"run-{len(runs)}", draw, options.parts))
        console.print(f"{len(runs)}: {runs[-1]}")
    results = {"undisturbed": expected, "another_seed": other, "runs": runs}
    kills = sum(len(run["kills"]) for run in runs)
    same = sum(len(run["kills"]) for run in runs if run["model_sha256"] == expected)
    bars = [
        Bar("kills of running parts of a deployment", kills, options.kills, at_most=False),
        Bar("of them in runs that end with the undisturbed model", same, kills, at_most=False),
        Bar("runs of another seed that do", float(other == expected), 0),
    ]
    show(console, runs, expected)
    record(options, results, bars, config=config.model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("kill_sites", "SIGKILL to the parts of a deployment.", "--kills 3")
    parser.add_argument("--kills", type=int, default=12, help="kills, in as many runs as that takes")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a run")
    parser.add_argument("--parts", nargs="+", default=["trainer", "supernode", "superlink"], help="which, in a run")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the moments")
    options = parser.parse_args()
    if options.smoke:
        options.kills, options.rounds, options.parts = 1, 4, ["trainer"]
    return options


def killed(config: RunConfig, directory: Path, draw: np.random.Generator, parts: list[str]) -> Found:
    """Kill the parts in the order of their moments, the SuperLink last, and go on until the run ends."""
    last = config.federation.num_rounds - 2
    moments = sorted((int(draw.integers(0, last)), float(draw.uniform(0, ROUND_S))) for _ in parts)
    kills: list[Found] = []
    began = time.monotonic()
    deployment = Deployment(directory, SITES, lanes=2)
    deployment.prepare(config)
    with deployment, Watched(deployment) as watched:
        for part, (after_rounds, part_s) in zip(in_order(parts, draw), moments, strict=True):
            watched.wait_for(lambda wanted=after_rounds: watched.rounds_done >= wanted)
            time.sleep(part_s)
            site = int(draw.integers(SITES))
            if not watched.has_ended and kill(deployment, part, site):
                kills.append({"part": part, "site": site, "rounds_done": watched.rounds_done})
    summary = watched.summary
    if watched.error is not None:
        if "superlink" not in [kill["part"] for kill in kills]:
            raise watched.error
        summary = resume_local(directory, progress=quiet())
    return {"kills": kills, "seconds": time.monotonic() - began, "model_sha256": summary["model_sha256"]}


def in_order(parts: list[str], draw: np.random.Generator) -> list[str]:
    """Give the parts of sites in any order, and then the SuperLink, after whose end only a resume goes on."""
    shuffled = [str(part) for part in draw.permutation([part for part in parts if part != "superlink"])]
    return [*shuffled, *(part for part in parts if part == "superlink")]


def kill(deployment: Deployment, part: str, site: int) -> bool:
    """Kill a part, and start again what nobody else does; False where it does not run just now."""
    if part == "trainer":
        pid = deployment.trainer_pid(site)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None
    if part == "superlink":
        deployment.kill("superlink")
        return True
    deployment.kill(f"supernode-{site}")
    deployment.start_supernode(site)
    return True


def show(console: Console, runs: list[Found], expected: str) -> None:
    made = table("SIGKILL to the parts of a deployment", "killed, after how many rounds", "s", "the same")
    for run in runs:
        kills = ", ".join(f"{kill['part']} {kill['rounds_done']}" for kill in run["kills"])
        same = "yes" if run["model_sha256"] == expected else "NO"
        made.add_row(kills, f"{run['seconds']:.0f}", same)
    console.print(made)


if __name__ == "__main__":
    main()
