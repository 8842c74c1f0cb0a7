"""A site's files: whatever is cut short, damaged or never written, a state that the run can count on is found."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parablock.algorithm.parablock import NEVER, ClientState, Commit, commit, initial_client
from parablock.errors import StorageError
from parablock.storage import files as files_
from parablock.storage import site_store
from parablock.storage.checkpoint import ClientSnapshot
from parablock.storage.site_store import SiteStore, StoredClient
from parablock.wire.messages import Skip, Update, to_bytes
from parablock.wire.quantize import pack

ALL = {"S": 1 << 40}
BLOCKS = 3


class Stopped(BaseException):
    """The process is gone."""


def value(block: int, version: int) -> Tensor:
    return torch.full((4,), float(10 * block + version))


def update(t: int, chunks: int = 2) -> list[bytes]:
    return [
        to_bytes(Update(t, t % BLOCKS, 0, 5, t - 2, 1.0, 1, 0.5, k, chunks, pack(value(t, k), "float32")))
        for k in range(chunks)
    ]


class Site:
    """A site that trains round after round: block t mod 3 in round t, each commit a round later."""

    def __init__(self, folder: Path, session: str = "S") -> None:
        self.store, self.session = SiteStore(folder), session
        self.base = tuple(value(b, NEVER) for b in range(BLOCKS))
        self.versions, self.sent = [NEVER] * BLOCKS, dict[int, list[bytes]]()

    def _state(self) -> tuple[ClientState, ClientSnapshot]:
        versions = tuple(self.versions)
        residuals = {0: value(7, max(self.sent, default=0))}
        memory = {"a moment/..": torch.ones(2)}
        return (
            ClientState(self.base, versions, (1.0, 0.5, 0.25)),
            ClientSnapshot(0, versions, (1.0, 0.5, 0.25), dict(self.sent), memory, residuals),
        )

    def train(self, t: int) -> None:
        if t >= 2:
            b = (t - 2) % BLOCKS
            self.versions[b] = t - 2
            self.base = (*self.base[:b], value(b, t - 2), *self.base[b + 1 :])
        self.sent = {s: messages for s, messages in self.sent.items() if s >= t - 1} | {t: update(t)}
        self.store.save_latest(self.session, t + 1, *self._state())

    def mark(self, t: int, keep: int = 2) -> None:
        self.store.save_mark(self.session, t, *self._state(), keep=keep)


def trained(folder: Path, rounds: int, session: str = "S") -> Site:
    site = Site(folder, session)
    for t in range(rounds):
        if t % 3 == 0 and t:
            site.mark(t)
        site.train(t)
    return site


def newest(folder: Path, sessions: dict[str, int] = ALL) -> StoredClient | None:
    return SiteStore(folder).newest(sessions)[0]


def is_whole(stored: StoredClient) -> bool:
    """Whether a state is exactly the one of its round."""
    t = stored.round_index
    versions = [max((s for s in range(t - 2) if s % BLOCKS == b), default=NEVER) for b in range(BLOCKS)]
    assert list(stored.snapshot.versions) == versions
    assert {b: float(v[0]) for b, v in stored.blocks.items()} == {
        b: 10.0 * b + s for b, s in enumerate(versions) if s != NEVER
    }
    assert stored.snapshot.sent == {s: update(s) for s in range(max(0, t - 2), t)}
    assert torch.equal(stored.snapshot.residuals[0], value(7, t - 1))
    assert stored.snapshot.memory["a moment/.."].tolist() == [1, 1]
    return True


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    trained(tmp_path, 8)
    stored = newest(tmp_path)
    assert stored is not None and stored.round_index == 8 and is_whole(stored)
    before = newest(tmp_path, {"S": 7})
    assert before is not None and before.round_index == 6 and is_whole(before)
    assert newest(tmp_path, {"S": 2}) is None and newest(tmp_path, {"other": 99}) is None
    assert newest(tmp_path / "none") is None


def test_the_folder_is_the_sites_alone(tmp_path: Path):
    (tmp_path / "open").mkdir(mode=0o755)
    for folder in (tmp_path / "open", tmp_path / "new"):
        SiteStore(folder)
        assert folder.stat().st_mode & 0o777 == 0o700


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HARM = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
    ),
    "three bytes more": lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 3),
}


@pytest.mark.parametrize("harm", HARM)
def test_whatever_happens_to_any_file_a_whole_state_or_none_is_found(tmp_path: Path, harm: str):
    trained(tmp_path / "model", 8)
    for name in files(tmp_path / "model"):
        folder = tmp_path / name.strip(".")
        trained(folder, 8)
        HARM[harm](folder / name)
        store = SiteStore(folder)
        store.forget_newer(ALL)
        stored, passed_over = store.newest(ALL)
        of_latest = name in json.dumps(json.loads((tmp_path / "model/latest.json").read_text().partition("\n")[0]))
        assert stored is not None and is_whole(stored), name
        if (of_latest or name == "latest.json") and harm != "three bytes more":
            assert stored.round_index < 8, name  # a block that has not changed since is that of earlier states too
            assert (harm == "removed" and name == "latest.json") or passed_over, name
        site = trained(folder, 9)  # and the site goes on
        assert site.store.newest(ALL)[0].round_index == 9


def test_all_damaged_is_no_state_and_each_is_told(tmp_path: Path):
    trained(tmp_path, 8)
    for path in tmp_path.glob("*.json"):
        path.write_bytes(path.read_bytes()[:-3])
    stored, passed_over = SiteStore(tmp_path).newest(ALL)
    assert stored is None and len(passed_over) == 3


def sealed(folder: Path, **changes: object) -> None:
    """Change `latest.json`, checksum and all."""
    text, _, _ = (folder / "latest.json").read_text().partition("\n")
    changed = json.dumps({**json.loads(text), **changes})
    (folder / "latest.json").write_text(f"{changed}\n{site_store.zlib.crc32(changed.encode())}")


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"round_index": "8"},
        {"round_index": None},
        {"tensors": []},
        {"tensors": {"block-x": "block-000-S-000006"}},
        {"tensors": {}},
        {"updates": []},
        {"updates": {"x": "update-S-000007"}},
        {"updates": {"7": "latest.json"}},
        {"versions": None},
        {"memory": ["other"]},
    ],
)
def test_a_file_of_another_form_is_passed_over(tmp_path: Path, changes: dict[str, object]):
    trained(tmp_path, 8)
    sealed(tmp_path, **changes)
    stored, passed_over = SiteStore(tmp_path).newest(ALL)
    assert stored is not None and stored.round_index == 6 and passed_over
    SiteStore(tmp_path).forget_newer(ALL)


@pytest.mark.parametrize(
    "messages", [[], update(7)[:1], update(7)[::-1], [*update(7), update(7)[1]], [to_bytes(Skip(7))]], ids=len
)
def test_an_update_that_is_not_whole_is_passed_over(tmp_path: Path, messages: list[bytes]):
    trained(tmp_path, 8)
    (path,) = tmp_path.glob("update-S-000007-*")
    path.write_bytes(b"".join(len(m).to_bytes(8, "little") + m for m in messages))
    stored, passed_over = SiteStore(tmp_path).newest(ALL)
    assert stored is not None and stored.round_index == 6 and is_whole(stored)
    assert "not a whole update" in passed_over[0]


def test_a_damaged_update_is_written_anew_by_the_round_that_comes_again(tmp_path: Path):
    trained(tmp_path, 8)
    (tmp_path / "update-S-000007").write_bytes(b"x")
    site = trained(tmp_path, 8)
    assert site.store.newest(ALL)[0].round_index == 8
    assert is_whole(newest(tmp_path))


def stops(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[int]:
    """Let the process be gone before the `at`-th change of a file."""
    count = 0
    for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "open"), (site_store, "save_file")):
        inner = getattr(owner, name)

        def call(*args, inner=inner, name=name, **options):
            nonlocal count
            if name != "open" or "w" in str(args[1:]):
                count += 1
                if count == at:
                    raise Stopped
            return inner(*args, **options)

        monkeypatch.setattr(owner, name, call)
    yield count


def test_a_site_that_dies_at_any_write_has_the_state_of_this_round_or_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, at = set(), 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        site = trained(folder, 6)
        with monkeypatch.context() as patch:
            next(stops(patch, at))
            try:
                site.mark(6)
                site.train(6)
            except Stopped:
                is_over = False
            else:
                is_over = True
        store = SiteStore(folder)
        store.forget_newer(ALL)
        stored, passed_over = store.newest(ALL)
        assert stored is not None and is_whole(stored) and not passed_over
        seen.add(stored.round_index)
        named = {path.name for path in folder.iterdir() if path.suffix != ".json"}
        assert not [name for name in named if name.endswith(".partial") and "json" not in name]
        if is_over:
            break
    assert seen == {6, 7} and at > 8


def unsafe_steps(site: Site, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Train a round; return what took its name before it was on the disk, and the folder unless it came last."""
    folder, found, synced, fsync, replace_ = site.store.folder, [], [], os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_name(self: Path, target: Path) -> Path:
        if self.stat().st_ino not in synced:
            found.append(re.split(r"[-.]", target.name)[0])
        synced.append(0)
        return replace_(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_sync)
        patch.setattr(Path, "replace", note_name)
        site.train(8)
    return found + ["the folder"] * (synced[-1] != folder.stat().st_ino)


def test_what_a_state_names_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert unsafe_steps(trained(tmp_path / "as it is", 8), monkeypatch) == []
    without = trained(tmp_path / "without", 8)
    for module in (site_store, files_):
        monkeypatch.setattr(module, "sync", lambda _: None)
    assert unsafe_steps(without, monkeypatch) == ["block", "residual", "memory", "update", "latest", "the folder"]


def test_only_what_no_state_names_is_swept(tmp_path: Path):
    site = trained(tmp_path, 8)
    for name in ("block-009-S-000001", ".memory-x-S-000001.partial", "update-S-000099", "noise_key", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    site.train(8)
    left = files(tmp_path)
    assert "noise_key" in left and "notes.txt" in left
    assert not {"block-009-S-000001", ".memory-x-S-000001.partial", "update-S-000099"} & set(left)
    for round_index in (9, 6, 3):
        stored = newest(tmp_path, {"S": round_index})
        assert stored is not None and stored.round_index == round_index and is_whole(stored)


def test_only_the_newest_marks_stay(tmp_path: Path):
    site = trained(tmp_path, 13)
    assert [path.name for path in sorted(tmp_path.glob("mark-*.json"))] == ["mark-000009.json", "mark-000012.json"]
    site.mark(13, keep=1)
    assert [path.name for path in sorted(tmp_path.glob("mark-*.json"))] == ["mark-000013.json"]


def test_a_run_that_goes_back_forgets_what_is_newer(tmp_path: Path):
    trained(tmp_path, 8)
    store = SiteStore(tmp_path)
    store.forget_newer({"S": 8})
    assert newest(tmp_path).round_index == 8
    store.forget_newer({"S": 6, "T": 1 << 40})
    assert newest(tmp_path).round_index == 6
    assert (tmp_path / "latest.json").exists() is False
    store.forget_newer({"T": 1 << 40})
    assert files(tmp_path) == []


def test_the_state_that_a_session_begins_with_outlives_the_training_after_it(tmp_path: Path):
    site = trained(tmp_path, 8)
    site.store.begin_with(newest(tmp_path, {"S": 8}))
    site.train(8)
    assert newest(tmp_path, {"S": 8}).round_index == 8
    site.store.begin_with(newest(tmp_path, {"S": 7}))
    assert newest(tmp_path, {"S": 7}).round_index == 6


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_is_told_as_that_and_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    site = trained(tmp_path, 8)
    full = OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_, **__):
        raise full

    owner, name = [
        (site_store, "save_file"),
        (Path, "open"),
        (Path, "write_text"),
        (Path, "replace"),
    ][at]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(StorageError, match="disk is full"):
            site.train(8)
    stored = newest(tmp_path)
    assert stored is not None and stored.round_index == 8 and is_whole(stored)
    site.store.forget_newer(ALL)
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


def test_a_round_writes_the_block_that_has_changed_and_no_other(tmp_path: Path):
    def files_after(t: int, state: ClientState) -> dict[str, int]:
        store.save_latest("s", t, state, replace(snapshot, versions=state.versions))
        return {path.name: path.stat().st_ino for path in tmp_path.glob("block-*")}

    def after(t: int, block_index: int, state: ClientState) -> ClientState:
        return commit(state, [Commit(block_index, t, torch.full((3,), float(t)), 1.0)], t)

    store, state = SiteStore(tmp_path), initial_client([torch.zeros(3), torch.zeros(3)])
    snapshot = ClientSnapshot(0, state.versions, state.rho, {})
    assert files_after(0, state) == {}, "the base model is at hand anyway"
    first = files_after(1, state := after(0, 0, state))
    second = files_after(2, state := after(1, 1, state))
    assert first.keys() == {"block-000-s-000001"}
    assert second.keys() == {"block-000-s-000001", "block-001-s-000002"}
    assert second["block-000-s-000001"] == first["block-000-s-000001"]
    third = files_after(3, state := after(2, 0, state))
    assert third.keys() == {"block-000-s-000003", "block-001-s-000002"}
    stored, _ = store.newest({"s": 9})
    assert stored is not None and {b: float(value[0]) for b, value in stored.blocks.items()} == {0: 2.0, 1: 1.0}


def test_what_has_been_written_is_not_kept_in_memory(tmp_path: Path):
    site = trained(tmp_path, 5)
    old, kept = weakref.ref(site.base[0]), weakref.ref(site.base[1])
    site.base = (value(0, 3), *site.base[1:])
    gc.collect()
    assert old() is None and kept() is not None
