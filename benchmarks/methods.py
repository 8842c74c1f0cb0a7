"""Every method on the T0 families, one family a client: loss at equal rounds, equal seconds and equal bytes.

All fine-tune the small pretrained model through the same clients, wire, data order and evaluation. The learning
rate of each kind of method (blocks, all parameters, adapters) is the best of a grid, on a seed that is not used
afterwards. The clock is virtual: a local step takes as long as its operations do on an assumed core, so losses and
seconds are the same in every run. A loss does not depend on the link, so each method is run once; how long its
rounds take over a link of another speed, the same engine tells without training.

A run that is complete is not run again, as long as its configuration is the same.

    .venv/bin/python benchmarks/methods.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _families import family_scores
from _record import (
    Bar,
    commit_of,
    generated,
    kept_run,
    make_console,
    make_parser,
    mean_and_deviation,
    metrics_of,
    record,
    t0,
    table,
)
from rich.console import Console
from torch import Tensor

from parablock.algorithm.stacking import Factors
from parablock.clock import VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.config.methods import METHODS
from parablock.engine.contract import Hooks
from parablock.engine.inprocess import run_in_process
from parablock.experiment.engines import server_plan
from parablock.methods.blocks import trained_blocks
from parablock.methods.flora import factors_of
from parablock.model.adapters import matrices_block
from parablock.model.blocks import Block
from parablock.model.load import load_model
from parablock.trace import Trace
from parablock.training.flops import FlopModel, Tokens
from parablock.training.step_time import ASSUMED_FLOPS
from parablock.training.trainer import Trained
from parablock.wire.transport import Link

Found = dict[str, Any]
KINDS = {"blocks": "blocks", "all parameters": "everything", "adapters": "adapters"}
"""Which `trains` each kind of method has."""
GRID = {"blocks": (1e-3, 3e-3, 1e-2), "all parameters": (3e-4, 1e-3, 3e-3), "adapters": (3e-3, 1e-2)}
TUNED_ON = {"blocks": "fl_bcd", "all parameters": "fedavg", "adapters": "fedit"}
TUNING_SEED = 9
ROUNDS = {"blocks": 1.0, "all parameters": 0.5, "adapters": 1.0, "fedcybgd": 8.0}
"""Of those of a block method; FedCyBGD trains on one of eight clients in a round."""
SCORED = ("parablock", "fl_bcd", "fedavg", "fedit")
"""The methods that are scored on each family apart."""


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    rates = dict(zip(KINDS, options.rates, strict=True)) if options.rates else tuned_rates(options, console)
    example = make_config("parablock", rates["blocks"], 0, options).model_dump(mode="json")
    found: Found = {"learning_rates": rates, "runs": [], "base": base_scores(options)}
    for seed in options.seeds:
        for kind, trains in KINDS.items():
            methods = [name for name, method in METHODS.items() if method.trains == trains]
            wanted = [name for name in methods if name in (options.only or methods)]
            found["runs"] += [outcome(method, rates[kind], seed, options, console) for method in wanted]
        found["round_s"] = {
            m: {str(u): round_s(m, u, options) for u in options.links} for m in names(found["runs"])
        }
        found |= {"equal_seconds": equal_seconds(found, options), "equal_bytes": equal_bytes(found)}
        show(console, found, options)
        record(options, found, bars(found), config=example, console=console)  # in case the rest is not reached


def parse_options() -> argparse.Namespace:
    parser = make_parser("methods", "All methods at equal rounds, seconds and bytes.", "--only parablock fl_bcd")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument(
        "--rounds", type=int, default=16, help="rounds of a block method; at least one for each block"
    )
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--batch-size", type=int, default=2, help="examples of a step")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--max-examples", type=int, default=96, help="held-out examples that the loss is of")
    parser.add_argument(
        "--task-examples", type=int, default=24, help="held-out examples of a family; 0: do not score families"
    )
    parser.add_argument("--links", type=float, nargs="+", default=[10.0, 30.0, 100.0], help="10^6 bit/s, each way")
    parser.add_argument("--only", nargs="+", help="which methods; all when left out")
    parser.add_argument(
        "--rates", type=float, nargs=len(KINDS), help=f"learning rates of {', '.join(KINDS)}; left out: tuned first"
    )
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds, options.steps, options.max_examples = options.seeds[:1], 8, 1, 8
        options.task_examples, options.links = 2, [10.0]
    return options


def make_config(method: str, rate: float, seed: int, options: argparse.Namespace) -> RunConfig:
    num_clients = 2 if options.smoke else 8
    material = generated(Path(options.work_dir) / "material", num_clients=num_clients) if options.smoke else t0()
    rounds = round(options.rounds * ROUNDS.get(method, ROUNDS[kind_of(method)]))
    full = kind_of(method) == "all parameters"  # a round of these sends many bytes: look at each
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {
                "train": material.train,
                "test": material.test,
                "max_length": options.max_length,
                "partition": {"scheme": "by_file"},
            },
            "federation": {"method": method, "num_clients": num_clients, "num_rounds": rounds}
            | {"delay": int(METHODS[method].may_lag)},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": options.batch_size,
                "learning_rate": rate,
            },
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": step_s(kind_of(method), options)},
            "evaluation": {
                "every_rounds": 1 if full else max(1, rounds // 4),
                "max_examples": options.max_examples,
            },
            "checkpoint": {"every_rounds": 0},
            "seed": seed,
        }
    )


def kind_of(method: str) -> str:
    return next(kind for kind, trains in KINDS.items() if METHODS[method].trains == trains)


def tuned_rates(options: argparse.Namespace, console: Console) -> dict[str, float]:
    """Find the learning rate of each kind of method: the best of its grid after half of the rounds."""
    short = argparse.Namespace(**vars(options) | {"rounds": max(8, options.rounds // 2)})
    rates = {}
    for kind, grid in GRID.items():
        losses = {}
        for rate in grid[: 1 if options.smoke else None]:
            config = make_config(TUNED_ON[kind], rate, TUNING_SEED, short)
            directory = kept_run(config, options.work_dir, f"tuning-{TUNED_ON[kind]}")
            losses[rate] = directory.read_summary()["final_eval_loss"]
        rates[kind] = min(losses, key=lambda rate: losses[rate])
        told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        console.print(f"learning rate of {kind}: {rates[kind]:g} ({told})")
    return rates


def outcome(method: str, rate: float, seed: int, options: argparse.Namespace, console: Console) -> Found:
    """Give the curve and the scores of a run."""
    directory = kept_run(make_config(method, rate, seed, options), options.work_dir, f"{method}-seed-{seed}")
    summary = directory.read_summary()
    rows = metrics_of(directory)
    clients = 1 if METHODS[method].pools_data else summary["num_clients"]
    spent = list(accumulate((row["uplink_bytes"] + row["downlink_bytes"]) / clients for row in rows))
    curve = [[0, 0.0, summary["initial_eval_loss"]]]
    curve += [[k + 1, spent[k], row["eval_loss"]] for k, row in enumerate(rows) if row["eval_loss"] is not None]
    console.print(f"{method}, seed {seed}: {curve[0][2]:.4f} → {curve[-1][2]:.4f} in {summary['elapsed_s']:.0f} s")
    folder = directory.path / "model"
    return {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "num_rounds": summary["num_rounds"],
        "curve": curve,
        "scores": scores_of(str(folder), options) if method in SCORED else {},
        "model_sha256": summary["model_sha256"],
        "directory": directory.path.name,
        "commit": commit_of(directory),
    }


def scores_of(model: str, options: argparse.Namespace) -> Found:
    """Score a model on each family apart."""
    skipped = options.smoke or not options.task_examples
    return {} if skipped else family_scores(model, options.task_examples, Path(options.work_dir) / "choices")


def base_scores(options: argparse.Namespace) -> Found:
    return scores_of(model_of(options), options)


# -- time -----------------------------------------------------------------------------------------------------


@cache
def _blocks(method: str, model: str) -> tuple[tuple[Block, ...], FlopModel, Factors | None]:
    """Give what a method trains, the operations of the model, and for FLoRA what is stacked."""
    loaded = load_model(model, dtype="float32", device="cpu", init="pretrained", seed=0)
    flops = FlopModel(loaded.model)
    config = parse_config(
        {
            "model": {"name_or_path": model},
            "data": {"train": ["-"]},
            "federation": {"method": method},
        }
    )
    blocks = trained_blocks(loaded.model, config)
    if METHODS[method].combines != "stack":
        return blocks, flops, None
    return (
        (matrices_block(loaded.model, layers_path=config.blocks.layers_path),),
        flops,
        factors_of(loaded.model, config),
    )


def step_s(kind: str, options: argparse.Namespace) -> float:
    """Give the seconds of a local step on one assumed core, by its operations; for blocks their mean."""
    blocks, flops, _ = _blocks(TUNED_ON[kind], model_of(options))
    if kind == "adapters":  # the matrices themselves need no gradient
        blocks = tuple(replace(block, layers=()) for block in blocks)
    tokens = Tokens.at_most(num_examples=options.batch_size, max_length=options.max_length)
    return round(fmean(flops.step(block, tokens) for block in blocks) / ASSUMED_FLOPS["cpu", "float32"], 4)


def model_of(options: argparse.Namespace) -> str:
    if options.smoke:
        return generated(Path(options.work_dir) / "material", num_clients=2).model
    return t0().model


class Idle:
    """Trains nothing, for as long as training would take."""

    num_examples = 1

    def __init__(self, step_time_s: float, sends: int | None) -> None:
        self.step_time_s, self._sends = step_time_s, sends

    def train(
        self,
        round_index: int,
        block_index: int,
        num_local_steps: int,
        steps_before: int,
        working: tuple[Tensor, ...],
    ) -> Trained:
        del round_index, num_local_steps, steps_before
        own = working[block_index].float() if self._sends is None else torch.zeros(self._sends)
        return Trained(own, 0.0)

    def memory(self) -> dict[str, Tensor]:
        return {}

    def remember(self, memory: dict[str, Tensor]) -> None:
        assert not memory


def round_s(method: str, mbps: float, options: argparse.Namespace) -> float:
    """Let the engine tell how long a round takes over a link, on average over some rounds."""
    config = make_config(method, 1e-3, 0, options)
    sent = METHODS[method].sends
    blocks, _, factors = _blocks(method if sent else "fedavg", model_of(options))
    rounds = 2 * len(blocks) if METHODS[method].asks == "cohort" else 4 * len(blocks)
    plan = replace(server_plan(config, factors=factors), num_rounds=rounds)
    assert config.engine.step_time_s is not None
    clock = VirtualClock()
    run_in_process(
        [torch.zeros(block.num_parameters if sent else 0) for block in blocks],
        [Idle(config.engine.step_time_s, factors and factors.num_elements) for _ in range(plan.num_clients)],
        plan,
        Trace(clock),
        Hooks(lambda *_: None, lambda _: None),
        link=Link(mbps, mbps),
        in_flight="aligned",
    )
    return clock.now() / rounds


# -- tables ---------------------------------------------------------------------------------------------------


def names(runs: list[Found]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs))


def loss_at(curve: list[list[float]], place: float, axis: int) -> float | None:
    """Read a curve off at so many rounds (axis 0) or bytes (axis 1); None beyond its end."""
    for left, right in pairwise(curve):
        if left[axis] <= place <= right[axis] * (1 + 1e-9):
            share = (place - left[axis]) / (right[axis] - left[axis])
            return left[2] + share * (right[2] - left[2])
    return None


def equal_seconds(found: Found, options: argparse.Namespace) -> Found:
    """Give each method's losses when ParaBlock has done half and all of its rounds, for each link."""
    tables: Found = {}
    for mbps in map(str, options.links):
        whole = found["round_s"]["parablock"][mbps] * options.rounds
        tables[mbps] = {
            f"{share * whole:.1f}": {
                method: [
                    loss_at(run["curve"], share * whole / found["round_s"][method][mbps], 0)
                    for run in found["runs"]
                    if run["method"] == method
                ]
                for method in names(found["runs"])
                if METHODS[method].sends
            }
            for share in (0.25, 0.5, 1.0)
        }
    return tables


def equal_bytes(found: Found) -> Found:
    """Give each method's losses when so many bytes have crossed a client's link."""
    methods = [method for method in names(found["runs"]) if METHODS[method].sends]
    runs = [run for run in found["runs"] if run["method"] in methods]
    whole = max(
        run["curve"][-1][1]
        for run in runs
        if METHODS[run["method"]].trains == "adapters" or METHODS[run["method"]].may_lag
    )
    return {
        f"{share * whole / 1e6:.1f}": {
            method: [loss_at(run["curve"], share * whole, 1) for run in runs if run["method"] == method]
            for method in methods
        }
        for share in (0.125, 0.25, 0.5, 1.0)
    }


def final(found: Found, method: str) -> list[float]:
    return [run["curve"][-1][2] for run in found["runs"] if run["method"] == method]


def bars(found: Found) -> list[Bar]:
    if not {"parablock", "fl_bcd"} <= set(names(found["runs"])):
        return []
    ratio = fmean(final(found, "parablock")) / fmean(final(found, "fl_bcd"))
    return [Bar("T0: final loss of ParaBlock / FL-BCD, means", ratio, 1.02)]


def show(console: Console, found: Found, options: argparse.Namespace) -> None:
    made = table(
        "At the end", "method", "rounds", "eval loss", *(f"s a round at {mbps:g}" for mbps in options.links)
    )
    for method in names(found["runs"]):
        runs = [run for run in found["runs"] if run["method"] == method]
        seconds = (f"{value:.2f}" for value in found["round_s"][method].values())
        made.add_row(method, str(runs[0]["num_rounds"]), mean_and_deviation(final(found, method)), *seconds)
    console.print(made)


if __name__ == "__main__":
    main()
