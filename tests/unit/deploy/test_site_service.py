"""A site's process: how its operator ends it."""

from __future__ import annotations

import subprocess
import sys

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
