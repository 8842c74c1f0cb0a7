"""Turn a configuration into an engine and its input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parablock.algorithm.aggregate import Kinds, ServerOptimizer
from parablock.config.keys import RunConfig
from parablock.engine.contract import EngineInput
from parablock.engine.faults import Fault, Faults
from parablock.engine.inprocess import run_in_process
from parablock.engine.local_steps import local_steps_of
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.engine.update_form import Differences, FixedPointWords, SparseDifferences, UpdateForm
from parablock.errors import ConfigError
from parablock.experiment.protections import (
    adds_noise,
    aggregation_rule,
    fewest_updates,
    grid_of,
    masking_of,
    noise_of_the_server,
    protections,
    releases_of,
)
from parablock.methods.base import MethodModel
from parablock.storage.audit_log import FILE_NAME, AuditLog
from parablock.storage.checkpoint import RunState
from parablock.trace import Trace
from parablock.wire.quantize import SPARSE, Encoding, payload_format
from parablock.wire.transport import Link


class InProcess:
    """Server and clients in this process, over links that the configuration describes."""

    is_local = True

    run = staticmethod(run_in_process)


def check_in_process(config: RunConfig) -> None:
    """Raise a ConfigError if the run is configured for sites."""
    if config.engine.name != "inprocess":
        problem = (
            f"engine.name: {config.engine.name} has its clients at sites; start it with "
            "`parablock deploy local`, or leave engine.name out to run in this process"
        )
        raise ConfigError([problem])


def engine_input(
    config: RunConfig,
    model: MethodModel,
    trace: Trace,
    hooks: Hooks,
    *,
    secret: bytes | None = None,
    resumed: RunState | None = None,
    faults: Faults,
    folder: Path | None = None,
    log: AuditLog | None = None,
) -> EngineInput:
    """Return the input of an engine; see `EngineInput`.

    Args:
        config: The run.
        model: The model as the method trains it, with the clients that train in this process.
        trace: Records the run.
        hooks: The callbacks of the recorder.
        secret: The key of the noise; None without noise.
        resumed: The checkpoint to go on from; None: at the beginning.
        faults: The faults to inject.
        folder: The run directory; None without one.
        log: The log of what server and clients release; None: nothing outlives the run.
    """
    form = form_of(model, config, secret)
    return EngineInput(
        server=server_plan(config, form, folder),
        client=client_plan(config, form, secret),
        take_params=model.take_params,
        trainers=model.trainers,
        trace=trace,
        hooks=hooks,
        link=Link(**config.link.model_dump()),
        resumed=resumed,
        faults=faults,
        masking=masking_of(config),
        releases=releases_of(config, log),
        releases_of=lambda client_id: releases_of(config, log, f"client-{client_id}") if log else None,
        excluded=frozenset(config.federation.excluded_clients),
    )


def release_log(config: RunConfig, folder: Path | None) -> AuditLog | None:
    """Return the log of what server and clients of this process release; None where nothing is hidden."""
    if folder is None or not (adds_noise(config) or masking_of(config)):
        return None
    return AuditLog((folder if config.engine.name == "inprocess" else folder / "deployment") / FILE_NAME)


def account_of(config: RunConfig) -> str:
    """Return what an account of ε counts; see `ServerPlan`."""
    if not adds_noise(config) or config.privacy.mode == "distributed":  # a line for each sum is there
        return ""
    return "updates" if config.privacy.mode == "local" else "means"


def update_form(config: RunConfig, secret: bytes | None = None, kinds: Kinds | None = None) -> UpdateForm:
    """Return the configured form of updates, for a method without a form of its own.

    Args:
        config: The run.
        secret: The key of the noise; None without noise.
        kinds: The kinds of parameters that have a ρ of their own, as the method's model says.
    """
    rule, noise, grid = aggregation_rule(config), noise_of_the_server(config, secret), grid_of(config)
    if grid is not None:
        return FixedPointWords(grid, rule, noise)
    if config.wire.format == SPARSE:
        return SparseDifferences(encoding_of(config), kinds=kinds)
    return Differences(encoding_of(config), rule, noise, kinds)


def form_of(model: MethodModel, config: RunConfig, secret: bytes | None) -> UpdateForm:
    """Return the form of a method's updates: its own, or the configured one; the secret is as in `update_form`."""
    if model.form is not None:
        return model.form.encoded_by(encoding_of(config))
    return update_form(config, secret, model.kinds)


def client_plan(config: RunConfig, form: UpdateForm, secret: bytes | None) -> ClientPlan:
    """Return the settings of every client; the secret is for the noise that a client adds itself."""
    federation, protection_of = config.federation, protections(config, secret)
    return ClientPlan(federation.in_flight, form, federation.delay + 1, protection_of, federation.fewest_asked)


def checkpoints_kept(config: RunConfig) -> int:
    """Return the number of checkpoints that are kept.

    A site may be d + 1 rounds behind the server when both die; the run goes on from a round that all of them keep.
    """
    keep, behind = config.checkpoint.keep, config.federation.delay + 2
    return keep if config.engine.name == "inprocess" else max(keep, behind)


def clients_of(config: RunConfig) -> int:
    """Return the number of clients: one if the method pools all data."""
    return 1 if config.federation.traits.pools_data else config.federation.num_clients


def server_plan(config: RunConfig, form: UpdateForm, folder: Path | None = None) -> ServerPlan:
    """Return the settings of the server; the folder is the run directory."""
    federation = config.federation
    return ServerPlan(
        num_clients=clients_of(config),
        num_rounds=federation.num_rounds,
        delay=federation.delay,
        schedule=config.schedule,
        participation=federation.participation,
        seed=config.seed,
        form=form,
        local_steps=local_steps_of(config),
        stall_timeout_s=federation.stall_timeout_s,
        checkpoint_every=config.checkpoint.every_rounds,
        server_optimizer=ServerOptimizer(**federation.server_optimizer.model_dump()),
        aggregation_s=None if config.engine.step_time_s is None else 0.0,
        in_turn=federation.traits.asks == "one_in_turn",
        min_updates=fewest_updates(config),
        deadline_factor=federation.deadline_factor,
        folder=folder,
        max_client_examples=federation.max_client_examples,
        account=account_of(config),
    )


def faults_of(config: RunConfig, happened: Sequence[int] = ()) -> Faults:
    """Return the configured faults; those that `happened` before an interruption do not happen again."""
    faults = (Fault(fault.client, fault.round, fault.at, fault.kind, fault.value) for fault in config.faults)
    return Faults(faults, happened=happened)


def encoding_of(config: RunConfig) -> Encoding:
    """Return how updates and new values become bytes; a stack of adapters travels whole."""
    wire = config.wire
    chunk_bytes = wire.chunk_bytes if wire.streaming and config.federation.traits.combines != "stack" else None
    name = payload_format(wire.format, wire.density)
    return Encoding(
        name, wire.rounding, wire.error_feedback, config.seed, chunk_bytes, residual_decay=wire.residual_decay
    )
