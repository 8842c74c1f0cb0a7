"""Output that fails, and signals: a run goes on, or is saved and resumes with the same model."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parablock.cli.output import LastingStream, lasting_output
from parablock.experiment.progress import SILENCE_S
from tiny_runs import Process, Runs, Workshop, command_line, done, half_written, metrics_of, summary_of

NUM_ROUNDS = 12
SLOW = ("federation.num_rounds=12", "engine={clock: real, num_threads: 1}", "link={latency_s: 0.02}")


def sha(run_dir: Path) -> str:
    return str(summary_of(run_dir)["model_sha256"])


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> str:
    return sha(runs(*SLOW))


def shell(workshop: Workshop, run_dir: Path, tail: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with its output led into `tail` by a real shell."""
    words = command_line(workshop.arguments(run_dir, *SLOW))
    script = f'"$@" {tail}; echo "code ${{PIPESTATUS[0]}}" >&2'
    return subprocess.run(
        ["bash", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_run_outlasts_its_reader_and_a_full_disk_of_its_output(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    left = shell(workshop, tmp_path / "head", "| head -2")
    assert len(left.stdout.splitlines()) == 2
    assert left.stderr.splitlines() == ["code 0"]
    full = shell(workshop, tmp_path / "full", "> /dev/full")
    assert full.stderr.splitlines()[-1] == "code 0"
    assert "the output could not be written: No space left on device; the files are whole" in full.stderr
    assert sha(tmp_path / "head") == sha(tmp_path / "full") == undisturbed


def test_output_that_is_the_result_is_not_lost_in_silence(workshop: Workshop):
    words = command_line(["blocks", str(workshop.model)])
    with Path("/dev/full").open("w") as full:
        lost = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert lost.returncode == 1
    assert "the output could not be written: No space left on device" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_a_terminal_of_ascii_gets_similar_characters(workshop: Workshop, undisturbed: str, tmp_path: Path):
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    outcome = shell(workshop, tmp_path / "ascii", "", **plain)
    assert outcome.stderr.splitlines() == ["code 0"]
    assert outcome.stdout.isascii() and "?" not in outcome.stdout
    assert sha(tmp_path / "ascii") == undisturbed


def test_what_is_written_after_a_failure_is_dropped_and_the_first_failure_is_known(tmp_path: Path):
    with Path("/dev/full").open("w") as full:
        stream = LastingStream(full)
        for _ in range(3):
            stream.write("x" * 100_000)
            stream.flush()
        assert stream.failure is not None and stream.failure.strerror == "No space left on device"
    with (tmp_path / "log").open("w") as file:
        stream = LastingStream(file)
        stream.write("whole")
        stream.flush()
        assert stream.failure is None
    assert (tmp_path / "log").read_text() == "whole"


def test_the_streams_are_put_back(capsys: pytest.CaptureFixture[str]):
    import sys

    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), lasting_output() as output:
        sys.stdout.write("said\n")
        assert sys.stdout is output
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"


# -- a terminal that is closed, and Ctrl-C ---------------------------------------------------------------------


class Terminal:
    """A run at a real terminal."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="100", LINES="40")
            words = command_line(arguments)
            os.execv(words[0], words)
        self.shown, self._closed, self.pictures = "", False, list[tuple[float, str]]()

    def read(self, seconds: float = 0.05) -> None:
        if not self._closed and select.select([self._master], [], [], seconds)[0]:
            try:
                text = os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                self._closed = True
                return
            self.shown += text
            self.pictures.append((time.monotonic(), text))

    def read_until(self, reached: Callable[[], bool], patience_s: float = 120.0) -> None:
        end = time.monotonic() + patience_s
        while not reached() and not self._closed:
            assert time.monotonic() < end, self.shown
            self.read()

    def press(self, key: bytes) -> None:
        os.write(self._master, key)

    def hang_up(self) -> None:
        os.close(self._master)
        self._closed = True

    def wait(self) -> int:
        self.read_until(lambda: self._closed)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def rows_of(run_dir: Path) -> int:
    return len(metrics_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def test_a_closed_terminal_saves_the_run(workshop: Workshop, undisturbed: str, tmp_path: Path):
    terminal = Terminal(workshop.arguments(tmp_path / "run", *SLOW))
    terminal.read_until(lambda: rows_of(tmp_path / "run") >= 2)
    terminal.hang_up()
    assert terminal.wait() == 130
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    done("resume", str(tmp_path / "run"))
    assert sha(tmp_path / "run") == undisturbed


def test_a_run_under_nohup_does_not_mind_the_end_of_its_terminal(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    words = ["nohup", *command_line(workshop.arguments(tmp_path / "run", *SLOW))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while rows_of(tmp_path / "run") < 2 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert sha(tmp_path / "run") == undisturbed


def test_ctrl_c_says_what_it_waits_for_and_twice_names_the_run(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    terminal = Terminal(workshop.arguments(run_dir, *SLOW, "link={latency_s: 1.5}", "federation.delay=0"))
    terminal.read_until(lambda: "3/12" in terminal.shown or rows_of(run_dir) >= 1)
    terminal.press(b"\x03")
    terminal.read_until(lambda: "waiting for the end of round" in terminal.shown)
    terminal.press(b"\x03")
    assert terminal.wait() == 130
    said = " ".join(terminal.shown.split())
    assert "about" in said.partition("waiting for the end of round")[2][:40]
    assert f"parablock resume {run_dir}" in said
    assert "Traceback" not in said


MOMENTS = ("start", "load", "scored", "row 1", "row 3", "checkpoint", "row 5", "row 7", "row 9", "row 11")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_leaves_nothing_or_a_run_that_goes_on(
    moment: str, workshop: Workshop, undisturbed: str, tmp_path: Path
):
    run_dir = tmp_path / "run"

    def reached() -> bool:
        said = process.log.read_text()
        match moment.split():
            case ["start"]:
                return process.is_alive
            case ["load"]:
                return "loading" in said
            case ["scored"]:
                return "base model: eval loss" in said
            case ["checkpoint"]:
                return any((run_dir / "checkpoints").glob("round-*"))
            case _:
                return rows_of(run_dir) >= int(moment.split()[1])

    with Process(workshop.arguments(run_dir, *SLOW), tmp_path / "log") as process:
        process.wait_until(reached)
        process.send(signal.SIGINT)
        code, said = process.wait(), process.log.read_text()
    assert "Traceback" not in said or moment == "start"  # before the command line is at work, Python itself is told
    assert half_written(run_dir) == []
    if not (run_dir / "config.yaml").exists():
        assert code != 0 and moment in ("start", "load")
        return
    if code == 0:  # the last round was over
        assert sha(run_dir) == undisturbed
        return
    assert code == 130, said
    assert f"parablock resume {run_dir}" in said
    done("resume", str(run_dir))
    assert sha(run_dir) == undisturbed
    assert [row["round_index"] for row in metrics_of(run_dir)] == list(range(NUM_ROUNDS))


# -- a picture that moves ---------------------------------------------------------------------------------------


def test_the_picture_of_a_run_never_stands_still_for_long(workshop: Workshop, tmp_path: Path):
    """From the start to the summary something is drawn all the time; that it is new is for the unit tests."""
    terminal = Terminal(workshop.arguments(tmp_path / "run", *SLOW))
    assert terminal.wait() == 0
    times = [at for at, _ in terminal.pictures]
    # a loaded machine delays a picture; without the display's own thread, loading alone is one gap
    assert len(times) > 20
    shown = terminal.shown
    assert "loading torch and transformers" in shown
    assert "scoring the base model" in shown
    assert "step" in shown and "2/2" in shown
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"
    assert SILENCE_S > 5  # a log is not a picture
