"""Every change that `docs/extending.md` shows applies, does what the page says, and touches few files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from outcomes import ended
from pages import ROOT, Step, perform, steps
from parablock import load_config, run
from tiny_runs import Workshop, command, metrics_of, summary_of

PAGE = (ROOT / "docs/extending.md").read_text()
SECTIONS = {heading: list(steps(text)) for heading, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, re.M)}
TERM, FORM = "A method with a term in the local loss", "A method with updates of its own kind"
FORMAT, TRANSPORT, DATA, SCHEDULE = "A wire format", "A transport", "A data format", "A block schedule"
FAMILY = "A model family"
MOST_FILES = {TERM: 3, FORM: 5, FORMAT: 2, DATA: 2, SCHEDULE: 2}
REFUSED = {
    TERM: "there is no method fedprox_l1",
    FORM: "fedsign",
    FORMAT: "float16",
    DATA: "it has the fields query, response",
    SCHEDULE: "there_and_back",
}
"""What is told to who tries a section without its change."""

PERFORM = """
import io, json, shlex, sys
from contextlib import redirect_stdout

from tiny_runs import command

printed = []
for language, content in json.load(sys.stdin):
    if language == "python":
        with redirect_stdout(io.StringIO()) as out:
            exec(content, {"__name__": "__main__"})
        printed.append(out.getvalue())
    else:
        outcome = command(*shlex.split(content)[1:])
        assert outcome.code == 0, outcome.stderr
        printed.append(outcome.stdout)
print(json.dumps(printed))
"""
"""Do the steps of the page in one process, which imports torch once."""


PARITY = """
import test_threads_equal_the_oracle as parity
from parablock.algorithm.voting import VoteAggregation
from parablock.engine.update_form import SignVotes
from parablock.wire.quantize import Encoding


def vote(updates, round_index):
    aggregation = VoteAggregation()
    aggregation.fold(updates)
    return aggregation.aggregate()


def votes(encoding):
    def fresh():
        carried = parity.lossy(encoding)["fresh"]()
        encode = carried["encode"]
        carried["encode"] = lambda delta, *place: encode(
            delta.sign() * delta.abs().mean().bfloat16().float(), *place
        )
        return carried

    return {"fresh": fresh, "aggregate": vote}


for delay in (0, 2):
    half = Encoding("float16")
    found = parity.threaded(delay, encoding=half)
    parity.assert_equal(found, parity.oracle(delay, **parity.lossy(half)))
    assert not parity.same(found[0].server.params, parity.oracle(delay).server.params)
    parity.Differences, usual = (lambda encoding, *_: SignVotes(encoding)), parity.Differences
    for encoding in (Encoding("float32"), Encoding("int2", "stochastic")):
        found = parity.threaded(delay, encoding=encoding)
        parity.assert_equal(found, parity.oracle(delay, **votes(encoding)))
        assert not parity.same(found[0].server.params, parity.oracle(delay, **parity.lossy(encoding)).server.params)
    parity.Differences = usual
print("equal")
"""
"""float16 and votes: the engine against the sequential version."""


def start(folder: Path, workshop: Workshop) -> Path:
    """Put what the page starts from into a folder."""
    (folder / "made").symlink_to(workshop.path)
    (folder / "first.yaml").write_text(workshop.config.read_text())
    return folder


@pytest.fixture
def folder(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run commands in without any change, in this process."""
    monkeypatch.chdir(tmp_path)
    return start(tmp_path, workshop)


@dataclass(frozen=True)
class Done:
    """The page, carried out: where, and what each section printed, step by step."""

    folder: Path
    printed: dict[str, list[str]]


@pytest.fixture(scope="module")
def done(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Make all changes in a copy of the source, and do with it what the page says."""
    place = start(tmp_path_factory.mktemp("changed"), workshop)
    shutil.copytree(ROOT / "src/parablock", place / "src/parablock")
    todo = []
    for section, of_section in SECTIONS.items():
        for step in of_section:
            for content in step.content.splitlines() if step.language == "bash" else [step.content]:
                if step.language == "diff" or (step.language == "bash" and not content.startswith("parablock")):
                    perform(Step(step.language, content), place)
                else:
                    content += " --format json" if content.startswith("parablock plan") else ""
                    todo.append((section, step.language, content))
    todo.append(("parity", "python", PARITY))
    paths = os.pathsep.join(map(str, (place / "src", ROOT / "tests/support", ROOT / "tests/parity")))
    given = json.dumps([entry[1:] for entry in todo])
    process = ended([sys.executable, "-W", "error", "-c", PERFORM], place, {"PYTHONPATH": paths}, given=given)
    assert process.code == 0, process.stderr
    printed: dict[str, list[str]] = {}
    for (section, *_), output in zip(todo, json.loads(process.stdout), strict=True):
        printed.setdefault(section, []).append(output)
    return Done(place, printed)


def files_of(section: str) -> list[str]:
    """The source files that a section's change touches."""
    changes = [step.content for step in SECTIONS[section] if step.language == "diff"]
    return [name for change in changes for name in re.findall(r"^\+\+\+ b/(.+)$", change, re.M)]


def compared(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((folder / "compare.json").read_text())}


def plain_run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run `first.yaml` without any change, in this process."""
    return run(load_config(folder / "first.yaml", overrides), folder / "runs/plain")


# -- how many files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", MOST_FILES)
def test_a_change_touches_as_few_files_as_the_page_says(section: str) -> None:
    files = files_of(section)
    assert len(set(files)) == len(files) <= MOST_FILES[section]
    assert all(name.startswith("src/parablock/") for name in files)
    (told,) = re.findall(rf"^\| {section.lower()} \| (\d+) \|$", PAGE, re.M)
    assert int(told) == len(files)


def test_a_transport_is_one_script_that_changes_no_file() -> None:
    assert [step.language for step in SECTIONS[TRANSPORT]] == ["python"]


@pytest.mark.parametrize("section", MOST_FILES)
def test_a_change_applies_alone_and_once_and_is_as_tidy_as_the_rest(section: str, folder: Path) -> None:
    shutil.copytree(ROOT / "src/parablock", folder / "src/parablock")
    (change,) = (step for step in SECTIONS[section] if step.language == "diff")
    perform(change, folder)
    for how in (["check"], ["format", "--check"]):
        options = ["--no-cache", "--config", str(ROOT / "pyproject.toml")]
        tool = [sys.executable, "-m", "ruff", *how, *options, *files_of(section)]
        outcome = ended(tool, folder)
        assert outcome.code == 0, outcome.stdout
    with pytest.raises(AssertionError, match="error: "):
        perform(change, folder)


# -- what they do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", REFUSED)
def test_without_the_change_the_commands_are_refused_by_name(section: str, folder: Path) -> None:
    for step in SECTIONS[section]:
        for line in step.content.splitlines() if step.language == "bash" else ():
            if line.startswith("parablock"):
                outcome = command(*shlex.split(line)[1:])
                assert outcome.code != 0 and REFUSED[section] in outcome.stderr
            else:
                perform(Step("bash", line), folder)


@pytest.mark.slow
def test_a_term_of_its_own_changes_what_is_learned(done: Done) -> None:
    losses = {name: entry["final_eval_loss"] for name, entry in compared(done.folder / "runs/l1").items()}
    assert losses.keys() == {"fedprox_l1", "fedavg"}
    assert abs(losses["fedprox_l1"] - losses["fedavg"]) > 0.01
    settings = yaml.safe_load((done.folder / "runs/l1/fedprox_l1/config.yaml").read_text())
    assert settings["federation"]["proximal_l1"] == 0.1


@pytest.mark.slow
def test_votes_learn_with_few_bytes_as_planned(done: Done) -> None:
    plan, found = json.loads(done.printed[FORM][0]), compared(done.folder / "runs/sign")
    votes, mean = found["fedsign"], found["fedavg"]
    assert votes["uplink_bytes"] < mean["uplink_bytes"] / 13
    assert plan["bytes_per_client_round"]["int2"] == pytest.approx(votes["bytes_per_client_round"], rel=0.01)
    assert mean["final_eval_loss"] < votes["final_eval_loss"] < votes["initial_eval_loss"] - 1


@pytest.mark.slow
def test_a_wire_format_halves_the_bytes(done: Done, folder: Path) -> None:
    halved, whole = summary_of(done.folder / "runs/float16"), plain_run(folder)
    assert halved["uplink_bytes"] == pytest.approx(whole["uplink_bytes"] / 2, rel=0.02)
    assert halved["final_eval_loss"] == pytest.approx(whole["final_eval_loss"], abs=0.02)
    assert halved["model_sha256"] != whole["model_sha256"]


@pytest.mark.slow
def test_a_run_over_the_transport_gives_the_bits_of_any_other(done: Done, folder: Path) -> None:
    assert done.printed[TRANSPORT] == ["completed\n"]
    settings = ("checkpoint.every_rounds=0",)
    over_files, plain = summary_of(done.folder / "runs/by-folder"), plain_run(folder, *settings)
    same = ("model_sha256", "final_eval_loss", "uplink_bytes", "downlink_bytes")
    assert [over_files[key] for key in same] == [plain[key] for key in same]
    assert over_files["overlap_fraction"] == 0 < plain["overlap_fraction"], "it went another way"


@pytest.mark.slow
def test_rows_of_the_data_format_are_read(done: Done) -> None:
    run_printed, messages = done.printed[DATA]
    assert "metamath: 1 example," in run_printed
    assert summary_of(done.folder / "runs/metamath")["status"] == "completed"
    assert json.loads(messages)["messages"][1] == {"role": "assistant", "content": "Lima"}


@pytest.mark.slow
def test_a_schedule_goes_there_and_back(done: Done) -> None:
    assert done.printed[SCHEDULE][0] == "[2.0, 2.0, 2.0]\n"
    assert [row["block_index"] for row in metrics_of(done.folder / "runs/there-and-back")] == [0, 1, 2, 3, 3, 2]


@pytest.mark.slow
def test_the_layers_of_a_family_are_found_by_their_path(done: Done, folder: Path) -> None:
    assert "layers.3" in done.printed[FAMILY][0]
    line = SECTIONS[FAMILY][0].content.replace("model.layers", "model.stages")
    outcome = command(*shlex.split(line)[1:])
    assert outcome.code != 0 and "model.stages" in outcome.stderr


@pytest.mark.slow
def test_the_new_payloads_give_the_bits_of_the_sequential_version(done: Done) -> None:
    assert done.printed["parity"] == ["equal\n"]
