"""Times of rounds by arithmetic, and bytes and times of a plan against those of real runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from parablock.config.load import load_config
from parablock.model.blocks import find_layers
from parablock.model.pretrained import outline_model
from parablock.plan.forecast import make_plan
from parablock.plan.itinerary import walk
from parablock.plan.timing import _Client, time_rounds
from parablock.plan.traffic import Sizes
from parablock.wire.transport import Link
from planning import config_of
from tiny_runs import Workshop, summary_of


def timing_of(delay: int, *, num_rounds: int, compute_s: float, link: Link, chunk_bytes: int | None = None) -> Any:
    federation = {"num_clients": 2, "num_rounds": num_rounds, "delay": delay}
    config = config_of(
        federation=federation,
        blocks={"schedule": "cyclic"},
        wire={"streaming": chunk_bytes is not None},
        checkpoint={"every_rounds": 0},
    )
    itinerary = walk(config, 8, delay=delay)
    sizes = Sizes([250_000] * 8, dtype="float32", wire_format="float32", chunk_bytes=chunk_bytes)
    return time_rounds(itinerary, sizes, lambda *_: compute_s, link, delay=delay)


def test_one_after_the_other_a_round_is_the_sum_and_overlapped_the_longer_one():
    # 250,000 elements are 8·10^6 bit: 1 s up and 2 s down; headers add below 0.1 %
    link = Link(8.0, 4.0)
    serial = timing_of(0, num_rounds=50, compute_s=4.0, link=link)
    overlapped = timing_of(1, num_rounds=50, compute_s=4.0, link=link)
    for timing in (serial, overlapped):
        assert timing.compute_s == 4.0
        assert timing.exchange_s == pytest.approx(3.0, rel=0.03)
        assert timing.communication_s == pytest.approx(3.0, rel=0.03)
        assert timing.sequential_s == pytest.approx(7.0, rel=0.03)
    assert serial.round_s == pytest.approx(7.0, rel=0.01)
    assert overlapped.round_s == pytest.approx(4.0 + 3.0 / 50, rel=0.01)  # the drain, once
    assert overlapped.cover_s == overlapped.exchange_s < overlapped.compute_s


def test_a_link_that_takes_longer_than_the_computation_sets_the_pace_again():
    wide = timing_of(1, num_rounds=40, compute_s=4.0, link=Link(8.0, 4.0))
    narrow = timing_of(1, num_rounds=40, compute_s=4.0, link=Link(1.6, 1.6))  # 5 s up, 5 s down
    assert narrow.cover_s > narrow.compute_s and narrow.round_s > 1.4 * wide.round_s
    patient = timing_of(3, num_rounds=40, compute_s=4.0, link=Link(1.6, 1.6))
    assert patient.cover_s == pytest.approx(5.0, rel=0.05)  # one direction of the link
    assert patient.round_s < narrow.round_s


def test_streaming_runs_both_directions_at_once():
    whole = timing_of(0, num_rounds=10, compute_s=1.0, link=Link(8.0, 8.0))
    streamed = timing_of(0, num_rounds=10, compute_s=1.0, link=Link(8.0, 8.0), chunk_bytes=65536)
    # 16 chunks: all of them up, and the last one down
    assert whole.exchange_s == pytest.approx(2.0, rel=0.1)
    assert streamed.exchange_s == pytest.approx(1 + 1 / 16, rel=0.05)
    assert streamed.communication_s == pytest.approx(whole.communication_s, rel=0.05)


@pytest.fixture(scope="module")
def tiny_llama(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[..., LlamaForCausalLM]:
    """The workshop's model is wider here."""
    return partial(tiny_llama, hidden_size=64)


MASKED = ("privacy.secure_aggregation=masked", "privacy.clip_norm=1", "wire.streaming=false")
SETTINGS = {
    "as it is": (),
    "delay 0, whole": ("federation.delay=0", "wire.streaming=false"),
    "delay 2": ("federation.delay=2", "federation.num_rounds=9"),
    "half a cohort": ("federation.participation=0.5", "federation.num_rounds=12"),
    "half a cohort, int8, whole": (
        *("federation.participation=0.5", "federation.num_rounds=12"),
        *("wire.format=int8", "wire.streaming=false"),
    ),
    "chunks, slow up": ("wire.chunk_bytes=65536", "link.upload_mbps=2"),
    "chunks, slow down, int4": ("wire.chunk_bytes=16384", "link.download_mbps=1", "wire.format=int4"),
    "few large blocks": ("blocks.layers_per_block=4", "federation.delay=2", "wire.format=int8"),
    "ends, random": (
        *("blocks.include_embeddings=true", "blocks.include_head=true"),
        *("blocks.schedule=random", "blocks.allow_unvisited=true", "seed=3"),
    ),
    "all parameters": ("federation.method=fedavg", "federation.delay=0"),
    "adapters": ("federation.method=fedit", "federation.delay=0", "lora.rank=4"),
    "adapters, half a cohort, int8, whole": (
        *("federation.method=fedit", "federation.delay=0", "federation.participation=0.5"),
        *("wire.format=int8", "wire.streaming=false", "federation.num_rounds=12"),
    ),
    "adapters of some matrices, bfloat16 model": (
        *("federation.method=fedit", "federation.delay=0", "model.dtype=bfloat16"),
        "lora.target_modules=[q_proj,down_proj]",
    ),
    "half of the adapters": ("federation.method=ffa_lora", "federation.delay=0", "lora.rank=4"),
    "adapters, steps that fill the wait": (
        *("federation.method=fedit", "federation.delay=1", "train.num_local_steps=auto"),
        *("train.min_local_steps=2", "link.upload_mbps=1"),
    ),
    "all parameters, delay 2, half a cohort, steps that fill the wait": (
        *("federation.method=fedavg", "federation.delay=2", "federation.participation=0.5"),
        *("federation.num_rounds=12", "train.num_local_steps=auto"),
    ),
    "blocks of two sizes, steps that fill the wait": (
        *("blocks.split=attention_mlp", "train.num_local_steps=auto", "link.upload_mbps=2"),
        *("federation.delay=0", "blocks.allow_unvisited=true"),
    ),
    "adapters, masked": (*("federation.method=fedit", "federation.delay=1", "link.latency_s=0.1", *MASKED),),
    "adapters, masked, three of four, a short computation": (
        *("federation.method=fedit", "federation.delay=2", "federation.participation=0.75", *MASKED),
        *("federation.num_rounds=12", "engine.step_time_s=0.001"),
    ),
    "blocks, masked, delay 0": ("federation.delay=0", *MASKED),
    "adapters, words without masks": (
        *("federation.method=fedit", "privacy.secure_aggregation=plain", *MASKED[1:]),
    ),
    "stacked adapters": ("federation.method=flora", "federation.delay=0", "lora.rank=4"),
    "stacked adapters, half a cohort": (
        *("federation.method=flora", "federation.delay=0", "lora.rank=4"),
        *("federation.participation=0.5", "federation.num_rounds=12"),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_and_times_are_those_of_the_run(name: str, workshop: Workshop, tmp_path: Path):
    config = load_config(workshop.config, SETTINGS[name])
    outcome = workshop.run(tmp_path / "run", *SETTINGS[name])
    assert outcome.code == 0, outcome.stderr
    summary, plan = summary_of(tmp_path / "run"), make_plan(config)
    rounds = summary["num_rounds"]
    traffic = plan.traffic[config.wire.format]
    messages = 40 * summary["num_clients"] * rounds * (20 if "chunks" in name else 1)  # digits not known before
    assert abs(traffic["uplink_bytes"] - summary["uplink_bytes"]) < messages
    assert abs(traffic["downlink_bytes"] - summary["downlink_bytes"]) < messages
    assert plan.total_bytes == traffic["uplink_bytes"] + traffic["downlink_bytes"]
    per_round = plan.bytes_per_client_round
    assert per_round[config.wire.format] == pytest.approx(summary["bytes_per_client_round"], rel=2e-3)
    others = set(per_round) - {config.wire.format}
    assert all(abs(per_round[other] / summary["bytes_per_client_round"] - 1) > 0.05 for other in others)
    assert plan.compute_s * rounds == pytest.approx(summary["compute_s"])
    assert plan.communication_s * rounds == pytest.approx(summary["communication_s"], rel=2e-3)
    assert plan.hours * 3600 == pytest.approx(summary["wall_time_s"], rel=2e-3)
    assert plan.round_s * rounds == pytest.approx(plan.hours * 3600)


def test_lora_methods_send_adapters_half_of_them_or_stacks_of_them(workshop: Workshop):
    plans = {
        method: make_plan(
            load_config(workshop.config, [f"federation.method={method}", "federation.delay=0", "lora.rank=4"])
        )
        for method in ("fedit", "ffa_lora", "flora")
    }
    _, layers = find_layers(outline_model(str(workshop.model), dtype="float32"), None)
    matrices = [module.weight.shape for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    both = 4 * sum(outputs + inputs for outputs, inputs in matrices)
    parameters = {method: plan.blocks[0]["parameters"] for method, plan in plans.items()}
    b_alone = 4 * sum(outputs for outputs, _ in matrices)
    assert parameters == {"fedit": both, "ffa_lora": b_alone, "flora": both}
    for method, plan in plans.items():  # six rounds of four clients; a new value goes down after each
        traffic, header = plan.traffic["float32"], 24 * 500
        payload = 24 * 4 * parameters[method]
        assert 0 < traffic["uplink_bytes"] - payload < header
        down = payload * 4 if method == "flora" else payload  # the stack of four
        assert 0 < traffic["downlink_bytes"] - down < 3 * header
    with_blocks = make_plan(load_config(workshop.config, ["federation.delay=0"]))
    assert with_blocks.blocks[0]["parameters"] not in parameters.values()
    few = plans["flora"].traffic["int8"]
    assert few["downlink_bytes"] == pytest.approx(
        plans["flora"].traffic["float32"]["downlink_bytes"] * 0.2578, rel=0.1
    )


def test_an_answer_waits_behind_the_updates_that_were_ready_before_it_and_delays_those_after_it():
    client = _Client()
    client.queue += [(0.0, 5.0, 0), (2.0, 5.0, 1), (30.0, 5.0, 2)]
    assert client.upload(0) == 0.0 and client.up_s == 5.0
    assert client.answer(29.0, 3.0) == 32.0, "after round 1, before round 2"
    assert client.answer(30.5, 3.0) == 40.0, "after round 2"
    assert (client.upload(1), client.upload(2)) == (5.0, 32.0)


def test_agreeing_on_masks_takes_bytes_and_time_and_a_question_every_round(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    def plan(*overrides: str) -> Any:
        serial = ("federation.method=fedit", "federation.delay=0", "checkpoint.every_rounds=0")
        link = "link={latency_s: 1, upload_mbps: null, download_mbps: null}"
        return make_plan(load_config(workshop.config, [*serial, link, *overrides]))

    plain, masked = plan("privacy.secure_aggregation=plain", *MASKED[1:]), plan(*MASKED)
    # keys, roster, shares and letters; in each of six rounds a message before the update, and two after it
    assert (masked.hours - plain.hours) * 3600 == pytest.approx(4 + 6 * 3)
    assert masked.exchange_s == pytest.approx(plain.exchange_s + 3)
    assert masked.total_bytes > plain.total_bytes
    monkeypatch.setattr("parablock.experiment.protections.EXTRA", ("no_such_module",))
    without = plan(*MASKED)
    assert (without.hours, without.total_bytes) == (plain.hours, plain.total_bytes)
    assert "without it the messages that agree on masks are not counted" in without.assumptions
    assert not any("masks" in line for line in masked.assumptions)


def test_another_delay_is_another_time(workshop: Workshop):
    hours = {d: make_plan(load_config(workshop.config, [f"federation.delay={d}"])).hours for d in (0, 1)}
    assert hours[1] < 0.9 * hours[0]
