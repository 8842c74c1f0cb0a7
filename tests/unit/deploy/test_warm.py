"""ClientApps forked from a process that has loaded Flower: beside its real SuperExec, without a SuperNode."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from parablock.deploy.processes import site_environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a ClientApp is forked on Linux only")

PATIENCE_S = 120.0
REFUSED = "one of the arguments --token --token-file is required"
"""What Flower's own `flwr-clientapp` says of a command without a token."""


def wait_for(what: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return found


class SuperExec:
    """Flower's SuperExec as a SuperNode starts it, with nobody at the other end."""

    def __init__(self, home: Path, tmp: Path) -> None:
        self.log = home / "log"
        self.env = site_environment(home, {"TMPDIR": str(tmp)})
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["/usr/bin/env", "flower-superexec", "--insecure", "--runtime-api-address", "127.0.0.1:1"],
                env=self.env,
                stdout=log,
                stderr=log,
            )

    def keeper(self) -> psutil.Process | None:
        children = psutil.Process(self.process.pid).children()
        return next((child for child in children if child.name() == "flwr-keeper"), None)

    def call(self, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command that a SuperExec would, as its child does."""
        words, env = ["/usr/bin/env", "flwr-clientapp", *arguments], self.env | {"PARABLOCK_KEEPER": address}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def superexec(tmp_path: Path) -> Iterator[SuperExec]:
    made = SuperExec(tmp_path / "home", tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def test_a_keeper_forks_flowers_own_clientapp_and_without_it_the_command_is_that(superexec: SuperExec):
    keeper = wait_for(superexec.keeper)
    (address,) = (connection.laddr for connection in keeper.net_connections("unix"))
    assert Path(address).stat().st_mode & 0o077 == 0
    assert Path(address).parent.stat().st_mode & 0o077 == 0
    for calls in (1, 2):
        called = superexec.call(address, "--insecure", "--parent-pid", "an ö, and a space")
        assert (called.returncode, called.stdout, called.stderr) == (0, "", "")  # it says nothing itself
        wait_for(lambda calls=calls: superexec.log.read_text().count("'an ö, and a space'") == calls)
    assert "usage: flwr-clientapp" in superexec.log.read_text()
    assert superexec.process.poll() is None
    keeper.kill()
    wait_for(lambda: not keeper.is_running() or keeper.status() == psutil.STATUS_ZOMBIE)
    called = superexec.call(address)
    assert (called.returncode, REFUSED in called.stderr) == (2, True)
    assert superexec.process.poll() is None


def test_a_keeper_ends_with_its_superexec_however_that_ends(superexec: SuperExec):
    keeper = wait_for(superexec.keeper)
    superexec.process.kill()
    superexec.process.wait()
    wait_for(lambda: not keeper.is_running())


def test_a_superexec_without_a_keeper_says_so_and_goes_on(tmp_path: Path):
    (tmp_path / f"parablock-{os.getuid()}").touch()  # where its socket would be
    superexec = SuperExec(tmp_path / "home", tmp_path)
    try:
        wait_for(lambda: "Connection attempt failed" in superexec.log.read_text())
        assert "Each ClientApp starts from nothing" in superexec.log.read_text()
        assert superexec.keeper() is None
        assert REFUSED in superexec.call("").stderr
    finally:
        superexec.process.kill()
        superexec.process.wait()
