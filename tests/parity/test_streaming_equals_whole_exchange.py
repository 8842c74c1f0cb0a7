"""A streamed exchange ends with bitwise the numbers of a whole one, sooner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import run_here, server_plan
from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.parablock import same
from parablock.algorithm.robust import Rule
from parablock.clock import RealClock, VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.plans import Hooks
from parablock.engine.update_form import Differences
from parablock.engine.update_store import UpdateStore
from parablock.trace import Trace
from parablock.wire.quantize import CHUNK_PIECE, Encoding
from parablock.wire.transport import Link
from toy import Walker

SIZE = 5 * CHUNK_PIECE + 1234  # six chunks, the last one short and odd
ROUNDS = 7


STEP_S = 0.25


def run(
    encoding: Encoding,
    *,
    delay: int = 1,
    clock=None,
    link: Link = Link(20.0, 20.0),  # noqa: B008
    participation: float = 1.0,
    optimizer: ServerOptimizer = ServerOptimizer(),  # noqa: B008
    dtype: torch.dtype = torch.float32,
    rule: Rule = Rule(),  # noqa: B008
    folder: Path | None = None,
) -> tuple[EngineResult, float, int]:
    clock = clock or VirtualClock()
    changes = {"participation": participation, "server_optimizer": optimizer, "folder": folder}
    plan = server_plan(4, ROUNDS, delay, Differences(encoding, rule), stall_timeout_s=30.0, **changes)
    down: list[int] = []
    hooks = Hooks(lambda state, updates, traffic: down.append(traffic.downlink_bytes), lambda state: None)
    # each block begins a little below the one before it
    params = [torch.linspace(-1, 1, SIZE + k).to(dtype)[:SIZE] for k in range(3)]
    result = run_here(params, [Walker(i, STEP_S) for i in range(4)], plan, Trace(clock), hooks, link=link)
    return result, clock.now(), sum(down) + result.last_traffic.downlink_bytes - down[-1]


STREAMED = {"chunk_bytes": CHUNK_PIECE * 4}
CASES = {
    "float32": ({}, {}),
    "bfloat16 wire": ({"format": "bfloat16"}, {}),
    "int4 stochastic": ({"format": "int4", "rounding": "stochastic"}, {}),
    "int4 nearest with feedback": ({"format": "int4", "rounding": "nearest", "error_feedback": True}, {}),
    "int8, bfloat16 model": ({"format": "int8", "rounding": "stochastic"}, {"dtype": torch.bfloat16}),
    "momentum": ({}, {"optimizer": ServerOptimizer("momentum", 0.5)}),
    "adam, int8": ({"format": "int8"}, {"optimizer": ServerOptimizer("adam", 0.01)}),
    "median, int8": ({"format": "int8"}, {"rule": Rule("median")}),
    "krum, which waits for whole updates": ({}, {"rule": Rule("krum", assumed_attackers=0)}),
    "participation": ({"format": "int4"}, {"participation": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("delay", [0, 1, 2])
def test_streamed_is_whole_bitwise(case, delay):
    wire, options = CASES[case]
    encoding = Encoding(**{"format": "float32", **wire})
    whole, _, _ = run(encoding, delay=delay, **options)
    streamed, _, _ = run(replace(encoding, **STREAMED), delay=delay, **options)
    assert same(whole.server.params, streamed.server.params)
    assert same(whole.server.view, streamed.server.view)
    assert all(same(client.base, streamed.server.view) for client in streamed.clients)
    assert not same(
        whole.server.params, run(replace(encoding, **STREAMED), delay=delay + 1, **options)[0].server.params
    )


@pytest.mark.parametrize(
    "case", ["float32", "int4 stochastic", "median, int8", "krum, which waits for whole updates"]
)
@pytest.mark.parametrize("wire", [{}, STREAMED], ids=["whole", "streamed"])
def test_updates_that_are_kept_in_a_file_end_with_bitwise_the_numbers_of_those_in_memory(
    case: str, wire: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own, options = CASES[case]
    encoding = Encoding(**{"format": "float32", **own, **wire})
    in_memory = run(encoding, **options)[0]
    written: list[int] = []
    write = UpdateStore._write
    monkeypatch.setattr(
        UpdateStore, "_write", lambda self, vector, offset: (written.append(offset), write(self, vector, offset))
    )
    monkeypatch.setattr("parablock.engine.round_fold.IN_MEMORY_BYTES", 0)
    in_file = run(encoding, folder=tmp_path, **options)[0]
    assert same(in_memory.server.params, in_file.server.params)
    assert in_memory.server.rho == in_file.server.rho
    assert len(written) == ROUNDS * 4 * len(encoding.cut(SIZE))
    assert list(tmp_path.iterdir()) == []
    assert not same(in_file.server.params, run(encoding, delay=0, **options)[0].server.params)


def test_streaming_under_the_real_clock_is_the_same_too():
    encoding = Encoding("int4", "stochastic", **STREAMED)
    virtual, _, _ = run(encoding)
    real, _, _ = run(encoding, clock=RealClock(), link=Link(400.0, 400.0))
    assert same(virtual.server.params, real.server.params)


def test_an_exchange_costs_about_its_longer_direction():
    """Six chunks: max(up, down) plus a chunk is 7/12 of the sum; with 20 or more it goes towards one half."""
    slow = Link(1.0, 1.0)
    whole, streamed = (
        run(Encoding("float32"), delay=0, link=slow),
        run(Encoding("float32", **STREAMED), delay=0, link=slow),
    )
    up_and_down = ROUNDS * 2 * SIZE * 4 * 8 / 1e6
    compute = ROUNDS * STEP_S
    assert whole[1] == pytest.approx(up_and_down + compute, rel=0.02)
    assert (streamed[1] - compute) / (whole[1] - compute) == pytest.approx(7 / 12, abs=0.04)


def test_streaming_sends_the_same_bytes_but_for_the_chunks_headers():
    whole, streamed = run(Encoding("int8"))[2], run(Encoding("int8", **STREAMED))[2]
    headers = 4 * ROUNDS * 6 * 300
    assert whole < streamed < whole + headers


def test_whoever_misses_rounds_gets_whole_values_when_it_returns():
    result, _, _ = run(Encoding("int4", **STREAMED), participation=0.25)
    assert all(same(client.base, result.server.view) for client in result.clients)
