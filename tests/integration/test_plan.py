"""`parablock plan` as a user types it: from a folder that holds config.json alone, and beside a real run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import Workshop, assert_refused, command, done, summary_of


def planned(workshop: Workshop, *arguments: str) -> dict[str, Any]:
    outcome = done("plan", str(workshop.config), "--format", "json", *arguments)
    content: dict[str, Any] = json.loads(outcome.stdout)
    return content


def test_the_plan_of_a_run_is_what_the_run_then_takes(workshop: Workshop, tmp_path: Path) -> None:
    plan = planned(workshop, "--set", "wire.format=bfloat16")
    assert workshop.run(tmp_path / "run", "wire.format=bfloat16").code == 0
    summary = summary_of(tmp_path / "run")
    moved = summary["uplink_bytes"] + summary["downlink_bytes"]
    assert plan["total_bytes"] == pytest.approx(moved, rel=5e-3)
    assert plan["bytes_per_client_round"]["bfloat16"] == pytest.approx(summary["bytes_per_client_round"], rel=5e-3)
    assert plan["hours"] * 3600 == pytest.approx(summary["wall_time_s"], rel=5e-3)
    assert plan["num_blocks"] == summary["num_blocks"]
    assert planned(workshop)["total_bytes"] > 1.5 * moved  # float32


@pytest.mark.parametrize("method", ["fedavg", "fedit", "ffa_lora", "rolora"])
@pytest.mark.parametrize("delay", [0, 1])
def test_the_bytes_and_seconds_of_every_method_are_those_of_its_run(
    workshop: Workshop, tmp_path: Path, method: str, delay: int
) -> None:
    (row,) = (row for row in planned(workshop)["methods"] if (row["method"], row["delay"]) == (method, delay))
    changes = (f"federation.method={method}", f"federation.delay={delay}")
    assert workshop.run(tmp_path / "run", *changes).code == 0
    summary = summary_of(tmp_path / "run")
    assert row["bytes_per_client_round"] == pytest.approx(summary["bytes_per_client_round"], rel=0.01)
    assert row["hours"] * 3600 == pytest.approx(summary["wall_time_s"], rel=0.01)


def test_options_for_the_link_replace_the_configured_one(workshop: Workshop) -> None:
    base, slower = planned(workshop), planned(workshop, "--upload-mbps", "2", "--download-mbps", "4")
    assert (slower["links"][0]["upload_mbps"], slower["links"][0]["download_mbps"]) == (2, 4)
    assert slower["communication_s"] > 3 * base["communication_s"]
    assert slower["compute_s"] == base["compute_s"]
    by_hand = planned(workshop, "--set", "link.upload_mbps=2", "--set", "link.download_mbps=4")
    assert by_hand == slower


def test_weights_tokenizer_and_data_may_be_absent(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(workshop.model / "config.json", tmp_path / "model")
    moved = ["--set", f"model.name_or_path={tmp_path / 'model'}", "--set", "data.train=[a, b, c, d]"]
    assert planned(workshop, *moved) == planned(workshop)
    refused = command("plan", str(workshop.config), "--probe", "--set", "engine.step_time_s=null", *moved)
    assert refused.code == 2 and "Traceback" not in refused.stderr
    assert command("plan", str(workshop.config), "--set", f"model.name_or_path={tmp_path}").code == 2


def test_a_probe_measures_here(workshop: Workshop) -> None:
    stated = planned(workshop)
    probed = planned(workshop, "--probe", "--set", "engine.step_time_s=null")
    assert (stated["compute_source"], probed["compute_source"]) == ("stated", "probed")
    assert probed["compute_s"] not in (0, stated["compute_s"])
    assert probed["total_bytes"] == stated["total_bytes"]


def test_the_text_has_tables_a_verdict_and_a_recommendation(workshop: Workshop) -> None:
    outcome = command("plan", str(workshop.config))
    assert outcome.code == 0 and outcome.stderr == ""
    for words in (
        "4 blocks",
        "Overlap hides the communication",
        "Sizes that go with parablock: blocks.layers_per_block: 1, train",
    ):
        assert words in outcome.stdout
    assert "The learning rate is 0.01." in " ".join(outcome.stdout.split())
    assert outcome.stdout.startswith("Recommended: federation.method: fedit, federation.delay: ")
    assert "(as configured)" not in outcome.stdout
    assert "fl_bcd" in outcome.stdout and "fl_bcd *" not in outcome.stdout
    linked = " ".join(outcome.stdout.split())
    assert "A round computes for 0.1 s, communicates for " in linked and " without overlap)" in linked
    no_link = command("plan", str(workshop.config), "--set", "link={}").stdout
    assert "A round takes 0.1 s." in no_link and "computes for" not in no_link, "there is nothing to overlap"
    short = command("plan", str(workshop.config), "--set", "federation.num_rounds=2").stdout
    assert "fl_bcd *" in short and "parablock *" in short and "*: with 2 rounds not every block is reached" in short
    adapters = command("plan", str(workshop.config), "--set", "federation.method=fedit").stdout
    assert ("A round sends what adapters" in outcome.stdout, "A round sends" in adapters) == (True, False)
    as_advised = [
        "(as configured)" in command("plan", str(workshop.config), *sets).stdout
        for sets in (("--set", "federation.method=fedit", "--set", f"federation.delay={d}") for d in (0, 1))
    ]
    assert sorted(as_advised) == [False, True]


def test_plan_and_run_tell_the_memory_of_all_clients_in_one_process(workshop: Workshop, tmp_path: Path) -> None:
    plan = planned(workshop)
    whole = plan["process_memory_bytes"]
    assert whole["host"] > 4 * (plan["memory_parts"]["block"]["base_copy"]) + 4e8 and whole["device"] == 0
    real = ("--set", "engine.clock=real", "--set", "engine.step_time_s=null")
    assert planned(workshop, *real)["process_memory_bytes"]["host"] > whole["host"]
    remote = ("--set", "engine.name=remote", "--set", "link={}")
    assert planned(workshop, *real, *remote)["process_memory_bytes"] is None
    warning = "all clients in one process may take"
    text = " ".join(done("plan", str(workshop.config)).stdout.split())
    assert "all 4 clients and the server, which share a model, take about 4" in text
    assert warning not in text
    long = "data.max_length=2000000000"  # a bound: no row is so long
    planned_long = " ".join(done("plan", str(workshop.config), "--set", long).stdout.split())
    assert f"warning: {warning}" in planned_long and planned_long.index(warning) < planned_long.index("next: ")
    output = workshop.run(tmp_path / "run", "federation.num_rounds=1", "blocks.allow_unvisited=true", long).stdout
    assert f"warning: {warning}" in output and output.index(warning) < output.index("base model: eval loss")
    usual = workshop.run(tmp_path / "usual", "federation.num_rounds=1", "blocks.allow_unvisited=true").stdout
    assert "base model: eval loss" in usual and warning not in usual


def test_an_unknown_format_is_named(workshop: Workshop) -> None:
    assert_refused(command("plan", str(workshop.config), "--format", "xml"), "--format")


def test_the_file_that_a_server_starts_with_can_be_planned(workshop: Workshop, tmp_path: Path) -> None:
    done("deploy", "init", "server", str(tmp_path / "server"), "--model", str(workshop.model))
    file = tmp_path / "server" / "run.yaml"
    outcome = done("plan", str(file), "--format", "json")
    assert json.loads(outcome.stdout)["num_blocks"] > 0
    assert "planned for sites that have the rows" in outcome.stderr
    assert_refused(command("plan", str(file), "--probe"), "--probe times real steps, and needs rows")
    size = ("--set", "blocks.layers_per_block=auto")
    assert_refused(command("plan", str(file), *size), "set 1: `parablock plan` then advises")
    numbered = done("plan", str(file), "--set", "blocks.layers_per_block=1", "--format", "json")
    assert json.loads(numbered.stdout)["recommended"]["layers_per_block"] > 0
