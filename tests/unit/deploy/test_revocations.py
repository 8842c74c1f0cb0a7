"""The server's copy of the list of revoked certificates: read again when it changes; a bad one lets nobody in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from parablock.deploy import revocations
from parablock.deploy.authority import Revocations, load_credentials, make_all, revoke
from parablock.deploy.revocations import parse_revoked
from parablock.errors import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_all(folder / "ours", 2, [])
    make_all(folder / "theirs", 1, [])
    return folder


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "ours", tmp_path / "ours")


def certificate(folder: Path) -> bytes:
    return load_credentials(folder).certificate


def test_the_list_holds_as_soon_as_its_file_is_there(ours: Path):
    path = ours / "server" / "revoked.pem"
    shutil.copy(ours / "authority" / "revoked.pem", path)
    listed = Revocations(path, load_credentials(ours / "server").authority)
    assert not listed.is_revoked(certificate(ours / "site-0"))
    revoke(ours / "authority", "site-0", passphrase=None)
    assert not listed.is_revoked(certificate(ours / "site-0")), "it is not copied yet"
    shutil.copy(ours / "authority" / "revoked.pem", path)
    assert listed.is_revoked(certificate(ours / "site-0"))
    assert not listed.is_revoked(certificate(ours / "site-1"))
    assert listed.problem == ""


def test_a_list_is_read_only_when_it_has_changed(ours: Path, monkeypatch: pytest.MonkeyPatch):
    path, read = ours / "authority" / "revoked.pem", []

    def counted(*arguments):
        read.append(arguments)
        return parse_revoked(*arguments)

    monkeypatch.setattr(revocations, "parse_revoked", counted)
    listed = Revocations(path, load_credentials(ours / "server").authority)
    for _ in range(3):
        assert not listed.is_revoked(certificate(ours / "site-0"))
    assert len(read) == 1
    os.utime(path, ns=(1, 1))
    assert not listed.is_revoked(certificate(ours / "site-0"))
    assert len(read) == 2
    path.write_bytes(b"")
    for _ in range(2):
        assert listed.is_revoked(certificate(ours / "site-0"))
    assert len(read) == 4, "a bad one is read until it is good"


def test_without_a_list_nobody_is_revoked_but_who_cannot_be_read(ours: Path):
    revoke(ours / "authority", "site-0", passphrase=None)
    listed = Revocations(None, load_credentials(ours / "server").authority)
    assert not listed.is_revoked(certificate(ours / "site-0"))
    assert listed.is_revoked(b"nonsense")
    assert listed.problem == ""


def lose(path: Path, made: Path) -> None:
    path.unlink()


def forge(path: Path, made: Path) -> None:
    shutil.copy(made / "theirs" / "authority" / "revoked.pem", path)


def cut(path: Path, made: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def alter(path: Path, made: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-2]  # of the signature, before the footer
    path.write_bytes(b"".join([*lines[:-2], (b"B" if last[:1] != b"B" else b"C") + last[1:], lines[-1]]))


def confuse(path: Path, made: Path) -> None:
    shutil.copy(made / "ours" / "authority" / "authority.pem", path)


def make_a_folder(path: Path, made: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lose, "cannot be read: No such file"),
        (forge, "is not signed by CN=ParaBlock authority"),
        (cut, "is not a list of revoked certificates"),
        (alter, "is not signed by|is not a list"),
        (confuse, "is not a list of revoked certificates"),
        (make_a_folder, "cannot be read: Is a directory"),
    ],
)
def test_a_bad_list_refuses_everybody_until_a_good_one_is_there(ours: Path, made: Path, harm, told: str):
    path = ours / "server" / "revoked.pem"
    shutil.copy(ours / "authority" / "revoked.pem", path)
    listed = Revocations(path, load_credentials(ours / "server").authority)
    assert not listed.is_revoked(certificate(ours / "site-0"))
    harm(path, made)
    assert all(listed.is_revoked(certificate(ours / f"site-{number}")) for number in (0, 1))
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(listed.problem)
    assert Revocations(path, load_credentials(ours / "server").authority).problem == listed.problem, "at the start"
    assert str(path) in listed.problem and "everybody is refused" in listed.problem
    if path.is_dir():
        path.rmdir()
    shutil.copy(ours / "authority" / "revoked.pem", path)
    assert not listed.is_revoked(certificate(ours / "site-0"))
    assert listed.problem == ""


def test_a_list_needs_an_authority(ours: Path):
    with pytest.raises(InputError, match="the authority's certificate does not hold"):
        Revocations(ours / "authority" / "revoked.pem", b"nonsense")
