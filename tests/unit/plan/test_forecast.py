"""A plan as a whole: what it needs, what it says, what it recommends."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig

from parablock.algorithm.schedule import SCHEDULES, blocks_never_visited
from parablock.config.keys import RunConfig
from parablock.config.load import load_config, parse_config
from parablock.errors import ConfigError, ModelError
from parablock.plan import forecast
from parablock.plan.forecast import make_plan
from parablock.plan.scenario import Scenario
from parablock.plan.view import next_step
from parablock.privacy.accounting import Accountant
from parablock.training.flops import Tokens
from parablock.training.step_time import ASSUMED_FLOPS, assumed_compute, slowdown
from planning import plan_of
from tiny_runs import Workshop

PROMISED_KEYS = [
    *("num_blocks", "blocks", "bytes_per_client_round", "total_bytes", "compute_s", "communication_s", "round_s"),
    *("sequential_s", "hours", "memory_bytes", "never_visited", "recommended"),
]
FURTHER_KEYS = [
    *("exchange_s", "serial_s", "traffic", "links", "memory_parts", "compute_source", "assumptions", "verdict"),
    *("methods", "equal_rank", "recommended_method", "learning_rate", "process_memory_bytes"),
]
FORMATS = ["float32", "bfloat16", "int8", "int4"]


@pytest.fixture(scope="module")
def outlined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of an 8-billion-parameter Llama and nothing else."""
    folder = tmp_path_factory.mktemp("eight-billion")
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    return folder


def large_config(folder: Path, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"name_or_path": str(folder), "dtype": "bfloat16", "device": "cpu"},
        "data": {"train": ["nowhere.jsonl"]},
        "engine": {"clock": "virtual", "step_time_s": 2.0},
    }
    return parse_config(base | sections)


def test_config_json_is_enough_for_a_model_that_would_fill_sixteen_gigabytes(outlined: Path):
    plan = make_plan(large_config(outlined))
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336) + 2 * 4096
    assert plan.num_blocks == 32
    assert {block["parameters"] for block in plan.blocks} == {layer}
    assert [block["layers"] for block in plan.blocks] == [[k] for k in range(32)]
    assert plan.blocks[0]["bytes"] == 4 * layer  # wire.format: float32
    parameters = 32 * layer + 2 * 128256 * 4096 + 4096
    assert plan.memory_parts["full"]["parameters"] == 2 * parameters
    # gradients, moments and master copy, 16 bytes a parameter
    full = plan.memory_parts["full"]
    assert full["gradients"] + full["optimizer_state"] + full["fp32_copies"] == 16 * parameters
    assert plan.memory_bytes["lora"] < plan.memory_bytes["block"] < plan.memory_bytes["full"] / 4
    with_ends = make_plan(large_config(outlined, blocks={"include_embeddings": True, "include_head": True}))
    assert [block["name"] for block in (with_ends.blocks[0], with_ends.blocks[-1])] == ["embeddings", "head"]


def test_a_folder_without_configuration_and_one_without_language_model_are_errors(tmp_path: Path):
    with pytest.raises(ModelError, match="no model folder"):
        make_plan(large_config(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        make_plan(large_config(tmp_path))
    BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        make_plan(large_config(tmp_path))


def test_the_keys_are_frozen_and_the_whole_is_json(workshop: Workshop):
    content = json.loads(json.dumps(asdict(plan_of(workshop))))
    assert sorted(content) == sorted([*PROMISED_KEYS, *FURTHER_KEYS])
    assert {"index", "layers", "parameters", "bytes"} <= set(content["blocks"][0])
    assert list(content["bytes_per_client_round"]) == list(content["traffic"]) == FORMATS
    assert list(content["memory_bytes"]) == list(content["memory_parts"]) == ["block", "lora", "full"]
    assert list(content["recommended"]) == ["layers_per_block", "num_local_steps", "format"]
    per_round = content["bytes_per_client_round"]
    assert per_round["float32"] > per_round["bfloat16"] > per_round["int8"] > per_round["int4"]


def test_a_format_beyond_the_four_is_added_when_it_is_configured(workshop: Workshop):
    plan = plan_of(workshop, "wire.format=int2")
    assert list(plan.bytes_per_client_round) == [*FORMATS, "int2"]
    assert plan.bytes_per_client_round["int2"] < plan.bytes_per_client_round["int4"]
    assert plan.recommended["format"] == "int2"


def test_a_method_that_trains_no_blocks_is_refused(workshop: Workshop):
    config = load_config(workshop.config)
    federation = config.federation.model_copy(update={"method": "central"})
    with pytest.raises(ConfigError, match=r"federation\.method: plans are made for .*, not for central"):
        make_plan(config.model_copy(update={"federation": federation}))


def test_blocks_that_the_rounds_do_not_reach_are_listed_and_larger_blocks_recommended(workshop: Workshop):
    short = plan_of(workshop, "federation.num_rounds=2", "blocks.schedule=cyclic")
    assert short.never_visited == [2, 3]
    assert short.recommended["layers_per_block"] == 2
    assert {row["method"]: row["never_visited"] for row in short.methods}.items() >= {
        "parablock": 2,
        "fedit": 0,
    }.items()
    enough = plan_of(workshop, "federation.num_rounds=4", "blocks.schedule=cyclic")
    assert (enough.never_visited, enough.recommended["layers_per_block"]) == ([], 1)


def test_blocks_of_many_layers_are_chosen_and_recommended_so_that_each_is_visited_four_times(outlined: Path):
    def blocks(size: int | str, rounds: int, **sections: Any) -> tuple[int, int]:
        federation = {"num_clients": 2, "num_rounds": rounds}
        plan = make_plan(
            large_config(outlined, blocks={"layers_per_block": size}, federation=federation, **sections)
        )
        return plan.num_blocks, plan.recommended["layers_per_block"]

    # 32 layers: the rounds / 4 blocks, at least four
    assert (blocks("auto", 32), blocks("auto", 8)) == ((8, 4), (4, 8))
    # a number that is given is kept, and the plan says what would be better, unless it is larger already
    assert blocks(1, 32) == (32, 4)
    # on a fast link the blocks are larger, on a slow one they are visited often enough nevertheless
    fast, slow = ({"link": {"upload_mbps": mbps, "download_mbps": mbps}} for mbps in (1e5, 1))
    assert (blocks("auto", 32, **fast)[0], blocks("auto", 32, **slow)[0]) == (4, 8)


def test_a_plan_tells_the_learning_rate_that_the_run_has(outlined: Path, workshop: Workshop):
    assert make_plan(large_config(outlined)).learning_rate == 5e-4
    assert make_plan(large_config(outlined, federation={"method": "fedavg"})).learning_rate == 5e-5
    assert plan_of(workshop, "train.learning_rate=0.02").learning_rate == 0.02


def test_stated_steps_count_and_more_steps_compute_longer(workshop: Workshop):
    # step_time_s is 0.05 in this configuration, K is 2
    assert plan_of(workshop).compute_s == pytest.approx(0.1)
    assert plan_of(workshop, "train.num_local_steps=6").compute_s == pytest.approx(0.3)
    assert plan_of(workshop, "engine.step_time_s=0.2").compute_s == pytest.approx(0.4)
    assert plan_of(workshop).compute_source == "stated"


def test_without_a_statement_an_ordinary_device_and_the_longest_examples_are_assumed(workshop: Workshop):
    config = load_config(workshop.config, ["engine.step_time_s=null", "engine.num_threads=2"])
    plan = make_plan(config)
    assert plan.compute_source == "assumed"
    assert "60 GFLOP/s on the cpu" in plan.assumptions[0] and "64 tokens" in plan.assumptions[0]
    scenario = Scenario(config, probe=False)
    tokens = Tokens.at_most(num_examples=4, max_length=64)
    seconds = 2 * scenario.flops.step(scenario.blocks[1], tokens) / (2 * ASSUMED_FLOPS["cpu", "float32"])
    compute = assumed_compute(config, scenario.flops)
    assert compute.round_s(scenario.blocks[1], 0, 0, 2) == pytest.approx(seconds)
    assert compute.round_s(scenario.blocks[0], 0, 0, 2) > seconds > compute.round_s(scenario.blocks[3], 0, 0, 2)
    assert make_plan(load_config(workshop.config, ["engine.step_time_s=null", "data.max_length=32"])).compute_s < (
        plan.compute_s
    )


def test_accumulation_and_checkpointing_make_steps_longer(workshop: Workshop):
    def computes(*overrides: str) -> float:
        return plan_of(workshop, "engine.step_time_s=null", *overrides).compute_s

    assert computes("train.gradient_accumulation_steps=3") == pytest.approx(3 * computes())
    assert computes() < computes("train.gradient_checkpointing=true") < 2 * computes()


def test_clients_that_share_this_machine_are_slower_under_the_real_clock(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    real = ["engine.clock=real", "engine.step_time_s=null", "engine.num_threads=1"]
    factor, told = slowdown(load_config(workshop.config, real), 1)
    assert factor == 2.0 and "4 clients share 2 cores" in told
    half = load_config(workshop.config, [*real, "federation.participation=0.5"])
    assert slowdown(half, 1) == (1.0, "")
    assert slowdown(load_config(workshop.config), 1) == (1.0, "")
    assert plan_of(workshop, *real).compute_s == pytest.approx(
        2 * plan_of(workshop, "engine.step_time_s=null", "engine.num_threads=1").compute_s
    )


def test_steps_that_fill_the_wait_follow_the_link(workshop: Workshop):
    def computes(mbps: float) -> float:
        link = [f"link.upload_mbps={mbps}", f"link.download_mbps={mbps}", "link.latency_s=0"]
        return plan_of(workshop, "train.num_local_steps=auto", *link).compute_s

    # 9,280 parameters in fp32 are 296,960 bit, one chunk: 0.297 s up and then down at 1 Mbit/s, 12 steps of 0.05 s
    # the first two of six rounds know no speed yet, and take one step
    assert computes(1.0) == pytest.approx((2 + 4 * 12) * 0.05 / 6)
    assert computes(100.0) == pytest.approx(0.05)
    slow = plan_of(workshop, "train.num_local_steps=auto", "link={upload_mbps: 1, download_mbps: 1}")
    assert "a round computes for 0.6 s" in slow.verdict and "Overlap hides the communication" in slow.verdict
    assert any("auto is 12 here, and 1 until a client's first" in line for line in slow.assumptions)


def test_overlap_saves_most_where_exchange_and_computation_are_equally_long(workshop: Workshop):
    def saving(step_time_s: float) -> float:
        rows = plan_of(
            workshop,
            *("wire.streaming=false", "link.latency_s=0", "federation.num_rounds=64"),
            *("checkpoint.every_rounds=0", f"engine.step_time_s={step_time_s}"),
        ).links
        (row,) = (row for row in rows if row["upload_mbps"] == row["download_mbps"] == 4)
        assert row["saving"] == pytest.approx(1 - row["overlapped_s"] / row["serial_s"])
        return row["saving"]

    # at 4 Mbit/s an exchange takes 2 · 0.075 s; a round has 2 steps
    long, equal, short = saving(1.0), saving(0.075), saving(0.002)
    assert 0 < long < 0.1 and long < equal
    assert 0.45 < equal <= 0.5
    assert short <= 0.5


def test_several_speeds_are_shown_and_the_configured_link_first(workshop: Workshop):
    rows = plan_of(workshop, "link.upload_mbps=7", "link.download_mbps=20").links
    assert [(row["upload_mbps"], row["download_mbps"]) for row in rows] == [
        (7, 20),
        *((speed, speed) for speed in (4, 10, 30, 100)),
    ]
    assert all(before["exchange_s"] > after["exchange_s"] for before, after in itertools.pairwise(rows[1:]))
    unlimited = plan_of(workshop, "link.upload_mbps=null", "link.download_mbps=null").links
    assert [row["upload_mbps"] for row in unlimited] == [4, 10, 30, 100]


def test_a_plan_shows_the_blocks_that_auto_will_choose_and_says_so_of_them(workshop: Workshop):
    auto = ("blocks={split: attention_mlp, layers_per_block: auto}", "federation.num_rounds=32")
    fast = plan_of(workshop, *auto, "link={upload_mbps: 10, download_mbps: 10}")
    slow = plan_of(workshop, *auto, "link={upload_mbps: 5, download_mbps: 5}")
    assert [block["name"] for block in fast.blocks] == [
        f"layers.{layers}.{half}" for layers in ("0-1", "2-3") for half in ("attention", "mlp")
    ]
    assert (fast.num_blocks, slow.num_blocks) == (4, 8)
    assert fast.verdict.startswith("Overlap hides the communication")
    assert "blocks.layers_per_block: auto is 2 here" in fast.assumptions
    assert not any("auto is" in line for line in plan_of(workshop).assumptions)
    hopeless = plan_of(workshop, *auto, "link={upload_mbps: 0.01, download_mbps: 0.01}")
    endless = plan_of(workshop, *auto, "link={upload_mbps: 10000, download_mbps: 10000}")
    assert (hopeless.num_blocks, endless.num_blocks) == (8, 4)  # the smallest there are, and never fewer than four
    few_rounds = plan_of(workshop, auto[0], "federation.num_rounds=4", "link={upload_mbps: 5, download_mbps: 5}")
    assert few_rounds.num_blocks == 4  # smaller ones would not all be visited


def test_the_verdict_names_the_missing_link_the_missing_delay_and_the_hopeless_link(workshop: Workshop):
    unlimited = ["link.upload_mbps=null", "link.download_mbps=null", "link.latency_s=0"]
    assert plan_of(workshop, *unlimited).verdict.startswith("No link speed is given")
    both = "set federation.method: parablock, federation.delay: 1."  # fl_bcd, as the file may say, has no delay
    assert both in plan_of(workshop, "federation.delay=0").verdict
    whole = plan_of(workshop, "federation.method=fedavg", "federation.delay=0")
    assert "set federation.delay: 1" in whole.verdict and "blocks." not in whole.verdict
    assert whole.num_blocks == 1 and all(row["saving"] > 0 for row in whole.links)
    hopeless = plan_of(workshop, "link.upload_mbps=0.001", "link.download_mbps=0.001")
    assert hopeless.verdict.startswith("The link is the bottleneck")


def test_a_large_layer_takes_the_bytes_of_adapters_of_rank_83_and_adapters_are_recommended(outlined: Path):
    plan = make_plan(large_config(outlined, link={"upload_mbps": 30, "download_mbps": 30}))
    # a layer of 218 million parameters; A and B of rank 1 on q, k, v, o, gate, up and down of 32 layers
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    layer = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336) + 2 * 4096
    assert plan.equal_rank == pytest.approx(layer / (32 * per_layer)) == pytest.approx(83.2, abs=0.1)
    rows = {(row["method"], row["delay"]): row for row in plan.methods}
    assert {name for name, _ in rows} == {"parablock", "fedavg", "fedprox", "fedit", "ffa_lora", "rolora", "flora"}
    assert {delay for name, delay in rows if name == "flora"} == {0}
    assert rows["parablock", 1]["hours"] == pytest.approx(plan.hours)
    assert rows["parablock", 1]["bytes_per_client_round"] == plan.bytes_per_client_round["float32"]
    assert rows["parablock", 0]["round_s"] == pytest.approx(plan.serial_s)
    assert rows["fedit", 1]["round_s"] < rows["fedit", 0]["round_s"] < rows["fedavg", 0]["round_s"]
    half = [rows[name, 1]["bytes_per_client_round"] / rows["fedit", 1]["bytes_per_client_round"] for name in (
        "ffa_lora", "rolora"
    )]  # fmt: skip
    assert half == pytest.approx([0.5, 0.5], abs=0.12)
    advised = plan.recommended_method
    assert (advised["method"], advised["delay"]) == ("fedit", 1)
    assert "all 32 layers" in advised["reason"] and "less time" in advised["reason"]
    assert "then parablock" in advised["unless"]


def test_a_fast_link_leaves_no_reason_for_a_delay(outlined: Path):
    fast = {"upload_mbps": 1e6, "download_mbps": 1e6}
    advised = make_plan(large_config(outlined, link=fast)).recommended_method
    assert (advised["method"], advised["delay"]) == ("fedit", 0) and "would save 0%" in advised["reason"]


@pytest.mark.parametrize("delay", [0, 1])
def test_without_a_link_nothing_is_said_against_the_delay_that_is_configured(outlined: Path, delay: int):
    advised = make_plan(large_config(outlined, federation={"delay": delay})).recommended_method
    assert advised["delay"] == delay and "the link, which is not given" in advised["reason"]


def test_a_method_that_the_settings_do_not_allow_has_its_problem_in_place_of_figures(workshop: Workshop):
    sparse = plan_of(workshop, "federation.method=fedavg", "federation.delay=1", "wire.format=sparse2")
    rows = {(row["method"], row["delay"]): row for row in sparse.methods}
    assert "sparse2 leaves most" in rows["parablock", 1]["problem"] and rows["parablock", 1]["memory_bytes"] == 0
    assert rows["fedavg", 1]["bytes_per_client_round"] == sparse.bytes_per_client_round["sparse2"]
    assert not rows["fedit", 0]["problem"] and "not send the same parameters" in rows["flora", 0]["problem"]
    dense = plan_of(workshop, "federation.method=fedavg", "federation.delay=1")
    few, many = (plan.traffic[name] for plan, name in ((sparse, "sparse2"), (dense, "float32")))
    assert few["uplink_bytes"] < 0.02 * many["uplink_bytes"]
    assert few["downlink_bytes"] < 0.03 * many["downlink_bytes"]
    # without chunks a client that lacks two versions, in the drain, gets the value: once in these 6 rounds
    whole = plan_of(workshop, "federation.method=fedavg", "wire={format: sparse2, streaming: false}")
    assert 1 / 6 < whole.traffic["sparse2"]["downlink_bytes"] / many["downlink_bytes"] < 0.03 + 1 / 6


def test_each_delay_is_checked_by_itself_and_no_refused_one_is_suggested(workshop: Workshop):
    serial = ("federation.method=fedavg", "federation.delay=0")
    whole, plain = (
        plan_of(workshop, *serial, *more) for more in (["federation.server_optimizer.name=momentum"], [])
    )
    figures, free = ({(row["method"], row["delay"]): row for row in plan.methods} for plan in (whole, plain))
    for name in ("fedavg", "fedit", "ffa_lora", "fedprox"):
        assert figures[name, 0] == free[name, 0] and not free[name, 1]["problem"]
        assert "momentum would add its moments" in figures[name, 1]["problem"] and not figures[name, 1]["hours"]
    assert figures["fedavg", 0]["hours"] == pytest.approx(whole.hours)
    assert not figures["parablock", 1]["problem"], "its block in flight is not the next one"
    assert "no delay is possible: federation.server_optimizer: momentum" in whole.verdict
    assert "with these settings: parablock, rolora." in whole.verdict and "set federation" in plain.verdict
    assert "federation.delay: 1" not in whole.verdict and whole.recommended["num_local_steps"] == 2
    assert [{row["saving"] > 0 for row in plan.links} for plan in (whole, plain)] == [{False}, {True}]
    advised = [plan.recommended_method for plan in (whole, plain)]
    assert [(each["method"], each["delay"]) for each in advised] == [("fedit", 0), ("fedit", 1)]
    assert "these settings allow it no delay" in advised[0]["reason"]


def test_a_method_that_cannot_lag_says_so_and_advises_on_nothing(workshop: Workshop):
    slow = ("federation.delay=0", "link.upload_mbps=1", "link.download_mbps=1")
    stacked, mean = (plan_of(workshop, f"federation.method={name}", *slow) for name in ("flora", "fedit"))
    assert "no delay is possible: flora makes no mean" in stacked.verdict
    assert "parablock, fedavg, fedit, ffa_lora, rolora, fedprox." in stacked.verdict
    assert "wire.format" not in stacked.verdict and "wire.format: int8" in mean.verdict
    assert stacked.recommended == {"layers_per_block": 1, "num_local_steps": 2, "format": "float32"}
    assert all(row["saving"] == 0 for row in stacked.links) and all(row["saving"] > 0 for row in mean.links)


def test_the_rank_of_equal_bytes_counts_both_directions(workshop: Workshop):
    def rank(method: str, *more: str) -> float:
        serial = (f"federation.method={method}", "federation.delay=0", "lora.rank=4")
        return plan_of(workshop, *serial, *more).equal_rank

    assert rank("fedit") == rank("fedit", "federation.participation=0.5") == pytest.approx(4)
    assert rank("flora") == pytest.approx((4 + 4 * 4) / 2), "the stack of four goes down"
    # two of four clients: a client that missed a round gets the matrices, which are more than a stack
    assert rank("flora", "federation.participation=0.5") > (4 + 2 * 4) / 2


def test_formats_that_the_settings_refuse_are_neither_shown_nor_suggested(workshop: Workshop):
    masked = ("privacy.secure_aggregation=masked", "privacy.clip_norm=1", "wire.streaming=false")
    slow = ("link.upload_mbps=2", "link.download_mbps=2")
    hidden, clipped = (plan_of(workshop, *slow, *each) for each in (masked, masked[1:]))
    assert list(hidden.bytes_per_client_round) == list(hidden.traffic) == ["float32"]
    assert list(clipped.bytes_per_client_round) == FORMATS
    assert "wire.format: " in clipped.verdict and "wire.format: " not in hidden.verdict
    assert hidden.recommended["num_local_steps"] > 2
    # keys that go with the configured format do not forbid another
    with_feedback = plan_of(workshop, "wire={format: int8, error_feedback: true, rounding: nearest}")
    assert list(with_feedback.bytes_per_client_round) == FORMATS


def test_a_plan_tells_the_epsilon_that_the_run_will_have(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    noise = ("privacy.clip_norm=1", "privacy.noise_multiplier=0.5")
    shared = ("privacy.mode=distributed", "privacy.secure_aggregation=masked", "wire.streaming=false")
    told = f"ε is {Accountant(0.5, 'central', 1e-5).epsilon(6):.3g} for δ = 1e-05 after the last round"
    for more in ((), shared):
        assert [line.split(",")[0] for line in plan_of(workshop, *noise, *more).assumptions if "ε" in line] == [
            told
        ]
    assert not any("ε" in line for line in plan_of(workshop).assumptions)
    monkeypatch.setattr("parablock.experiment.protections.EXTRA", ("no_such_module",))
    assert any("needs no_such_module; install it" in line for line in plan_of(workshop, *noise).assumptions)


@pytest.mark.parametrize(("rounds", "clients"), [(10**21, 4), (4, 10**8), (50_001, 2)])
def test_a_plan_of_more_rounds_than_it_can_follow_is_refused_at_once(outlined: Path, rounds: int, clients: int):
    config = large_config(outlined, federation={"num_rounds": rounds, "num_clients": clients})
    with pytest.raises(ConfigError, match=f"{rounds} rounds of {clients} clients .*more than 100,000"):
        make_plan(config)


def test_blocks_are_looked_for_no_longer_than_until_each_was_visited():
    places = {"num_blocks": 5, "delay": 1, "seed": 0}
    for schedule in SCHEDULES:
        assert blocks_never_visited(schedule, num_rounds=10**21, **places) == ()
        assert len(blocks_never_visited(schedule, num_rounds=3, **places)) >= 2


def test_clients_that_no_round_asks_do_not_count_against_the_limit(outlined: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forecast, "MAX_CLIENT_ROUNDS", 20)
    few, many = (
        large_config(outlined, federation={"num_rounds": 4, "num_clients": 8, "participation": share})
        for share in (0.25, 0.5)
    )
    assert make_plan(few).num_blocks
    with pytest.raises(
        ConfigError, match=r"4 rounds of 8 clients .* 4 asked in each, are .* 24 rounds of a client, more than 20"
    ):
        make_plan(many)


def test_the_next_step_of_a_run_whose_rows_are_at_sites_is_its_server(outlined: Path):
    here = large_config(outlined)
    there = here.model_copy(update={"data": here.data.model_copy(update={"train": ()})})
    plan = make_plan(there)
    assert next_step(plan, there, Path("run.yaml"))[-1].startswith(
        "next: parablock deploy server --keys KEYS run.yaml "
    )
    assert next_step(plan, here, Path("run.yaml"))[-1].startswith("next: parablock run run.yaml ")
