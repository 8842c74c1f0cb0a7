"""`parablock compare`: the same data, seed and link for each method."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from parablock.compare import plan_comparison
from parablock.config import load_config
from tiny_runs import Workshop, command, make_workshop, metrics_of, summary_of


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("compare"), tiny_llama, tiny_tokenizer)


def test_methods_are_compared_in_one_table_with_the_base_model_first(workshop, tmp_path):
    directory = tmp_path / "compared"
    outcome = command(
        *("compare", str(workshop.config), "--output-dir", str(directory)),
        *("--methods", "parablock,fl_bcd,fedavg", "--seeds", "0,1"),
    )
    assert outcome.code == 0, outcome.stderr
    summaries = json.loads((directory / "compare.json").read_text())
    assert [summary["name"] for summary in summaries] == [
        f"{method}-seed{seed}" for seed in (0, 1) for method in ("parablock", "fl_bcd", "fedavg")
    ]
    for summary in summaries:
        assert summary_of(directory / summary["name"])["model_sha256"] == summary["model_sha256"]
    assert len({summary["model_sha256"] for summary in summaries}) == 6
    table = (directory / "compare.md").read_text().splitlines()
    assert "base model" in table[2]
    assert "parablock-seed0" in table[3]
    assert (directory / "report.html").exists()


def test_a_compared_run_is_the_run_that_the_method_makes_alone(workshop, tmp_path):
    command("compare", str(workshop.config), "--output-dir", str(tmp_path / "c"), "--methods", "fl_bcd,parablock")
    workshop.run(tmp_path / "alone", "federation.delay=0")
    alone, compared = summary_of(tmp_path / "alone"), summary_of(tmp_path / "c" / "fl_bcd")
    assert alone["model_sha256"] == compared["model_sha256"]
    assert alone["model_sha256"] != summary_of(tmp_path / "c" / "parablock")["model_sha256"]


def test_what_is_said_of_blocks_holds_for_the_methods_that_train_blocks(workshop):
    config = load_config(workshop.config, ["blocks.layers_per_block=2", "blocks.schedule=cyclic"])
    by_name = {planned.name: planned.config for planned in plan_comparison(config, ["fl_bcd", "fedavg"])}
    assert by_name["fl_bcd"].blocks == config.blocks
    assert by_name["fedavg"].blocks != config.blocks
    assert by_name["fedavg"].train == config.train


def test_fedavg_trains_and_sends_all_parameters_in_every_round(workshop, tmp_path):
    workshop.run(tmp_path / "fedavg", "federation.method=fedavg", "federation.delay=0")
    workshop.run(tmp_path / "fl_bcd", "federation.delay=0")
    fedavg, fl_bcd = summary_of(tmp_path / "fedavg"), summary_of(tmp_path / "fl_bcd")
    assert fedavg["num_blocks"] == 1
    assert {row["block_index"] for row in metrics_of(tmp_path / "fedavg")} == {0}
    # 4 layers, and embeddings of 300 · 32 with the final norm beside them: more than four blocks' worth of bytes
    assert fedavg["uplink_bytes"] > 4.5 * fl_bcd["uplink_bytes"]
    assert fedavg["final_eval_loss"] != fl_bcd["final_eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "parablock,parablock"], "once"),
        (["--methods", "parablock,gossip"], "gossip"),
        (["--methods", "flora"], "not built"),
        (["--seeds", "0,x"], "whole numbers"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_runs(workshop, tmp_path, arguments, said):
    outcome = command("compare", str(workshop.config), "--output-dir", str(tmp_path / "c"), *arguments)
    assert outcome.code == 2
    assert said in outcome.stderr
    assert not (tmp_path / "c").exists()


def test_a_comparison_does_not_write_over_the_report_of_a_run(workshop, tmp_path):
    workshop.run(tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_bytes()
    outcome = command(
        *("compare", str(workshop.config), "--output-dir", str(tmp_path / "run"), "--methods", "fl_bcd")
    )
    assert outcome.code == 2
    assert "holds a run already" in outcome.stderr
    assert (tmp_path / "run" / "report.html").read_bytes() == before
