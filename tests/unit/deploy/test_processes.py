"""What Flower's processes get with their environment, seen in a process that has it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from parablock.deploy.processes import LARGE_PAGES, TUNABLES, environment, server_environment, site_environment
from parablock.engine.flower.courier import trainer_environment
from parablock.engine.flower.stream import PART_BYTES, together_bytes

HAS_GLIBC = platform.libc_ver()[0] == "glibc"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = """
import re
buffer = b"x" * (64 << 20)
print(sum(int(kb) for kb in re.findall("AnonHugePages: *([0-9]+) kB", open("/proc/self/smaps").read())) >> 10)
"""


def said(code: str, env: dict[str, str]) -> int:
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="large pages are not for who asks here"
)
def test_large_buffers_take_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TUNABLES, raising=False)
    assert said(LARGE, environment(tmp_path)) > 0  # MiB; all of it where memory is not in pieces
    assert said(LARGE, dict(os.environ)) == 0


def test_what_a_user_asks_of_the_c_library_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TUNABLES, "glibc.malloc.arena_max=2")
    assert environment(tmp_path)[TUNABLES] == f"{LARGE_PAGES}:glibc.malloc.arena_max=2"


def test_an_array_is_one_object_for_flower(tmp_path: Path):
    content = f"bytes({together_bytes(PART_BYTES)})"
    code = f"from flwr.app import Array; print(len(Array('uint8', (1,), 'x', {content}).slice_array()))"
    assert said(code, environment(tmp_path)) == 1
    assert said(code, dict(os.environ)) == 2


def test_a_server_moves_one_object_of_each_site_at_a_time(tmp_path: Path):
    code = """
import threading, time
from flwr.superlink.grid.http_grid import pull_objects
lock, now, most = threading.Lock(), 0, 0
def carry(name, content=b""):
    global now, most
    with lock:
        now += 1
        most = max(most, now)
    time.sleep(0.05)
    with lock:
        now -= 1
    return content
names = [str(i) for i in range(6)]
assert set(pull_objects(names, carry)) == set(names)
print(most)
"""
    assert said(code, server_environment(tmp_path)) == 1
    assert said(code, environment(tmp_path)) == min(2, os.cpu_count() or 1)


@pytest.mark.parametrize(("calls_it", "concurrent"), [("warm.superexec()", [1, 1]), ("", [2, 2])])
def test_a_clientapp_moves_one_object_at_a_time_and_its_supernode_several(
    tmp_path: Path, calls_it: str, concurrent: list[int]
):
    code = f"""
from contextlib import suppress
from parablock.deploy import warm
warm._begin_to_keep, warm._load = lambda: None, lambda name: lambda: 0
with suppress(SystemExit):
    {calls_it or "pass"}
from flwr.supercore import constant
print(constant.FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS, constant.FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=site_environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert [int(number) for number in done.stdout.split()] == concurrent


@pytest.mark.skipif(not HAS_GLIBC, reason="the C library here takes no such settings")
def test_a_site_uses_the_memory_of_a_message_again_and_a_server_gives_it_back(tmp_path: Path):
    code = """
import re
def kept():
    return sum(int(kb) for kb in re.findall("(?m)^VmRSS:\\s*([0-9]+) kB", open("/proc/self/status").read())) >> 10
before = kept()
some = [b"x" * (10 << 20) for _ in range(3)]
del some
print(kept() - before)  # MiB
"""
    assert said(code, site_environment(tmp_path)) > 20
    assert said(code, server_environment(tmp_path)) < 5


def test_a_site_looks_for_messages_twice_as_often_as_a_server_looks_for_runs(tmp_path: Path):
    code = """
from flwr.supercore.superexec import run_superexec
print(round(1000 * run_superexec._get_task_poll_interval()))
"""
    assert said(code, site_environment(tmp_path)) == 500  # ms
    assert said(code, server_environment(tmp_path)) == 1000


@pytest.mark.skipif(not HAS_GLIBC, reason="the C library here takes no such settings")
def test_a_trainer_uses_the_memory_of_a_block_again_whatever_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = """
import resource
def new_pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"x" * (64 << 20)
del block
before = new_pages()
block = b"x" * (64 << 20)
print(new_pages() - before)
"""
    at_site = site_environment(tmp_path)
    for name, value in at_site.items():
        monkeypatch.setenv(name, value)
    assert said(code, trainer_environment()) == 0
    assert said(code, at_site) > 16  # large pages at least
