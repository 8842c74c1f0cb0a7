"""The Flower engine gives bit for bit what every engine gives, also where exchanges are lost or come twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from flwr.app import Message

from engines import QUIET, engine_input, run_here, server_plan
from loop_grid import Fate, LoopGrid
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.parablock import initial_client, same
from parablock.algorithm.robust import Rule
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.contract import EngineResult
from parablock.engine.faults import Fault, Faults
from parablock.engine.flower import lanes
from parablock.engine.flower.engine import run_over_flower
from parablock.engine.flower.exchange import Request
from parablock.engine.flower.grid import GridTransport
from parablock.engine.flower.local_socket import address_of, listen, secret_of
from parablock.engine.flower.mailbox import TrainerMailbox
from parablock.engine.flower.masked import MaskedMailbox
from parablock.engine.flower.session import SessionFolder
from parablock.engine.plans import ClientPlan, ClientStart, Hooks, ServerPlan
from parablock.engine.update_form import Differences, FixedPointWords
from parablock.errors import StallError
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.storage.checkpoint import RunState
from parablock.trace import Trace
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Link
from toy import ToyTrainer, initial
from transports import make_impatient

ONE, TWO = [("both",)], [("up", "down")]
LANES = {"one lane": ONE, "two lanes": TWO, "one and two": ONE + TWO}
EXAMPLES = [3, 1, 2]
ROUNDS = 7
CHUNKED = Encoding("float32", chunk_bytes=8)


def plan(delay: int, encoding: Encoding, examples: Sequence[int] = EXAMPLES) -> ServerPlan:
    return server_plan(len(examples), ROUNDS, delay, Differences(encoding))


def over_flower(
    tmp_path: Path,
    plan: ServerPlan,
    fate: Fate = lambda *_: "carry",
    *,
    examples: Sequence[int] = EXAMPLES,
    make_trainer: Callable[[int, int, None], ToyTrainer] = ToyTrainer,
    on_event: Callable[[str], None] = lambda _: None,
    masking: SecureAggregation | None = None,
    faults: Sequence[Fault] = (),
    hooks: Hooks = QUIET,
    carries: Sequence[tuple[str, ...]] = ONE,
) -> tuple[EngineResult, LoopGrid]:
    dirs = [tmp_path / str(i) for i in range(len(examples))]

    def start(client_id: int, folder: SessionFolder) -> None:
        def serve() -> None:
            trace = Trace(RealClock())
            secret, listener = secret_of(dirs[client_id]), listen(address_of(dirs[client_id]))
            mailbox = TrainerMailbox(client_id, listener, secret, folder, trace, epoch_s=0.0, lease_s=20.0)
            with suppress(StallError), mailbox:  # a server that was stopped leaves it to its lease
                masked = masking and masking.client_side(client_id, 0)
                Client(
                    client_id,
                    ClientPlan("aligned", plan.form, lambda _: protection_of(plan)),
                    make_trainer(client_id, examples[client_id], None),
                    MaskedMailbox(mailbox, masked) if masked else nullcontext(mailbox),
                    trace,
                    warn=on_event,
                    start=ClientStart(initial_client(initial(4))),
                    faults=Faults(faults),
                ).run()

        threading.Thread(target=serve, daemon=True).start()

    grid = LoopGrid(dirs, start, fate, carries)
    opening = Request("run", "session", None, "", "")
    transport = GridTransport(grid, len(examples), opening, epoch_s=lambda: 0.0, tell=on_event)
    transport.gather(10.0)
    hooks = replace(hooks, on_event=on_event)
    try:
        given = engine_input(initial(4), [], plan, Trace(RealClock()), hooks, masking=masking)
        return run_over_flower(given, transport), grid
    finally:
        grid.is_over.set()


def in_process(plan: ServerPlan, examples: Sequence[int] = EXAMPLES, faults: Sequence[Fault] = ()) -> EngineResult:
    return run_here(
        initial(4),
        [ToyTrainer(i, count, None) for i, count in enumerate(examples)],
        plan,
        Trace(RealClock()),
        QUIET,
        link=Link(),
        in_flight="aligned",
        faults=Faults(faults),
        protection_of=lambda _: protection_of(plan),
    )


def protection_of(plan: ServerPlan) -> Protection | None:
    return Protection(plan.form.grid.clip_norm) if isinstance(plan.form, FixedPointWords) else None


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    make_impatient(monkeypatch)


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("encoding", [Encoding("float32"), CHUNKED, Encoding("int8", chunk_bytes=8)], ids=repr)
@pytest.mark.parametrize("carries", LANES.values(), ids=LANES)
def test_flower_gives_what_one_process_gives(
    tmp_path: Path, delay: int, encoding: Encoding, carries: Sequence[tuple[str, ...]]
):
    result, _ = over_flower(tmp_path, plan(delay, encoding), carries=carries)
    assert result.finished
    assert same(result.server.params, in_process(plan(delay, encoding)).server.params)
    if delay:
        assert not same(result.server.params, in_process(plan(0, encoding)).server.params)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("examples", [(3, 1), (3, 1, 2, 5)], ids=["two clients", "four clients"])
def test_two_clients_and_four_give_what_one_process_gives(tmp_path: Path, delay: int, examples: tuple[int, ...]):
    method = plan(delay, CHUNKED, examples)
    result, _ = over_flower(tmp_path, method, examples=examples)
    assert same(result.server.params, in_process(method, examples).server.params)
    weighted = (*examples[:-1], examples[-1] + 1)
    assert not same(result.server.params, in_process(method, weighted).server.params)


@pytest.mark.parametrize(("what", "carries"), [("lose", ONE + TWO), ("refuse", ONE), ("refuse", TWO)])
def test_what_is_lost_is_sent_again_and_counts_once(tmp_path: Path, what: str, carries: Sequence[tuple[str, ...]]):
    method = replace(plan(1, CHUNKED), stall_timeout_s=120.0)  # it may go badly for one of them for a while
    undisturbed, quiet = over_flower(tmp_path / "quiet", method)
    result, grid = over_flower(
        tmp_path / "lossy",
        method,
        fate=lambda client_id, count: what if Random(f"{client_id} {count}").random() < 1 / 3 else "carry",
        carries=carries,
    )
    assert same(result.server.params, undisturbed.server.params)
    assert sum(grid.exchanges) > sum(quiet.exchanges)
    assert result.last_traffic.uplink_bytes == undisturbed.last_traffic.uplink_bytes


@pytest.mark.parametrize(("delay", "fate"), [(0, "carry"), (1, "carry"), (1, "lose")])
@pytest.mark.parametrize("carries", LANES.values(), ids=LANES)
def test_two_exchanges_under_way_give_what_one_at_a_time_gives(
    tmp_path: Path, monkeypatch, fate: str, delay: int, carries: Sequence[tuple[str, ...]]
):
    monkeypatch.setattr(lanes, "LEAST_BYTES", 150)  # an update takes two exchanges
    push, draw = LoopGrid.push_messages, Random(f"{fate} {delay}")

    def push_late(self: LoopGrid, messages: Iterable[Message]) -> Iterable[str]:
        time.sleep(0.05 * (draw.random() < 1 / 3))  # the next ones would be sooner
        return push(self, messages)

    monkeypatch.setattr(LoopGrid, "push_messages", push_late)
    method = replace(plan(delay, CHUNKED), stall_timeout_s=120.0)
    result, grid = over_flower(
        tmp_path / "two", method, fate=lambda *_: fate if draw.random() < 1 / 9 else "carry", carries=carries
    )
    assert same(result.server.params, in_process(method).server.params)
    assert grid.following > method.num_rounds
    assert all(attempts == sorted(attempts) for attempts in grid.attempts.values())
    assert result.last_traffic.uplink_bytes == in_process(method).last_traffic.uplink_bytes
    monkeypatch.setattr(lanes, "AT_ONCE", 1)
    result, alone = over_flower(tmp_path / "one", method, carries=carries)
    assert same(result.server.params, in_process(method).server.params)
    assert alone.following == 0
    assert fate != "carry" or grid.reply_bytes < 1.2 * alone.reply_bytes  # some is sent again on a busy machine


def test_a_trainer_that_dies_in_the_middle_of_an_update_sends_it_whole_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lanes, "LEAST_BYTES", 150)  # an update takes several exchanges
    encoding = Encoding("float32")
    result, grid = over_flower(
        tmp_path, plan(1, encoding), lambda i, n: "die" if i == 1 and n % 9 == 0 else "carry"
    )
    assert grid.deaths > 0
    assert same(result.server.params, in_process(plan(1, encoding)).server.params)
    assert not same(result.server.params, in_process(plan(0, encoding)).server.params)


def test_a_site_four_times_slower_is_asked_again_and_changes_nothing(tmp_path: Path):
    class Slow(ToyTrainer):
        def train(self, *asked):
            time.sleep(0.4 if self.client_id == 0 else 0.1)  # a site may wait 0.3 s for its trainer
            return super().train(*asked)

    method = replace(plan(1, CHUNKED), num_rounds=4)
    result, grid = over_flower(tmp_path, method, make_trainer=Slow)
    assert same(result.server.params, in_process(method).server.params)
    assert grid.exchanges[0] > max(grid.exchanges[1:])
    assert not same(result.server.params, in_process(replace(method, num_rounds=3)).server.params)


def test_a_round_that_lacks_a_site_waits_until_it_is_back_and_says_so(tmp_path: Path):
    method = replace(plan(1, CHUNKED), min_updates=len(EXAMPLES), stall_timeout_s=0.4)
    told: list[str] = []

    def is_said() -> bool:
        return any("still waiting for the update of round 0" in event and "client 1" in event for event in told)

    result, _ = over_flower(
        tmp_path,
        method,
        fate=lambda client_id, _: "refuse" if client_id == 1 and not is_said() else "carry",
        on_event=told.append,
    )
    assert is_said()
    assert same(result.server.params, in_process(method).server.params)


def test_a_stop_does_not_wait_for_a_site_that_is_silent_and_keeps_the_last_checkpoint(tmp_path: Path):
    method = replace(plan(0, CHUNKED), min_updates=len(EXAMPLES), stall_timeout_s=300.0, checkpoint_every=2)
    told, states, silent = list[str](), list[RunState](), list[bool]()

    def fate(client_id: int, count: int) -> str:
        if client_id == 1 and len(states) == 2:
            silent.append(True)
            return "refuse"
        return "carry"

    result, _ = over_flower(
        tmp_path,
        method,
        fate,
        on_event=told.append,
        hooks=replace(QUIET, on_checkpoint=states.append, asked_to_stop=lambda: bool(silent)),
    )
    assert not result.finished
    assert any("no longer waiting for client 1" in event for event in told)
    assert [state.round_index for state in states] == [2, 4]
    assert result.server.committed == 3, "round 4 lacks the site's update"
    assert not same(result.server.params, in_process(method).server.params)


MASKED = SecureAggregation(len(EXAMPLES), ROUNDS, 1.0, 0, 20.0)


def on_the_grid(delay: int) -> ServerPlan:
    grid = FixedPointGrid(2.0, len(EXAMPLES))
    form = FixedPointWords(grid, Rule(clip_norm=2.0))
    return replace(plan(delay, Encoding("float32")), form=form, min_updates=2)


@pytest.mark.parametrize("delay", [0, 1])
def test_masked_over_flower_is_bitwise_the_plain_grid_of_one_process(tmp_path: Path, delay: int):
    result, _ = over_flower(tmp_path, on_the_grid(delay), masking=MASKED)
    plain = in_process(on_the_grid(delay))
    assert same(result.server.params, plain.server.params)
    assert result.server.rho == plain.server.rho
    assert not same(result.server.params, in_process(plan(delay, Encoding("float32"))).server.params)


def test_masked_over_flower_where_a_client_drops_and_answers_are_lost(tmp_path: Path):
    drop = [Fault(1, 3, "train", "drop")]
    result, grid = over_flower(
        tmp_path,
        on_the_grid(1),
        lambda client_id, count: "lose" if count % 3 == client_id else "carry",
        masking=MASKED,
        faults=drop,
    )
    assert max(grid.exchanges) > ROUNDS
    assert same(result.server.params, in_process(on_the_grid(1), faults=drop).server.params)
    assert not same(result.server.params, in_process(on_the_grid(1)).server.params)


def test_a_site_that_cannot_answer_a_greeting_is_told_of_and_greeted_again(tmp_path: Path):
    told: list[str] = []
    fates = iter(["fail", "fail"])
    result, _ = over_flower(
        tmp_path,
        plan(0, CHUNKED),
        fate=lambda client_id, count: next(fates, "carry") if (client_id, count) == (2, 0) else "carry",
        on_event=told.append,
    )
    assert result.finished
    assert told.count("a new SuperNode cannot answer: there is no such app (code 1)") == 2
    assert told.index("client 2 has connected") > 2
