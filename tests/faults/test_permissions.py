"""What this user may not read: one block that names it, the reason and the cure, and never another's cause.

The superuser may read everything, so the commands run in a process that has given that up, where it can.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from outcomes import Outcome
from tiny_runs import Workshop, assert_refused, write_rows

GIVEN_UP = ("--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-all")
SCRIPT = """
import json, sys
from dataclasses import asdict
from tiny_runs import command
print("\\n" + json.dumps([asdict(command(*line.split())) for line in json.loads(sys.argv[1])]))
"""
DENIED = "cannot be read: Permission denied"
CASES = {
    "data folder": ("folder " + DENIED, "may not enter the folder folder", "chmod u+rX folder"),
    "data folder/*.jsonl": ("folder/*.jsonl " + DENIED, "may not enter the folder folder", "chmod u+rX folder"),
    "data folder/rows.jsonl": ("rows.jsonl " + DENIED, "may not enter the folder folder", "chmod u+rX folder"),
    "data file": ("file/rows.jsonl " + DENIED, "may not read the file file/rows.jsonl", "chmod u+rX"),
    "data table": ("table/rows.parquet " + DENIED, "may not read the file table/rows.parquet", "chmod u+rX"),
    "init {rows} --model kept --output new.yaml": ("kept " + DENIED, "may not enter the folder kept", "chmod"),
    "init {rows} --model settings --output new.yaml": (
        "settings/config.json " + DENIED,
        "may not read the file settings/config.json",
        "chmod u+rX settings/config.json",
    ),
    "run {config} --output-dir out --set model.name_or_path=weights": (
        "weights/model.safetensors " + DENIED,
        "may not read the file",
        "chmod u+rX",
    ),
    "eval run": ("run/config.yaml " + DENIED, "may not enter the folder run.", "chmod u+rX run)"),
    "export run --output-dir out": ("run/config.yaml " + DENIED, "may not enter the folder run.", "chmod"),
    "resume run": ("'run' is not readable", "", ""),
    "eval summary": ("summary/summary.json " + DENIED, "may not read the file summary/summary.json", "chmod"),
    "export summary --output-dir out": ("summary/summary.json " + DENIED, "may not read the file", "chmod"),
    "eval tuned": ("tuned/model/model.safetensors " + DENIED, "may not read the file", "chmod"),
    "export tuned --output-dir out": ("tuned/model/model.safetensors " + DENIED, "may not read the file", "chmod"),
    "report rounds": ("rounds " + DENIED, "may not read the file rounds/metrics.jsonl", "chmod u+rX"),
    "resume checkpoint": (
        "checkpoint/checkpoints/round-000004 " + DENIED,
        "may not read the file checkpoint/checkpoints/",
        "chmod",
    ),
}
"""Command line → what it says."""
OTHERS_CAUSES = ("No such file", "by hand", "is damaged", "lost", "anew", "not exist")


@pytest.fixture(scope="module")
def outcomes(workshop: Workshop) -> dict[str, Outcome]:
    """What all command lines say, and one on what may be read."""
    path = workshop.path
    made = path / "whole"
    assert workshop.run(made).code == 0
    for name in ("run", "summary", "tuned", "rounds", "checkpoint"):
        shutil.copytree(made, path / name)
    shutil.rmtree(path / "checkpoint" / "model")
    (path / "checkpoint" / "summary.json").unlink()
    for name in ("settings", "weights"):
        shutil.copytree(workshop.model, path / name)
    for name in ("folder", "file", "open"):
        (path / name).mkdir()
        write_rows(path / name / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    (path / "table").mkdir()
    (path / "table" / "rows.parquet").write_bytes(b"PAR1")
    shutil.copytree(workshop.model, path / "kept")
    closed = [
        *("folder", "file/rows.jsonl", "table/rows.parquet", "settings/config.json", "weights/model.safetensors"),
        *("kept", "run", "summary/summary.json", "tuned/model/model.safetensors"),
        *("rounds/metrics.jsonl", "checkpoint/checkpoints/round-000004/state.json"),
    ]
    before = {name: (path / name).stat().st_mode for name in closed}
    for name in closed:
        (path / name).chmod(0)
    names = {"rows": "open/rows.jsonl", "config": workshop.config}
    lines = [line.format(**names) for line in (*CASES, "data open")]
    try:
        said = _without_rights(lines, path)
    finally:
        for name, mode in before.items():
            (path / name).chmod(mode)
    return dict(zip((*CASES, "data open"), said, strict=True))


def _without_rights(lines: list[str], folder: Path) -> list[Outcome]:
    words = [sys.executable, "-c", SCRIPT, json.dumps(lines)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("the superuser may read everything, and there is no `setpriv` here")
        words = ["setpriv", *GIVEN_UP, *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if "setpriv:" in ended.stderr:
        pytest.skip(f"no rights can be given up here: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    return [Outcome(**each) for each in json.loads(ended.stdout.splitlines()[-1])]


@pytest.mark.parametrize("line", CASES)
def test_what_may_not_be_read_is_said_to_be_so(line: str, outcomes: dict[str, Outcome]):
    assert_refused(outcomes[line], *CASES[line])
    assert [cause for cause in OTHERS_CAUSES if cause in outcomes[line].stderr] == []


def test_what_may_be_read_is_read_by_the_same_process(outcomes: dict[str, Outcome]):
    assert outcomes["data open"].code == 0, outcomes["data open"].stderr
