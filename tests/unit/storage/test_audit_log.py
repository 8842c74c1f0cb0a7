"""The audit log: what was appended stays, and every change of it is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parablock.errors import StorageError
from parablock.seeding import generator_for
from parablock.storage import audit_log
from parablock.storage.audit_log import START, AuditLog, head_of, verify


def log_of(path: Path, num_lines: int = 6) -> AuditLog:
    log = AuditLog(path)
    for t in range(num_lines):
        log.append("release", round=t, clients=[0, t], bytes_sha256="ab" * 4)
    return log


def test_a_log_tells_what_was_appended_and_each_line_names_the_one_before(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log_of(path, 2)
    hashes = [AuditLog(path).append("join", client=k) for k in (7, 8)]  # by another object, as after a restart
    entries = verify(path).entries
    assert [entry.kind for entry in entries] == ["release", "release", "join", "join"]
    assert entries[1].facts == {"round": 1, "clients": [0, 1], "bytes_sha256": "abababab"}
    assert [entry.hash for entry in entries[2:]] == hashes
    previous = [json.loads(line)["previous"] for line in path.read_text().splitlines()]
    assert previous == [START, *(entry.hash for entry in entries[:-1])]
    assert verify(path).bad_line is None


def test_only_its_owner_can_read_a_log(tmp_path: Path):
    log_of(tmp_path / "audit.jsonl", 1)
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_threads_and_two_objects_append_one_chain(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path), AuditLog(path)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: logs[k % 2].append("join", client=k), range(40)))
    assert sorted(entry.facts["client"] for entry in verify(path).entries) == list(range(40))


def test_what_another_object_appended_is_read_without_the_lines_before(tmp_path: Path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    logs = [log_of(path), AuditLog(path)]
    monkeypatch.setattr(audit_log, "verify", lambda _: pytest.fail("all of it was read again"))
    for k in range(10):
        logs[k % 2].append("join", client=k)
        logs[k % 2].append("leave", client=k)
    monkeypatch.undo()
    assert len(verify(path).entries) == 26
    content = path.read_bytes()
    logs[0].append("join", client=0)
    flip(path, len(content) + 30, 0)
    with pytest.raises(StorageError, match="line 27"):
        logs[1].append("join", client=1)


def flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_in_the_line_where_it_is(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log_of(path)
    sound, draws = path.read_bytes(), generator_for(0, "flips")
    for _ in range(200):
        at, bit = int(draws.integers(len(sound))), int(draws.integers(8))
        flip(path, at, bit)
        assert verify(path).bad_line == sound[:at].count(b"\n") + 1, (at, bit)
        path.write_bytes(sound)
    assert verify(path).bad_line is None  # it was the flips


@pytest.mark.parametrize("change", ["removed", "moved", "doubled"])
def test_a_line_that_is_removed_moved_or_doubled_is_found(tmp_path: Path, change: str):
    path = tmp_path / "audit.jsonl"
    log_of(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for k in range(len(lines)):
        others = lines[:k] + lines[k + 1 :]
        at = (k + 1) % len(lines)
        changed = {
            "removed": others,
            "moved": [*others[:at], lines[k], *others[at:]],
            "doubled": [*lines, lines[k]],
        }
        path.write_bytes(b"".join(changed[change]))
        expected = {"removed": k + 1, "moved": min(k, at) + 1, "doubled": len(lines) + 1}
        assert verify(path).bad_line == expected[change]


def test_the_head_shows_that_the_last_lines_or_the_whole_log_are_gone(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log_of(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert verify(path).bad_line == 5
    assert "6 lines were written" in verify(path).problem
    path.unlink()
    with pytest.raises(StorageError, match="6 lines were written"):
        AuditLog(path).append("join")
    head_of(path).unlink()
    assert not verify(path).entries  # control: without the head nothing shows that there was a log


def test_nothing_is_appended_to_a_damaged_log(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log = log_of(path)
    flip(path, 30, 0)
    with pytest.raises(StorageError, match="line 1"):
        AuditLog(path)
    AuditLog(tmp_path / "other.jsonl").append("join")
    path.write_bytes(path.read_bytes() + b"{}\n")  # another process wrote nonsense: the object that is open notices
    with pytest.raises(StorageError, match="line 1"):
        log.append("join")


@pytest.mark.parametrize("tail", [b"", b'{"time":"2026-', b"\0\0\0"])
def test_an_append_that_was_cut_off_is_removed_and_nothing_else(tmp_path: Path, tail: bytes):
    path = tmp_path / "audit.jsonl"
    log_of(path)
    path.write_bytes(path.read_bytes() + tail)
    assert verify(path).bad_line is None
    AuditLog(path).append("join")
    assert [entry.kind for entry in verify(path).entries] == ["release"] * 6 + ["join"]


def test_a_whole_line_that_the_head_does_not_count_yet_stays(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log = log_of(path, 3)
    head = head_of(path).read_text()
    log.append("join")
    head_of(path).write_text(head)  # as if the process had died between the two
    AuditLog(path).append("leave")
    assert [entry.kind for entry in verify(path).entries] == ["release"] * 3 + ["join", "leave"]


def test_a_killed_process_leaves_a_sound_log(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    code = f"""
from pathlib import Path
from parablock.storage.audit_log import AuditLog
log = AuditLog(Path({str(path)!r}))
while True:
    print(log.append("join"), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(20)]
    process.kill()
    told += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    AuditLog(path).append("leave")
    found = [entry.hash for entry in verify(path).entries]
    assert verify(path).bad_line is None
    assert found[: len(told) - 1] == told[:-1]  # what an append had returned is there; the last word may be cut


def test_a_log_that_became_shorter_while_it_was_open_is_damaged(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log = log_of(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(StorageError, match="lines were written"):
        log.append("join", client=1)
