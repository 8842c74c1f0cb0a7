"""A server or a site begins again with glibc's settings, once, and keeps its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parablock.deploy.allocation import SETTINGS, keep_memory, with_kept_memory

CLEAN = {name: value for name, value in os.environ.items() if name not in SETTINGS}

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
    command = [sys.executable, str(tmp_path / "script.py"), "deploy", "a path with blanks"]
    with subprocess.Popen(command, env=CLEAN | own, stdout=subprocess.PIPE) as process:
        told = json.loads(process.communicate()[0])
    assert told["pid"] == process.pid, "as service managers expect"
    assert told["arguments"] == ["deploy", "a path with blanks"]
    assert {name: told["environment"][name] for name in SETTINGS} == with_kept_memory(own)


def test_within_another_program_nothing_begins_again(monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("this is the process of the tests"))
    monkeypatch.setattr(sys, "argv", ["parablock", "deploy", "server"])
    keep_memory()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are of glibc")
@pytest.mark.parametrize(("settings", "times"), [({}, 2), (SETTINGS, 1)])
def test_a_command_begins_again_before_it_has_loaded_anything(settings: dict[str, str], times: int):
    command = [sys.executable, "-X", "importtime", "-m", "parablock", "deploy", "client", "--help"]
    done = subprocess.run(command, env=CLEAN | settings, capture_output=True, text=True, check=True)
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert loaded.count("parablock.deploy.allocation") == times
    assert loaded.count("parablock.cli.main") == 1


LOADING = """
import gc, json
from parablock.deploy.allocation import libraries_load
looks, kept = [], []
gc.callbacks.append(lambda phase, info: looks.append(phase))

def load():
    before = len(looks)
    kept.extend([index] for index in range(10_000))
    return len(looks) - before

with libraries_load():
    within, is_on = load(), gc.isenabled()
frozen = gc.get_freeze_count()
outside, is_on_again = load(), gc.isenabled()
try:
    with libraries_load():
        raise ImportError
except ImportError:
    pass
told = dict(within=within, is_on=is_on, frozen=frozen, outside=outside)
print(json.dumps(told | dict(is_on_again=is_on_again, after_an_error=gc.isenabled())))
"""


def test_nobody_looks_for_garbage_in_libraries_while_they_load_nor_afterwards():
    """In a process of its own: what is frozen stays so."""
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["within"], told["is_on"]) == (0, False) and told["frozen"] > 10_000
    assert told["outside"] > 0 and told["is_on_again"] and told["after_an_error"]
