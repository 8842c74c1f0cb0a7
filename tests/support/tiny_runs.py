"""Whole runs in a second: a tiny model, small files, one configuration, and the real command line.

Tests change the configuration as users do, with `--set`. The command line runs in this process, where it is
fast, or as a process of its own, where it has to be killed or limited.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from outcomes import Outcome, ended
from parablock.cli.main import main
from parablock.config.keys import RunConfig
from parablock.experiment import engines
from parablock.experiment.protections import protections
from parablock.privacy.protection import Protection

NUM_CLIENTS = 4
NUM_LAYERS = 4
VOCABULARY = 300

Row = dict[str, Any]


Runs = Callable[..., Path]


@dataclass(frozen=True)
class Workshop:
    """A folder with `model/`, `client_0.jsonl` … `client_3.jsonl`, `test.jsonl` and `run.yaml`."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def test_file(self) -> Path:
        return self.path / "test.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "run.yaml"

    def client_file(self, client_id: int) -> Path:
        return self.path / f"client_{client_id}.jsonl"

    def run(self, output_dir: Path, *overrides: str) -> Outcome:
        """Run with these `--set` overrides, in this process."""
        return command(*self.arguments(output_dir, *overrides))

    def arguments(self, output_dir: Path, *overrides: str) -> list[str]:
        """The arguments of `parablock` for a run with these `--set` overrides."""
        sets = [word for override in overrides for word in ("--set", override)]
        return ["run", str(self.config), "--output-dir", str(output_dir), *sets]


def make_workshop(
    path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> Workshop:
    workshop = Workshop(path)
    tiny_llama(num_layers=NUM_LAYERS, vocab_size=VOCABULARY).save_pretrained(workshop.model)
    tokenizer.save_pretrained(workshop.model)
    for client_id in range(NUM_CLIENTS):
        write_rows(workshop.client_file(client_id), (sum_row(client_id + 2, k) for k in range(8 + 2 * client_id)))
    write_rows(workshop.test_file, (sum_row(k, k) for k in range(6)))
    workshop.config.write_text(yaml.safe_dump(tiny_config(workshop)))
    return workshop


def tiny_config(workshop: Workshop) -> dict[str, Any]:
    """A run of one client per file that takes well below a second."""
    return {
        "model": {"name_or_path": str(workshop.model), "device": "cpu"},
        "data": {
            "train": [str(workshop.client_file(client_id)) for client_id in range(NUM_CLIENTS)],
            "test": [str(workshop.test_file)],
            "max_length": 64,
            "partition": {"scheme": "by_file"},
        },
        "federation": {"num_clients": NUM_CLIENTS, "num_rounds": 6, "delay": 1},
        "train": {"num_local_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "link": {"upload_mbps": 20, "download_mbps": 20, "latency_s": 0.01},
        "engine": {"clock": "virtual", "num_threads": 1, "step_time_s": 0.05},
        "evaluation": {"every_rounds": 3, "num_answers": 0},
        "checkpoint": {"every_rounds": 2},
    }


def sum_row(left: int, right: int) -> Row:
    return {"prompt": f"{left} plus {right}?", "completion": f"#### {left + right}"}


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def noise_under(keys: Mapping[int, bytes]) -> Iterator[None]:
    """Let each client of a run in this process make its noise of a key of its own, as sites do."""

    def of_keys(config: RunConfig, _: bytes | None) -> Callable[[int], Protection | None]:
        return lambda client_id: protections(config, keys[client_id])(client_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "protections", of_keys)
        yield


def noise_keys(state: Path) -> dict[int, bytes]:
    """Read the keys that sites have made, whose folders lie in this one by client number."""
    return {int(path.parts[-4]): path.read_bytes() for path in state.glob("*/runs/*/noise_key")}


def command(*arguments: str) -> Outcome:
    """Run the real command line in this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["parablock", *arguments])
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except Exception:
            code = 1  # what Python makes of it
            traceback.print_exc()
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def done(*arguments: str) -> Outcome:
    """Run the real command line in this process; it has to succeed."""
    outcome = command(*arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome


def command_line(arguments: Iterable[str]) -> list[str]:
    """The same command line as a process of its own."""
    return [sys.executable, "-c", "from parablock.__main__ import main; main()", *arguments]


def command_apart(
    *arguments: str, environment: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
) -> Outcome:
    """Run the command line as a process of its own."""
    return ended(command_line(arguments), environment=environment, before=before)


def assert_refused(outcome: Outcome, *says: str) -> None:
    """Check that a command has ended with 2, and with one block on stderr that has these words."""
    assert "Traceback" not in outcome.stderr + outcome.stdout
    assert outcome.code == 2, outcome
    assert outcome.stderr.startswith(("error: ", "Usage: "))
    for words in says:
        assert words in outcome.stderr


def after(rounds: int) -> Callable[[], bool]:
    """Return what asks a run to stop when so many of its rounds have started."""
    asked = count()
    return lambda: next(asked) >= rounds


def summary_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return content


def metrics_of(run_dir: Path) -> list[Row]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def longest_file(limit_bytes: int) -> Iterator[None]:
    """Let every write of this process fail that would make a file longer than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def half_written(folder: Path) -> list[str]:
    """Files and folders that were begun and not finished."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".partial")]


class Process:
    """The command line as a process of its own that starts at once, forked from one that has torch loaded.

    Args:
        arguments: Of `parablock`.
        log: Where its output goes.
        stdout: Where its standard output goes instead.
        encoding: Of its output.
        ignores: Signals that it ignores from the beginning, as under `nohup`.
    """

    def __init__(
        self,
        arguments: Iterable[str],
        log: Path,
        *,
        stdout: Path | None = None,
        encoding: str = "utf-8",
        ignores: Iterable[signal.Signals] = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parablock.cli.main", "parablock.experiment.run"])
        self.log = log
        log.write_text("")
        outputs = str(stdout or log), str(log), encoding
        self._process = context.Process(target=_main_with, args=(list(arguments), *outputs, tuple(ignores)))
        self._process.start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def kill(self) -> int:
        """Send SIGKILL and give the exit code, which is another one if the process was faster."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"it still runs after {timeout_s} s"
        return self._process.exitcode

    def wait_until(self, reached: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for something to be true, or for the end of the process."""
        end = time.monotonic() + timeout_s
        while not reached() and self._process.is_alive():
            assert time.monotonic() < end, f"nothing came of it in {timeout_s} s: {self.log.read_text()}"
            time.sleep(0.002)


def _main_with(
    arguments: list[str], stdout: str, log: str, encoding: str, ignores: tuple[signal.Signals, ...]
) -> None:
    for number in ignores:
        signal.signal(number, signal.SIG_IGN)
    with Path(log).open("a", encoding="utf-8") as file, Path(stdout).open("a", encoding="utf-8") as other:
        os.dup2(other.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (open(fd, "w", encoding=encoding, buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
    sys.argv = ["parablock", *arguments]
    main()
