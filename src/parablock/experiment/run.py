"""Run a configuration, or go on with a run: from the inputs to the run directory with its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.engine.contract import Engine, EngineInput, EngineResult
from parablock.engine.faults import Faults
from parablock.engine.plans import Hooks
from parablock.errors import CheckpointError, InputError
from parablock.experiment.engines import InProcess, clients_of, engine_input, faults_of
from parablock.experiment.inputs import read_inputs
from parablock.experiment.progress import LoggedProgress, Progress
from parablock.experiment.protections import adds_noise, check_privacy_extra, new_secret
from parablock.experiment.recorder import Recorder
from parablock.experiment.recorder import Summary as Summary
from parablock.experiment.trackers import check_trackers
from parablock.methods.base import RunInputs
from parablock.methods.choose import make_method_model
from parablock.report.write import write_report
from parablock.storage.checkpoint import RunState, load_newest
from parablock.storage.files import claimed
from parablock.storage.run_directory import RunDirectory

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
    inputs = read_inputs(config, progress.message)
    directory.create(inputs.config.to_yaml(), inputs.manifest)
    with claimed(directory.path):
        if adds_noise(config):
            directory.write_secret(new_secret())
        return Run(inputs, directory, progress, asked_to_stop, connect(inputs), began).execute(None)


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
    inputs = read_inputs(config, progress.message)
    before = directory.read_manifest()
    for key, what in UNCHANGED_ON_RESUME.items():
        if before.get(key) != inputs.manifest[key]:
            raise CheckpointError(
                f"{what} ({key}) is not what it was when the run in {directory.path} began",
                cause="The data files or the model folder changed in the meantime.",
                remedy="Put back what changed, or start a new run.",
            )
    engine = connect(inputs)
    state, passed_over = load_newest(directory.checkpoints, engine.held_rounds)
    for reason in passed_over:
        progress.message(f"passed over a damaged checkpoint: {reason}")
    if state is None:
        progress.message("there is no checkpoint that server and clients share; the run begins anew")
    return Run(inputs, directory, progress, asked_to_stop, engine, began).execute(state)


class Run:
    """The life cycle of a run: start or go on, drive the engine, finish or fail.

    Args:
        inputs: What was read.
        directory: The run directory.
        progress: Told how the run goes.
        asked_to_stop: See `run`.
        engine: Brings server and clients together.
        began: When this process began with the run, by `time.perf_counter`.
    """

    def __init__(
        self,
        inputs: RunInputs,
        directory: RunDirectory,
        progress: Progress,
        asked_to_stop: Callable[[], bool],
        engine: Engine,
        began: float,
    ) -> None:
        self._inputs, self._config, self._directory = inputs, inputs.config, directory
        self._progress, self._asked_to_stop, self._engine, self._began = progress, asked_to_stop, engine, began
        self._model = make_method_model(inputs, None if engine.is_local else ())
        self._secret = directory.read_secret() if adds_noise(self._config) else None

    def execute(self, state: RunState | None) -> Summary:
        """Run to the end, or to where it is stopped.

        Args:
            state: The checkpoint to go on from; None: from the start.
        """
        config, progress = self._config, self._progress
        for note in self._inputs.notes:
            progress.message(note)
        if state is None:
            progress.message(f"scoring the base model on {len(self._inputs.test)} test examples")
        recorder = Recorder(config, self._directory, progress, self._model, began=self._began, state=state)
        progress.start(config.federation.num_rounds, clients_of(config), recorder.num_done)
        faults = faults_of(config, state.progress["faults"] if state else ())
        try:
            result = self._engine.run(self._engine_input(recorder, faults, state))
            recorder.troubles = _troubles(faults, result)
            summary = self._finish(result, recorder)
        except Exception:
            with suppress(InputError):  # the reason why it failed may be that nothing can be written
                recorder.write_summary("failed")
                write_report([self._directory.path])
            raise
        write_report([self._directory.path])
        return summary

    def _engine_input(self, recorder: Recorder, faults: Faults, state: RunState | None) -> EngineInput:
        hooks = Hooks(
            on_commit=recorder.on_commit,
            on_checkpoint=recorder.on_checkpoint,
            asked_to_stop=self._asked_to_stop,
            on_event=self._progress.message,
        )
        return engine_input(
            self._config,
            self._model,
            recorder.trace,
            hooks,
            secret=self._secret,
            resumed=state,
            faults=faults,
            folder=self._directory.path,
        )

    def _finish(self, result: EngineResult, recorder: Recorder) -> Summary:
        if recorder.unsaved is not None:  # where the run is stopping, no message is left that could carry it
            raise recorder.unsaved
        if not result.finished:
            return recorder.write_summary("interrupted")
        wall_time_s = recorder.trace.clock.now()
        eval_loss = self._model.finish_model(result.server.params)
        recorder.record_last(result.last_traffic, eval_loss)
        return recorder.write_summary(
            "completed",
            wall_time_s=wall_time_s,
            final_eval_loss=eval_loss,
            model_sha256=self._model.export(self._directory.model),
        )


def _troubles(faults: Faults, result: EngineResult) -> dict[str, Any]:
    """Count what went wrong: faults by kind, and messages of clients that were refused by reason."""
    if not faults and not result.refused:
        return {}
    return {"faults": faults.counts, "refused_updates": result.refused}
