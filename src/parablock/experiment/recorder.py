"""Recorder of a run: its rounds, trace, checkpoints, trackers and summary."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from parablock.algorithm.aggregate import each_rho
from parablock.algorithm.parablock import ServerState
from parablock.clock import Clock, RealClock, VirtualClock
from parablock.config.keys import RunConfig
from parablock.errors import StorageError, TrainingError
from parablock.experiment.engines import checkpoints_kept
from parablock.experiment.progress import Progress
from parablock.experiment.protections import privacy_spent
from parablock.experiment.trackers import figures_of, open_trackers
from parablock.methods.base import MethodModel
from parablock.printable import counted
from parablock.storage.checkpoint import RunState, save_checkpoint
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.run_directory import Row, RunDirectory, time_and_bytes
from parablock.trace import Trace
from parablock.wire.messages import Update
from parablock.wire.transport import Traffic

Summary = dict[str, Any]


class Recorder:
    """The records of a run, from the start or from a checkpoint.

    Args:
        config: The run.
        directory: The run directory.
        progress: Shows the records while the run goes on.
        model: The model, which is scored between rounds.
        began: When this process began with the run, by `time.perf_counter`.
        start: The checkpoint that the run goes on from; at its start, the loss of the base model.
        releases: What ε is made of.

    Attributes:
        trace: The spans so far; its clock is the run's.
        unsaved: The error of the last checkpoint; None if it was written.
        troubles: Faults and refused updates, for the summary.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        progress: Progress,
        model: MethodModel,
        *,
        began: float,
        start: RunState | float,
        releases: ReleaseLedger,
    ) -> None:
        self._releases = releases
        self._config, self._directory, self._progress, self._model = config, directory, progress, model
        self._began, self._elapsed_before, self._last_commit_s, start_s = began, 0.0, 0.0, 0.0
        self.unsaved: StorageError | None = None
        self.troubles: dict[str, Any] = {}
        state = start if isinstance(start, RunState) else None
        if not isinstance(start, RunState):
            self._rows, self._initial_eval_loss = directory.rows_before(0), start
        else:
            self._rows = directory.rows_before(start.server.committed + 1)
            stored = start.progress
            self._initial_eval_loss, start_s = stored["initial_eval_loss"], stored["clock_s"]
            self._elapsed_before, self._last_commit_s = stored["elapsed_s"], stored["last_commit_s"]
            progress.message(where_it_goes_on(start, config.federation.num_rounds))
        first_step, values = len(self._rows) + 1 if state else 0, config.model_dump(mode="json")
        self._trackers = open_trackers(config.report_to, directory.path, first_step=first_step, config=values)
        if state is None:
            self._trackers.log(0, {"eval_loss": self._initial_eval_loss})
        is_virtual = config.engine.clock == "virtual"
        self._clock: Clock = VirtualClock(start_s=start_s) if is_virtual else RealClock(start_s=start_s)
        self.trace = Trace(self._clock, on_begin=progress.begins, on_end=progress.ends)
        self.trace.spans.extend(state.spans if state else [])

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of the rounds that are done."""
        return self._rows

    def on_commit(self, server: ServerState, updates: list[Update], traffic: Traffic) -> None:
        """Record a round, with the model's loss if it is due; the last round waits for `record_last`."""
        now = self._clock.now()
        row = _row(server, updates, traffic, round_s=now - self._last_commit_s)
        row |= privacy_spent(self._config, self._releases, server.committed)
        self._last_commit_s = now
        every = self._config.evaluation.every_rounds
        is_last = server.committed == self._config.federation.num_rounds - 1
        if every and (server.committed + 1) % every == 0 and not is_last:
            self._progress.stage("scoring the model", self._model.num_scored, is_brief=True, scores=True)
            with (
                self.trace.span(None, "server", "evaluating", round_index=server.committed),
                self._clock.working(0.0),
            ):
                row["eval_loss"] = self._model.evaluate(server.params)
            self._progress.stage("", scores=True)
        self._rows.append(row)
        if not is_last:
            self._record(row)

    def record_last(self, traffic: Traffic, eval_loss: float) -> None:
        """Record the last round: its traffic, with that of the drain, and the loss of the finished model."""
        row = self._rows[-1]
        row["downlink_bytes"] = traffic.downlink_bytes
        before_s = row["communication_s"]
        row["communication_s"] = max((traffic.seconds(i) for i in row["participants"]), default=0.0)
        row["sequential_s"] += row["communication_s"] - before_s  # the drain follows the round
        row["eval_loss"] = eval_loss
        self._record(row)

    def _record(self, row: Row) -> None:
        self._directory.append(row)
        self._progress.round_done(row)
        self._trackers.log(row["round_index"] + 1, figures_of(row))

    def on_checkpoint(self, state: RunState) -> None:
        """Save a checkpoint, with the recorder's own state; an error is kept as `unsaved` too."""
        progress = {
            **state.progress,
            "initial_eval_loss": self._initial_eval_loss,
            "elapsed_s": self._elapsed_s(),
            "clock_s": self._clock.now(),
            "last_commit_s": self._last_commit_s,
            "released": self._releases.newest,
        }
        keep = checkpoints_kept(self._config)
        self._progress.stage("saving a checkpoint", is_brief=True)
        try:
            save_checkpoint(self._directory.checkpoints, replace(state, progress=progress), keep=keep)
        except StorageError as error:
            self.unsaved = error
            raise
        finally:
            self._progress.stage("")

    def write_summary(self, status: str, **outcome: Any) -> Summary:
        """Close the trackers, and write the trace and `summary.json`.

        Args:
            status: completed | interrupted | failed.
            outcome: Values that a run has only at its end.

        Returns:
            The content of `summary.json`.
        """
        federation = self._config.federation
        self._trackers.close()
        summary: Summary = {
            "status": status,
            "method": federation.method,
            "delay": federation.delay,
            "num_rounds": federation.num_rounds,
            "rounds_done": len(self._rows),
            "num_clients": federation.num_clients,
            "num_blocks": self._model.num_blocks,
            "seed": self._config.seed,
            "clock": self._config.engine.clock,
            "initial_eval_loss": self._initial_eval_loss,
            "final_eval_loss": None,
            "wall_time_s": self._clock.now(),
            "elapsed_s": self._elapsed_s(),
            **time_and_bytes(self._rows, self.trace.spans),
            "peak_memory_bytes": _peak_memory_bytes(),
            "model_sha256": None,
            **privacy_spent(self._config, self._releases),
            **self.troubles,
            **outcome,
        }
        self._directory.write_trace(self.trace.spans)
        self._directory.write_summary(summary)
        return summary

    def _elapsed_s(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._began


def check_finite(loss: float, config: RunConfig) -> None:
    """Refuse a base model whose loss is not finite, with a `TrainingError`."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of the base model on the test rows is {loss}, before any training",
            cause=f"The model computes numbers that are not finite in {config.model.dtype}.",
            remedy="Set model.dtype: float32, or take another checkpoint; training cannot start from here.",
        )


def _row(server: ServerState, updates: list[Update], traffic: Traffic, *, round_s: float) -> Row:
    """Make a line of `metrics.jsonl`; a void round has no update and no loss."""
    t, b = server.committed, server.history[server.committed]
    told = [(u.train_loss, u.num_examples) for u in updates if u.train_loss is not None]
    communication_s = [traffic.seconds(u.client_id) for u in updates]
    squared_delta = server.squared_delta[b] if updates else 0.0
    return {
        "round_index": t,
        "block_index": b,
        "train_loss": sum(loss * count for loss, count in told) / sum(count for _, count in told) if told else None,
        "eval_loss": None,
        "compute_s": max((u.compute_s for u in updates), default=0.0),
        "communication_s": max(communication_s, default=0.0),
        "round_s": round_s,
        "sequential_s": max((u.compute_s + s for u, s in zip(updates, communication_s, strict=True)), default=0.0),
        "uplink_bytes": traffic.uplink_bytes,
        "downlink_bytes": traffic.downlink_bytes,
        "staleness": max((t - 1 - u.committed for u in updates), default=0),
        "participants": [u.client_id for u in updates],
        "rho": fmean(each_rho(server.rho[b])),
        "delta_norm": math.sqrt(squared_delta * server.params[b].numel()),
        "num_local_steps": max(server.local_steps[t]),
        "participant_steps": [u.num_local_steps for u in updates],
        "participant_losses": [u.train_loss for u in updates],
    }


def where_it_goes_on(state: RunState, num_rounds: int) -> str:
    """Say what a checkpoint holds, and what is computed again; rounds count from 1 for people."""
    done, begun = state.server.committed + 1, state.round_index
    said = f"{done} of {counted(num_rounds, 'round')} {'is' if done == 1 else 'are'} done"
    if begun - done == 1:
        said += f", the updates of round {begun} are under way"
    elif begun > done:
        said += f", the updates of rounds {done + 1} to {begun} are under way"
    if begun < num_rounds:
        said += f"; from round {begun + 1} on, what had been begun is computed again"
    return f"resuming from the checkpoint round-{begun:06d}: {said}"


def _peak_memory_bytes() -> int:
    """Return the peak of the GPU's allocations, or of this process's resident memory (all clients together)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
