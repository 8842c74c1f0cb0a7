"""What each choice does to a model: one setting at a time, in the tables that `parablock report` makes of runs.

A small random Llama is trained on generated word problems, which are dealt to eight clients by topic with a
Dirichlet distribution. The clock is virtual and the link so slow that an exchange takes as long as the computation
of a round, so losses, bytes and seconds are the same in every run. All runs lie in one folder, and a folder for
each setting points at those that differ in it:

    parablock report runs/model_ablations/delay

A run that is complete is not run again, as long as its configuration is the same.

    .venv/bin/python benchmarks/model_ablations.py
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _record import kept_run, make_console, make_parser, record, table
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import overridden, parse_config
from parablock.demo.material import TEST_FILE_NAME, make_tiny_llama, make_word_problems
from parablock.model.blocks import partition_blocks
from parablock.model.load import outline_model
from parablock.report.reading import read_runs
from parablock.report.tables import Table, ablation_table

LAYERS, STEP_S = 4, 0.25
Overrides = tuple[str, ...]

MOMENTUM = "federation.server_optimizer"
SETTINGS: dict[str, tuple[Overrides, ...]] = {
    "delay": tuple((f"federation.delay={delay}",) for delay in (0, 1, 2, 4)),
    "in_flight": tuple((f"federation.in_flight={rule}",) for rule in ("aligned", "own", "none")),
    "local_steps": tuple((f"train.num_local_steps={steps}",) for steps in (1, 2, 4)),
    "block_order": tuple((f"blocks.schedule={name}",) for name in ("cyclic", "reversed", "shuffled", "random")),
    "layers_per_block": tuple((f"blocks.layers_per_block={layers}",) for layers in (1, 2, 4)),
    "participation": tuple((f"federation.participation={part}",) for part in (1.0, 0.5, 0.25)),
    "dirichlet": tuple((f"data.partition.alpha={alpha}",) for alpha in (100.0, 1.0, 0.1)),
    "server_momentum": (
        (),
        (f"{MOMENTUM}={{name: momentum, learning_rate: 0.5, momentum: 0.5}}",),
        (f"{MOMENTUM}={{name: momentum, learning_rate: 0.1, momentum: 0.9}}",),
    ),
    "error_feedback": (
        (),
        ("wire.format=int4",),
        ("wire.format=int4", "wire.error_feedback=true"),
        ("wire.format=int2",),
        ("wire.format=int2", "wire.error_feedback=true"),
    ),
}
"""What is run for each setting; what is not named is as in `base_config`."""


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = make_console()
    found: dict[str, Any] = {}
    for setting in options.only or SETTINGS:
        folder = Path(options.work_dir) / setting
        made = run_setting(setting, folder, options, console)
        found[setting] = {"header": made.header, "rows": made.rows, "command": f"parablock report {folder}"}
        show(console, setting, made)
        base = base_config(options.seeds[0], options).model_dump(mode="json")
        record(options, found, [], config=base, console=console)  # after each, in case the rest is not reached


def parse_options() -> argparse.Namespace:
    parser = make_parser("model_ablations", "One setting at a time, on a small model.", "--only delay --seeds 0")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="which settings; all when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--rounds", type=int, default=32, help="rounds of a run; at least 4, one for each block")
    parser.add_argument("--clients", type=int, default=8, help="clients")
    parser.add_argument("--steps", type=int, default=2, help="local steps of a round, K")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW")
    options = parser.parse_args()
    if options.smoke:
        options.only, options.seeds, options.rounds, options.clients = ["delay"], [0, 1], 6, 2
        options.steps = 1
    return options


@cache
def material(folder: Path, clients: int) -> tuple[str, list[str], str, float]:
    """Make the model and the problems; give them with the speed of a link that takes as long as a local step."""
    files = make_word_problems(folder / "problems", num_clients=clients, examples_per_client=120, seed=0)
    texts = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    model = str(make_tiny_llama(folder / "model", texts, seed=0, num_layers=LAYERS))
    blocks = partition_blocks(outline_model(model, dtype="float32"), layers_per_block=1)
    megabits = 2 * (4 * blocks[0].num_parameters + 600) * 8e-6  # both ways together
    return model, [str(path) for path in files], str(folder / "problems" / TEST_FILE_NAME), megabits / STEP_S


def base_config(seed: int, options: argparse.Namespace) -> RunConfig:
    model, train, test, mbps = material(Path(options.work_dir) / "material", options.clients)
    return parse_config(
        {
            "model": {"name_or_path": model},
            "data": {
                "train": train,
                "test": [test],
                "max_length": 160,
                "partition": {"scheme": "dirichlet", "alpha": 1.0, "field": "template"},
            },
            "federation": {"num_clients": options.clients, "num_rounds": options.rounds, "delay": 1},
            "train": {
                "num_local_steps": options.steps,
                "per_device_train_batch_size": 4,
                "learning_rate": options.learning_rate,
                "lr_scheduler_type": "cosine",
            },
            "link": {"upload_mbps": mbps / options.steps, "download_mbps": mbps / options.steps},
            "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": STEP_S},
            "evaluation": {"every_rounds": 0, "max_examples": 120},
            "checkpoint": {"every_rounds": 0},
            "seed": seed,
        }
    )


def run_setting(setting: str, folder: Path, options: argparse.Namespace, console: Console) -> Table:
    """Run each place of a setting with each seed, point at the runs from its folder, and make the table."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for overrides in SETTINGS[setting]:
        for seed in options.seeds:
            config = changed(base_config(seed, options), overrides)
            run = kept_run(config, str(Path(options.work_dir) / "all"), f"seed-{seed}").path
            pointer = folder / f"{len(runs):02d}"
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(run.resolve())
            runs.append(pointer)
    console.print(f"{setting}: {len(runs)} runs")
    return ablation_table(read_runs(runs))


def changed(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Change what a setting names; the method follows the delay."""
    tree = config.model_dump(mode="json")
    del tree["federation"]["method"]
    return parse_config(overridden(tree, overrides))


def show(console: Console, setting: str, made: Table) -> None:
    shown = table(setting, *made.header)
    for row in made.rows:
        shown.add_row(*row)
    console.print(shown)


if __name__ == "__main__":
    main()
