"""A user with 200 lines of text and a Hugging Face folder gets a tuned model by the README alone.

Its files and commands are taken from the README and run as they stand, in order, from `init` to a conversation
with the tuned model. What the test adds: tiny models in folders of the names that the README uses, the JSONL files,
what is said to the model, and, to the commands beside that path (another split, the comparison), `--set` for fewer
rounds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pages import ROOT, perform, steps
from tiny_runs import sum_row, summary_of, write_rows

README = (ROOT / "README.md").read_text()
MODEL, LARGER = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"
PATH = ("init", "plan", "run", "eval", "chat")
SHORT = (
    " --set federation.num_rounds=4 --set train.num_local_steps=2 --set train.learning_rate=0.01"
    " --set engine.num_threads=1 --set evaluation.max_examples=8"
)
Done = tuple[Path, dict[str, str]]


def shortened(line: str) -> str | None:
    """Make what is beside the path quick; leave out what installs, or runs the demo and all tests."""
    if line.startswith("make "):
        return None
    if line.split()[1] == "chat":
        return f"echo '3 plus 4?' | {line} --max-new-tokens 8"
    is_beside = line.split()[1] in ("run", "compare") and "runs/mine" not in line
    return line + SHORT if is_beside else line


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Done]:
    """Follow the README; give the folder and what each block printed, by its first line."""
    folder = tmp_path_factory.mktemp("user")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    for model in (MODEL, LARGER):
        make_model(folder / model, tiny_tokenizer)
    for name, rows in (("site_a", range(100)), ("site_b", range(100, 200)), ("mine", range(200))):
        write_rows(folder / f"{name}.jsonl", (sum_row(k // 10, k % 10) for k in rows))
    yield folder, {step.content: perform(step, folder, shortened) for step in steps(README)}


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def printed_by(done: Done, word: str) -> str:
    return next(text for content, text in done[1].items() if word in content)


@pytest.mark.slow
def test_following_the_readme_gives_a_tuned_model_that_transformers_loads(done: Done) -> None:
    summary = summary_of(done[0] / "runs" / "mine")
    assert (summary["status"], summary["num_clients"], summary["method"]) == ("completed", 2, "fedit")
    assert summary["rounds_done"] == 20
    assert summary["final_eval_loss"] < summary["initial_eval_loss"]
    folder = str(done[0] / "runs" / "mine" / "model")
    tuned, base = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, str(done[0] / MODEL)))
    assert type(tuned) is Qwen2ForCausalLM
    changed = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert any(changed) and not all(changed)  # layers are trained, embeddings are not
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_way_to_a_conversation_has_six_commands() -> None:
    way = next(step.content for step in steps(README) if "parablock chat" in step.content).splitlines()
    assert way[0] == "make setup"
    assert [line.split()[1] for line in way[1:]] == list(PATH)


@pytest.mark.slow
def test_what_the_readme_says_the_folder_holds_is_there(done: Done) -> None:
    part = README.split("`runs/mine` then holds", 1)[1].split("All keys", 1)[0]
    names = ["model/", "report.html", "summary.json", "metrics.jsonl", "trace.json", "checkpoints/"]
    assert [name for name in names if f"`{name}`" not in part] == []
    assert [name for name in names if not (done[0] / "runs" / "mine" / name).exists()] == []


@pytest.mark.slow
def test_the_commands_of_the_readme_show_what_it_says(done: Done) -> None:
    printed = printed_by(done, "init site_a")
    assert "site_a.jsonl: 100 rows, prompt_completion" in printed  # init
    assert "Recommended" in printed  # plan
    assert "a round takes about" in printed  # run
    assert "on rows that the run held out" in printed and "were trained on" not in printed  # eval
    said = [line for line in printed.splitlines() if line.partition(":")[0] in ("base", "tuned")]
    assert len(said) == 2  # chat
    assert "layers.3" in printed_by(done, "blocks Qwen")
    one = summary_of(done[0] / "runs" / "one")
    assert (one["status"], one["num_clients"]) == ("completed", 2)
    assert one["model_sha256"] != summary_of(done[0] / "runs" / "mine")["model_sha256"]
    compared = json.loads((done[0] / "runs" / "compared" / "compare.json").read_text())
    assert [run["method"] for run in compared] == ["parablock", "fl_bcd", "fedavg"]


@pytest.mark.slow
def test_the_python_lines_of_the_readme_make_the_same_model_as_its_commands(done: Done) -> None:
    typed, called, other = (summary_of(done[0] / "runs" / name) for name in ("mine", "from-python", "one"))
    assert called["rounds_done"] == 20
    assert called["model_sha256"] == typed["model_sha256"] != other["model_sha256"]
    assert called["uplink_bytes"] == typed["uplink_bytes"]  # measured times are in the messages, and no digits more
