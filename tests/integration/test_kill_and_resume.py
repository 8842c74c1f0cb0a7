"""A run that is killed at any moment and resumed ends as the run that was never disturbed.

The processes that are killed are forked from one that has torch loaded already, so that a kill costs little and
there can be many. The moments are drawn from seeds: after so many rounds, and a random part of a round later.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parablock.model.save import model_sha256
from tiny_runs import (
    NUM_CLIENTS,
    Process,
    Runs,
    Workshop,
    command,
    command_line,
    done,
    half_written,
    metrics_of,
    summary_of,
)

NUM_ROUNDS = 10
LONGER = (f"federation.num_rounds={NUM_ROUNDS}", "train.num_local_steps=1", "evaluation.every_rounds=4")
REAL = ("engine={clock: real, num_threads: 1}", "link={upload_mbps: 50, download_mbps: 50, latency_s: 0.01}")

SCENARIOS: dict[str, tuple[str, ...]] = {
    "delay 0": ("federation.delay=0",),
    "delay 1": (),
    "delay 2": ("federation.delay=2",),
    "delay 2, real clock": ("federation.delay=2", *REAL),
    "partial participation": ("federation.participation=0.5", "federation.delay=2"),
    "kept moments": ("train.optimizer_state=keep",),
    "server adam": ("federation.server_optimizer={name: adam, learning_rate: 0.01}",),
    "server momentum, delay 0": ("federation.server_optimizer.name=momentum", "federation.delay=0"),
    "bf16": ("model.dtype=bfloat16", "wire.format=bfloat16"),
    "bf16 on the wire": ("wire.format=bfloat16", "wire.error_feedback=true", "federation.participation=0.5"),
    "int8 with everything": (
        "wire={format: int8, error_feedback: true, chunk_bytes: 2048}",
        "federation.participation=0.75",
        "train.optimizer_state=keep",
        "federation.server_optimizer.name=momentum",
        "blocks={schedule: importance, allow_unvisited: true}",
    ),
    "a schedule of the learning rate": ("train.lr_scheduler_type=cosine", "train.warmup_ratio=0.2"),
    "steps that fill the wait": ("train.num_local_steps=auto", "link={upload_mbps: 2, download_mbps: 2}"),
    "fedavg": ("federation.method=fedavg", "federation.delay=0"),
    "fedavg in flight": ("federation.method=fedavg", "federation.delay=1"),
    "fedit in flight, moments kept": (
        *("federation.method=fedit", "federation.delay=2", "train.optimizer_state=auto"),
        *("federation.participation=0.5", "federation.in_flight=mean"),
    ),
    "rolora": ("federation.method=rolora", "federation.delay=1", "wire={format: int4, error_feedback: true}"),
    "flora in few bits": ("federation.method=flora", "federation.delay=0", "wire.format=int4"),
    "sparse updates in flight": (
        *("federation.method=fedit", "federation.delay=1", "wire={format: sparse2, density: 0.05}"),
        "federation.participation=0.75",
    ),
    "muon, kept moments": ("train.optimizer=muon", "train.optimizer_state=keep"),
    "half layers for the link": (
        "blocks={split: attention_mlp, layers_per_block: auto}",
        "link={upload_mbps: 10, download_mbps: 10}",
        "train.num_local_steps=2",
    ),
    "no checkpoints": ("checkpoint.every_rounds=0",),
}


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> Runs:
    """Give the run directory of a run with these overrides that nothing disturbed."""
    return lambda *overrides: runs(*LONGER, *overrides)


def start(workshop: Workshop, run_dir: Path, *overrides: str) -> Process:
    return Process(workshop.arguments(run_dir, *LONGER, *overrides), run_dir.with_suffix(".log"))


def go_on(run_dir: Path) -> Process:
    return Process(["resume", str(run_dir)], run_dir.with_suffix(".log"))


def num_rows(run_dir: Path) -> int:
    """Whole lines of the metrics; −1 before there is a run to resume."""
    if not (run_dir / "config.yaml").exists():
        return -1
    return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")


def kill_at(process: Process, run_dir: Path, *, rows: int, later_s: float) -> bool:
    """Kill a process at a moment; False if it had ended by then."""
    process.wait_until(lambda: num_rows(run_dir) >= rows)
    time.sleep(later_s)
    return process.kill() == -signal.SIGKILL


def assert_same_run(run_dir: Path, reference: Path) -> None:
    ours, theirs = summary_of(run_dir), summary_of(reference)
    assert ours["status"] == "completed"
    assert ours["model_sha256"] == theirs["model_sha256"] == model_sha256(run_dir / "model")
    for key in ("initial_eval_loss", "final_eval_loss", "num_rounds", "rounds_done"):
        assert ours[key] == theirs[key]
    # Messages carry times, whose digits differ. A coarse wire sends the first new values after a pause in full.
    assert ours["uplink_bytes"] == pytest.approx(theirs["uplink_bytes"], rel=0.01)
    if "format: float32" in (run_dir / "config.yaml").read_text():
        assert ours["downlink_bytes"] == pytest.approx(theirs["downlink_bytes"], rel=0.01)
    rows, reference_rows = metrics_of(run_dir), metrics_of(reference)
    assert [row["round_index"] for row in rows] == list(range(NUM_ROUNDS))
    keys = ("round_index", "block_index", "train_loss", "eval_loss", "rho", "participants", "staleness")
    for row, reference_row in zip(rows, reference_rows, strict=True):
        assert {key: row[key] for key in keys} == {key: reference_row[key] for key in keys}
    # the report is drawn after the run is complete, and can be drawn again: a kill may leave it half done
    assert [name for name in half_written(run_dir) if not name.startswith(".report.")] == []


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_killed_twice_at_random_moments_ends_as_if_never_stopped(
    scenario: str, workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    overrides, run_dir = SCENARIOS[scenario], tmp_path / "run"
    moments = np.random.default_rng(sorted(SCENARIOS).index(scenario))
    rows = sorted(moments.integers(0, NUM_ROUNDS - 3, size=2).tolist())
    with start(workshop, run_dir, *overrides) as process:
        assert kill_at(process, run_dir, rows=rows[0], later_s=moments.uniform(0, 0.03))
    assert not (run_dir / "summary.json").exists()
    with go_on(run_dir) as process:
        kill_at(process, run_dir, rows=rows[1], later_s=moments.uniform(0, 0.03))
    if not (run_dir / "summary.json").exists():
        done("resume", str(run_dir))
    assert_same_run(run_dir, undisturbed(*overrides))


def test_the_scenarios_differ_from_each_other(undisturbed: Runs):
    names = [name for name in SCENARIOS if name not in ("delay 2, real clock", "no checkpoints")]
    shas = {summary_of(undisturbed(*SCENARIOS[name]))["model_sha256"] for name in names}
    assert len(shas) == len(names)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_moment_from_its_first_to_its_last_ends_as_if_never_stopped(
    seed: int, workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    run_dir, moments = tmp_path / "run", np.random.default_rng(seed)
    process = start(workshop, run_dir)
    kills = 0
    while True:
        with process:
            kills += kill_at(process, run_dir, rows=0, later_s=moments.uniform(0, 0.15 + 0.3 * kills))
        if (run_dir / "summary.json").exists():
            break
        process = go_on(run_dir)
    assert kills >= 1
    assert_same_run(run_dir, undisturbed())


def test_a_run_killed_while_it_saves_its_model_writes_it_again(
    workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    run_dir = tmp_path / "run"
    with start(workshop, run_dir) as process:
        process.wait_until((run_dir / ".model.partial").exists)
        process.kill()
    if not (run_dir / "summary.json").exists():
        done("resume", str(run_dir))
    assert_same_run(run_dir, undisturbed())


def test_a_run_killed_before_there_is_anything_to_resume_is_run_again(
    workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)  # what `run` makes before the configuration
    (run_dir / "metrics.jsonl").touch()
    (run_dir / ".manifest.json.partial").write_text('{"half')
    assert command("resume", str(run_dir)).code == 2
    assert workshop.run(run_dir, *LONGER).code == 0
    assert_same_run(run_dir, undisturbed())


# -- Ctrl-C ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "overrides"),
    [
        (signal.SIGINT, ()),
        (signal.SIGINT, ("federation.delay=0",)),
        (signal.SIGTERM, REAL),
        (signal.SIGTERM, ("checkpoint.every_rounds=0",)),
    ],
)
def test_a_signal_stops_a_run_cleanly_and_it_goes_on_from_that_round(
    number: signal.Signals, overrides: tuple[str, ...], workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    run_dir = tmp_path / "run"
    with start(workshop, run_dir, *overrides) as process:
        process.wait_until(lambda: num_rows(run_dir) >= 3)
        process.send(number)
        assert process.wait() == 130
    said = process.log.read_text()
    assert "stopping at the next round" in said
    assert f"parablock resume {run_dir}" in said
    assert "Traceback" not in said
    assert half_written(run_dir) == []
    summary = summary_of(run_dir)
    assert summary["status"] == "interrupted"
    assert 3 <= summary["rounds_done"] == num_rows(run_dir) < NUM_ROUNDS
    assert summary["model_sha256"] is None
    assert not (run_dir / "model").exists()
    newest = max(int(path.name.removeprefix("round-")) for path in (run_dir / "checkpoints").iterdir())
    assert newest >= summary["rounds_done"]
    resumed = done("resume", str(run_dir))
    assert f"resuming from the checkpoint round-{newest:06d}: " in resumed.stdout
    assert_same_run(run_dir, undisturbed(*overrides))


def test_nobody_else_runs_where_a_run_is_at_work(workshop: Workshop, undisturbed: Runs, tmp_path: Path):
    run_dir = tmp_path / "run"
    with start(workshop, run_dir, *REAL) as process:
        process.wait_until(lambda: num_rows(run_dir) >= 3)
        process.send(signal.SIGSTOP)  # so that it is at work still
        refused = command("resume", str(run_dir))
        process.send(signal.SIGCONT)
        assert process.wait() == 0
    assert refused.code == 2
    assert f"another process is at work in {run_dir}" in " ".join(refused.stderr.split())
    assert_same_run(run_dir, undisturbed(*REAL))


def test_the_installed_program_stops_at_ctrl_c(workshop: Workshop, undisturbed: Runs, tmp_path: Path):
    run_dir = tmp_path / "run"
    words = command_line(workshop.arguments(run_dir, *LONGER, *REAL))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        end = time.monotonic() + 60
        while num_rows(run_dir) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = re.search(
        r"stopped after (\d+) of \d+ rounds and saved, with the updates under way; go on with: (.*)", said
    )
    assert found and int(found[1]) == num_rows(run_dir) and found[2].startswith("parablock resume")
    assert "Traceback" not in said
    done("resume", str(run_dir))
    assert_same_run(run_dir, undisturbed(*REAL))


def test_a_second_signal_stops_at_once_and_leaves_a_run_that_goes_on(
    workshop: Workshop, undisturbed: Runs, tmp_path: Path
):
    slow = ("engine={clock: real, num_threads: 1}", "link={latency_s: 0.4}", "federation.delay=0")
    run_dir = tmp_path / "run"
    with start(workshop, run_dir, *slow) as process:
        process.wait_until(lambda: num_rows(run_dir) >= 1)
        process.send(signal.SIGINT)
        process.wait_until(lambda: "stopping at the next round" in process.log.read_text())
        process.send(signal.SIGINT)
        assert process.wait() == 130
    assert "stopped at once" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("latency_s: 0.4", "latency_s: 0.0"))  # no need to wait
    done("resume", str(run_dir))
    assert_same_run(run_dir, undisturbed("federation.delay=0"))


# -- damage ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(workshop: Workshop) -> Path:
    """A run that was killed with two checkpoints behind it; tests take copies."""
    run_dir = workshop.path / "interrupted"
    with start(workshop, run_dir) as process:
        assert kill_at(process, run_dir, rows=5, later_s=0.0)
    assert len(checkpoints(run_dir)) == 2
    return run_dir


def checkpoints(run_dir: Path) -> list[Path]:
    """The finished ones, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("name", ["server.safetensors", "client-001.safetensors", "state.json", "trace.json"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    name: str, interrupted: Path, undisturbed: Runs, tmp_path: Path
):
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    before, newest = checkpoints(run_dir)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    resumed = done("resume", str(run_dir))
    assert f"passed over a damaged checkpoint: {newest.name}" in resumed.stdout
    again = int(before.name.removeprefix("round-")) + 1
    assert f"resuming from the checkpoint {before.name}: " in resumed.stdout
    assert f"from round {again} on, what had been begun is computed again" in resumed.stdout
    assert_same_run(run_dir, undisturbed())


def forget_checkpoints(run_dir: Path) -> None:
    for path in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(path)


def begin_a_line(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"round_index": 9, "blo')


@pytest.mark.parametrize("damage", [None, forget_checkpoints, begin_a_line])
def test_a_run_goes_on_from_its_newest_checkpoint_or_from_the_beginning(
    damage: Callable[[Path], None] | None, interrupted: Path, undisturbed: Runs, tmp_path: Path
):
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    newest = int(checkpoints(run_dir)[-1].name.removeprefix("round-"))
    if damage:
        damage(run_dir)
    resumed = done("resume", str(run_dir))
    assert "passed over" not in resumed.stdout
    assert (f"resuming from the checkpoint round-{newest:06d}" in resumed.stdout) == (
        damage is not forget_checkpoints
    )
    assert_same_run(run_dir, undisturbed())


@pytest.mark.parametrize("kept", [0, 2])
def test_lost_lines_of_the_metrics_are_an_error_and_not_a_gap(kept: int, interrupted: Path, tmp_path: Path):
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:kept]))
    outcome = command("resume", str(run_dir))
    assert outcome.code == 2
    assert re.search(r"metrics\.jsonl does not hold the \d rounds", outcome.stderr)
    assert (run_dir / "metrics.jsonl").read_text() == "".join(lines[:kept])


# -- what goes on ---------------------------------------------------------------------------------------------


def test_time_and_trace_go_on_where_they_were(interrupted: Path, undisturbed: Runs, tmp_path: Path):
    run_dir = Path(shutil.copytree(interrupted, tmp_path / "run"))
    done("resume", str(run_dir))
    ours, theirs = summary_of(run_dir), summary_of(undisturbed())
    assert ours["compute_s"] == pytest.approx(theirs["compute_s"])
    # what was in flight is sent again: at most the exchange of one round more
    assert theirs["wall_time_s"] * 0.9 < ours["wall_time_s"] < theirs["wall_time_s"] * 1.2
    spans = [event for event in trace_of(run_dir) if event["name"] == "computing"]
    rounds = sorted((event["pid"], event["args"]["round_index"]) for event in spans)
    assert rounds == [(client + 1, t) for client in range(NUM_CLIENTS) for t in range(NUM_ROUNDS)]


def trace_of(run_dir: Path) -> list[dict[str, Any]]:
    events = json.loads((run_dir / "trace.json").read_text())["traceEvents"]
    return [event for event in events if event["ph"] == "X"]
