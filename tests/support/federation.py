"""A federation on this machine that lives by the commands of docs/deploying.md, as they stand there."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pages import ROOT, steps
from parablock.deploy.status import read_status
from parablock.errors import InputError
from tiny_runs import Process, metrics_of

PASSPHRASE = "three words here"
PATIENCE_S = 180.0
RUN: dict[str, dict[str, Any]] = {
    "federation": {"num_rounds": 40, "stall_timeout_s": 120},
    "train": {"num_local_steps": 2, "learning_rate": 0.01},
    "checkpoint": {"every_rounds": 4, "keep": 2},
    "evaluation": {"every_rounds": 0},
}
"""What the operator changes in the run.yaml that `deploy init` wrote."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Federation:
    """A folder with a model, rows, and what the commands of the page make there.

    Args:
        folder: An empty one, to which a model and rows have been brought.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.started: dict[str, Process] = {}
        page = (ROOT / "docs" / "deploying.md").read_text()
        self.sections = {
            title: [line for step in steps(part) if step.language == "bash" for line in step.content.splitlines()]
            for title, _, part in (part.partition("\n") for part in page.split("\n## ")[1:])
        }

    def line(self, section: str, *words: str) -> str:
        """The one command of a section that has all these words, with this machine's host and port."""
        (found,) = (line for line in self.sections[section] if all(word in line for word in words))
        return self.local(found)

    def local(self, line: str) -> str:
        """A command with the host and the port of this machine, and nothing else changed."""
        local = line.replace("0.0.0.0:8000", "127.0.0.1:8000").replace("fl.example.org", "localhost")
        return local.replace(":8000", f":{self.port}")

    def shell(self, line: str, *, code: int = 0) -> str:
        """Type a command into a shell, with the passphrase where it is asked for; give what it printed."""
        primary, terminal = os.openpty()
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.folder,
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "COLUMNS": "200",
                "PYTHONUNBUFFERED": "1",
            },
        )
        assert process.stdout is not None
        printed, out, end = b"", process.stdout.fileno(), time.monotonic() + PATIENCE_S
        with process.stdout:
            while True:
                assert time.monotonic() < end, (line, printed)
                ready, _, _ = select.select([out, primary], [], [], 1.0)
                if primary in ready and os.read(primary, 4096).rstrip().endswith(b":"):  # it asks
                    os.write(primary, f"{PASSPHRASE}\n".encode())
                if out in ready:
                    if not (part := os.read(out, 4096)):
                        break
                    printed += part
        ended = process.wait(PATIENCE_S)  # before its terminal is closed, which would hang it up
        os.close(primary)
        os.close(terminal)
        text = printed.decode()
        assert ended == code, (line, ended, text)
        assert "Traceback" not in text
        return text

    def start(self, name: str, line: str) -> Process:
        """Start a command that goes on, in this folder; a process of that name that is left is an error."""
        assert name not in self.started or not self.started[name].is_alive
        words = shlex.split(line)
        assert words[0] == "parablock"
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            self.started[name] = Process(words[1:], self.log(name))
        finally:
            os.chdir(before)
        return self.started[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def serve(self, run: str) -> Process:
        """Start the server on a run by the command of the page."""
        return self.start("server", self.line("Day by day", "deploy server").replace("runs/second", f"runs/{run}"))

    def site(self, client_id: int) -> Process:
        return self.start(
            f"site-{client_id}", self.line("Ten minutes to a federation", "deploy client", f"site-{client_id}/")
        )

    def until(self, name: str, reached: Callable[[], bool]) -> None:
        """Wait for something to be true while a process lives."""
        self.started[name].wait_until(reached, PATIENCE_S)
        assert reached(), self.log(name).read_text()

    def run_dir(self, run: str) -> Path:
        return self.folder / "server" / "runs" / run

    def rounds(self, run: str) -> int:
        file = self.run_dir(run) / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def states(self, run: str) -> list[str]:
        """What the status says of each site."""
        try:
            status = read_status(self.run_dir(run))
        except InputError:
            return []
        return [site["state"] for site in status["sites"]] if status["running"] else []

    def change_run(self, changes: dict[str, dict[str, Any]]) -> None:
        """Edit run.yaml as its operator would."""
        file = self.folder / "server" / "run.yaml"
        tree = yaml.safe_load(file.read_text())
        for section, values in changes.items():
            tree.setdefault(section, {}).update(values)
        file.write_text(yaml.safe_dump(tree))

    def told(self, name: str) -> str:
        return self.log(name).read_text()

    def end(self) -> None:
        for process in self.started.values():
            process.kill()


def participants(run_dir: Path) -> list[list[int]]:
    """The clients whose updates each round has."""
    return [sorted(row["participants"]) for row in metrics_of(run_dir)]


def lines_of(log: Path) -> list[str]:
    """The messages of a log of JSON lines."""
    return [json.loads(line)["message"] for line in log.read_text().splitlines()]


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def has(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
