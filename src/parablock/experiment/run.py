"""Run a configuration, or go on with a run: from the inputs to the run directory with its model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.config.methods import cohort_size
from parablock.engine.contract import Engine, EngineResult
from parablock.engine.plans import Hooks
from parablock.errors import CheckpointError, InputError
from parablock.experiment.engines import (
    InProcess,
    check_in_process,
    clients_of,
    engine_input,
    faults_of,
    release_log,
)
from parablock.experiment.inputs import read_inputs
from parablock.experiment.outlook import foresee, warn_of_this_run
from parablock.experiment.progress import LoggedProgress, Progress
from parablock.experiment.protections import adds_noise, check_privacy_extra, new_secret, releases_of
from parablock.experiment.recorder import Recorder, Summary, check_finite
from parablock.experiment.trackers import check_trackers
from parablock.methods.base import MethodModel, RunInputs, Watch
from parablock.methods.choose import make_method_model
from parablock.report.units import format_bytes
from parablock.report.write import write_report
from parablock.storage.checkpoint import RunState, load_newest
from parablock.storage.files import free_bytes, lock_folder
from parablock.storage.run_directory import RunDirectory

UNCHANGED_ON_RESUME = {
    "data_sha256": "the data",
    "base_sha256": "the base model",
    "blocks": "the partition of the model",
}
"""The entries of a manifest that have to be the same when the run goes on."""


def run(
    config: RunConfig,
    output_dir: Path | str,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    connect: Callable[[RunInputs], Engine] | None = None,
) -> Summary:
    """Fine-tune as the configuration says, and leave a run directory.

    Args:
        config: The run.
        output_dir: A folder that holds no run yet; nothing is written before all input has been checked.
        progress: Shows how the run goes; None: the logger `parablock`, at level INFO.
        asked_to_stop: Asked at every round; when true the run is saved and stops. Also asked while a round waits
            for a client that is gone; then the run stops at once, and goes on from its last checkpoint.
        connect: Makes the engine of the run; None: all in this process.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: Something that the user gave is wrong.
        ParaBlockError: The run failed.
    """
    began, progress = time.perf_counter(), progress or LoggedProgress()
    if connect is None:
        check_in_process(config)
    directory = RunDirectory(output_dir)
    directory.check_unused()
    inputs = _checked_inputs(config, progress)
    notes = [_warn_of_little_room(directory, inputs), "" if connect else warn_of_this_run(inputs.config)]
    for note in filter(None, notes):
        progress.message(note)
    secret = new_secret() if adds_noise(config) else None
    directory.create(inputs.config.to_yaml(), inputs.manifest, secret)
    with lock_folder(directory.path):
        engine = connect(inputs) if connect else InProcess()
        return _Run(inputs, directory, progress, asked_to_stop, engine, began).execute(None)


def resume(
    output_dir: Path | str,
    *,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    connect: Callable[[RunInputs], Engine] | None = None,
) -> Summary:
    """Go on from the newest checkpoint, bitwise as if the run had never stopped; see `run`.

    Raises:
        CheckpointError: There is no unfinished run, or its data or model changed.
        StorageError: The run is still at work.
    """
    began, progress = time.perf_counter(), progress or LoggedProgress()
    directory = RunDirectory(output_dir)
    directory.check_resumable()
    with lock_folder(directory.path):
        inputs = _checked_inputs(load_config(directory.config), progress)
        _check_unchanged(directory, inputs.manifest)
        engine = connect(inputs) if connect else InProcess()
        state, passed_over = load_newest(directory.checkpoints)
        for reason in passed_over:
            progress.message(f"passed over a damaged checkpoint: {reason}")
        if state is None:
            progress.message("there is no checkpoint yet; the run begins anew")
        return _Run(inputs, directory, progress, asked_to_stop, engine, began).execute(state)


def _checked_inputs(config: RunConfig, progress: Progress) -> RunInputs:
    check_trackers(config.report_to)
    check_privacy_extra(config)
    return read_inputs(config, progress.stage)


def _warn_of_little_room(directory: RunDirectory, inputs: RunInputs) -> str:
    """Say that the disk cannot hold the model and a checkpoint, which is about as large; "" if it can."""
    model = sum(p.numel() * p.element_size() for p in inputs.loaded.model.parameters())
    free = free_bytes(directory.path)
    if free >= 2 * model:
        return ""
    return (
        f"warning: the disk of {directory.path} has {format_bytes(free)} free, and the model alone takes about "
        f"{format_bytes(model)}, a checkpoint as much; make room, or the end of the run may not be written"
    )


def _check_unchanged(directory: RunDirectory, manifest: Mapping[str, Any]) -> None:
    before = directory.read_manifest()
    for key, subject in UNCHANGED_ON_RESUME.items():
        if before.get(key) != manifest[key]:
            raise CheckpointError(
                f"{subject} ({key}) is not what it was when the run in {directory.path} began",
                cause="The data files or the model folder changed in the meantime.",
                remedy="Put back what changed, or start a new run.",
            )


@dataclass(frozen=True)
class _Run:
    """The life cycle of a run: start or go on, drive the engine, finish or fail."""

    inputs: RunInputs
    directory: RunDirectory
    progress: Progress
    asked_to_stop: Callable[[], bool]
    engine: Engine
    began: float

    def execute(self, state: RunState | None) -> Summary:
        """Run to the end or to a stop, from a checkpoint or, with None, from the start."""
        config, directory, progress = self.inputs.config, self.directory, self.progress
        log = release_log(config, directory.path)
        releases = releases_of(config, log)
        if state is not None:
            releases.check_holds(state.progress.get("released", ""))
        for note in self.inputs.notes:
            progress.note(note)
        watch = Watch(progress.step, progress.done)
        model = make_method_model(self.inputs, None if self.engine.is_local else (), watch)
        progress.stage("")
        start = self._look_at_base(model) if state is None else state  # no part of the time of the rounds
        recorder = Recorder(config, directory, progress, model, began=self.began, start=start, releases=releases)
        cohort = cohort_size(config.federation.model_dump())
        progress.start(
            config.federation.num_rounds,
            clients_of(config),
            len(recorder.rows),
            cohort,
            scored_every=config.evaluation.every_rounds,
            earlier=recorder.rows,
            num_blocks=len(self.inputs.blocks),
            delay=config.federation.delay,
        )
        faults = faults_of(config, state.progress["faults"] if state else ())
        hooks = Hooks(recorder.on_commit, recorder.on_checkpoint, self.asked_to_stop, progress.message)
        secret, folder = directory.read_secret() if adds_noise(config) else None, directory.path
        try:
            given = engine_input(
                config,
                model,
                recorder.trace,
                hooks,
                secret=secret,
                resumed=state,
                faults=faults,
                folder=folder,
                log=log,
            )
            given = replace(given, releases=releases)
            result = self.engine.run(given)
            if faults or result.refused:
                recorder.troubles = {"faults": faults.counts, "refused_updates": result.refused}
            summary = self._finish(result, recorder, model)
        except Exception:
            with suppress(InputError):  # the run may have failed because nothing can be written
                recorder.write_summary("failed")
                write_report([directory.path])
            raise
        progress.stage("writing the report", is_brief=True)
        write_report([directory.path])
        return summary

    def _look_at_base(self, model: MethodModel) -> float:
        """Score the base model, let it answer, and say how long the run will take; return its loss."""
        progress, began_s = self.progress, time.perf_counter()
        text = f"scoring the base model on {model.num_scored} test examples"
        progress.stage(text, model.num_scored, scores=True)
        loss = model.evaluate(model.params)
        progress.stage("", scores=True)
        check_finite(loss, self.inputs.config)
        progress.note(f"base model: eval loss {loss:.4f}")
        scored_s = time.perf_counter()
        if self.inputs.config.evaluation.num_answers:
            progress.stage("the base model answers test prompts, tokens", model.most_answer_tokens(), is_brief=True)
            self.directory.write_answers("base", model.answer())
            progress.stage("")
        if outlook := foresee(self.inputs, scored_s - began_s, time.perf_counter() - scored_s):
            progress.message(outlook)
        return loss

    def _finish(self, result: EngineResult, recorder: Recorder, model: MethodModel) -> Summary:
        if recorder.unsaved is not None:  # in a stopping run no message is left to carry the error
            raise recorder.unsaved
        if not result.finished:
            return recorder.write_summary("interrupted")
        wall_time_s = recorder.trace.clock.now()
        self.progress.rounds_over()
        self.progress.stage("scoring the tuned model", model.num_scored, is_brief=True, scores=True)
        eval_loss = model.finish_model(result.server.params)
        self.progress.stage("", scores=True)
        recorder.record_last(result.last_traffic, eval_loss)
        if self.inputs.config.evaluation.num_answers:
            text = "the tuned model answers test prompts, tokens"
            self.progress.stage(text, model.most_answer_tokens(), is_brief=True)
            self.directory.write_answers("tuned", model.answer())
        self.progress.stage("writing the tuned model", is_brief=True)
        return recorder.write_summary(
            "completed",
            wall_time_s=wall_time_s,
            final_eval_loss=eval_loss,
            model_sha256=model.export(self.directory.model),
        )
