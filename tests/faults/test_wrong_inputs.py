"""Wrong inputs through the real command line.

Every one of them ends with exit code 2 and one block on stderr that names the key, or the file and line, and
says what to do; there is no traceback, and nothing half-written is left. The most frequent ones are in
`test_forty_errors.py`, single values of a configuration in `tests/unit/config`.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from broken_inputs import write_broken_files, write_broken_models
from parablock.config.load import load_config
from parablock.errors import StorageError
from parablock.experiment.progress import make_progress
from parablock.experiment.run import run
from tiny_runs import (
    Outcome,
    Workshop,
    command,
    command_apart,
    half_written,
    metrics_of,
    sum_row,
    summary_of,
    write_rows,
)


@pytest.fixture(scope="module")
def workshop(workshop: Workshop) -> Workshop:
    """Add what is broken."""
    write_broken_files(workshop.path)
    write_broken_models(workshop)
    return workshop


@pytest.fixture(scope="module")
def finished(workshop: Workshop) -> Path:
    """A run of one round, complete."""
    run_dir = workshop.path / "finished"
    one_round = ("blocks.allow_unvisited=true", "federation.num_rounds=1", "evaluation.every_rounds=0")
    assert workshop.run(run_dir, *one_round).code == 0
    return run_dir


@pytest.fixture(scope="module")
def unfinished(workshop: Workshop) -> Path:
    """A run that stopped with its checkpoints at rounds 2 and 4; tests take copies."""
    run_dir = workshop.path / "unfinished"
    assert workshop.run(run_dir).code == 0
    shutil.rmtree(run_dir / "model")
    (run_dir / "summary.json").unlink()
    return run_dir


def assert_refused(outcome: Outcome, *says: str) -> None:
    assert "Traceback" not in outcome.stderr + outcome.stdout
    assert outcome.code == 2, outcome
    assert outcome.stderr.startswith(("error: ", "Usage: "))
    for words in says:
        assert words in outcome.stderr


# -- configurations -------------------------------------------------------------------------------------------

WRONG_VALUES = {
    "unknown key": (["train.num_local_step=4"], ["train.num_local_step: unknown key", "`train.num_local_steps`"]),
    "wrong schedule": (["blocks.schedule=spiral"], ["blocks.schedule: ", "'cyclic'", "'spiral'"]),
    "faults": (["faults=[{client: 1, kind: drop}]"], ["faults.0.round: required", "faults.0.at: required"]),
    "flower in one process": (
        ["engine.name=flower", "engine.clock=real", "engine.step_time_s=null"],
        ["engine.name: flower", "deploy local"],
    ),
    "flower in simulated time": (["engine.name=flower"], ["engine: ", "leave clock: real"]),
    "K is a word": (["train.num_local_steps=many"], ["train.num_local_steps: ", "'many'"]),
    "blocks fit no link": (
        ["blocks.layers_per_block=auto", "link={upload_mbps: null, download_mbps: null}"],
        ["blocks.layers_per_block: auto fits the blocks to the link", "set link.upload_mbps"],
    ),
    "both are auto": (
        ["blocks.layers_per_block=auto", "train.num_local_steps=auto"],
        ["blocks.layers_per_block: auto follows from train.num_local_steps", "set a number"],
    ),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_a_wrong_value_is_refused_with_its_key(case: str, workshop: Workshop, tmp_path: Path):
    overrides, says = WRONG_VALUES[case]
    assert_refused(workshop.run(tmp_path / "out", *overrides), *says)
    assert not (tmp_path / "out").exists()


def test_the_configuration_that_the_wrong_values_are_put_into_is_right(finished: Path):
    assert summary_of(finished)["status"] == "completed"


WRONG_FILES = {
    "broken.yaml": ["is not YAML", "line"],
    "folder": ["cannot be read"],
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_is_no_configuration_is_refused_with_its_name(name: str, workshop: Workshop, tmp_path: Path):
    outcome = command("run", str(workshop.path / name), "--output-dir", str(tmp_path / "out"))
    assert_refused(outcome, name, *WRONG_FILES[name])
    assert not (tmp_path / "out").exists()


def test_all_problems_of_a_configuration_are_said_at_once(workshop: Workshop, tmp_path: Path):
    outcome = command(
        "run",
        str(workshop.path / "many.yaml"),
        "--output-dir",
        str(tmp_path / "out"),
        "--set",
        "federation.delay=-1",
    )
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


# -- rows -----------------------------------------------------------------------------------------------------

ONE_FILE = ["data.partition.scheme=iid", "federation.num_clients=2"]


def reads(name: str) -> list[str]:
    return [*ONE_FILE, f"data.train={{path}}/{name}"]


def split_by(scheme: str, field: str, name: str = "labelled.jsonl") -> list[str]:
    return [*reads(name), f"data.partition={{{{scheme: {scheme}, field: {field}}}}}"]


WRONG_ROWS = {
    "folder": (reads("folder"), ["folder is a folder, not a file", "List the files"]),
    "not UTF-8": (reads("bytes.jsonl"), ["bytes.jsonl, line 2 is not JSON", "UTF-8"]),
    "not an object": (reads("numbers.jsonl"), ["numbers.jsonl, line 2 holds a value of type int"]),
    "blank lines": (reads("blank.jsonl"), ["blank.jsonl is empty", "at least one example"]),
    "two formats": (reads("mixed.jsonl"), ["mixed.jsonl, line", "has the format", "one format"]),
    "number for text": (reads("number_for_text.jsonl"), ["number_for_text.jsonl, line 2", "as a string"]),
    "turn without content": (reads("turns.jsonl"), ["turns.jsonl, line", "turn 1", '"role": "user"']),
    "another format": ([*reads("rows.jsonl"), "data.format=gsm8k"], ["rows.jsonl, line", "question", "prompt"]),
    "prompts fill max_length": ([*reads("rows.jsonl"), "data.max_length=8"], ["None of 4 rows", "data.max_length"]),
    "more clients than rows": (
        [*reads("rows.jsonl"), "federation.num_clients=9"],
        ["8 rows cannot be split over 9 clients", "lower federation.num_clients"],
    ),
    "nothing left to train on": (
        [*reads("rows.jsonl"), "federation.num_clients=8", "data.test=[]"],
        ["client 0 has 1 row", "Give data.test"],
    ),
    "broken test file": (["data.test={path}/broken.jsonl"], ["broken.jsonl, line 4 is not JSON"]),
    "field missing in a row": (
        split_by("by_field", "label", "label_missing.jsonl"),
        ["label_missing.jsonl, line 5"],
    ),
    "field missing everywhere": (
        split_by("by_field", "colour"),
        ["labelled.jsonl, line 1", "data.partition.field"],
    ),
    "wrong number of values": (
        [*split_by("by_field", "label"), "federation.num_clients=3"],
        ["2 values and 3 clients", "federation.num_clients: 2"],
    ),
    "dirichlet leaves a client empty": (
        [*split_by("dirichlet", "label"), "federation.num_clients=8", "data.partition.alpha=0.01"],
        ["gave each of 8 clients", "Raise data.partition.alpha"],
    ),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows_are_refused_with_their_file_and_line(case: str, workshop: Workshop, tmp_path: Path):
    overrides, says = WRONG_ROWS[case]
    outcome = workshop.run(tmp_path / "out", *(override.format(path=workshop.path) for override in overrides))
    assert_refused(outcome, *says)
    assert not (tmp_path / "out").exists()


def test_a_hub_name_that_is_not_reachable_is_refused_and_says_where_it_looked(workshop: Workshop, tmp_path: Path):
    outcome = command_apart(
        *workshop.arguments(tmp_path / "out", *ONE_FILE, "data.train=nobody/nothing"),
        environment={"HF_HUB_OFFLINE": "1"},
    )
    assert_refused(outcome, "'nobody/nothing' is neither a file here nor reachable", "check the name")
    assert not (tmp_path / "out").exists()


# -- models ---------------------------------------------------------------------------------------------------

WRONG_MODELS = {
    "file": ("rows.jsonl", ["There is no model folder", "That path is a file"]),
    "without config": ("without_config", ["without_config", "config"]),
    "corrupt weights": ("corrupt_weights", ["weights of", "corrupt_weights", "again"]),
    "without weights": ("without_weights", ["weights of", "without_weights", "again"]),
    "unknown type": ("unknown_type", ["unknown_type", "mystery", "another model.name_or_path"]),
}


@pytest.mark.parametrize("case", WRONG_MODELS)
def test_a_wrong_model_is_refused_with_its_name(case: str, workshop: Workshop, tmp_path: Path):
    name, says = WRONG_MODELS[case]
    outcome = workshop.run(tmp_path / "out", f"model.name_or_path={workshop.path / name}")
    assert_refused(outcome, *says)
    assert not (tmp_path / "out").exists()


def test_a_gpu_where_there_is_none_is_refused(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    outcome = workshop.run(tmp_path / "out", "model.device=cuda")
    assert_refused(outcome, "model.device is cuda", "model.device: auto or cpu")
    assert not (tmp_path / "out").exists()


def test_a_model_id_without_a_network_is_refused_and_says_what_to_check(workshop: Workshop, tmp_path: Path):
    outcome = command_apart(
        *workshop.arguments(tmp_path / "out", "model.name_or_path=nobody/nothing"),
        environment={"HF_HUB_OFFLINE": "1"},
    )
    assert_refused(outcome, "nobody/nothing cannot be read", "the network", "local folder")
    assert not (tmp_path / "out").exists()


# -- the output folder ----------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(workshop: Workshop, finished: Path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert_refused(workshop.run(finished), "finished holds a run already", "parablock resume", "--output-dir")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["rows.jsonl", "rows.jsonl/below", "/dev/full", "/dev/full/below"])
def test_an_output_folder_that_is_a_file_is_refused(place: str, workshop: Workshop):
    before = (workshop.path / "rows.jsonl").read_bytes()
    assert_refused(workshop.run(workshop.path / place), place, "--output-dir")
    assert (workshop.path / "rows.jsonl").read_bytes() == before


def test_a_folder_in_a_place_where_none_can_be_made_is_refused(workshop: Workshop):
    assert_refused(
        workshop.run(Path("/proc/parablock/out")), "/proc/parablock/out cannot be written", "--output-dir"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
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


def test_a_disk_that_is_full_before_the_run_leaves_nothing(workshop: Workshop, small_disk: Callable[[str], Path]):
    disk = small_disk("4k")
    assert_refused(workshop.run(disk / "out"), "out", "disk is full", "Free some space")
    assert not (disk / "out").exists()


def test_a_read_only_disk_is_refused(workshop: Workshop, small_disk: Callable[[str], Path]):
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_refused(workshop.run(disk / "out"), "out cannot be written", "is read-only", "--output-dir")


def test_a_disk_that_fills_in_the_first_checkpoint_leaves_no_half_of_it(
    workshop: Workshop, small_disk: Callable[[str], Path]
):
    disk = small_disk("120k")
    assert_refused(workshop.run(disk / "out"), "round-000002", "disk is full", "parablock resume")
    assert half_written(disk) == []
    assert list((disk / "out/checkpoints").iterdir()) == []
    small_disk("4m")
    assert command("resume", str(disk / "out")).code == 0
    assert summary_of(disk / "out")["model_sha256"] == undisturbed(workshop)["model_sha256"]


def test_a_disk_that_fills_later_leaves_the_last_good_checkpoint_to_go_on_from(
    workshop: Workshop, small_disk: Callable[[str], Path]
):
    disk = small_disk("700k")  # a checkpoint takes about 460 kB
    assert_refused(workshop.run(disk / "out"), "round-000004", "disk is full", "parablock resume")
    assert half_written(disk) == []
    assert [path.name for path in (disk / "out/checkpoints").iterdir()] == ["round-000002"]
    small_disk("4m")
    resumed = command("resume", str(disk / "out"))
    assert resumed.code == 0
    assert "resuming at round 2" in resumed.stdout
    assert summary_of(disk / "out")["model_sha256"] == undisturbed(workshop)["model_sha256"]


def test_a_disk_that_fills_under_the_model_leaves_no_half_of_it(
    workshop: Workshop, small_disk: Callable[[str], Path]
):
    disk = small_disk("560k")  # the model takes about 200 kB
    assert_refused(
        workshop.run(disk / "out", "checkpoint.every_rounds=4"),
        "model cannot be written",
        "disk is full",
        "Free some space",
    )
    assert half_written(disk) == []
    assert not (disk / "out/model").exists()
    small_disk("4m")
    assert command("resume", str(disk / "out")).code == 0
    assert summary_of(disk / "out")["model_sha256"] == undisturbed(workshop)["model_sha256"]


def undisturbed(workshop: Workshop, *overrides: str) -> dict[str, Any]:
    run_dir = workshop.path / "-".join(["undisturbed", *overrides])
    if not run_dir.exists():
        assert workshop.run(run_dir, *overrides).code == 0
    return summary_of(run_dir)


@contextmanager
def longest_file(limit_bytes: int) -> Iterator[None]:
    """Let every write of this process fail that would make a file longer than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_in_mid_run_leaves_the_last_good_checkpoint_to_go_on_from(
    workshop: Workshop, tmp_path: Path
):
    # With kept moments a client's part of a checkpoint grows by 75 kB at each new block, to 188 kB at round 2
    # and 338 kB at round 4.
    keep, run_dir = "train.optimizer_state=keep", tmp_path / "out"
    with longest_file(256_000):
        outcome = workshop.run(run_dir, keep)
    assert_refused(outcome, "round-000004", "cannot be written", "--output-dir")
    assert half_written(run_dir) == []
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["round-000002"]
    assert summary_of(run_dir)["status"] == "failed"
    resumed = command("resume", str(run_dir))
    assert resumed.code == 0
    assert "resuming at round 2" in resumed.stdout
    assert summary_of(run_dir)["model_sha256"] == undisturbed(workshop, keep)["model_sha256"]
    assert [row["round_index"] for row in metrics_of(run_dir)] == list(range(6))


def test_a_disk_that_is_full_of_updates_leaves_the_last_checkpoint_to_go_on_from(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["round-000002"]
    assert half_written(run_dir) == []
    resumed = command("resume", str(run_dir))
    assert resumed.code == 0
    assert "resuming at round 2" in resumed.stdout
    assert summary_of(run_dir)["model_sha256"] == undisturbed(workshop)["model_sha256"]


def test_a_run_that_cannot_be_saved_when_it_is_stopped_says_so(workshop: Workshop, tmp_path: Path):
    run_dir = tmp_path / "out"
    rounds: list[int] = []

    def asked_to_stop() -> bool:
        rounds.append(len(rounds))
        return len(rounds) >= 3

    config = load_config(workshop.config, ["checkpoint.every_rounds=0"])
    with (
        make_progress(console=Console(file=io.StringIO())) as progress,
        longest_file(100_000),
        pytest.raises(StorageError, match="round-000003 cannot be written"),
    ):
        run(config, run_dir, progress=progress, asked_to_stop=asked_to_stop)
    assert summary_of(run_dir)["status"] == "failed"
    assert half_written(run_dir) == []


def test_a_run_whose_report_cannot_be_written_is_complete_all_the_same(workshop: Workshop, tmp_path: Path):
    run_dir = tmp_path / "out"
    with longest_file(400_000):
        assert_refused(workshop.run(run_dir), "report.html cannot be written", "--output-dir")
    assert summary_of(run_dir) == {**summary_of(run_dir), "status": "completed"}
    assert summary_of(run_dir)["model_sha256"] == undisturbed(workshop)["model_sha256"]
    assert half_written(run_dir) == []


@pytest.mark.parametrize("limit_bytes", [0, 1000])
def test_a_run_that_cannot_write_its_first_files_leaves_nothing(
    limit_bytes: int, workshop: Workshop, tmp_path: Path
):
    run_dir = tmp_path / "new" / "out"
    with longest_file(limit_bytes):
        assert_refused(workshop.run(run_dir), str(run_dir), "cannot be written", "--output-dir")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_write_its_first_files_leaves_what_was_in_the_folder(workshop: Workshop, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with longest_file(1000):
        assert_refused(workshop.run(tmp_path), "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -- resume ---------------------------------------------------------------------------------------------------


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path):
    assert_refused(command("resume", str(tmp_path)), f"{tmp_path} holds no run", "--output-dir")
    assert_refused(command("resume", str(tmp_path / "nowhere")), "nowhere holds no run", "--output-dir")
    assert list(tmp_path.iterdir()) == []


def test_a_run_cannot_go_on_with_other_rows(workshop: Workshop, unfinished: Path, tmp_path: Path):
    run_dir = shutil.copytree(unfinished, tmp_path / "run")
    kept = workshop.client_file(1).read_text()
    try:
        write_rows(workshop.client_file(1), [sum_row(9, k) for k in range(10)])
        assert_refused(command("resume", str(run_dir)), "data_sha256", "Put back what changed")
    finally:
        workshop.client_file(1).write_text(kept)
    assert half_written(run_dir) == []


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


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": lambda place: damage(place / "server.safetensors"),
    "flipped bit of a client": lambda place: damage(place / "client-002.safetensors"),
    "missing file": lambda place: (place / "client-002.safetensors").unlink(),
    "cut state": lambda place: (place / "state.json").write_text('{"format_version"'),
    "no state": lambda place: (place / "state.json").unlink(),
    "state of another kind": lambda place: (place / "state.json").write_text("[1]"),
    "another format version": lambda place: (place / "state.json").write_text(
        (place / "state.json").read_text().replace('"format_version": ', '"format_version": 9')
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_of_which_every_checkpoint_is_damaged_cannot_be_resumed(kind: str, unfinished: Path, tmp_path: Path):
    run_dir = shutil.copytree(unfinished, tmp_path / "run")
    for place in (run_dir / "checkpoints").iterdir():
        DAMAGES[kind](place)
    outcome = command("resume", str(run_dir))
    assert_refused(outcome, "every checkpoint in", "is damaged", "round-000002", "round-000004", "anew")
    assert half_written(run_dir) == []


# -- eval, blocks, demo ---------------------------------------------------------------------------------------


WRONG_SCORES = {
    "no choices": (["--data", "many.jsonl", "--task", "multiple_choice"], ["many.jsonl, line", "choices"]),
    "missing file": (["--data", "missing.jsonl"], ["missing.jsonl does not exist", "Check the path"]),
    "broken file": (["--data", "broken.jsonl"], ["broken.jsonl, line 4 is not JSON"]),
    "no file": ([], ["--data"]),
    "no examples": (["--data", "test.jsonl", "--max-examples", "0"], ["--max-examples"]),
}


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_what_cannot_be_scored_is_refused(
    case: str, workshop: Workshop, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    write_rows(workshop.path / "many.jsonl", (sum_row(1, k) for k in range(20)))
    write_rows(workshop.path / "choices.jsonl", [{**sum_row(1, 1), "choices": ["#### 3", "#### 4"]}])
    monkeypatch.chdir(workshop.path)
    arguments, says = WRONG_SCORES[case]
    assert_refused(command("eval", str(finished), *arguments), *says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model", "--split", "thirds"], ["blocks.split is 'thirds'", "attention_mlp"]),
        (["model", "--layers-per-block", "0"], ["layers"]),
    ],
)
def test_blocks_of_what_has_none_are_refused(
    arguments: list[str], says: list[str], workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(workshop.path)
    assert_refused(command("blocks", *arguments), *says)


def test_a_demo_does_not_write_over_a_run(finished: Path):
    assert_refused(command("demo", "--output-dir", str(finished)), "holds a run already", "--output-dir")


@pytest.mark.parametrize("arguments", [["fly"], ["run"], ["run", "a.yaml"], ["run", "--fast"], ["resume"]])
def test_a_command_line_that_is_not_understood_shows_its_usage(arguments: list[str]):
    outcome = command(*arguments)
    assert_refused(outcome)
    assert outcome.stderr.startswith("Usage: ")


# -- as a process of its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.num_local_steps=0", "train.num_local_steps: must be at least 1"),
        ("model.name_or_path={path}/corrupt_weights", "corrupt_weights"),
    ],
)
def test_a_process_says_the_same_and_nothing_else(override: str, says: str, workshop: Workshop, tmp_path: Path):
    override = override.format(path=workshop.path)
    apart = command_apart(*workshop.arguments(tmp_path / "out", override))
    here = workshop.run(tmp_path / "out", override)
    assert_refused(apart, says)
    assert (apart.code, apart.stderr) == (here.code, here.stderr)
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(workshop: Workshop, tmp_path: Path):
    plain = workshop.arguments(tmp_path / "out", "seed=-1")
    assert "Traceback" in command("--debug", *plain).stderr
    assert "Traceback" not in command(*plain).stderr
