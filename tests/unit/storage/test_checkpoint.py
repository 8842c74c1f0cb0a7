from __future__ import annotations

import hashlib
import json

import pytest
import torch

from parablock.algorithm.aggregate import Aggregate, ServerOptimizer
from parablock.algorithm.parablock import initial_server, same, schedule_round, server_commit
from parablock.errors import CheckpointError, StorageError
from parablock.storage.checkpoint import ClientSnapshot, RunState, load_newest, save_checkpoint
from parablock.trace import Span


def state(round_index: int = 8, dtype: torch.dtype = torch.bfloat16) -> RunState:
    server = initial_server([torch.randn(4).to(dtype), torch.randn(6).to(dtype)])
    server = schedule_round(server, 1, (8, 3))
    aggregate = Aggregate(torch.randn(6), (0.25, 0.5), 0.5)
    announce = lambda new, view: (view + 1).to(view.dtype)  # noqa: E731
    server = server_commit(server, aggregate, ServerOptimizer("adam", 0.1), announce)
    clients = (
        ClientSnapshot(
            0,
            (-1, 0),
            (1.0, (0.25, 0.5)),
            {7: [b"an update\x00\xff", b"its second chunk"]},
            {"1.step": torch.tensor(3)},
        ),
        ClientSnapshot(1, (-1, -1), (1.0, 1.0), {}),
    )
    spans = [
        Span(None, "server", "aggregating", 0.5, 0.25, {"round_index": 0}),
        Span(0, "compute", "computing", 0, 1, {}),
    ]
    return RunState(round_index, server, clients, {"initial_eval_loss": 3.5, "downlink": {7: {0: (5, 0.5)}}}, spans)


def test_everything_comes_back_bitwise(tmp_path):
    saved = state()
    save_checkpoint(tmp_path, saved, keep=2)
    found, passed_over = load_newest(tmp_path)
    assert found is not None
    assert passed_over == []
    for name in ("params", "view"):
        assert same(getattr(found.server, name), getattr(saved.server, name))
        assert getattr(found.server, name)[0].dtype == torch.bfloat16
    assert not same(found.server.view, found.server.params)
    assert all(same(a, b) for a, b in zip(found.server.moments, saved.server.moments, strict=True))
    for name in ("versions", "rho", "squared_delta", "committed", "history", "local_steps"):
        assert getattr(found.server, name) == getattr(saved.server, name)
    assert [c.sent for c in found.clients] == [c.sent for c in saved.clients]
    assert [c.versions for c in found.clients] == [c.versions for c in saved.clients]
    assert [c.rho for c in found.clients] == [c.rho for c in saved.clients]
    assert found.clients[0].memory["1.step"].item() == 3
    assert found.spans == saved.spans
    assert found.progress["initial_eval_loss"] == 3.5
    assert found.round_index == 8


def test_only_the_newest_are_kept(tmp_path):
    for round_index in (8, 16, 24):
        save_checkpoint(tmp_path, state(round_index), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000016", "round-000024"]


@pytest.mark.parametrize("name", ["server.safetensors", "client-000.safetensors", "trace.json", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage):
    save_checkpoint(tmp_path, state(8), keep=2)
    place = save_checkpoint(tmp_path, state(16), keep=2)
    content = bytearray((place / name).read_bytes())
    if damage == "remove":
        (place / name).unlink()
    else:
        content[len(content) // 2] ^= 0x10
        (place / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    found, passed_over = load_newest(tmp_path)
    assert found is not None
    assert found.round_index == 8
    assert "round-000016" in passed_over[0]
    (tmp_path / "round-000008" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        load_newest(tmp_path)


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert load_newest(tmp_path) == (None, [])
    assert load_newest(tmp_path / "missing") == (None, [])


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    save_checkpoint(tmp_path, state(8), keep=2)
    (tmp_path / ".round-000016.partial").mkdir()
    found, _ = load_newest(tmp_path)
    assert found is not None
    assert found.round_index == 8
    save_checkpoint(tmp_path, state(16), keep=2)  # the leftover is in nobody's way
    assert not (tmp_path / ".round-000016.partial").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error_and_leaves_the_last_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(8), keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parablock.storage.files.os.fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save_checkpoint(tmp_path, state(16), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000008"]


def test_another_format_version_is_not_guessed_at(tmp_path):
    place = save_checkpoint(tmp_path, state(8), keep=1)
    meta = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        load_newest(tmp_path)


def test_a_file_without_a_hash_is_not_read(tmp_path):
    save_checkpoint(tmp_path, state(8), keep=2)
    place = save_checkpoint(tmp_path, state(16), keep=2)
    path = place / "state.json"
    meta = json.loads(path.read_text())
    del meta["own_sha256"], meta["sha256"]["client-001.safetensors"]
    own = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()  # by whoever left the file out
    path.write_text(json.dumps({**meta, "own_sha256": own}))
    found, passed_over = load_newest(tmp_path)
    assert found is not None and found.round_index == 8
    assert "no hash of client-001.safetensors" in passed_over[0]


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff", b'{"format_version": 2}', b"[" * 100_000])
def test_a_state_that_is_anything_else_is_passed_over(tmp_path, content):
    save_checkpoint(tmp_path, state(8), keep=2)
    (save_checkpoint(tmp_path, state(16), keep=2) / "state.json").write_bytes(content)
    found, passed_over = load_newest(tmp_path)
    assert found is not None and found.round_index == 8 and len(passed_over) == 1
