"""A server or a site begins again with glibc's settings, once, and keeps its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parablock.deploy.allocation import SETTINGS, keep_memory, with_kept_memory

SCRIPT = """
import json, os, sys
from parablock.deploy.allocation import keep_memory
keep_memory()
print(json.dumps({"environment": dict(os.environ), "arguments": sys.argv[1:], "pid": os.getpid()}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are of glibc")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "7"}])
def test_a_command_begins_again_with_the_settings_and_those_of_its_owner_stay(tmp_path: Path, own: dict[str, str]):
    (tmp_path / "script.py").write_text(SCRIPT)
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, str(tmp_path / "script.py"), "deploy", "a path with blanks"]
    with subprocess.Popen(command, env=clean | own, stdout=subprocess.PIPE) as process:
        told = json.loads(process.communicate()[0])
    assert told["pid"] == process.pid, "as service managers expect"
    assert told["arguments"] == ["deploy", "a path with blanks"]
    assert {name: told["environment"][name] for name in SETTINGS} == with_kept_memory(own)


def test_within_another_program_nothing_begins_again(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("this is the process of the tests"))
    monkeypatch.setattr(sys, "argv", ["parablock", "deploy", "server"])
    keep_memory()
