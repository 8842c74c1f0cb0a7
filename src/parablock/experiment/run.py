"""The composition root: configuration → objects → run → records."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from parablock.algorithm.parablock import ServerState
from parablock.clock import Clock, RealClock, VirtualClock
from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.engine.contract import Engine, EngineResult
from parablock.engine.faults import Faults
from parablock.engine.plans import Hooks
from parablock.errors import CheckpointError, InputError, StorageError
from parablock.experiment.engines import InProcess, checkpoints_kept, clients_of, engine_input, faults_of
from parablock.experiment.inputs import read_inputs
from parablock.experiment.progress import LoggedProgress, Progress
from parablock.experiment.protections import adds_noise, check_privacy_extra, new_secret, privacy_spent
from parablock.experiment.trackers import Trackers, check_trackers, figures_of, open_trackers
from parablock.methods.base import RunInputs
from parablock.methods.choose import make_method_model
from parablock.report.write import write_report
from parablock.storage.checkpoint import RunState, load_newest, save_checkpoint
from parablock.storage.files import claimed
from parablock.storage.run_directory import RunDirectory, time_and_bytes
from parablock.trace import Trace
from parablock.wire.messages import Update
from parablock.wire.transport import Traffic

Summary = dict[str, Any]


UNCHANGED_ON_RESUME = {
    "data_sha256": "the data",
    "base_sha256": "the base model",
    "blocks": "the partition of the model",
}
"""What of a manifest has to be the same when the run goes on."""


def run(
    config: RunConfig,
    output_dir: Path | str,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    connect: Callable[[RunInputs], Engine] = InProcess,
) -> Summary:
    """Fine-tune as the configuration says, and leave a run directory.

    Args:
        config: The run.
        output_dir: A folder that holds no run yet; nothing is written before all input has been checked.
        progress: Who is told how it goes; None: the logger `parablock`, at level INFO.
        asked_to_stop: Asked at every round; when true the run is saved and stops. Also asked while a round waits
            for a client that is gone; then it stops at once, and goes on from its last checkpoint.
        connect: Makes the engine for the run; None given: all in this process.

    Returns:
        What stands in `summary.json`.

    Raises:
        InputError: Something that the user gave is wrong.
        ParaBlockError: The run failed.
    """
    began, progress = time.perf_counter(), progress or LoggedProgress()
    if connect is InProcess:
        InProcess.check(config)
    directory = RunDirectory(output_dir)
    directory.check_unused()
    check_trackers(config.report_to)
    check_privacy_extra(config)
    job = read_inputs(config, progress.message)
    directory.create(job.config.to_yaml(), job.manifest)
    with claimed(directory.path):
        if adds_noise(config):
            directory.write_secret(new_secret())
        return _Run(job, directory, progress, asked_to_stop, began, connect(job)).execute(None)


def resume(
    output_dir: Path | str,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    connect: Callable[[RunInputs], Engine] = InProcess,
) -> Summary:
    """Go on from the newest checkpoint, bitwise as if the run had never stopped; see `run`.

    Raises:
        CheckpointError: There is no unfinished run, or its data or model changed.
        StorageError: It is still at work.
    """
    began, progress = time.perf_counter(), progress or LoggedProgress()
    directory = RunDirectory(output_dir)
    directory.check_resumable()
    with claimed(directory.path):
        return _go_on(directory, began, progress, asked_to_stop, connect)


def _go_on(
    directory: RunDirectory,
    began: float,
    progress: Progress,
    asked_to_stop: Callable[[], bool],
    connect: Callable[[RunInputs], Engine],
) -> Summary:
    config = load_config(directory.config)
    check_trackers(config.report_to)
    check_privacy_extra(config)
    job = read_inputs(config, progress.message)
    before = directory.read_manifest()
    for key, what in UNCHANGED_ON_RESUME.items():
        if before.get(key) != job.manifest[key]:
            raise CheckpointError(
                f"{what} ({key}) is not what it was when the run in {directory.path} began",
                cause="The data files or the model folder changed in the meantime.",
                remedy="Put back what changed, or start a new run.",
            )
    engine = connect(job)
    state, passed_over = load_newest(directory.checkpoints, engine.held_rounds)
    for reason in passed_over:
        progress.message(f"passed over a damaged checkpoint: {reason}")
    if state is None:
        progress.message("there is no checkpoint that server and clients share; the run begins anew")
    return _Run(job, directory, progress, asked_to_stop, began, engine).execute(state)


class _Run:
    """One execution of a job, from the start or from a checkpoint."""

    def __init__(
        self,
        job: RunInputs,
        directory: RunDirectory,
        progress: Progress,
        asked_to_stop: Callable[[], bool],
        began: float,
        engine: Engine,
    ) -> None:
        self.job, self.config, self.directory, self.progress = job, job.config, directory, progress
        self.asked_to_stop, self.began, self.elapsed_before = asked_to_stop, began, 0.0
        self.engine = engine
        self.fleet = make_method_model(job, None if engine.is_local else ())
        self.rows: list[dict[str, Any]] = []
        self.initial_eval_loss = float("nan")
        self.last_commit_s = 0.0
        self.trackers = Trackers(())
        self.unsaved: StorageError | None = None
        self.troubles: dict[str, Any] = {}
        self.secret = directory.read_secret() if adds_noise(self.config) else None

    def execute(self, state: RunState | None) -> Summary:
        """Run to the end, or to where it is stopped."""
        config = self.config
        for note in self.job.notes:
            self.progress.message(note)
        if state is None:
            self.rows = self.directory.rows_before(0)
            self.progress.message(f"scoring the base model on {len(self.job.test)} test examples")
            self.initial_eval_loss = self.fleet.evaluate(self.fleet.params)
            self.progress.message(f"base model: eval loss {self.initial_eval_loss:.4f}")
        else:
            self._take_up(state)
        self.trackers = open_trackers(
            config.report_to,
            self.directory.path,
            first_step=len(self.rows) + 1 if state else 0,
            config=config.model_dump(mode="json"),
        )
        if state is None:
            self.trackers.log(0, {"eval_loss": self.initial_eval_loss})
        clock = self._clock(state)
        trace = Trace(clock, on_begin=self._begins, on_end=self._ends)
        trace.spans.extend(state.spans if state else [])
        self.progress.start(config.federation.num_rounds, clients_of(config), len(self.rows))
        faults = faults_of(config, state.progress["faults"] if state else ())
        try:
            given = engine_input(
                config,
                self.fleet,
                trace,
                Hooks(
                    on_commit=lambda server, updates, traffic: self._on_commit(clock, server, updates, traffic),
                    on_checkpoint=lambda checkpoint: self._on_checkpoint(clock, checkpoint),
                    asked_to_stop=self.asked_to_stop,
                    on_event=self.progress.message,
                ),
                secret=self.secret,
                resumed=state,
                faults=faults,
                folder=self.directory.path,
            )
            result = self.engine.run(given)
            self.troubles = _troubles(faults, result)
            summary = self._finish(result, trace, clock)
        except Exception:
            with suppress(InputError):  # the reason why it failed may be that nothing can be written
                self._conclude(trace, clock, status="failed")
                write_report([self.directory.path])
            raise
        write_report([self.directory.path])
        return summary

    def _take_up(self, state: RunState) -> None:
        self.rows = self.directory.rows_before(state.server.committed + 1)
        self.initial_eval_loss = state.progress["initial_eval_loss"]
        self.elapsed_before = state.progress["elapsed_s"]
        self.last_commit_s = state.progress["last_commit_s"]
        self.progress.message(f"resuming at round {state.round_index}")

    def _clock(self, state: RunState | None) -> Clock:
        start_s = state.progress["clock_s"] if state else 0.0
        is_virtual = self.config.engine.clock == "virtual"
        return VirtualClock(start_s=start_s) if is_virtual else RealClock(start_s=start_s)

    def _begins(self, client_id: int | None, activity: str) -> None:
        if client_id is not None:
            self.progress.begins(client_id, activity)

    def _ends(self, client_id: int | None, activity: str) -> None:
        if client_id is not None:
            self.progress.ends(client_id, activity)

    def _on_commit(self, clock: Clock, server: ServerState, updates: list[Update], traffic: Traffic) -> None:
        now = clock.now()
        row = _row(server, updates, traffic, round_s=now - self.last_commit_s)
        row |= privacy_spent(self.config, server.committed + 1)
        self.last_commit_s = now
        every = self.config.evaluation.every_rounds
        is_last = server.committed == self.config.federation.num_rounds - 1
        if every and (server.committed + 1) % every == 0 and not is_last:
            with clock.working(0.0):
                row["eval_loss"] = self.fleet.evaluate(server.params)
        self.rows.append(row)
        if not is_last:  # the last one has the drain and the final evaluation still to come
            self._record(row)

    def _record(self, row: dict[str, Any]) -> None:
        self.directory.append(row)
        self.progress.round_done(row)
        self.trackers.log(row["round_index"] + 1, figures_of(row))

    def _on_checkpoint(self, clock: Clock, state: RunState) -> None:
        progress = {
            **state.progress,
            "initial_eval_loss": self.initial_eval_loss,
            "elapsed_s": self._elapsed_s(),
            "clock_s": clock.now(),
            "last_commit_s": self.last_commit_s,
        }
        state = replace(state, progress=progress)
        try:
            save_checkpoint(self.directory.checkpoints, state, keep=checkpoints_kept(self.config))
        except StorageError as error:
            self.unsaved = error
            raise

    def _finish(self, result: EngineResult, trace: Trace, clock: Clock) -> Summary:
        if self.unsaved is not None:  # where the run is stopping, no message is left that could carry it
            raise self.unsaved
        if not result.finished:
            return self._conclude(trace, clock, status="interrupted")
        wall_time_s = clock.now()
        last = self.rows[-1]
        last["downlink_bytes"] = result.last_traffic.downlink_bytes
        before_s = last["communication_s"]
        last["communication_s"] = max((result.last_traffic.seconds(i) for i in last["participants"]), default=0.0)
        last["sequential_s"] += last["communication_s"] - before_s  # the drain follows the round
        last["eval_loss"] = self.fleet.conclude(result.server.params)
        self._record(last)
        sha256 = self.fleet.export(self.directory.model)
        return self._conclude(
            trace,
            clock,
            status="completed",
            wall_time_s=wall_time_s,
            final_eval_loss=last["eval_loss"],
            model_sha256=sha256,
        )

    def _conclude(self, trace: Trace, clock: Clock, *, status: str, **outcome: Any) -> Summary:
        federation = self.config.federation
        self.trackers.close()
        summary: Summary = {
            "status": status,
            "method": federation.method,
            "delay": federation.delay,
            "num_rounds": federation.num_rounds,
            "rounds_done": len(self.rows),
            "num_clients": federation.num_clients,
            "num_blocks": self.fleet.num_blocks,
            "seed": self.config.seed,
            "clock": self.config.engine.clock,
            "initial_eval_loss": self.initial_eval_loss,
            "final_eval_loss": None,
            "wall_time_s": clock.now(),
            "elapsed_s": self._elapsed_s(),
            **time_and_bytes(self.rows, trace.spans),
            "peak_memory_bytes": _peak_memory_bytes(),
            "model_sha256": None,
            **privacy_spent(self.config, len(self.rows)),
            **self.troubles,
            **outcome,
        }
        self.directory.write_trace(trace.spans)
        self.directory.write_summary(summary)
        return summary

    def _elapsed_s(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.began


def _row(server: ServerState, updates: list[Update], traffic: Traffic, *, round_s: float) -> dict[str, Any]:
    """Make a line of `metrics.jsonl`; a void round has no update and no loss."""
    t, b = server.committed, server.history[server.committed]
    total = sum(update.num_examples for update in updates)
    train_loss = sum(update.train_loss * update.num_examples for update in updates) / total if updates else None
    communication = {update.client_id: traffic.seconds(update.client_id) for update in updates}
    squared_delta = server.squared_delta[b] if updates else 0.0
    return {
        "round_index": t,
        "block_index": b,
        "train_loss": train_loss,
        "eval_loss": None,
        "compute_s": max((update.compute_s for update in updates), default=0.0),
        "communication_s": max(communication.values(), default=0.0),
        "round_s": round_s,
        "sequential_s": max(
            (update.compute_s + communication[update.client_id] for update in updates), default=0.0
        ),
        "uplink_bytes": traffic.uplink_bytes,
        "downlink_bytes": traffic.downlink_bytes,
        "staleness": max((t - 1 - update.committed for update in updates), default=0),
        "participants": [update.client_id for update in updates],
        "rho": server.rho[b],
        "delta_norm": math.sqrt(squared_delta * server.params[b].numel()),
        "num_local_steps": max(server.local_steps[t]),
        "participant_steps": [update.num_local_steps for update in updates],
    }


def _troubles(faults: Faults, result: EngineResult) -> dict[str, Any]:
    """Count what went wrong: faults by kind, and messages of clients that were refused by reason."""
    if not faults and not result.refused:
        return {}
    return {"faults": faults.counts, "refused_updates": result.refused}


def _peak_memory_bytes() -> int:
    """Give the peak of the GPU's allocations, or of this process's resident memory (all clients together)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
