"""The scripts in examples/, run as a user runs them: each in a process of its own, from another folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from outcomes import ended
from tiny_runs import make_workshop, summary_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
MAX_LINES = 59


def run_example(name: str, *arguments: object, folder: Path) -> str:
    """Run a script with warnings as errors; give what it printed."""
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    done = ended(command, folder)
    assert done.code == 0, done.stderr
    return done.stdout


def losses(text: str) -> tuple[float, float]:
    """Read `loss before -> after` out of a line."""
    before, after = re.findall(r"loss (\d+\.\d+) (?:->|→) (\d+\.\d+)", text)[0]
    return float(before), float(after)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_enough_to_be_read_at_once(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= MAX_LINES


def test_every_example_is_run_here_and_listed_in_the_readme() -> None:
    here = Path(__file__).read_text()
    readme = (EXAMPLES / "README.md").read_text()
    assert len(SCRIPTS) == 5
    assert [script.name for script in SCRIPTS if f'run_example("{script.stem}"' not in here] == []
    assert sorted(re.findall(r"^\| `(\w+\.py)`", readme, flags=re.MULTILINE)) == [path.name for path in SCRIPTS]


@pytest.mark.slow
def test_two_clients_learn_and_hide_communication(tmp_path: Path) -> None:
    printed = run_example("01_two_clients", tmp_path / "out", folder=tmp_path)
    before, after = losses(printed)
    summary = summary_of(tmp_path / "out" / "run")
    assert after < before / 2
    assert (summary["num_clients"], summary["delay"], summary["clock"]) == (2, 1, "real")
    assert f"{summary['overlap_fraction']:.0%} of the communication" in printed
    assert summary["overlap_fraction"] > 0.2


@pytest.mark.slow
def test_your_own_jsonl_makes_what_it_is_not_given_and_learns_the_answers(tmp_path: Path) -> None:
    printed = run_example("02_your_own_jsonl", folder=tmp_path)
    before, after = losses(printed)
    assert after < before / 4
    base, tuned = re.findall(r"exact answers (\d+)% -> (\d+)% of 20", printed)[0]
    assert int(tuned) >= int(base) + 50


@pytest.mark.slow
def test_your_own_jsonl_takes_a_file_and_a_folder(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Say {k % 7}.", "completion": f"It is {k % 7}."} for k in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_workshop(tmp_path, tiny_llama, tiny_tokenizer).model
    printed = run_example("02_your_own_jsonl", text, model, tmp_path / "out", folder=tmp_path)
    assert "Say 0." in printed
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_model_that_nobody_knows_is_partitioned_and_learns(tmp_path: Path) -> None:
    printed = run_example("03_your_own_model_and_blocks", folder=tmp_path)
    assert "blocks: layers.0-1 (18,528), layers.2-3 (18,528), head (6,272)" in printed
    first, last = (float(loss) for loss in re.findall(r"losses (\d+\.\d+),", printed))
    assert last < first / 4


@pytest.mark.slow
def test_a_deployment_gives_the_model_of_one_process_and_takes_its_processes_down(tmp_path: Path) -> None:
    printed = run_example("04_deployment", tmp_path / "out", folder=tmp_path)
    assert "the same model" in printed
    deployed, here = (summary_of(tmp_path / "out" / name) for name in ("deployed", "here"))
    assert deployed["model_sha256"] == here["model_sha256"]
    assert deployed["final_eval_loss"] < deployed["initial_eval_loss"] - 1
    logs = tmp_path / "out" / "deployed" / "deployment" / "logs"
    assert {log.name for log in logs.iterdir()} == {"site-0.log", "site-1.log"}
    running = ended(["ps", "-ewwo", "args"]).stdout
    assert "python" in running
    assert str(tmp_path / "out") not in running


@pytest.mark.slow
def test_the_comparison_shows_the_same_bytes_and_less_time(tmp_path: Path) -> None:
    table = run_example("05_compare_methods", tmp_path / "out", folder=tmp_path).splitlines()
    assert [row.split("|")[1].strip() for row in table] == ["method", "---", "fl_bcd", "parablock"]
    serial, overlapped = (summary_of(tmp_path / "out" / f"delay-{delay}") for delay in (0, 1))
    assert overlapped["wall_time_s"] < 0.7 * serial["wall_time_s"]
    assert overlapped["uplink_bytes"] == pytest.approx(serial["uplink_bytes"], rel=1e-4)  # headers hold the loss
    assert overlapped["model_sha256"] != serial["model_sha256"]
