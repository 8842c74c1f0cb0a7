"""Files and folders that are whole or not there, and what is no plain file."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from parablock.errors import ModelError, StorageError
from parablock.storage.files import (
    check_absent,
    check_writable,
    check_writable_file,
    storage,
    write_atomically,
    write_beside,
    write_folder_beside,
)
from tiny_runs import longest_file


@pytest.mark.parametrize("problem", [KeyboardInterrupt, SystemExit, ModelError("refused"), StorageError("full")])
def test_whatever_ends_the_writing_of_a_folder_leaves_nothing(tmp_path: Path, problem: BaseException):
    with pytest.raises(BaseException) as raised, write_folder_beside(tmp_path / "a" / "b" / "folder") as beside:
        (beside / "half").write_text("x")
        raise problem
    assert raised.type is problem or raised.value is problem
    assert list(tmp_path.iterdir()) == []
    with write_folder_beside(tmp_path / "folder") as beside:
        (beside / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["whole"]


def test_a_pipe_stays_one_and_its_reader_gets_the_text(tmp_path: Path):
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_atomically(pipe, "all of it\n")
    reader.join(10)
    assert read == ["all of it\n"] and pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_one_and_its_target_is_written(tmp_path: Path, is_there: bool):
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if is_there:
        target.write_text("before")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert not target.is_symlink() and [path.name for path in target.parent.iterdir()] == ["target"]


def test_devices_and_open_files_are_written_into(tmp_path: Path):
    write_atomically(Path(os.devnull), "x")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(StorageError, match="the disk is full"):
        write_atomically(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()
    with (tmp_path / "file").open("w+") as file:
        write_atomically(Path(f"/dev/fd/{file.fileno()}"), "into it")
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "file").stat().st_ino
        assert file.read() == "into it"


def test_a_full_disk_is_named_whichever_library_meets_it_and_a_run_is_told_how_it_goes_on(tmp_path: Path):
    with longest_file(1000), pytest.raises(StorageError, match="the disk is full") as full, storage(tmp_path):
        np.zeros(10_000).tofile(tmp_path / "file")
    assert "resume" not in full.value.remedy and "--output-dir" not in full.value.remedy
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(StorageError, match="the disk is full") as full, storage(tmp_path / "checkpoints" / "x"):
        raise OSError(28, "No space left on device")
    assert f"parablock resume {tmp_path}" in full.value.remedy
    with pytest.raises(StorageError, match="is a directory") as other, storage(tmp_path):
        raise IsADirectoryError("it is a directory")
    assert "the disk is full" not in other.value.what and "--output-dir" not in other.value.remedy


def test_who_may_read_a_file_stays_when_it_is_written_anew(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, "one")
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    for mode, new in ((0o640, 0o640), (0o600, 0o600), (0o444, 0o644)):  # which its owner can go on with
        path.chmod(mode)
        with write_beside(path) as beside:
            beside.write_text("two")
            assert beside.stat().st_mode & 0o077 == 0, "nobody else reads it before it is whole"
        assert path.read_text() == "two" and path.stat().st_mode & 0o777 == new


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_name_that_no_file_can_have_is_an_error_of_storage(tmp_path: Path):
    for write in (lambda path: write_atomically(path, "x"), lambda path: check_absent(path, "Choose another.")):
        with pytest.raises(StorageError, match="File name too long"):
            write(tmp_path / ("x" * 300))
    check_absent(tmp_path / "x", "Choose another.")


def test_a_path_back_from_a_folder_that_is_not_there_is_refused_and_makes_none(tmp_path: Path):
    (tmp_path / "there").mkdir()
    back = tmp_path / "gone" / ".." / "file"
    for check in (check_absent, check_writable, check_writable_file):
        with pytest.raises(StorageError, match=r"gone, which is no folder"):
            check(back, "--output")
        check(tmp_path / "there" / ".." / "file", "--output")
    check_writable(Path("..") / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("replaces", [True, False])
def test_a_folder_that_somebody_makes_meanwhile_stays_unless_it_is_to_be_replaced(tmp_path: Path, replaces: bool):
    folder, raised = tmp_path / "folder", None
    try:
        with write_folder_beside(folder, replaces=replaces) as beside:
            (beside / "ours").touch()
            folder.mkdir()
            (folder / "theirs").touch()
    except StorageError as error:
        raised = error
    assert [path.name for path in folder.iterdir()] == (["ours"] if replaces else ["theirs"])
    assert (raised is None) == replaces and [path.name for path in tmp_path.iterdir()] == ["folder"]
