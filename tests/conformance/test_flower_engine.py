"""The Flower engine gives bit for bit what every engine gives, also where exchanges are lost or come twice."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from loop_grid import Fate, LoopGrid
from parablock.algorithm.parablock import initial_client, same
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.flower import grid as grid_module
from parablock.engine.flower.engine import run_over_flower
from parablock.engine.flower.exchange import Request
from parablock.engine.flower.grid import GridTransport
from parablock.engine.flower.local_socket import address_of, listen, secret_of
from parablock.engine.flower.mailbox import TrainerMailbox
from parablock.engine.flower.session import SessionFolder
from parablock.engine.inprocess import EngineResult, Hooks, run_in_process
from parablock.engine.server import ServerPlan
from parablock.engine.steps import FixedSteps
from parablock.trace import Trace
from parablock.wire.link import Link
from parablock.wire.quantize import Encoding
from toy import ToyTrainer, initial

EXAMPLES = [3, 1, 2]
ROUNDS = 7
HOOKS = Hooks(on_commit=lambda *_: None, on_checkpoint=lambda _: None)


def plan(delay: int, encoding: Encoding) -> ServerPlan:
    return ServerPlan(len(EXAMPLES), ROUNDS, delay, "shuffled", 1.0, 0, encoding, FixedSteps(1), 20.0, 0)


def over_flower(
    tmp_path: Path, delay: int, encoding: Encoding, fate: Fate = lambda *_: "carry"
) -> tuple[EngineResult, LoopGrid]:
    params, dirs = initial(4), [tmp_path / str(i) for i in range(len(EXAMPLES))]

    def start(client_id: int, folder: SessionFolder) -> None:
        def serve() -> None:
            trace = Trace(RealClock())
            secret, listener = secret_of(dirs[client_id]), listen(address_of(dirs[client_id]))
            mailbox = TrainerMailbox(client_id, listener, secret, folder, trace, epoch_s=0.0, lease_s=20.0)
            with mailbox:
                Client(
                    client_id,
                    initial_client(params),
                    ToyTrainer(client_id, EXAMPLES[client_id], None),
                    nullcontext(mailbox),
                    trace,
                    in_flight="aligned",
                    encoding=encoding,
                    hand_in=lambda *_: None,
                ).run()

        threading.Thread(target=serve, daemon=True).start()

    grid = LoopGrid(dirs, start, fate)
    opening = Request("run", "session", None, "", "")
    transport = GridTransport(grid, len(EXAMPLES), opening, epoch_s=lambda: 0.0, tell=lambda _: None)
    transport.gather(10.0)
    return run_over_flower(params, plan(delay, encoding), Trace(RealClock()), HOOKS, transport), grid


def in_process(delay: int, encoding: Encoding) -> EngineResult:
    trainers = [ToyTrainer(i, examples, None) for i, examples in enumerate(EXAMPLES)]
    trace = Trace(RealClock())
    return run_in_process(
        initial(4), trainers, plan(delay, encoding), trace, HOOKS, link=Link(), in_flight="aligned"
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """An exchange that is overdue is made again after a moment, as it is after a minute in earnest."""
    monkeypatch.setattr(grid_module, "WAIT_S", 0.3)
    monkeypatch.setattr(grid_module, "SLACK_S", 0.2)
    monkeypatch.setattr(grid_module, "POLL_S", 0.005)
    monkeypatch.setattr(grid_module, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(grid_module, "PUSH_S", 0.1)


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(
    "encoding", [Encoding("float32"), Encoding("float32", chunk_bytes=8), Encoding("int8", chunk_bytes=8)], ids=repr
)
def test_flower_gives_what_one_process_gives(tmp_path: Path, delay: int, encoding: Encoding):
    result, _ = over_flower(tmp_path, delay, encoding)
    assert result.finished
    assert same(result.server.params, in_process(delay, encoding).server.params)
    if delay:
        assert not same(result.server.params, in_process(0, encoding).server.params)


@pytest.mark.parametrize("what", ["lose", "refuse"])
def test_what_is_lost_is_sent_again_and_counts_once(tmp_path: Path, what: str):
    encoding = Encoding("float32", chunk_bytes=8)
    undisturbed, quiet = over_flower(tmp_path / "quiet", 1, encoding)
    result, grid = over_flower(
        tmp_path / "lossy", 1, encoding, fate=lambda client_id, count: what if count % 3 == client_id else "carry"
    )
    assert same(result.server.params, undisturbed.server.params)
    assert sum(grid.exchanges) > sum(quiet.exchanges)
    assert result.last_traffic.uplink_bytes == undisturbed.last_traffic.uplink_bytes
