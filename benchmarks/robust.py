"""What hostile clients do to each aggregation rule: held-out loss with one fifth of them attacking, on real text.

T0, mixed and dealt evenly to ten clients, of which two attack in every round: they send their update with its
sign turned, or ten times too long as well. The loss of each rule stands beside that of the plain mean when
nobody attacks, and of the plain mean under the same attack.

What has been run is not run again as long as its settings are the same; remove the work folder to begin anew.

    .venv/bin/python benchmarks/robust.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _record import Bar, generated, make_console, make_parser, record, t0, table
from rich.console import Console
from torch import Tensor

from parablock.algorithm.robust import Rule
from parablock.clock import VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.engine.contract import Hooks
from parablock.engine.inprocess import run_in_process
from parablock.evaluation.scoring import evaluate_loss
from parablock.experiment.engines import server_plan
from parablock.experiment.inputs import read_inputs
from parablock.model.params import Replica
from parablock.trace import Trace
from parablock.training.trainer import LocalTrainer, Trained, Trainer, local_arguments
from parablock.wire.transport import Link

ATTACKS = {"none": 1.0, "sign flip": -1.0, "flip and scale": -10.0}
"""What an attacker multiplies its update by."""
Found = dict[str, Any]


@dataclass
class Attacker:
    """A client that trains as all do and sends a multiple of what it found.

    Args:
        honest: Its local training.
        factor: What it multiplies its update by.
    """

    honest: Trainer
    factor: float

    def __post_init__(self) -> None:
        self.num_examples, self.step_time_s = self.honest.num_examples, self.honest.step_time_s

    def train(
        self,
        round_index: int,
        block_index: int,
        num_local_steps: int,
        steps_before: int,
        working: tuple[Tensor, ...],
    ) -> Trained:
        found = self.honest.train(round_index, block_index, num_local_steps, steps_before, working)
        v = working[block_index].float()
        return replace(found, trained=v + self.factor * (found.trained[:].float() - v))

    def memory(self) -> dict[str, Tensor]:
        return self.honest.memory()

    def remember(self, memory: dict[str, Tensor]) -> None:
        self.honest.remember(memory)


def main() -> None:
    options = parse_options()
    console = make_console()
    rules = {
        "mean": Rule(),
        "mean, clipped": Rule(clip_norm=options.clip_norm),
        "median": Rule("median"),
        "trimmed mean": Rule("trimmed_mean", trim_fraction=options.trim_fraction),
        "krum": Rule("krum", assumed_attackers=options.attackers),
    }
    found = []
    for attack in options.attacks:
        for name in options.rules if attack != "none" else ["mean"]:
            found.append(outcome(attack, name, rules[name], options, console))
    show(console, found)
    record(options, found, bars(found), config=make_config(options).model_dump(mode="json"), console=console)


def parse_options() -> argparse.Namespace:
    parser = make_parser("robust", "Final loss under attack, by aggregation rule.", "--rules mean median")
    parser.add_argument("--rules", nargs="+", default=["mean", "mean, clipped", "median", "trimmed mean", "krum"])
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="what attackers do")
    parser.add_argument("--clients", type=int, default=10, help="clients of a run")
    parser.add_argument("--attackers", type=int, default=2, help="of them attack")
    parser.add_argument("--trim-fraction", type=float, default=0.2, help="of the trimmed mean")
    parser.add_argument("--clip-norm", type=float, default=2.0, help="of the clipped mean")
    parser.add_argument("--rounds", type=int, default=16, help="rounds of a run; at least 8, one for each block")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a round, K")
    parser.add_argument("--max-examples", type=int, default=256, help="held-out examples that the loss is of")
    parser.add_argument("--seed", type=int, default=0, help="seed")
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.attackers, options.rounds, options.steps, options.max_examples = 5, 1, 8, 1, 16
        options.attacks, options.rules = ["none", "flip and scale"], ["mean", "median"]
    return options


def make_config(options: argparse.Namespace) -> RunConfig:
    if options.smoke:
        material = generated(Path(options.work_dir) / "material", num_clients=options.clients)
    else:
        material = t0()
    return parse_config(
        {
            "model": {"name_or_path": material.model},
            "data": {"train": material.train, "test": material.test, "max_length": 128},
            "federation": {"num_clients": options.clients, "num_rounds": options.rounds},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
            },
            "engine": {"clock": "virtual", "num_threads": 1},
            "evaluation": {"max_examples": options.max_examples},
            "checkpoint": {"every_rounds": 0},
            "seed": options.seed,
        }
    )


def outcome(attack: str, name: str, rule: Rule, options: argparse.Namespace, console: Console) -> Found:
    """Give what a run ended with: the one that is there, or one that is run now."""
    config = make_config(options)
    facts = {"attack": attack, "factor": ATTACKS[attack], "rule": name, **asdict(rule)}
    key = json.dumps([facts, options.attackers, config.model_dump(mode="json")])
    place = Path(options.work_dir) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not place.exists():
        losses = run_attacked(config, rule, ATTACKS[attack], options.attackers)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(facts | losses), encoding="utf-8")
    found: Found = json.loads(place.read_text(encoding="utf-8"))
    console.print(f"{attack}, {name}: {found['initial_eval_loss']:.4f} → {found['final_eval_loss']:.4f}")
    return found


def run_attacked(config: RunConfig, rule: Rule, factor: float, num_attackers: int) -> Found:
    """Run with the last clients attacking."""
    job = read_inputs(config)
    config = job.config
    replica = Replica(job.loaded.model, job.blocks)
    params = tuple(replica.read(block.index) for block in job.blocks)
    pad = job.loaded.tokenizer.pad_token_id
    trainers: list[Trainer] = []
    for client_id, examples in enumerate(job.train):
        honest = LocalTrainer(
            client_id,
            examples,
            replica,
            train=config.train,
            arguments=local_arguments(config),
            num_rounds=config.federation.num_rounds,
            seed=config.seed,
            pad_token_id=pad,
            step_time_s=None,
        )
        attacks = client_id >= config.federation.num_clients - num_attackers
        trainers.append(Attacker(honest, factor) if attacks else honest)

    def loss() -> float:
        return evaluate_loss(replica.model, job.test, pad_token_id=pad, batch_size=16)

    before, rhos = loss(), []
    result = run_in_process(
        params,
        trainers,
        replace(server_plan(config), rule=rule),
        Trace(VirtualClock()),
        Hooks(lambda state, *_: rhos.append(state.rho[state.history[state.committed]]), lambda _: None),
        link=Link(),
        in_flight=config.federation.in_flight,
    )
    replica.load_all(result.server.params)
    return {"initial_eval_loss": before, "final_eval_loss": loss(), "mean_rho": sum(rhos) / len(rhos)}


def clean_loss(found: list[Found]) -> float:
    return next(row["final_eval_loss"] for row in found if (row["attack"], row["rule"]) == ("none", "mean"))


def bars(found: list[Found]) -> list[Bar]:
    return [
        Bar(f"{row['attack']}, {row['rule']}: loss / clean loss", row["final_eval_loss"] / clean_loss(found), 1.05)
        for row in found
        if row["attack"] != "none" and row["rule"] in ("median", "trimmed mean")
    ]


def show(console: Console, found: list[Found]) -> None:
    made = table("Held-out loss under attack", "attack", "rule", "base", "final", "/ clean", "mean ρ")
    for row in found:
        final = row["final_eval_loss"]
        values = (row["initial_eval_loss"], final, final / clean_loss(found), row["mean_rho"])
        made.add_row(row["attack"], row["rule"], *(f"{value:.4f}" for value in values))
    console.print(made)


if __name__ == "__main__":
    main()
