"""What an operator sees of a server, and what may be asked of it."""

from __future__ import annotations

import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from parablock.cli.main import app
from parablock.deploy.status import read_status, status_table

SITE = {
    "client_id": 0,
    "state": "connected",
    "since": "2026-01-01T00:00:00+00:00",
    "last_round": 122,
    "up_bytes": 987_654_321,
    "down_bytes": 987_654_321,
    "waiting_bytes": 987_654_321,
    "up_bytes_per_s": 98_765_432,
    "down_bytes_per_s": 0,
    "sent_again_bytes": 0,
    "certificate": {"key": "ab" * 32, "not_after": "2036-01-01T00:00:00+00:00"},
}


def run_with(folder: Path, pid: int, **more: Any) -> Path:
    status = {
        "pid": pid,
        "port": 8000,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "paused": False,
        "waiting_for": "the update of round 39",
        "sites": [SITE, {**SITE, "client_id": 1}],
        **more,
    }
    (folder / "deployment").mkdir(parents=True)
    (folder / "deployment" / "status.json").write_text(json.dumps(status))
    return folder


def shown(folder: Path, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(status_table(read_status(folder)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_status_is_whole_at_80_columns(tmp_path: Path):
    text = shown(run_with(tmp_path, os.getpid()), 80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "connected" in text and "123" in text and "waits for the update of round 39" in text


def test_a_run_that_is_complete_waits_for_nobody(tmp_path: Path):
    run_with(tmp_path, 2**22 + 1)
    assert "ended; last seen" in shown(tmp_path, 120)
    (tmp_path / "summary.json").write_text('{"status": "completed"}')
    text = shown(tmp_path, 120)
    assert "the run is complete" in text
    assert "waits" not in text and "connected" not in text and "/s" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["remove", "9"], "no client 9 in this run; its clients are 0 to 1"),
        (["remove", "1"], "removed"),
        (["remove", "site-1"], "removed"),
        (["remove", "one"], "'one' is no client; give its number, such as 3 or site-3"),
    ],
)
def test_only_a_client_of_the_run_can_be_removed(tmp_path: Path, words: list[str], said: str):
    command, client_id = words
    run_with(tmp_path, os.getpid())
    ended = CliRunner().invoke(app, ["deploy", command, str(tmp_path), client_id])
    assert said in ended.output + str(ended.exception)
    assert (tmp_path / "deployment" / "control" / "removed-1").exists() is client_id.endswith("1")


@pytest.mark.parametrize("command", ["stop", "pause"])
def test_nothing_is_asked_of_a_run_that_is_complete(tmp_path: Path, command: str):
    run_with(tmp_path, 2**22 + 1)
    assert CliRunner().invoke(app, ["deploy", command, str(tmp_path)]).exit_code == 0
    (tmp_path / "summary.json").write_text('{"status": "completed"}')
    assert "is complete" in str(CliRunner().invoke(app, ["deploy", command, str(tmp_path)]).exception)
