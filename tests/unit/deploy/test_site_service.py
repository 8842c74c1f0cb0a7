"""A site's process: how its operator ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DROPPED = """
import signal, sys, time, weakref
from parablock.deploy.site_service import interrupt_for_certain

class Thing: pass

if "{how}" == "for certain":
    interrupt_for_certain()
else:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
try:
    del thing  # the interrupt is raised in the callback, which drops it
    time.sleep(2)
    print("stays")
except KeyboardInterrupt:
    print("leaves")
"""


@pytest.mark.parametrize(("how", "came"), [("for certain", "leaves"), ("as Python has it", "stays")])
def test_an_interrupt_that_python_drops_comes_again(how: str, came: str):
    done = subprocess.run(
        [sys.executable, "-c", DROPPED.format(how=how)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [came]


SESSIONS = """
import gc, sys, weakref
from pathlib import Path
from types import SimpleNamespace
from parablock.clock import RealClock
from parablock.deploy import site_service
from parablock.deploy.allocation import libraries_load
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.site_channel import Refused, ServerEnd, SessionOver, SiteCaller, SiteChannel
from parablock.trace import Trace

sessions = []

def wait_for_session(*_, **__):
    if sessions:
        raise Refused("is gone" if sessions[0]() is None else "is kept")
    return Opening("run", "session", "", "")

def take_part(site, caller, opening):
    channel = SiteChannel(caller, opening, "process", Trace(RealClock()), lease_s=1.0)
    sessions.append(weakref.ref(channel))
    channel.stream.put(b"what the server never confirmed", 0)
    with libraries_load():
        pass
    raise SessionOver

SiteCaller.wait_for_session, site_service.take_part = wait_for_session, take_part
if sys.argv[2] == "frozen":
    gc.unfreeze = lambda: None
try:
    site_service.serve(SimpleNamespace(client_id=0, state_dir=Path(sys.argv[1])), ServerEnd("", None))
except Refused as told:
    print(told)
"""


@pytest.mark.parametrize(("how", "found"), [("as it is", "is gone"), ("frozen", "is kept")])
def test_nothing_of_a_session_outlives_it_where_libraries_were_loaded_within_it(
    tmp_path: Path, how: str, found: str
):
    """In a process of its own, since what is frozen there would stay so here."""
    command = [sys.executable, "-c", SESSIONS, str(tmp_path), how]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == found
