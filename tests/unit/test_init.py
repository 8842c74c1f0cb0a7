"""`from parablock import …`: the interface for Python."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import parablock
from outcomes import ended
from parablock import RunConfig, load_config, parse_config, resume, run
from parablock.errors import CheckpointError
from tiny_runs import Workshop, metrics_of, tiny_config


def modules_after(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and list the top-level modules that it has loaded."""
    script = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"torch", "transformers", "pydantic", "rich"}
    assert modules_after("import parablock; dir(parablock)") & heavy == set()
    assert modules_after("from parablock import RunConfig") & heavy == {"pydantic"}
    assert modules_after("from parablock import run") & heavy == heavy


def test_what_moves_bytes_loads_no_more_than_it_needs():
    heavy = {"torch", "transformers"}
    assert modules_after("import parablock.engine.flower.invitations") & heavy == {"torch"}
    assert modules_after("import parablock.deploy.client_app") & heavy == {"torch"}  # until the server lets it in
    assert modules_after("import parablock.deploy.server_app") & heavy == heavy


def test_every_name_that_it_says_it_has_is_there():
    assert {name for name in parablock.__all__ if not hasattr(parablock, name)} == set()
    assert set(parablock.__all__) <= set(dir(parablock))
    with pytest.raises(AttributeError, match="'parablock' has no attribute 'runn'"):
        parablock.runn  # noqa: B018


def test_its_names_are_those_of_their_homes():
    from parablock.config import load as config
    from parablock.experiment import run as experiment

    assert (run, resume) == (experiment.run, experiment.resume)
    assert (RunConfig, load_config, parse_config) == (config.RunConfig, config.load_config, config.parse_config)


def test_the_version_is_that_of_the_installed_distribution():
    assert parablock.__version__ == metadata.version("parablock")


def test_a_run_needs_a_configuration_and_a_folder_alone(workshop: Workshop, tmp_path: Path):
    summary = run(RunConfig(**tiny_config(workshop)), str(tmp_path / "run"))
    assert summary["status"] == "completed"
    assert len(metrics_of(tmp_path / "run")) == summary["num_rounds"] == 6


def test_a_run_without_a_display_prints_nothing_and_logs_its_lines(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    config = load_config(workshop.config)
    run(config, tmp_path / "silent")
    assert caplog.messages == []
    with caplog.at_level(logging.INFO, logger="parablock"):
        run(config, tmp_path / "logged")
    assert {record.name for record in caplog.records} == {"parablock"}
    assert len([line for line in caplog.messages if line.startswith("round ")]) == 6
    assert any("blocks" in line for line in caplog.messages)
    assert capsys.readouterr() == ("", "")


def test_a_stopped_run_is_resumed_from_python(workshop: Workshop, tmp_path: Path):
    config = load_config(workshop.config)
    whole = run(config, tmp_path / "whole")
    rounds = iter(range(100))
    stopped = run(config, tmp_path / "stopped", asked_to_stop=lambda: next(rounds) == 3)
    assert (stopped["status"], stopped["model_sha256"]) == ("interrupted", None)
    resumed = resume(tmp_path / "stopped")
    assert (resumed["status"], resumed["model_sha256"]) == ("completed", whole["model_sha256"])
    with pytest.raises(CheckpointError, match="complete"):
        resume(tmp_path / "stopped")


def test_only_a_configuration_and_a_folder_are_given_by_position():
    by_position = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY}
    for function, names in ((run, ["config", "output_dir"]), (resume, ["output_dir"])):
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind in by_position] == names
        assert {p.name for p in parameters if p.default is p.empty} == set(names)


@pytest.mark.slow
def test_a_type_checker_knows_the_interface_and_that_nothing_else_is_there(tmp_path: Path):
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text("from parablock import load_config, run\nx: dict[str, object] = run(load_config('a'), 'b')\n")
    wrong.write_text("import parablock\nparablock.run('a.yaml', 'b')\nparablock.resume()\nparablock.runn\n")
    mypy = [sys.executable, "-m", "mypy", "--config-file", str(Path(__file__).parents[2] / "pyproject.toml")]
    errors = ended([*mypy, right, wrong]).stdout.splitlines()[:-1]
    found = [error.split(":")[:2] for error in errors]  # mypy keeps what it has said of a file, with its place
    assert [(Path(place).name, line) for place, line in found] == [("wrong.py", line) for line in "234"], errors
