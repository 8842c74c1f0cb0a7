"""What a session keeps on the disk of a site."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from frames import REQUEST, frame
from parablock.engine.flower.session import Position, SessionFolder
from parablock.errors import ParaBlockError, StorageError
from tiny_runs import longest_file


def test_the_disk_gives_back_what_came_after_the_newest_snapshot(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    frames = [frame(number, b"%d" % number) for number in range(11)]
    halves = [frame(11, b"ab", size=4), frame(11, b"cd", offset=2)]
    folder.keep(reversed([*frames, *halves]))
    assert folder.opened_by() == REQUEST
    assert folder.kept() == [*frames, *halves]
    folder.move_to(Position(2, wanted=10, first_sent=1))
    again = SessionFolder(tmp_path, "run", "1")
    again.open(replace(REQUEST, config="another"))
    assert again.opened_by() == REQUEST
    assert again.position == Position(2, 10, 1)
    assert again.kept() == [frames[10], *halves]
    assert len(list((again.path / "frames").iterdir())) == 3  # the others are gone from the disk too
    assert again.finished is None
    again.finish(9)
    assert again.finished == 9


def test_a_sites_disk_that_takes_no_more_is_said_and_leaves_nothing_half_written(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    folder.keep([frame(0, b"there is room")])
    with longest_file(100_000), pytest.raises(StorageError, match="cannot be written") as full:
        folder.keep([frame(1, bytes(200_000))])
    assert "Make room there" in full.value.remedy
    assert [frame.content for frame in folder.kept()] == [b"there is room"]


def test_a_new_session_starts_where_the_server_says_and_forgets_the_old_one(tmp_path: Path):
    SessionFolder(tmp_path, "run", "1").open(REQUEST)
    new = SessionFolder(tmp_path, "run", "2")
    for t in (7, 8, 9):
        (new.snapshots / f"round-{t:06d}").mkdir(parents=True)
    new.open(replace(REQUEST, session="2", restore=8))
    assert new.position == Position(8)
    assert new.held_rounds() == (7, 8)
    assert not SessionFolder(tmp_path, "run", "1").path.exists()
    with pytest.raises(ValueError, match="not the name of a run"):
        SessionFolder(tmp_path, "../run", "1")


def test_a_trainer_that_lost_the_secrets_of_its_masks_says_so_and_a_new_session_has_new_ones(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    folder.begin_secrets()
    with pytest.raises(ParaBlockError, match="its secrets with it") as refused:
        SessionFolder(tmp_path, "run", "1").begin_secrets()
    assert "parablock resume" in refused.value.remedy
    resumed = SessionFolder(tmp_path, "run", "2")
    resumed.open(replace(REQUEST, session="2"))
    resumed.begin_secrets()
