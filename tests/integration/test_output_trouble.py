"""Output that fails, and signals: a run goes on, or is saved and resumes with the same model."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.table import Table
from rich.text import Text

from outcomes import Outcome, ended
from parablock.cli import terminal
from parablock.cli.output import LastingStream, SafeConsole, lasting_output, say, say_whole
from parablock.experiment.progress import SILENCE_S
from parablock.printable import as_argument, printable
from tiny_runs import (
    Process,
    Runs,
    Workshop,
    command,
    command_line,
    done,
    half_written,
    metrics_of,
    summary_of,
    tiny_config,
    write_rows,
)

NUM_ROUNDS = 8
SLOW = (f"federation.num_rounds={NUM_ROUNDS}", "engine={clock: real, num_threads: 1}", "link={latency_s: 0.02}")


def sha(run_dir: Path) -> str:
    return str(summary_of(run_dir)["model_sha256"])


def rows_of(run_dir: Path) -> int:
    return len(metrics_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> str:
    return sha(runs(*SLOW))


def test_a_run_outlasts_its_reader(workshop: Workshop, undisturbed: str, tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with Process(workshop.arguments(tmp_path / "run", *SLOW), tmp_path / "log", stdout=pipe) as process:
        with pipe.open(encoding="utf-8") as reader:
            assert all(reader.readline() for _ in range(2))
        assert rows_of(tmp_path / "run") == 0, "it is at work when its reader leaves"
        assert process.wait() == 0
    assert (tmp_path / "log").read_text() == ""
    assert sha(tmp_path / "run") == undisturbed


def test_a_run_outlasts_a_full_disk_of_its_output_and_under_nohup_the_end_of_its_terminal(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    arguments, log, full = workshop.arguments(tmp_path / "run", *SLOW), tmp_path / "log", Path("/dev/full")
    with Process(arguments, log, stdout=full, ignores=[signal.SIGHUP]) as process:
        process.wait_until(lambda: rows_of(tmp_path / "run") >= 2)
        process.send(signal.SIGHUP)
        assert process.wait() == 0
    assert "the output could not be written: No space left on device; the files are whole" in log.read_text()
    assert sha(tmp_path / "run") == undisturbed


def test_output_that_is_the_result_is_not_lost_in_silence(workshop: Workshop, tmp_path: Path):
    log = tmp_path / "log"
    with Process(["blocks", str(workshop.model)], log, stdout=Path("/dev/full")) as process:
        assert process.wait() == 1
    assert "the output could not be written: No space left on device" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_terminal_of_ascii_gets_similar_characters(workshop: Workshop, undisturbed: str, tmp_path: Path):
    with Process(workshop.arguments(tmp_path / "run", *SLOW), tmp_path / "log", encoding="ascii") as process:
        assert process.wait() == 0
    said = (tmp_path / "log").read_text()
    assert "eval loss" in said and said.isascii() and "?" not in said
    assert sha(tmp_path / "run") == undisturbed


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


def test_what_a_signal_s_handler_writes_comes_after_what_is_being_written():
    class Interrupted(io.StringIO):
        """It refuses a write within a write, as Python's streams do; a signal comes in a write and in a flush."""

        def __init__(self) -> None:
            super().__init__()
            self.signals, self.is_busy = ["in a write", "in a flush"], False

        def write(self, text: str) -> int:
            self._meet("in a write")
            return super().write(text)

        def flush(self) -> None:
            self._meet("in a flush")

        def _meet(self, place: str) -> None:
            if self.is_busy:
                raise RuntimeError("reentrant call inside <_io.BufferedWriter>")
            self.is_busy = True
            if place in self.signals:
                self.signals.remove(place)
                stream.write(f"{place}\n")
                stream.flush()
            self.is_busy = False

    written = Interrupted()
    stream = LastingStream(written)
    stream.write("a row\n")
    stream.flush()
    assert written.getvalue() == "a row\nin a write\nin a flush\n"
    with pytest.raises(RuntimeError, match="reentrant"):
        written.is_busy = True
        written.write("without the guard")


def test_the_streams_are_put_back(capsys: pytest.CaptureFixture[str]):
    import sys

    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), lasting_output() as output:
        sys.stdout.write("said\n")
        assert sys.stdout is output
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"


# -- text of others --------------------------------------------------------------------------------------------

EVIL = "a\x1b]0;PWNED\x07\x1b[31m\x9b31m\u202e\u2066\x7f\r"
SHOWN = r"a\u001b]0;PWNED\u0007\u001b[31m\u009b31m\u202e\u2066\u007f\u000d"
ACTING = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"


def test_no_text_acts_on_a_terminal_and_the_display_s_own_colours_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console, table = SafeConsole(), Table(EVIL)
    table.add_row(EVIL)
    for part in (EVIL, table):
        console.print(part, highlight=False)
        assert SHOWN in re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    console.print(Text(f"x\x1b]0;PWNED\u202e {EVIL}", style="green"), soft_wrap=True)
    said = capsys.readouterr().out
    assert said.startswith("\x1b[32mx\\u001b]0;PWNED\\u202e")
    assert re.findall(ACTING, said.replace("\x1b[32m", "").replace("\x1b[0m", "")) == []
    say(EVIL)
    say(EVIL, err=True)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}\n")
    assert len(re.findall(ACTING, EVIL)) == 8


def test_line_ends_of_windows_stay_and_a_return_to_the_begin_of_a_line_does_not():
    assert printable("a\r\nb\rc\r") == "a\r\nb\\u000dc\\u000d"


def test_text_is_broken_between_words_on_a_terminal_and_its_lines_are_whole_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = f"runs/{'mine' * 10}/evaluation/loss.jsonl"
    text = f"8 rounds of 2 clients took 19 min, and the communication none of it; every row: {path} (held out)"
    speak = [
        say,
        lambda text: say(text, err=True),
        lambda text: SafeConsole().print(text),  # its width is that of when it is made
        lambda text: SafeConsole().print(Text(text)),
    ]
    for one in speak:
        one(text)
        assert "".join(capsys.readouterr()) == f"{text}\n"
    SafeConsole().print_as_it_is("a\tb")
    assert capsys.readouterr().out == "a\tb\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    for one in speak:
        one(text)
        lines = re.sub("\x1b\\[[0-9;]*m", "", "".join(capsys.readouterr())).splitlines()
        assert " ".join(line.strip() for line in lines) == text
        assert path in [line.strip() for line in lines]
        assert max(len(line.rstrip()) for line in lines if path not in line) <= 40
    say_whole(text)
    assert capsys.readouterr().out == f"{text}\n"
    resume = f"parablock resume {'mine' * 10} --debug"
    say(f"it has no model yet; finish it with: {resume}", "or not")
    assert capsys.readouterr().out.splitlines()[-2:] == [resume, "or not"]
    quoted = f"see `{resume}`"
    say(quoted)
    assert capsys.readouterr().out.splitlines() == ["see", f"`{resume}`"]
    SafeConsole().print_as_it_is(text)  # what a model says
    assert re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out) == f"{text}\n"


def test_what_libraries_write_may_be_coloured_and_redrawn_and_can_do_nothing_else():
    written = io.StringIO()
    stream = LastingStream(written)
    for text in ("\r 50%\x1b[A", "\x1b[1;31mred\x1b[0m\x1b[2K\x1b[?25l", EVIL, "\x1bP0;1|x\x1b\\\x9d0;x"):
        stream.write(text)
    stream.flush()
    kept = "\r 50%\x1b[A\x1b[1;31mred\x1b[0m\x1b[2K\x1b[?25l"
    shown = SHOWN.replace(r"\u001b[31m", "\x1b[31m").replace(r"\u000d", "\r")
    assert written.getvalue() == kept + shown + r"\u001bP0;1|x\u001b\\u009d0;x".replace(r"\\u", "\\\\u")


def test_rows_fields_answers_and_errors_come_to_a_terminal_as_text(workshop: Workshop, tmp_path: Path):
    row = {"prompt": EVIL, "completion": EVIL, EVIL: 1}
    file = write_rows(tmp_path / "evil.jsonl", [row])
    broken = write_rows(tmp_path / "broken.jsonl", [{EVIL: 1}])
    model, lines = str(workshop.model), tmp_path / "lines.txt"
    lines.write_text(EVIL.rstrip())
    short = ("--max-new-tokens", "2")
    outcomes = [
        command("data", str(file)),
        command("data", str(file), "--model", model),
        command("data", str(broken)),
        command("generate", model, "--data", str(lines), *short),
        command("generate", model, "--data", str(lines), *short, "--format", "jsonl"),
    ]
    for outcome in outcomes:
        assert r"\u001b]0;PWNED\u0007" in outcome.stdout + outcome.stderr
        assert re.findall(ACTING, outcome.stdout + outcome.stderr) == []
    assert [outcome.code for outcome in outcomes] == [0, 0, 2, 0, 0]
    assert json.loads(outcomes[-1].stdout)["prompt"] == EVIL.rstrip()


def test_a_path_with_a_line_end_stays_in_one_line_whatever_prints_it(workshop: Workshop, tmp_path: Path):
    begin, end = "a\x07", "OF A NAME\t'b"
    folder = tmp_path / f"{begin}\n{end}"
    shutil.copytree(workshop.path, folder)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_config(Workshop(folder))))
    without_model = folder / "other.yaml"
    without_model.write_text(
        yaml.safe_dump({**tiny_config(Workshop(folder)), "model": {"name_or_path": f"{folder}/no"}})
    )
    run, gone, rows = str(folder / "run"), str(folder / "gone"), str(folder / "test.jsonl")
    to, few = "--output-dir", ("--set", "federation.num_rounds=4")
    broken = write_rows(folder / "broken.jsonl", [{"x": 1}])
    outcomes = [
        (0, command("data", rows)),
        (2, command("data", gone)),
        (2, command("data", str(broken))),
        (2, command("init", rows, "--model", gone)),
        (0, command("plan", str(config))),
        (2, command("plan", gone)),
        (0, command("run", str(config), to, run, *few)),
        (2, command("run", str(config), to, run)),
        (2, command("run", str(without_model), to, f"{run}2")),
        (2, command("resume", run)),
        (2, command("resume", gone)),
        (0, command("report", run)),
        (2, command("report", gone)),
        (0, command("eval", run)),
        (2, command("eval", gone)),
        (0, command("export", run, to, str(folder / "hf"))),
        (2, command("export", run, to, str(folder / "hf"))),
        (0, command("generate", run, "1 + 1?", "--max-new-tokens", "2", "--output", str(folder / "answers"))),
        (2, command("generate", run, "--data", gone)),
        (2, command("chat", gone)),
        (2, command("blocks", gone)),
        (0, command("compare", str(config), to, str(folder / "compared"), "--methods", "fedit", *few)),
        (0, command("forget", run, "--client", "1")),
        (2, command("forget", gone, "--client", "1")),
        (2, command("audit", gone)),
        (0, command("deploy", "keys", "--sites", "1", to, str(folder / "keys"))),
        (2, command("deploy", "status", gone)),
    ]
    for code, outcome in outcomes:
        said = outcome.stdout + outcome.stderr
        assert outcome.code == code, said
        assert "a\\u0007\\nOF A NAME\\t" in said
        assert re.findall(f"{ACTING}|\nOF A|\t", said) == []
    assert re.findall(f"{ACTING}|\nOF A|\t", str(folder)) == ["\x07", "\nOF A", "\t"]


def test_the_path_of_a_printed_command_is_read_by_a_shell_as_it_is():
    for path in ("a b", "a\nb", "-a\t'\\n", "\x1b]0;x\x07", "é\x9b\u202e\u2028\r\n$x"):
        word = as_argument(path)
        assert re.findall(f"{ACTING}|\n|\t|\u2028", word) == []
        given = subprocess.run(
            ["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
        )
        assert given.stdout.decode().removeprefix("./") == path


# -- a terminal that is closed, and Ctrl-C ---------------------------------------------------------------------


class Terminal:
    """A run at a real terminal."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under `nohup`
            os.environ.update(TERM="xterm", COLUMNS="100", LINES="40")
            words = command_line(arguments)
            os.execv(words[0], words)
        self.shown, self._closed = "", False

    def read(self, seconds: float = 0.05) -> None:
        if not self._closed and select.select([self._master], [], [], seconds)[0]:
            try:
                text = os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                self._closed = True
                return
            self.shown += text

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


def test_a_closed_terminal_whose_picture_has_moved_saves_the_run(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    """Up to the end something is drawn all the time; that it is new is for the unit tests."""
    terminal = Terminal(workshop.arguments(tmp_path / "run", *SLOW))
    terminal.read_until(lambda: rows_of(tmp_path / "run") >= 2 and "2/2" in terminal.shown)
    terminal.hang_up()
    assert terminal.wait() == 130
    # loading draws nothing itself: without the display's own thread its words are shown once
    assert terminal.shown.count("loading torch and transformers") >= 3
    for words in ("loading torch and transformers", "scoring the base model", "step"):
        assert words in terminal.shown
    assert SILENCE_S > 5  # a log is not a picture
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    done("resume", str(tmp_path / "run"))
    assert sha(tmp_path / "run") == undisturbed


def test_ctrl_c_says_what_it_waits_for_and_twice_names_the_run(
    workshop: Workshop, undisturbed: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    terminal = Terminal(workshop.arguments(run_dir, *SLOW, "link={latency_s: 1.5}", "federation.delay=0"))
    terminal.read_until(lambda: "round 1/8" in terminal.shown)  # how long a round takes is known
    terminal.press(b"\x03")
    terminal.read_until(lambda: "waiting for the end of round" in terminal.shown)
    terminal.press(b"\x03")
    assert terminal.wait() == 130
    said = " ".join(terminal.shown.split())
    assert "about" in said.partition("waiting for the end of round")[2][:40]
    assert f"parablock resume {run_dir}" in said
    assert "Traceback" not in said


SIGNAL_AT_AN_IMPORT = """
import importlib.abc, os, signal, sys
name, number, makes_of_it = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)

class Sender(importlib.abc.MetaPathFinder):
    def find_spec(self, wanted, path, target=None):
        if wanted == name:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), number)
                sum(range(1000))
            except BaseException:
                if makes_of_it == "itself":
                    raise
                raise ImportError("a library has caught it")

sys.meta_path.insert(0, Sender())
from parablock.__main__ import main
main()
"""


def signalled_at(name: str, *arguments: str, number: int = signal.SIGINT, makes_of_it: str = "itself") -> Outcome:
    """Run the command line as a process that gets a signal when it imports a module."""
    return ended([sys.executable, "-c", SIGNAL_AT_AN_IMPORT, name, str(int(number)), makes_of_it, *arguments])


@pytest.mark.parametrize("command_name", ["plan", "run"])
@pytest.mark.parametrize("name", ["parablock.cli.main", "typer", "parablock.config.load", "torch"])
@pytest.mark.parametrize("makes_of_it", ["itself", "another error"])
def test_ctrl_c_while_anything_loads_ends_with_one_line(
    command_name: str, name: str, makes_of_it: str, workshop: Workshop, tmp_path: Path
):
    words = [command_name, str(workshop.config)]
    words += ["--output-dir", str(tmp_path / "run")] if command_name == "run" else []
    outcome = signalled_at(name, *words, makes_of_it=makes_of_it)
    assert outcome.code == 130, outcome
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("stopped at once; nothing ") and " is left " in line and not outcome.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_while_the_program_loads_end_with_the_same_line(number: int, workshop: Workshop):
    outcome = signalled_at("typer", "plan", str(workshop.config), number=number)
    assert (outcome.code, outcome.stdout) == (130, "") and outcome.stderr.startswith("stopped at once; nothing was")


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_a_run_whose_streams_are_closed_writes_its_files(workshop: Workshop, tmp_path: Path, closed: str):
    words = command_line(workshop.arguments(tmp_path / "run", "federation.num_rounds=4"))
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *words], check=False, timeout=120)
    assert ended.returncode == 0
    assert summary_of(tmp_path / "run")["status"] == "completed"
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("made", [(), ("checkpoints",), ("checkpoints", "checkpoints/round-000001")])
def test_a_stop_is_told_of_whatever_a_run_has_begun(tmp_path: Path, made: tuple[str, ...]):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").touch()
    for name in made:
        (run / name).mkdir()
    where = "go on from the last checkpoint" if len(made) == 2 else "before the first checkpoint"
    said = terminal._after_a_stop(run, terminal.RESUME)
    assert where in said and said.endswith(f"parablock resume '{run}'")
    assert [as_argument(path) for path in ("-r", "a b", "runs/a")] == ["./-r", "'a b'", "runs/a"]
    (run / "summary.json").write_text('{"status": "completed"}')
    said = terminal._after_a_stop(run, terminal.RESUME)
    assert "is complete" in said and "resume" not in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("parablock.experiment.forget", ["forget", "run", "--client", "0"]),
        ("parablock.config.load", ["deploy", "server", "run.yaml", "--output-dir", "run"]),
        ("parablock.deploy.site", ["deploy", "client", "site.yaml", "--server", "127.0.0.1:1"]),
        ("transformers", ["deploy", "check", "site.yaml", "--server", "127.0.0.1:1", "--insecure"]),
        ("parablock.config.load", ["deploy", "app", "run.yaml", "--output-dir", "run"]),
        ("parablock.storage.run_directory", ["resume", "run"]),
    ],
)
def test_ctrl_c_while_a_command_for_sites_loads_ends_with_one_line(name: str, words: list[str]):
    outcome = signalled_at(name, *words, makes_of_it="another error")
    assert outcome.code == 130, outcome
    (line,) = (outcome.stdout + outcome.stderr).splitlines()
    assert line.startswith("stopped at once; ")


def test_ctrl_c_in_a_command_that_shows_no_progress_ends_with_the_code_of_a_stop():
    outcome = signalled_at("parablock.deploy.status", "deploy", "status", "run")
    assert (outcome.code, outcome.stdout, "Traceback" in outcome.stderr) == (130, "", False), outcome


def test_a_signal_that_a_script_ignores_ends_nothing(workshop: Workshop):
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SIGNAL_AT_AN_IMPORT}"
    words = ["parablock.cli.main", str(int(signal.SIGINT)), "itself", "--version"]
    outcome = ended([sys.executable, "-c", ignoring, *words])
    assert (outcome.code, outcome.stderr) == (0, "") and outcome.stdout.startswith("parablock ")


def test_a_signal_in_an_export_leaves_nothing_half_written(runs: Runs, tmp_path: Path):
    words = ["export", str(runs()), "--format", "adapter", "--output-dir", str(tmp_path / "new")]
    outcome = signalled_at("peft", *words, number=signal.SIGTERM)
    assert (outcome.code, outcome.stdout) == (130, "")
    assert outcome.stderr == "stopped at once; nothing half-written is left here\n"
    assert list(tmp_path.iterdir()) == []


MOMENTS = ("start", "load", "scored", "row 1", "row 2", "checkpoint", "row 3", "row 4", "row 5", "row 6", "row 7")


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


@pytest.mark.parametrize("name", ["forget", "compare"])
def test_ctrl_c_twice_names_the_run_that_was_under_way(name: str, runs: Runs, workshop: Workshop, tmp_path: Path):
    slow = ("federation.delay=0", "engine={clock: real, num_threads: 1}", "link={latency_s: 0.5}")
    begun = tmp_path / "out"
    if name == "forget":
        words = ["forget", str(runs(*slow, "federation.num_rounds=4")), "--client", "1", "--yes"]
    else:
        words = ["compare", str(workshop.config), "--methods", "fl_bcd,fedavg"]
        words += [word for setting in slow for word in ("--set", setting)]
        begun = tmp_path / "out" / "fl_bcd"
    with Process([*words, "--output-dir", str(tmp_path / "out")], tmp_path / "log") as process:
        process.wait_until(lambda: rows_of(begun) >= 1)
        process.send(signal.SIGINT)
        process.wait_until(lambda: "stopping at the next round" in (tmp_path / "log").read_text())
        process.send(signal.SIGINT)
        assert process.wait() == 130
    goes_on = "the same command" if name == "compare" else f"parablock resume {begun}"
    assert f"with: {goes_on}\n" in (tmp_path / "log").read_text()
