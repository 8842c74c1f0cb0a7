"""The two walks of CONTRIBUTING.md: files that an update passes, and files that see `wire.format`."""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from torch import Tensor

import parablock
from parablock.config.load import load_config
from parablock.engine.update_form import EncodedUpdate, LocalUpdate
from parablock.experiment.run import run
from parablock.training.local import LocalResult
from parablock.training.trainer import Trained
from parablock.wire.messages import Update
from parablock.wire.quantize import Vector
from parablock.wire.transport import Parcel
from tiny_runs import Workshop

SOURCE = Path(parablock.__file__).parent
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
CARRIERS = (Tensor, LocalResult, Trained, LocalUpdate, EncodedUpdate, Vector, Update, Parcel)
"""The types in which an update travels; bytes count where they are as long as one."""

MAILBOXES = ("clock.py",)
"""Files that hand anything from thread to thread."""

MAX_FILES_OF_AN_UPDATE = 16
MAX_FILES_OF_A_FORMAT = 8


def listed(walk: str) -> list[str]:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    between = re.search(rf"<!-- {re.escape(walk)} -->\n(.*?)<!-- end of the walk -->", text, re.S)
    assert between, walk
    numbered = re.findall(r"^(\d+)\. `([^`]+)`", between.group(1), re.M)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    assert len({path for _, path in numbered}) == len(numbered)
    return [path for _, path in numbered]


def carries(value: object, depth: int = 2) -> bool:
    """Whether a value is an update or holds one."""
    if isinstance(value, bytes):
        return len(value) > 1000
    if isinstance(value, list | tuple) and depth:
        return any(carries(item, depth - 1) for item in value[:3])
    if type(value).__module__.startswith("parablock.model.device_copy"):
        return True
    return isinstance(value, CARRIERS)


@contextmanager
def followed() -> Iterator[set[str]]:
    """Collect the files whose functions are called with an update, from the local steps to the commit."""
    files: set[str] = set()
    under_way = threading.Event()
    over = threading.Event()

    def look(frame: FrameType, event: str, arg: object) -> None:
        name, place = frame.f_code.co_name, Path(frame.f_code.co_filename)
        if not place.is_relative_to(SOURCE):
            return
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        if name == "copy_to_cpu" and caller.endswith("local.py"):
            under_way.set()
        if name == "server_commit" and event == "return":
            over.set()
        if event in ("call", "return") and under_way.is_set() and not over.is_set() and place.name not in MAILBOXES:
            handed = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
            values = [arg] if event == "return" else [frame.f_locals.get(variable) for variable in handed]
            if any(map(carries, values)):
                files.add(str(place.relative_to(SOURCE)))

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def test_an_update_passes_the_files_of_its_walk(workshop: Workshop, tmp_path: Path):
    options = [
        "federation.num_clients=1",
        "data.partition.scheme=iid",
        "federation.delay=0",
        "federation.num_rounds=2",
        "blocks.allow_unvisited=true",
        "wire.streaming=false",
        "evaluation.every_rounds=0",
    ]
    with followed() as files:
        run(load_config(workshop.config, options), tmp_path / "run")
    walk = listed("walk of an update")
    assert sorted(walk) == sorted(files), "\n".join(sorted(files))
    assert len(walk) <= MAX_FILES_OF_AN_UPDATE


def reads_the_format(tree: ast.AST) -> bool:
    """Whether a module reads `.format` or ["format"] of the configuration or of an encoding made of it."""
    owners = ("wire", "encoding", "self")
    for node in ast.walk(tree):
        if (isinstance(node, ast.Attribute) and node.attr == "format") or (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Constant)
            and node.slice.value == "format"
        ):
            owner = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "format":
            return True
        else:
            continue
        last = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
        if last.strip("_") in owners:
            return True
    return False


def files_that_see_the_format() -> set[str]:
    """Of all rooms but `plan/`, which forecasts every format beside the configured one."""
    return {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] not in ("plan", "data")
        and path.name != "data_section.py"  # data.format
        and reads_the_format(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_wire_format_is_seen_by_the_files_of_its_walk():
    walk = listed("walk of wire.format")
    assert set(walk) == files_that_see_the_format()
    assert len(walk) <= MAX_FILES_OF_A_FORMAT


@pytest.mark.parametrize("text", ["config.wire.format", "wire['format']", "self._encoding.format"])
def test_a_reader_of_the_format_is_found(text: str):
    assert reads_the_format(ast.parse(f"x = {text}"))
    assert not reads_the_format(ast.parse(f"x = {text.replace('format', 'rounding')}; f'{{x}}'.format(x)"))
