"""What each choice of the method does: one knob at a time, FL-BCD beside ParaBlock.

The problem is that of `rate.py`: logistic regression with a non-convex regulariser, in blocks, on clients whose
data differ, through the functions of the method alone. Printed is the squared norm of the gradient of the clients'
mean loss, averaged over the last quarter of the rounds: small is good. A knob that has no meaning without delay
leaves FL-BCD's column empty.

    .venv/bin/python benchmarks/ablations.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import torch
from _record import make_console, make_parser, mean_and_deviation, record, table
from rate import BLOCKS, CLIENTS, EXAMPLES, SIZE, STEPS, local_steps, make_clients
from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.seeding import generator_for
from parablock.wire.quantize import Encoding, pack

STEP = 0.3


@dataclass(frozen=True)
class Setting:
    """One place of one knob.

    Attributes:
        problem: Fields of `OracleProblem`.
        blocks: B.
        steps: K.
        spread: How much clients differ.
        wire: How updates are rounded on their way up; None: not.
        delays: Those that are run.
    """

    problem: dict[str, Any] = field(default_factory=dict)
    blocks: int = BLOCKS
    steps: int = STEPS
    spread: float = 1.0
    wire: Encoding | None = None
    delays: tuple[int, ...] = (0, 1)


KNOBS: dict[str, dict[str, Setting]] = {
    "delay": {str(delay): Setting(delays=(delay,)) for delay in (0, 1, 2, 4)},
    "in_flight": {rule: Setting({"in_flight": rule}, delays=(1,)) for rule in ("aligned", "own", "none")},
    "local steps": {str(steps): Setting(steps=steps) for steps in (1, 2, 4, 8)},
    "block order": {name: Setting({"schedule": name}) for name in ("cyclic", "reversed", "shuffled", "random")},
    "number of blocks": {str(blocks): Setting(blocks=blocks) for blocks in (2, 5, 10)},
    "participation": {str(part): Setting({"participation": part}) for part in (1.0, 0.5, 0.25)},
    "how much clients differ": {str(spread): Setting(spread=spread) for spread in (0.0, 1.0, 3.0)},
    "server momentum": {
        str(beta): Setting({"server_optimizer": ServerOptimizer("momentum", 1 - beta, beta)})
        for beta in (0.0, 0.5, 0.9)
    },
    "wire": {
        "float32": Setting(),
        "int4": Setting(wire=Encoding("int4", "stochastic")),
        "int2": Setting(wire=Encoding("int2", "stochastic")),
        "int2, error feedback": Setting(wire=Encoding("int2", "stochastic", error_feedback=True)),
    },
}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    found: dict[str, Any] = {}
    with torch.no_grad():
        for knob, settings in KNOBS.items():
            found[knob] = {
                place: {
                    str(d): [squared_gradient(setting, d, seed, options) for seed in options.seeds]
                    for d in setting.delays
                }
                for place, setting in settings.items()
            }
            show(console, knob, found[knob])
    facts = {"step": STEP, "blocks": BLOCKS, "local_steps": STEPS, "clients": CLIENTS, "rounds": options.rounds}
    record(options, found, [], config=facts, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("ablations", "One knob at a time, on a problem without a model.", "--seeds 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--rounds", type=int, default=150, help="T")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds = [0], 12
    return options


def over_seeds(setting: Setting, options: argparse.Namespace) -> dict[str, list[float]]:
    """Run one setting with each of its delays and every seed."""
    return {
        str(delay): [squared_gradient(setting, delay, seed, options) for seed in options.seeds]
        for delay in setting.delays
    }


def squared_gradient(setting: Setting, delay: int, seed: int, options: argparse.Namespace) -> float:
    """Run one setting, and average ‖∇f‖² over the last quarter."""
    clients = make_clients(seed, spread=setting.spread)
    solve = partial(local_steps, clients, STEP, seed, num_steps=setting.steps)
    start = torch.tensor(generator_for(seed, "rate start").normal(size=(BLOCKS * SIZE,))).float()
    facts: dict[str, Any] = {"encode": rounded(setting.wire)} if setting.wire else {}
    problem = OracleProblem([EXAMPLES] * CLIENTS, options.rounds, delay, seed=seed, **setting.problem, **facts)
    trajectory = run_sequential(start.chunk(setting.blocks), problem, solve).trajectory
    return fmean(clients.squared_norm(torch.cat(params)) for params in trajectory[-options.rounds // 4 :])


def rounded(wire: Encoding) -> Callable[[Tensor, int, int, int], Tensor]:
    """Round updates as a client does, with or without carrying over what was kept back."""
    kept: dict[tuple[int, int], Tensor] = {}

    def encode(delta: Tensor, block: int, t: int, client_id: int) -> Tensor:
        wanted = delta + kept.get((client_id, block), 0.0) if wire.error_feedback else delta
        sent = pack(wanted, wire.format, wire.noise(t, client_id)).values.float()
        kept[client_id, block] = wanted - sent
        return sent

    return encode


def show(console: Any, knob: str, places: dict[str, Any]) -> None:
    columns = sorted({delay for values in places.values() for delay in values})
    made = table(f"Squared gradient norm by {knob}", knob, *(f"delay {delay}" for delay in columns))
    for place, values in places.items():
        made.add_row(place, *(mean_and_deviation(values[d]) if d in values else "" for d in columns))
    console.print(made)


if __name__ == "__main__":
    main()
