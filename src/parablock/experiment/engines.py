"""What the parts of a run are made with: sections of the configuration as the arguments of the engine, and it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.stacking import Factors
from parablock.config.keys import RunConfig
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.faults import Fault, Faults
from parablock.engine.inprocess import run_in_process
from parablock.engine.local_steps import local_steps_of
from parablock.engine.server import ServerPlan
from parablock.errors import ConfigError
from parablock.experiment.protections import (
    aggregation_rule,
    fewest_updates,
    grid_of,
    masking_of,
    noise_of_the_server,
    protections,
)
from parablock.methods.base import RunInputs
from parablock.methods.flora import factors_of
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Link


class InProcess:
    """Server and clients in this process, over links that the configuration describes."""

    is_local = True
    held_rounds: frozenset[int] | None = None

    def __init__(self, job: RunInputs) -> None:
        stacks = job.config.federation.traits.combines == "stack"
        self._factors = factors_of(job.loaded.model, job.config) if stacks else None

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse a run that is configured for sites.

        Raises:
            ConfigError: It is.
        """
        if config.engine.name != "inprocess":
            raise ConfigError(
                [
                    f"engine.name: {config.engine.name} has its clients at sites; start it with "
                    "`parablock deploy local`, or leave engine.name out to run in this process"
                ]
            )

    def run(self, given: EngineInput) -> EngineResult:
        """Run all rounds; see `run_in_process`."""
        config = given.config
        return run_in_process(
            given.take_params(),
            given.trainers,
            server_plan(config, given.secret, self._factors, given.folder),
            given.trace,
            given.hooks,
            link=Link(**config.link.model_dump()),
            in_flight=config.federation.in_flight,
            resumed=given.resumed,
            faults=given.faults,
            protection_of=protections(config, given.secret),
            masking=masking_of(config),
        )


def checkpoints_kept(config: RunConfig) -> int:
    """Give how many checkpoints the server keeps.

    A site may be d + 1 rounds behind the server when both die; the run goes on from what all of them keep.
    """
    keep, behind = config.checkpoint.keep, config.federation.delay + 2
    return max(keep, behind) if config.engine.name == "flower" else keep


def clients_of(config: RunConfig) -> int:
    """Return how many clients there are: one where the method pools all data."""
    return 1 if config.federation.traits.pools_data else config.federation.num_clients


def server_plan(
    config: RunConfig, secret: bytes | None = None, factors: Factors | None = None, folder: Path | None = None
) -> ServerPlan:
    """Give what the server follows.

    Args:
        config: The run.
        secret: The key of its noise, where it adds some.
        factors: What adapters mean that it stacks, where it does.
        folder: The run directory, where there is one.
    """
    federation = config.federation
    return ServerPlan(
        num_clients=clients_of(config),
        num_rounds=federation.num_rounds,
        delay=federation.delay,
        schedule=config.blocks.schedule,
        participation=federation.participation,
        seed=config.seed,
        encoding=encoding_of(config),
        local_steps=local_steps_of(config),
        stall_timeout_s=federation.stall_timeout_s,
        checkpoint_every=config.checkpoint.every_rounds,
        server_optimizer=ServerOptimizer(**federation.server_optimizer.model_dump()),
        aggregation_s=None if config.engine.step_time_s is None else 0.0,
        rule=aggregation_rule(config),
        normals=noise_of_the_server(config, secret),
        in_turn=federation.traits.asks == "one_in_turn",
        min_updates=fewest_updates(config),
        grid=grid_of(config),
        factors=factors,
        deadline_factor=federation.deadline_factor,
        folder=folder,
    )


def faults_of(config: RunConfig, happened: Sequence[int] = ()) -> Faults:
    """Give what is to go wrong, without what had `happened` before an interruption."""
    faults = (Fault(fault.client, fault.round, fault.at, fault.kind, fault.value) for fault in config.faults)
    return Faults(faults, happened=happened)


def encoding_of(config: RunConfig) -> Encoding:
    """Give how updates and new values become bytes; a stack is known when all of it is, and goes whole."""
    wire = config.wire
    chunk_bytes = wire.chunk_bytes if wire.streaming and config.federation.traits.combines != "stack" else None
    return Encoding(wire.format, wire.rounding, wire.error_feedback, config.seed, chunk_bytes)
