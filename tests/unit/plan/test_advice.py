"""What a plan recommends, and when."""

from __future__ import annotations

import pytest
import torch

from parablock.plan.advice import Advice, Case, recommend
from parablock.wire.quantize import FLOATS
from planning import plan_of
from tiny_runs import Workshop

COVER_S = {"float32": 8.0, "bfloat16": 4.0, "int8": 2.0, "int4": 1.0}


def advice_for(step_s: float, *, steps: int = 4, most: int = 16, wire_format: str = "float32") -> Advice:
    large, small = Case(2, step_s, COVER_S), Case(1, step_s, {name: s / 2 for name, s in COVER_S.items()})
    return recommend([large, small], num_local_steps=steps, max_local_steps=most, wire_format=wire_format)


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [
        (2.0, Advice(2, 4, "float32", hides=True)),  # 4 · 2 s covers 8 s
        (1.0, Advice(2, 4, "bfloat16", hides=True)),
        (0.5, Advice(2, 4, "int8", hides=True)),
        (0.2, Advice(2, 10, "int8", hides=True)),  # no format that is as good does it alone: ⌈2 / 0.2⌉ steps
        (0.0625, Advice(2, 16, "int4", hides=True)),  # int8 would need 32 steps
        (0.04, Advice(1, 13, "int4", hides=True)),  # so would int4 here; blocks of half the size need ⌈0.5 / 0.04⌉
        (0.01, Advice(1, 16, "int4", hides=False)),
    ],
)
def test_the_rule_changes_the_format_then_the_steps_then_the_blocks(step_s: float, expected: Advice) -> None:
    assert advice_for(step_s) == expected


def test_fewer_steps_or_a_wider_format_are_never_recommended() -> None:
    assert advice_for(100.0, steps=20) == Advice(2, 20, "float32", hides=True)
    assert advice_for(100.0, wire_format="int8").format == "int8"
    assert advice_for(0.0625, wire_format="int4") == Advice(2, 16, "int4", hides=True)


def test_only_formats_whose_cost_is_known_are_recommended() -> None:
    case = Case(1, 0.5, {"float32": 8.0})
    found = recommend([case], num_local_steps=4, max_local_steps=16, wire_format="float32")
    assert found == Advice(1, 16, "float32", hides=True)
    assert advice_for(0.5).format == "int8"


def test_a_format_that_is_as_wide_as_another_is_followed_by_the_narrower_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FLOATS, "half", torch.float16)
    monkeypatch.setitem(COVER_S, "half", 4.0)
    found = [advice_for(step_s, wire_format="half").format for step_s in (100.0, 0.5, 0.0625)]
    assert found == ["half", "int8", "int4"]


def test_what_is_recommended_reacts_to_the_link_and_then_hides_the_exchange(workshop: Workshop) -> None:
    wide = plan_of(workshop, "link.upload_mbps=50", "link.download_mbps=50", "link.latency_s=0.001")
    assert wide.recommended == {"layers_per_block": 1, "num_local_steps": 2, "format": "float32"}
    assert wide.verdict.startswith("Overlap hides the communication")
    narrow = ["link.upload_mbps=0.2", "link.download_mbps=0.2"]
    before = plan_of(workshop, *narrow)
    advised = before.recommended
    assert advised["format"] == "int8" and advised["num_local_steps"] > 2
    assert before.exchange_s > before.compute_s and "only a part" in before.verdict
    assert f"train.num_local_steps: {advised['num_local_steps']}, wire.format: int8" in before.verdict
    after = plan_of(
        workshop,
        *(*narrow, f"wire.format={advised['format']}", "federation.num_rounds=40"),
        f"train.num_local_steps={advised['num_local_steps']}",
    )
    assert after.verdict.startswith("Overlap hides the communication")
    assert after.round_s < 1.1 * after.compute_s and after.serial_s > 1.5 * after.round_s
    assert before.round_s > 1.5 * before.compute_s
