"""Several methods on the same data, seed and link: one run directory each, one table, one page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parablock.checkpoint import storage, write_atomically
from parablock.config import RunConfig, parse_config
from parablock.conflicts import BLOCK_METHODS, LORA_METHODS
from parablock.errors import ConfigError, ParaBlockError
from parablock.experiment import Summary, run
from parablock.report.progress import Progress
from parablock.report.records import RunDirectory
from parablock.report.write import write_report


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    Attributes:
        name: Its folder.
        config: Its whole configuration.
    """

    name: str
    config: RunConfig


def plan_comparison(config: RunConfig, methods: Sequence[str], seeds: str = "") -> list[PlannedRun]:
    """Make the configuration of every method and seed, before any of them runs.

    A method brings its delay; `parablock` keeps the configuration's, or has 1 where that is 0. What the
    configuration says of blocks holds for the methods that train blocks.

    Args:
        config: What all have in common.
        methods: Their names.
        seeds: Comma-separated; empty: the configuration's seed.

    Raises:
        ConfigError: An unknown method, one that is not built, the same one twice, or a seed that is no number.
    """
    names = [method.strip() for method in methods if method.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError([f"{', '.join(names) or 'nothing'}: give each method once"], source="--methods")
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds.strip() else [config.seed]
    except ValueError:
        raise ConfigError([f"{seeds!r}: give whole numbers such as 0,1,2"], source="--seeds") from None
    planned = []
    for seed in numbers:
        for method in names:
            tree = config.model_dump(mode="json")
            delay = max(1, config.federation.delay) if method == "parablock" else 0
            tree["federation"] |= {"method": method, "delay": delay}
            if method not in BLOCK_METHODS:
                tree["blocks"] = {"layers_path": config.blocks.layers_path}
            if method not in LORA_METHODS:
                del tree["lora"]
            if method != "fedprox":
                del tree["federation"]["proximal_mu"]
            name = f"{method}-seed{seed}" if len(numbers) > 1 else method
            planned.append(PlannedRun(name, parse_config(tree | {"seed": seed}, source=f"method {method}")))
    return planned


def compare_methods(
    runs: Sequence[PlannedRun],
    output_dir: Path,
    *,
    progress: Progress,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[Summary]:
    """Run one after the other, and write `compare.json`, `compare.md` and a report page.

    Raises:
        StorageError: The folder holds something already, or cannot be written.
        ParaBlockError: A run failed, or was stopped; the finished ones stay.
    """
    directories = [RunDirectory(output_dir / planned.name) for planned in runs]
    for directory in (RunDirectory(output_dir), *directories):  # a run's own folder has a report already
        directory.check_unused()
    with storage(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    summaries: list[Summary] = []
    for planned, directory in zip(runs, directories, strict=True):
        progress.message(f"── {planned.name} ──")
        summary = run(planned.config, directory.path, progress=progress, asked_to_stop=asked_to_stop)
        if summary["status"] != "completed":
            raise ParaBlockError(
                f"the comparison stopped in {planned.name}; {len(summaries)} of {len(runs)} runs are complete",
                remedy=f"Finish that run with: parablock resume {directory.path}",
            )
        summaries.append({"name": planned.name, **summary})
    write_atomically(output_dir / "compare.json", json.dumps(summaries, indent=2) + "\n")
    write_atomically(output_dir / "compare.md", comparison_table(summaries) + "\n")
    write_report([output_dir])
    return summaries


def comparison_table(summaries: Sequence[Summary]) -> str:
    """Write the comparison as a Markdown table; the base model's loss comes first."""
    lines = [
        "| run | final eval loss | seconds | one after the other | hidden | MB up | MB down |",
        "|---|---|---|---|---|---|---|",
        f"| base model | {summaries[0]['initial_eval_loss']:.4f} | | | | | |",
    ]
    for summary in summaries:
        lines.append(
            f"| {summary['name']} | {summary['final_eval_loss']:.4f} | {summary['wall_time_s']:.1f} "
            f"| {summary['sequential_s']:.1f} | {summary['overlap_fraction']:.0%} "
            f"| {summary['uplink_bytes'] / 1e6:.1f} | {summary['downlink_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)
