"""What `parablock plan --probe` predicts against what a run then measures.

Runs are on the virtual clock: local steps are really taken and timed, one client at a time; links are
arithmetic. For each link and delay a run is planned right before and right after it, because the speed of a
machine that does other things as well drifts; the mean of both plans is compared, and medians over repeats.
With `--cpu-time` both count the processor seconds of this process, which other programs disturb far less. The
record says how many processors each of the three had: where these differ, it was the machine and not the plan.

    .venv/bin/python benchmarks/plan.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.plan.forecast import Plan, make_plan

FAMILIES = ("ag_news", "gigaword", "social_i_qa")
CASES = {
    "wide link, delay 1": {"delay": 1, "mbps": 60.0, "format": "float32"},
    "narrow link, delay 1": {"delay": 1, "mbps": 8.0, "format": "float32"},
    "narrow link, delay 0, int8": {"delay": 0, "mbps": 8.0, "format": "int8"},
}
KEYS = ("compute_s", "communication_s", "round_s", "bytes_per_client_round")
BAR = 0.15
Figures = dict[str, float]


def main() -> None:
    options = parse_options()
    if options.cpu_time:
        time.perf_counter = time.process_time  # whoever asks for elapsed seconds from now on: clock and probe
    console = make_console()
    folder = fresh_folder(options)
    material = generated(folder / "material", num_clients=len(FAMILIES)) if options.smoke else t0(*FAMILIES)
    configs = {name: make_config(material, options, case) for name, case in CASES.items()}
    found: dict[str, list[tuple[Figures, Figures]]] = {name: [] for name in configs}
    shares: dict[str, list[list[float]]] = {name: [] for name in configs}
    for repeat in range(options.repeats):
        for number, (name, config) in enumerate(configs.items()):
            share: list[float] = []
            with sharing(share):
                before = predict(make_plan(config, probe=True), config.wire.format)
            with sharing(share):
                measured = measure(run_quietly(config, folder / f"{number}-{repeat}"))
            with sharing(share):
                after = predict(make_plan(config, probe=True), config.wire.format)
            predicted = {key: (before[key] + after[key]) / 2 for key in KEYS}
            found[name].append((predicted, measured))
            shares[name].append(share)
            console.print(f"{name}, repeat {repeat}: " + ", ".join(ratios_in_words(predicted, measured)))
            console.print("  processors for plan, run, plan: " + ", ".join(f"{value:.2f}" for value in share))
    rows = [row(name, key, pairs) for name, pairs in found.items() for key in KEYS]
    show(console, rows)
    record(
        options,
        {"medians": rows, "repeats": found, "processors": shares},
        [Bar(f"{r['case']}: |{r['key']} predicted / measured − 1|", abs(r["ratio"] - 1), BAR) for r in rows],
        config={name: config.model_dump(mode="json") for name, config in configs.items()},
        console=console,
    )


@contextmanager
def sharing(shares: list[float]) -> Iterator[None]:
    """Add how many processors this process had on average: about one, where nobody else wants them."""
    own_s, elapsed_s = time.process_time(), time.perf_counter()
    yield
    shares.append((time.process_time() - own_s) / (time.perf_counter() - elapsed_s))


def parse_options() -> argparse.Namespace:
    parser = make_parser("plan", "Predictions of `plan --probe` against measured runs.", "--repeats 5")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of a run")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--repeats", type=int, default=3, help="plans and runs of each case")
    parser.add_argument("--cpu-time", action="store_true", help="count processor seconds, on a busy machine")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.repeats = 8, 1
    return options


def make_config(material: Material, options: argparse.Namespace, case: dict[str, Any]) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": 128,
                "partition": {"scheme": "by_file"},
            },
            "federation": {
                "num_clients": len(material.train),
                "num_rounds": options.rounds,
                "delay": case["delay"],
            },
            "train": {"num_local_steps": options.steps, "learning_rate": 1e-3},
            "wire": {"format": case["format"]},
            "link": {"upload_mbps": case["mbps"], "download_mbps": case["mbps"], "latency_s": 0.02},
            "engine": {"clock": "virtual", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": 16},
            "checkpoint": {"every_rounds": 0},
        }
    )


def predict(plan: Plan, wire_format: str) -> Figures:
    """Give what a plan says of a round."""
    times = {key: getattr(plan, key) for key in KEYS[:3]}
    return times | {"bytes_per_client_round": plan.bytes_per_client_round[wire_format]}


def measure(summary: dict[str, Any]) -> Figures:
    """Give what a run's summary says, of a round."""
    rounds = summary["num_rounds"]
    return {
        "compute_s": summary["compute_s"] / rounds,
        "communication_s": summary["communication_s"] / rounds,
        "round_s": summary["wall_time_s"] / rounds,
        "bytes_per_client_round": summary["bytes_per_client_round"],
    }


def ratios_in_words(predicted: Figures, measured: Figures) -> list[str]:
    return [f"{key} {predicted[key]:.4g} / {measured[key]:.4g}" for key in KEYS]


def row(name: str, key: str, pairs: list[tuple[Figures, Figures]]) -> dict[str, Any]:
    predicted, measured = (statistics.median(pair[side][key] for pair in pairs) for side in (0, 1))
    return {
        "case": name,
        "key": key,
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
        "ratio_by_repeat": [before[key] / after[key] for before, after in pairs],
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    made = table("A round, predicted and measured (medians)", "case", "", "predicted", "measured", "ratio")
    for r in rows:
        made.add_row(r["case"], r["key"], f"{r['predicted']:,.4g}", f"{r['measured']:,.4g}", f"{r['ratio']:.3f}")
    console.print(made)


if __name__ == "__main__":
    main()
