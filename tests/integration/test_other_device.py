"""A model that lies on another device than the CPU: every tensor is moved where it has to be.

The device is one that torch has beside the CPU on any machine (tests/support/other_device.cpp). It does not tell
how fast a GPU is, nor what the kernels of a GPU give.
"""

from __future__ import annotations

import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

import other_device
from outcomes import Outcome, ended
from tiny_runs import NUM_LAYERS, Workshop, command, summary_of, write_rows

KEEP = ("train.optimizer_state=keep", "checkpoint.every_rounds=3")
COARSE = (
    "model.dtype=bfloat16",
    "wire.format=int4",
    "train.gradient_checkpointing=true",
    "blocks.split=attention_mlp",
)
METHODS = ("parablock", "fedavg", "fedit", "flora")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: the other device is compiled")
    return other_device.build(tmp_path_factory.mktemp("library"))


def there(library: Path, *arguments: str) -> Outcome:
    """Run the command line where models are loaded onto the other device."""
    script = [sys.executable, other_device.__file__, library, *arguments]
    return ended(script, environment={"OMP_NUM_THREADS": "1"})


def assert_as_good(there: Path, here: Path) -> None:
    other, cpu = summary_of(there), summary_of(here)
    assert other["final_eval_loss"] == pytest.approx(cpu["final_eval_loss"], rel=1e-3)
    assert cpu["final_eval_loss"] < 0.99 * cpu["initial_eval_loss"]


def test_each_method_learns_on_another_device_what_it_learns_on_the_cpu(
    workshop: Workshop, library: Path, tmp_path: Path
):
    here, away = tmp_path / "here", tmp_path / "there"
    arguments = ("compare", str(workshop.config), "--methods", ",".join(METHODS), "--output-dir")
    assert command(*arguments, str(here)).code == 0
    outcome = there(library, *arguments, str(away))
    assert outcome.code == 0, outcome.stderr
    for method in METHODS:
        assert_as_good(away / method, here / method)


def test_half_layers_in_bfloat16_over_a_coarse_wire_learn_there(workshop: Workshop, library: Path, tmp_path: Path):
    overrides = (*COARSE, f"federation.num_rounds={2 * NUM_LAYERS}")
    assert workshop.run(tmp_path / "here", *overrides).code == 0
    outcome = there(library, *workshop.arguments(tmp_path / "there", *overrides))
    assert outcome.code == 0, outcome.stderr
    assert_as_good(tmp_path / "there", tmp_path / "here")


def test_a_run_goes_on_there_and_its_model_is_scored_there(workshop: Workshop, library: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert there(library, *workshop.arguments(run, *KEEP)).code == 0
    undisturbed = summary_of(run)["model_sha256"]
    (run / "summary.json").unlink()
    resumed = there(library, "resume", str(run))
    assert "resuming from the checkpoint round-000003" in resumed.stdout
    assert summary_of(run)["model_sha256"] == undisturbed
    rows = [{"prompt": f"1 plus {n}?", "completion": "no", "choices": ["no", "yes"]} for n in range(3)]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    for task in ("multiple_choice", "exact_match"):
        scores = [
            scored("eval", str(run), "--data", str(questions), "--task", task, "--max-new-tokens", "4")
            for scored in (command, partial(there, library))
        ]
        assert [score.code for score in scores] == [0, 0], scores[1].stderr
        here, away = (re.findall(r"│ (base|tuned) +│ +([\d.]+)", score.stdout) for score in scores)
        assert here == away
        assert [label for label, _ in here] == ["base", "tuned"], scores[0].stdout


def said_there(library: Path, *scripts: str) -> list[str]:
    """Run scripts in one Python where torch knows the device, and give what each says, its error included."""
    about = """
import sys, traceback, torch, other_device
other_device.make_known(sys.argv[1])
for script in sys.argv[2:]:
    try:
        exec(script)
    except Exception:
        traceback.print_exc(file=sys.stdout)
    print(end="\\0")
"""
    done = ended([sys.executable, "-c", about, library, *scripts], Path(other_device.__file__).parent)
    *said, rest = done.stdout.split("\0")
    assert rest == "", done.stderr
    return said


def test_the_other_device_is_as_foreign_as_a_gpu(library: Path):
    terms = ("torch.ones(2, device='other')", "torch.ones(2)")
    added, refused = said_there(
        library, *(f"print((torch.ones(2, device='other') * {term}).sum().item())" for term in terms)
    )
    assert "2.0" in added
    assert "RuntimeError" in refused


LEAVING = """
from parablock.model import device_copy
there = torch.arange(3500.).to('other') / 7
on_its_way = device_copy.copy_to_cpu(there)
"""


def test_what_was_trained_leaves_the_device_part_by_part_behind_the_main_stream(library: Path):
    part = "print(on_its_way[{}].isfinite().all().item(), on_its_way._here.isnan().sum().item())"
    whole = "print(torch.equal(on_its_way[:], torch.arange(3500.) / 7), on_its_way._source)"
    looks = (part.format(":600"), part.format("900:1100"), whole)
    assert said_there(library, *(LEAVING + look for look in looks)) == ["True 2500\n", "True 1500\n", "True None\n"]


def test_the_other_device_tells_a_copy_that_is_not_waited_for(library: Path):
    unread = "print(on_its_way._here.isnan().all().item())"
    gone = "on_its_way._source = None\ndel there\non_its_way[:]"
    changed = "there.zero_()\nprint(on_its_way[:].any().item())"
    unordered = """
here = torch.empty(3500, pin_memory=True)
with torch.Stream('other'):
    here.copy_(there, non_blocking=True)
del here
"""
    said = said_there(library, *(LEAVING + script for script in (unread, gone, changed)))
    assert said[0] == "True\n" and said[2] == "False\n"
    assert "was given up before it was done" in said[1]
    script = "import sys, torch, other_device\nother_device.make_known(sys.argv[1])" + LEAVING + unordered
    done = ended([sys.executable, "-c", script, library], Path(other_device.__file__).parent)
    assert "may still be writing" in done.stdout + done.stderr
