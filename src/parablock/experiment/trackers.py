"""Experiment trackers, TensorBoard and Weights & Biases: the numbers of `metrics.jsonl` under the same names.

The step is the number of finished rounds; step 0 holds the base model's eval loss.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parablock.errors import ConfigError
from parablock.storage.run_directory import Row


class TensorBoardTracker:
    """Event files for TensorBoard: `tensorboard --logdir DIR/tensorboard`.

    Args:
        directory: The run directory.
        first_step: The first step of this session; later steps of earlier sessions are dropped.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event for each figure to disk, at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """An offline run of Weights & Biases; `wandb sync DIR/wandb/offline-run-*` uploads it.

    Args:
        directory: The run directory.
        config: The configuration as plain values.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise it calls home even offline
        import wandb

        earlier = sorted((directory / "wandb").glob("offline-run-*"))
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        self._run = wandb.init(
            mode="offline",
            dir=str(directory),
            project="parablock",
            name=directory.resolve().name,
            id=earlier[-1].name.rsplit("-", 1)[-1] if earlier else None,
            config=dict(config),
            settings=quiet,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures of one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Any number of trackers as one."""

    def __init__(self, trackers: Sequence[TensorBoardTracker | WandbTracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the figures with each tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close each tracker."""
        for tracker in self._trackers:
            tracker.close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise a ConfigError for the trackers (of `report_to`) whose package, of the same name, is not installed."""
    install = "report_to: the package {0} is not installed; run: pip install 'parablock[{0}]'"
    problems = [install.format(name) for name in names if not _is_installed(name)]
    if problems:
        raise ConfigError(problems)


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def open_trackers(names: Sequence[str], directory: Path, *, first_step: int, config: Mapping[str, Any]) -> Trackers:
    """Open the trackers of `report_to`, each with a folder of its own in the run directory."""
    trackers: list[TensorBoardTracker | WandbTracker] = []
    if "tensorboard" in names:
        trackers.append(TensorBoardTracker(directory, first_step))
    if "wandb" in names:
        trackers.append(WandbTracker(directory, config))
    return Trackers(trackers)


def figures_of(row: Row) -> dict[str, float]:
    """Return the numbers of a round, with the number of participants in place of their list."""
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "round_index"}
    return {**numbers, "participants": len(row["participants"])}
