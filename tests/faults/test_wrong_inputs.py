"""Disks, folders and runs that are wrong, through the real command line.

Every one of them ends with exit code 2 and one block on stderr that names the place and says what to do; there is
no traceback, and nothing half-written is left. Wrong configurations, rows and models are in
`test_hundred_errors.py`, single values of a configuration in `tests/unit/config`.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from broken_inputs import write_broken_files, write_broken_models
from parablock.cli.terminal import LOADING
from parablock.config.load import load_config
from parablock.errors import StorageError
from parablock.experiment.progress import Progress, make_progress
from parablock.experiment.run import run
from parablock.storage.files import lock_folder
from tiny_runs import (
    Runs,
    Workshop,
    after,
    assert_refused,
    command,
    command_apart,
    done,
    half_written,
    longest_file,
    metrics_of,
    summary_of,
)

Resize = Callable[[str], Path]


@pytest.fixture(scope="module")
def workshop(workshop: Workshop) -> Workshop:
    """Add what is broken."""
    write_broken_files(workshop.path)
    write_broken_models(workshop)
    return workshop


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    """A run of one round, complete."""
    return runs("blocks.allow_unvisited=true", "federation.num_rounds=1", "evaluation.every_rounds=0")


@pytest.fixture(scope="module")
def unfinished(workshop: Workshop) -> Path:
    """A run that stopped with its checkpoints at rounds 2 and 4; tests take copies."""
    run_dir = workshop.path / "unfinished"
    assert workshop.run(run_dir).code == 0
    shutil.rmtree(run_dir / "model")
    (run_dir / "summary.json").unlink()
    return run_dir


# -- what is not there, or not yet -----------------------------------------------------------------------------


def test_a_run_without_a_model_says_whether_it_is_at_work_and_how_it_ended(unfinished: Path, tmp_path: Path):
    run_dir = Path(shutil.copytree(unfinished, tmp_path / "run"))
    name, new = str(run_dir), ("--output-dir", str(tmp_path / "new"))
    asking = [["eval", name], ["chat", name], ["generate", name, "Hi"], ["export", name, *new]]
    with lock_folder(run_dir):
        for line in [*asking, ["report", name], ["resume", name], ["forget", name, "--client", "0"]]:
            assert_refused(command(*line), f"another process is at work in {run_dir}", "has not ended")
    for status, how in (("interrupted", "stopped"), ("failed", "failed"), ("", "killed")):
        text = json.dumps({"status": status, "num_rounds": 6})
        (run_dir / "summary.json").write_text(text if status else "{")
        for line in asking:
            how_far = " of 6" if status else ""
            cause = f"It was {how} after round 6{how_far}." if how != "failed" else "It failed after round 6 of 6."
            assert_refused(command(*line), "has no model yet", cause, f"parablock resume {run_dir}")


MISSING = {
    "run {config} --output-dir {unfinished}": "holds a run already",
    "run {config} --output-dir {new} --set model.name_or_path={model}l": "There is no model folder",
    "run {config} --output-dir {new} --set data.test={path}/row.jsonl": "Did you mean {path}/rows.jsonl?",
    "compare {config} --output-dir {unfinished}": "holds a run already",
    "plan {config}l": "Did you mean {config}?",
    "plan {unfinished}": "it is a folder; give the path of a YAML file, such as {unfinished}/config.yaml",
    "plan {config} --set model.name_or_path={model}l": "Did you mean {model}?",
    "resume {unfinished}x": "Did you mean {unfinished}?",
    "blocks {model}l": "as MODEL.",
    "init {path}/row.jsonl --model {model} --output {new}": "Did you mean {path}/rows.jsonl?",
    "init {path}/rows.jsonl --model {model}l --output {new}": "as --model.",
    "init {path}/rows.jsonl --model {model} --output {config}": "is there already",
    "export {finished} --output-dir {unfinished}": "is there already",
    "export {unfinished}x --output-dir {new}": "Did you mean {unfinished}?",
    "eval {unfinished}x": "Did you mean {unfinished}?",
    "eval {model} --data {path}/row.jsonl": "Did you mean {path}/rows.jsonl?",
    "chat {unfinished}x": "Did you mean {unfinished}?",
    "generate {finished}": "There is no prompt",
    "generate {unfinished}x Hi": "Did you mean {unfinished}?",
}
"""Command lines that name what is not there, or what is there already → a part of what they say."""


class Staged(Progress):
    """A display that keeps the names of its stages."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def stage(self, name: str, total: int | None = None, *, is_brief: bool = False, scores: bool = False) -> None:
        del total, is_brief, scores
        self._names.append(name)


@pytest.mark.parametrize("line", MISSING)
def test_what_is_not_there_is_said_before_torch_is_loaded(
    line: str, workshop: Workshop, finished: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stages: list[str] = []
    monkeypatch.setattr("parablock.experiment.progress.make_progress", lambda **_: Staged(stages))
    places = {"finished": finished, "unfinished": unfinished, "new": tmp_path / "new", "path": workshop.path}
    places |= {"config": workshop.config, "model": workshop.model}
    assert_refused(command(*line.format(**places).split()), MISSING[line].format(**places))
    assert LOADING not in stages
    if line.startswith("blocks"):
        done("blocks", str(workshop.model))
        assert LOADING in stages


# -- configurations -------------------------------------------------------------------------------------------


def test_all_problems_of_a_configuration_are_said_at_once(workshop: Workshop, tmp_path: Path):
    file, out = str(workshop.path / "many.yaml"), str(tmp_path / "out")
    outcome = command("run", file, "--output-dir", out, "--set", "federation.delay=-1")
    assert_refused(
        outcome,
        "many.yaml has 7 problems:",
        "model.name_or_path: required and not given",
        "model.dtype: ",
        "federation.delay: ",
        "train.num_local_steps: ",
        "train.lerning_rate: unknown key; did you mean `train.learning_rate`?",
        "wire: error_feedback",
        "sede: unknown key; did you mean `seed`?",
    )


# -- the output folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.jsonl/below", "/dev/full", "/dev/full/below"])
def test_an_output_folder_that_is_a_file_is_refused(place: str, workshop: Workshop):
    before = (workshop.path / "rows.jsonl").read_bytes()
    assert_refused(workshop.run(workshop.path / place), place, "--output-dir")
    assert (workshop.path / "rows.jsonl").read_bytes() == before


def test_a_folder_in_a_place_where_none_can_be_made_is_refused(workshop: Workshop):
    assert_refused(
        workshop.run(Path("/proc/parablock/out")), "/proc/parablock/out cannot be written", "Choose another place"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Resize]:
    """Mount a file system of a given size, and give it another size when asked again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted: list[str] = []

    def resize(size: str) -> Path:
        options = f"remount,size={size}" if mounted else f"size={size}"
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here")
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(size)
        return disk

    yield resize
    if mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_before_the_run_leaves_nothing(workshop: Workshop, small_disk: Resize):
    disk = small_disk("4k")
    assert_refused(workshop.run(disk / "out"), "out", "disk is full", "Free some space")
    assert not (disk / "out").exists()


def test_a_read_only_disk_is_refused(workshop: Workshop, small_disk: Resize):
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_refused(workshop.run(disk / "out"), "out cannot be written", "is read-only", "--output-dir")


FULL: dict[str, tuple[str, list[str], str, str, list[str]]] = {
    # size of the disk, changes, what is said, what to do, and the checkpoints that are left
    "first checkpoint": ("120k", [], "round-000002", "parablock resume", []),
    "second checkpoint": ("700k", [], "round-000004", "parablock resume", ["round-000002"]),  # one takes 460 kB
    "model": ("560k", ["checkpoint.every_rounds=4"], "model cannot be", "Free some space", ["round-000004"]),
}


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_under_a_file_leaves_the_last_good_checkpoint_to_go_on_from(
    case: str, workshop: Workshop, runs: Runs, small_disk: Resize
):
    size, overrides, says, cure, left = FULL[case]
    run_dir = small_disk(size) / "out"
    assert_refused(workshop.run(run_dir, *overrides), says, "disk is full", cure)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == left
    assert not (run_dir / "model").exists()
    small_disk("4m")
    assert_goes_on(run_dir, runs, left)


def assert_goes_on(run_dir: Path, runs: Runs, left: list[str], *overrides: str) -> None:
    """Nothing is half-written, and a resume from the last checkpoint ends as if nothing had happened."""
    assert half_written(run_dir) == []
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == left
    resumed = done("resume", str(run_dir))
    assert ("resuming from the checkpoint" in resumed.stdout) == bool(left)
    assert summary_of(run_dir)["model_sha256"] == summary_of(runs(*overrides))["model_sha256"]
    assert [row["round_index"] for row in metrics_of(run_dir)] == list(range(6))


def test_a_write_that_fails_in_mid_run_leaves_the_last_good_checkpoint_to_go_on_from(
    workshop: Workshop, runs: Runs, tmp_path: Path
):
    # With kept moments a client's part of a checkpoint grows by 75 kB at each new block, to 188 kB at round 2
    # and 338 kB at round 4.
    keep, run_dir = "train.optimizer_state=keep", tmp_path / "out"
    with longest_file(256_000):
        outcome = workshop.run(run_dir, keep)
    assert_refused(outcome, "round-000004", "cannot be written", "Choose another place")
    assert summary_of(run_dir)["status"] == "failed"
    assert_goes_on(run_dir, runs, ["round-000002"], keep)


def test_a_disk_that_is_full_of_updates_leaves_the_last_checkpoint_to_go_on_from(
    workshop: Workshop, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir, write, writes = tmp_path / "out", os.pwrite, list[int]()

    def full(descriptor: int, content: memoryview, offset: int) -> int:
        writes.append(offset)
        if len(writes) > 2 * 4 + 1:  # four clients; the third round
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, offset)

    with monkeypatch.context() as patched:
        patched.setattr("parablock.engine.round_fold.IN_MEMORY_BYTES", 0)
        patched.setattr("parablock.engine.update_store.os.pwrite", full)
        assert_refused(workshop.run(run_dir), str(run_dir), "the disk is full", "parablock resume")
    assert summary_of(run_dir)["status"] == "failed"
    assert_goes_on(run_dir, runs, ["round-000002"])


def test_a_run_that_cannot_be_saved_when_it_is_stopped_says_so(workshop: Workshop, tmp_path: Path):
    run_dir = tmp_path / "out"
    config = load_config(workshop.config, ["checkpoint.every_rounds=0"])
    with (
        make_progress(console=Console(file=io.StringIO())) as progress,
        longest_file(100_000),
        pytest.raises(StorageError, match="round-000003 cannot be written"),
    ):
        run(config, run_dir, progress=progress, asked_to_stop=after(2))
    assert summary_of(run_dir)["status"] == "failed"
    assert half_written(run_dir) == []


def test_a_run_whose_report_cannot_be_written_is_complete_all_the_same(
    workshop: Workshop, runs: Runs, tmp_path: Path
):
    run_dir = tmp_path / "out"
    with longest_file(400_000):
        assert_refused(workshop.run(run_dir), "report.html cannot be written", "Choose another place")
    assert summary_of(run_dir) == {**summary_of(run_dir), "status": "completed"}
    assert summary_of(run_dir)["model_sha256"] == summary_of(runs())["model_sha256"]
    assert half_written(run_dir) == []


@pytest.mark.parametrize("limit_bytes", [0, 1000])
def test_a_run_that_cannot_write_its_first_files_leaves_nothing(
    limit_bytes: int, workshop: Workshop, tmp_path: Path
):
    run_dir = tmp_path / "new" / "out"
    with longest_file(limit_bytes):
        assert_refused(workshop.run(run_dir), str(run_dir), "cannot be written", "Choose another place")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_write_its_first_files_leaves_what_was_in_the_folder(workshop: Workshop, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with longest_file(1000):
        assert_refused(workshop.run(tmp_path), "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_base_model_whose_loss_is_not_finite_ends_the_run_at_once(workshop: Workshop, tmp_path: Path):
    model = shutil.copytree(workshop.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38  # finite, and its products are not
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = workshop.run(tmp_path / "out", f"model.name_or_path={model}")
    assert outcome.code == 1
    assert "error: the loss of the base model on the test rows is " in outcome.stderr
    assert "before any training" in outcome.stderr
    assert "round 1" not in outcome.stdout
    assert metrics_of(tmp_path / "out") == []


# -- resume ---------------------------------------------------------------------------------------------------


def test_a_run_cannot_go_on_with_another_model(
    workshop: Workshop, unfinished: Path, tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]
):
    run_dir = shutil.copytree(unfinished, tmp_path / "run")
    kept = shutil.copytree(workshop.model, tmp_path / "kept")
    try:
        tiny_llama(vocab_size=300, seed=1).save_pretrained(workshop.model)
        assert_refused(command("resume", str(run_dir)), "base_sha256", "Put back what changed")
    finally:
        shutil.rmtree(workshop.model)
        shutil.copytree(kept, workshop.model)


def test_a_run_cannot_go_on_without_its_files(workshop: Workshop, unfinished: Path, tmp_path: Path):
    run_dir = shutil.copytree(unfinished, tmp_path / "run")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("client_1.jsonl", "client_7.jsonl"))
    assert_refused(command("resume", str(run_dir)), "client_7.jsonl does not exist", "Did you mean")


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "summary.json"])
def test_a_run_with_a_damaged_record_cannot_be_resumed(name: str, unfinished: Path, tmp_path: Path):
    run_dir = shutil.copytree(unfinished, tmp_path / "run")
    (run_dir / name).write_text('{"half')
    assert_refused(command("resume", str(run_dir)), name)


# -- the command line -----------------------------------------------------------------------------------------


def test_what_is_to_be_scored_has_to_be_given(workshop: Workshop, finished: Path):
    assert_refused(command("eval", str(finished / "model")), "--data")  # a run has rows of its own
    nothing = ("--data", str(workshop.test_file), "--max-examples", "0")
    assert_refused(command("eval", str(finished), *nothing), "--max-examples")


def test_a_demo_does_not_write_over_a_run(finished: Path):
    assert_refused(command("demo", "--output-dir", str(finished)), "holds a run already", "--output-dir")


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["run", "a.yaml"], ["run", "--fast"], ["resume"]])
def test_a_command_line_that_is_not_understood_shows_its_usage(arguments: list[str]):
    outcome = command(*arguments)
    assert_refused(outcome)
    assert outcome.stderr.startswith("Usage: ")


# -- as a process of its own ----------------------------------------------------------------------------------


def test_a_process_says_the_same_and_nothing_else(workshop: Workshop, tmp_path: Path):
    override = f"model.name_or_path={workshop.path}/corrupt_weights"
    apart = command_apart(*workshop.arguments(tmp_path / "out", override))
    here = workshop.run(tmp_path / "out", override)
    assert_refused(apart, "weights of", "corrupt_weights", "again")
    assert (apart.code, apart.stderr) == (here.code, here.stderr)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(workshop: Workshop, tmp_path: Path):
    plain = workshop.arguments(tmp_path / "out", "seed=-1")
    assert "Traceback" in command("--debug", *plain).stderr
    assert "Traceback" not in command(*plain).stderr
