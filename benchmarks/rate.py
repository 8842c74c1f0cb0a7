"""How fast the gradient vanishes: ParaBlock against FL-BCD, and what its correction is worth.

The problem is logistic regression with a non-convex regulariser, on clients whose data differ, cut into blocks;
it runs through the functions of the method alone, in one thread. For each number of rounds T the step is ∝ 1/√T,
and the squared norm of the gradient of the clients' mean loss is averaged over the rounds. Against T, both on
logarithmic scales, that is close to a line, whose slope theory bounds by −1/2.

`naive` leaves updates in flight out of the working parameters (`in_flight: none`); `correction off` never takes
the aggregate for a client's own copy.

    .venv/bin/python benchmarks/rate.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any

import torch
from _record import Bar, make_console, make_parser, record, table
from torch import Tensor

from parablock.algorithm.sequential import OracleProblem, Solve, run_sequential
from parablock.seeding import generator_for

BLOCKS, SIZE, CLIENTS, EXAMPLES, BATCH, STEPS = 5, 8, 6, 60, 12, 2
REGULARISATION = 0.1
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Of the 95% interval, by the number of seeds."""
VARIANTS = {
    "FL-BCD": {"delay": 0},
    "ParaBlock": {"delay": 1},
    "naive": {"delay": 1, "in_flight": "none"},
    "correction off": {"delay": 1},
}


@dataclass(frozen=True)
class Clients:
    """The data of all clients: features (M × n × D) and labels ±1 (M × n)."""

    features: Tensor
    labels: Tensor

    def gradient(self, client_id: int, x: Tensor, rows: Tensor) -> Tensor:
        """∇f_i on some rows: log(1 + exp(−y a·x)) + λ Σ x² / (1 + x²)."""
        a, y = self.features[client_id, rows], self.labels[client_id, rows]
        weights = -y * torch.sigmoid(-y * (a @ x)) / len(y)
        return a.T @ weights + 2 * REGULARISATION * x / (1 + x.square()).square()

    def squared_norm(self, x: Tensor) -> float:
        """‖∇f‖² of the mean over the clients, on all rows."""
        a, y = self.features.flatten(0, 1), self.labels.flatten()
        gradient = a.T @ (-y * torch.sigmoid(-y * (a @ x)) / len(y))
        gradient = gradient + 2 * REGULARISATION * x / (1 + x.square()).square()
        return float(gradient.square().sum())


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    found = {}
    with torch.no_grad():
        for name in VARIANTS:
            means = [[mean_squared_gradient(name, T, seed) for T in options.rounds] for seed in options.seeds]
            slopes = [slope(options.rounds, row) for row in means]
            found[name] = {"squared_gradient": means, "slopes": slopes} | interval(slopes)
    show(console, options, found)
    record(options, found, bars(found), config={"variants": VARIANTS, "problem": problem_facts()}, console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("rate", "Slope of the mean squared gradient norm against T.", "--seeds 0 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="2 to 6, 8 or 10 of them")
    parser.add_argument("--rounds", type=int, nargs="+", default=[80, 160, 320, 640], help="T")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.rounds = [0, 1], [10, 20, 40]
    return options


def make_clients(seed: int, *, spread: float = 1.0) -> Clients:
    """Draw the data: each client's centre and rule for its labels are its own, `spread` from the common ones."""
    draw = generator_for(seed, "rate data")
    common, own = draw.normal(size=BLOCKS * SIZE), draw.normal(size=(CLIENTS, BLOCKS * SIZE))
    centres = draw.normal(size=(CLIENTS, 1, BLOCKS * SIZE))
    mixing = draw.normal(size=(BLOCKS * SIZE, BLOCKS * SIZE)) / sqrt(BLOCKS * SIZE)  # blocks act on each other
    features = (draw.normal(size=(CLIENTS, EXAMPLES, BLOCKS * SIZE)) + 0.5 * spread * centres) @ mixing
    scores = (features * (common + spread * own)[:, None]).sum(axis=2) + draw.normal(size=(CLIENTS, EXAMPLES))
    return Clients(torch.tensor(features).float(), torch.tensor(scores).sign().float())


def mean_squared_gradient(name: str, num_rounds: int, seed: int) -> float:
    """Run one variant for T rounds and average ‖∇f(x_t)‖² over them."""
    clients = make_clients(seed)
    solve: Solve = partial(local_steps, clients, 4.0 / sqrt(num_rounds), seed)
    start = torch.tensor(generator_for(seed, "rate start").normal(size=(BLOCKS, SIZE))).float()
    if name == "correction off":
        solve = never_corrected(solve, list(start))
    problem = OracleProblem([EXAMPLES] * CLIENTS, num_rounds, **VARIANTS[name], seed=seed)
    trajectory = run_sequential(list(start), problem, solve).trajectory
    return statistics.fmean(clients.squared_norm(torch.cat(params)) for params in trajectory)


def local_steps(
    clients: Clients,
    step: float,
    seed: int,
    client_id: int,
    t: int,
    block: int,
    working: tuple[Tensor, ...],
    *,
    num_steps: int = STEPS,
) -> Tensor:
    """K stochastic gradient steps on one block; all blocks have one size."""
    size = working[block].numel()
    x, part = torch.cat(working), slice(block * size, (block + 1) * size)
    draw = generator_for(seed, "rate batches", t, client_id)
    for rows in torch.from_numpy(draw.integers(EXAMPLES, size=(num_steps, BATCH))):
        x[part] -= step * clients.gradient(client_id, x, rows)[part]
    return x[part].clone()


def never_corrected(solve: Solve, start: list[Tensor]) -> Solve:
    """Let every client train on from its own copies for ever."""
    kept = [list(start) for _ in range(CLIENTS)]

    def uncorrected(client_id: int, t: int, block: int, working: tuple[Tensor, ...]) -> Tensor:
        own = kept[client_id]
        trained = solve(client_id, t, block, tuple(own))
        delta, own[block] = trained - own[block], trained
        return working[block] + delta

    return uncorrected


def slope(rounds: list[int], values: list[float]) -> float:
    """Fit log value = a + slope · log T."""
    x = torch.tensor(rounds).double().log()
    y = torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def interval(slopes: list[float]) -> dict[str, float]:
    """Give the mean and half of its 95% confidence interval over the seeds."""
    half = (
        STUDENT_T[len(slopes)] * statistics.stdev(slopes) / sqrt(len(slopes)) if len(slopes) in STUDENT_T else 0.0
    )
    return {"slope": statistics.fmean(slopes), "half_interval": half}


def bars(found: dict[str, Any]) -> list[Bar]:
    serial, overlapped = found["FL-BCD"]["slope"], found["ParaBlock"]["slope"]
    return [
        Bar("slope of FL-BCD", serial, -0.45),
        Bar("slope of ParaBlock", overlapped, -0.45),
        Bar("|slope of ParaBlock − slope of FL-BCD|", abs(overlapped - serial), 0.05),
    ]


def problem_facts() -> dict[str, float]:
    return {
        "blocks": BLOCKS,
        "block_size": SIZE,
        "clients": CLIENTS,
        "examples": EXAMPLES,
        "batch": BATCH,
        "local_steps": STEPS,
        "regularisation": REGULARISATION,
    }


def show(console: Any, options: argparse.Namespace, found: dict[str, Any]) -> None:
    columns: list[Callable[[dict[str, Any]], str]] = [
        lambda row: f"{row['slope']:.3f} ± {row['half_interval']:.3f}",
        lambda row: f"{statistics.fmean(values[-1] for values in row['squared_gradient']):.4g}",
    ]
    made = table("Mean squared gradient norm", "variant", "slope, 95%", f"at T = {options.rounds[-1]}")
    for name, row in found.items():
        made.add_row(name, *(column(row) for column in columns))
    console.print(made)


if __name__ == "__main__":
    main()
