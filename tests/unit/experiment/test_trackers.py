"""Trackers, by what can be read back from the files that they leave."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from made_runs import curves
from parablock.experiment.trackers import figures_of, open_trackers

CONFIG = {"seed": 3}


def row(round_index: int, **changes: Any) -> dict[str, Any]:
    facts = {"train_loss": 2.5, "eval_loss": None, "uplink_bytes": 1000, "participants": [0, 4]}
    return {"round_index": round_index, **facts, **changes}


def test_the_figures_of_a_row_are_its_numbers_under_their_own_names():
    assert figures_of(row(4)) == {"train_loss": 2.5, "uplink_bytes": 1000, "participants": 2}
    assert figures_of(row(4, eval_loss=2.25))["eval_loss"] == 2.25


def test_what_is_logged_is_on_the_disk_before_the_run_ends(tmp_path: Path):
    trackers = open_trackers(["tensorboard"], tmp_path, first_step=0, config=CONFIG)
    trackers.log(1, {"train_loss": 2.5})
    assert curves(tmp_path) == {"train_loss": [(1, 2.5)]}
    trackers.close()


def test_a_wandb_run_stays_on_this_machine_and_goes_on_under_the_same_id(tmp_path: Path):
    if importlib.util.find_spec("wandb") is None and not os.environ.get("CI"):
        pytest.skip("wandb is not installed: make setup")
    for first_step in (0, 2):
        trackers = open_trackers(["wandb"], tmp_path, first_step=first_step, config=CONFIG)
        trackers.log(first_step + 1, figures_of(row(first_step, train_loss=2.5 + first_step)))
        trackers.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len({file.name for file in files}) == 1
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    for _ in range(300):  # a process of W&B's own writes the file, and may still be at it
        if [history(file) for file in files] == [[(1, 2.5)], [(3, 4.5)]]:
            return
        time.sleep(0.1)
    assert [logged(file) for file in files] == [[(1, 2.5)], [(3, 4.5)]]


def history(file: Path) -> list[tuple[int, float]]:
    """Read what has been written whole so far."""
    from google.protobuf.message import DecodeError

    try:
        return logged(file)
    except (struct.error, ValueError, AssertionError, DecodeError):
        return []


def logged(file: Path) -> list[tuple[int, float]]:
    """Read (step, train_loss) from W&B's file: seven bytes, then records of checksum, length, kind and content."""
    from wandb.proto import wandb_internal_pb2

    content, place, steps = file.read_bytes(), 7, []
    while place < len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        assert kind == 1, "a record in several parts; the file is longer than this test expects"
        record = wandb_internal_pb2.Record.FromString(content[place + 7 : place + 7 + length])
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            steps.append((values["_step"], values["train_loss"]))
        place += 7 + length
    return steps
