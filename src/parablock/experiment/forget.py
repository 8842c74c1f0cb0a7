"""Forget a client: replay a run without it, from the last checkpoint before it took part.

The client stays configured and is excluded (`federation.excluded_clients`), so that the other clients keep their
rows, their numbers and their random draws: the result is bitwise that of a run that excluded it from the beginning.
The run directory that held its updates stays as it is, and has to be removed by whoever owns it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parablock.algorithm.schedule import cohort
from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.errors import ConfigError
from parablock.experiment.engines import check_in_process
from parablock.experiment.progress import Progress
from parablock.experiment.protections import adds_noise
from parablock.experiment.recorder import Summary
from parablock.experiment.run import resume, run
from parablock.storage.checkpoint import checkpoints_of
from parablock.storage.run_directory import Row, RunDirectory


@dataclass(frozen=True)
class Replay:
    """What it takes to forget a client.

    Attributes:
        config: The run without the client.
        first_round: The first round that asked the client; None: none ever did.
        begins_at: The round that the replay begins at; 0: it begins anew.
        num_rounds: Rounds to replay.
        seconds: What these rounds took in the run, on its clock.
        total_bytes: What they moved.
        releases_again: Whether noisy updates of the other clients are released a second time.
    """

    config: RunConfig
    first_round: int | None
    begins_at: int
    num_rounds: int
    seconds: float
    total_bytes: int
    releases_again: bool


def replay_without(output_dir: Path | str, client_id: int) -> Replay:
    """Return what forgetting a client of a run in one process would cost.

    Raises:
        CheckpointError: There is no such run.
        ConfigError: The run, or its method, cannot be replayed without a client; or there is no such client.
    """
    directory = RunDirectory(output_dir)
    directory.check_holds_run()
    directory.check_idle()
    before = load_config(directory.config)
    check_in_process(before)
    if not 0 <= client_id < before.federation.num_clients:
        raise ConfigError(
            [f"--client {client_id}: the run has clients 0 to {before.federation.num_clients - 1}"],
            source="the command line",
        )
    tree = before.model_dump(mode="json")
    tree["federation"]["excluded_clients"] = sorted({*before.federation.excluded_clients, client_id})
    config = parse_config(tree, source=f"the run without client {client_id}")
    rows = [json.loads(line) for line in directory.metrics.read_text(encoding="utf-8").splitlines()]
    first_round = _first_round(before, client_id, rows)
    usable = [t for t in checkpoints_of(directory.checkpoints) if first_round is None or t <= first_round]
    begins_at = 0 if adds_noise(config) else max(usable, default=0)  # what was released stays with its run and key
    replayed = rows[begins_at:]
    return Replay(
        config,
        first_round,
        begins_at,
        config.federation.num_rounds - begins_at,
        sum(row["round_s"] for row in replayed),
        sum(row["uplink_bytes"] + row["downlink_bytes"] for row in replayed),
        adds_noise(config),
    )


def forget(
    output_dir: Path | str,
    client_id: int,
    new_dir: Path | str,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Replay a run without a client, in a folder of its own; see `run`.

    Noise is drawn from a new key: under the old one, two updates of a client would differ by no noise at all.

    Raises:
        InputError: As `replay_without`, or the new folder is in use.
        ParaBlockError: The replay failed.
    """
    replay = replay_without(output_dir, client_id)
    options: dict[str, Any] = {"progress": progress, "asked_to_stop": asked_to_stop}
    if not replay.begins_at:
        return run(replay.config, new_dir, **options)
    old, new = RunDirectory(output_dir), RunDirectory(new_dir)
    new.create(replay.config.to_yaml(), old.read_manifest())
    name = f"round-{replay.begins_at:06d}"
    shutil.copytree(old.checkpoints / name, new.checkpoints / name)
    rows = old.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    new.metrics.write_text("".join(rows[: replay.begins_at]), encoding="utf-8")
    return resume(new.path, **options)


def _first_round(config: RunConfig, client_id: int, rows: Sequence[Row]) -> int | None:
    """Return the first round that asked a client: it was drawn, or stood in for another one.

    Where clients may be lost, who stood in for whom is not recorded, and the first round counts as the one.
    """
    federation = config.federation
    if config.faults or federation.deadline_factor is not None:
        return 0
    for t in range(federation.num_rounds):
        drawn = cohort(
            t, num_clients=federation.num_clients, participation=federation.participation, seed=config.seed
        )
        if client_id in drawn or (t < len(rows) and client_id in rows[t]["participants"]):
            return t
    return None
