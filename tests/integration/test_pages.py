"""What the pages tell a reader to type works, as it stands there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pages import ROOT, Step, perform, steps
from tiny_runs import summary_of


def page(name: str) -> list[Step]:
    return list(steps((ROOT / "docs" / name).read_text()))


@pytest.mark.slow
def test_the_quickstart_and_the_python_page_do_what_they_say(tmp_path: Path) -> None:
    printed = "".join(perform(step, tmp_path) for step in page("quickstart.md"))
    assert "layers.7" in printed
    first = summary_of(tmp_path / "runs/first")
    assert first["final_eval_loss"] < first["initial_eval_loss"] / 2
    overlapped, serial = json.loads((tmp_path / "runs/compared/compare.json").read_text())
    assert overlapped["wall_time_s"] < serial["wall_time_s"]
    assert overlapped["overlap_fraction"] > serial["overlap_fraction"] == 0
    assert (tmp_path / "runs/compared/report.html").exists()
    for step in page("api.md"):  # it says that `made/` is the quickstart's
        perform(step, tmp_path)
    assert summary_of(tmp_path / "runs/from-python")["rounds_done"] == 8


def test_the_pages_have_something_to_do() -> None:
    kinds = [step.language for step in page("quickstart.md")]
    assert kinds == ["python", "yaml", "bash", "bash", "python"]
    assert [step.language for step in page("api.md")] == ["python", "python"]


def test_a_step_that_fails_is_noticed(tmp_path: Path) -> None:
    for step in (Step("bash", "true\nfalse\n"), Step("python", "raise SystemExit(3)"), Step("python", "1 +")):
        with pytest.raises(AssertionError):
            perform(step, tmp_path)
    with pytest.raises(AssertionError, match="UserWarning"):
        perform(Step("python", "import warnings; warnings.warn('careful')"), tmp_path)
