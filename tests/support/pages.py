"""Doing what a page says: its files are written, its commands and scripts run, its changes made, in one folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from outcomes import ended

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = "<!-- not run"


@dataclass(frozen=True)
class Step:
    """One fenced block of a page.

    Attributes:
        language: `bash`, `python`, `yaml` or `diff`.
        content: What stands in it.
        file_name: Of YAML: the name that the text above gives it.
    """

    language: str
    content: str
    file_name: str = ""


def steps(text: str) -> Iterator[Step]:
    """Yield the blocks of a page that can be done, but for those below a `<!-- not run … -->`."""
    before = 0
    for match in re.finditer(r"^```(bash|python|yaml|diff)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        prose, before = text[before : match.start()], match.end()
        if NOT_RUN in prose.strip().rpartition("\n")[2]:
            continue
        names = re.findall(r"`([\w./-]+\.yaml)`", prose)
        yield Step(match[1], match[2], names[-1] if match[1] == "yaml" else "")


def python_of(page: str, mark: str) -> ModuleType:
    """Return the one script of a page that holds some text, as a module."""
    (script,) = (step.content for step in steps(page) if step.language == "python" and mark in step.content)
    module = ModuleType("script")
    exec(compile(script, "a page", "exec"), vars(module))
    return module


def perform(step: Step, folder: Path, change: Callable[[str], str | None] = lambda command: command) -> str:
    """Do one step; give what it printed.

    Args:
        step: The step.
        folder: Where.
        change: Makes another of each line of a shell block; None leaves it out.

    Raises:
        AssertionError: A command or script failed, or wrote a warning or a traceback.
    """
    if step.language == "yaml":
        (folder / step.file_name).write_text(step.content)
        return ""
    if step.language == "python":
        return _run([sys.executable, "-W", "error", "-c", step.content], folder)
    if step.language == "diff":
        (folder / "change.diff").write_text(step.content)
        return _run(["git", "apply", "change.diff"], folder)
    lines = (change(line) for line in step.content.replace("\\\n", " ").splitlines())
    return "".join(_run(["bash", "-c", line], folder) for line in lines if line)


def _run(command: list[str], folder: Path) -> str:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": programs, "OMP_NUM_THREADS": "2", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = ended(command, folder, environment)
    assert done.code == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout
