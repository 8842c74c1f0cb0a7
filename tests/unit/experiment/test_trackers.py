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

from parablock.config.load import parse_config
from parablock.errors import ConfigError
from parablock.experiment.trackers import check_trackers, figures_of, open_trackers

CONFIG = {"seed": 3}


def row(round_index: int, **changes: Any) -> dict[str, Any]:
    facts = {"train_loss": 2.5, "eval_loss": None, "uplink_bytes": 1000, "participants": [0, 4]}
    return {"round_index": round_index, **facts, **changes}


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_figures_of_a_row_are_its_numbers_under_their_own_names():
    assert figures_of(row(4)) == {"train_loss": 2.5, "uplink_bytes": 1000, "participants": 2}
    assert figures_of(row(4, eval_loss=2.25))["eval_loss"] == 2.25


def test_tensorboard_reads_back_every_figure_at_its_step(tmp_path: Path):
    trackers = open_trackers(["tensorboard"], tmp_path, first_step=0, config=CONFIG)
    trackers.log(0, {"eval_loss": 4.0})
    trackers.log(1, figures_of(row(0)))
    trackers.log(2, figures_of(row(1, train_loss=1.5, eval_loss=2.0)))
    trackers.close()
    found = curves(tmp_path)
    assert found["train_loss"] == [(1, 2.5), (2, 1.5)]
    assert found["eval_loss"] == [(0, 4.0), (2, 2.0)]
    assert found["participants"] == [(1, 2.0), (2, 2.0)]


def test_what_is_logged_is_on_the_disk_before_the_run_ends(tmp_path: Path):
    trackers = open_trackers(["tensorboard"], tmp_path, first_step=0, config=CONFIG)
    trackers.log(1, {"train_loss": 2.5})
    assert curves(tmp_path) == {"train_loss": [(1, 2.5)]}
    trackers.close()


def test_a_resumed_run_replaces_the_rounds_that_it_repeats(tmp_path: Path):
    for first_step, losses in ((0, [9.0, 8.0, 7.0]), (2, [6.0, 5.0])):
        trackers = open_trackers(["tensorboard"], tmp_path, first_step=first_step, config=CONFIG)
        for step, loss in enumerate(losses, start=first_step or 1):
            trackers.log(step, {"train_loss": loss})
        trackers.close()
    assert curves(tmp_path)["train_loss"] == [(1, 9.0), (2, 6.0), (3, 5.0)]


def test_without_trackers_nothing_is_written(tmp_path: Path):
    trackers = open_trackers([], tmp_path, first_step=0, config=CONFIG)
    trackers.log(1, figures_of(row(0)))
    trackers.close()
    assert list(tmp_path.iterdir()) == []


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


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    check_trackers(["tensorboard"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name))
    with pytest.raises(ConfigError, match=r"report_to: .*tensorboard.* pip install 'parablock\[tensorboard\]'"):
        check_trackers(["tensorboard"])
    check_trackers([])


def test_report_to_takes_known_names_once_each_and_one_without_a_list():
    base: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}}
    assert parse_config({**base, "report_to": "tensorboard"}).report_to == ("tensorboard",)
    assert parse_config({**base, "report_to": ["wandb", "tensorboard"]}).report_to == ("wandb", "tensorboard")
    for wrong, said in ((["tensorbord"], "report_to.0"), (["wandb", "wandb"], "once")):
        with pytest.raises(ConfigError, match=said):
            parse_config({**base, "report_to": wrong})
