"""What goes wrong with a client does not end a run, and what it ends with follows from who took part alone.

Each run is replayed by the oracle, which is told who trained and whose update counted, and nothing of clocks,
links, deadlines or deaths.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pytest
import torch

from engines import Followed, follow, run_here, server_plan
from parablock.algorithm.parablock import same
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.clock import RealClock, VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.faults import Fault, Faults
from parablock.engine.plans import Hooks
from parablock.engine.update_form import Differences
from parablock.errors import StallError, TrainingError
from parablock.storage.checkpoint import RunState
from parablock.trace import Trace
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Link
from toy import ToyTrainer, initial, solve

EXAMPLES = [3, 1, 2, 5]
ROUNDS = 12
LINK = Link(0.01, 0.01)


class Diverging(ToyTrainer):
    """Its loss is not finite in some rounds."""

    def __init__(self, client_id: int, num_examples: int, step_s: float, rounds: Collection[int]) -> None:
        super().__init__(client_id, num_examples, step_s)
        self.rounds = rounds

    def train(self, round_index, *rest):
        if round_index in self.rounds:
            raise TrainingError("The training loss is not finite")
        return super().train(round_index, *rest)


@dataclass
class Ran(Followed):
    """A run, and what the oracle is told of it beside."""

    trained: list[list[int]]
    faults: Faults


def run(
    *faults: Fault,
    delay: int = 1,
    clock=None,
    link: Link = LINK,
    encoding: Encoding = Encoding("float32"),  # noqa: B008
    step_s: float = 1.0,
    diverging: Mapping[int, Collection[int]] = {},
    num_groups: int = 4,
    **changes,
) -> Ran:
    """Run; `changes` are fields of the server's plan."""
    clock, injected = clock or VirtualClock(), Faults(faults)
    plan = server_plan(len(EXAMPLES), ROUNDS, delay, Differences(encoding), aggregation_s=0.0, **changes)
    trainers = [Diverging(i, n, step_s, diverging.get(i, ())) for i, n in enumerate(EXAMPLES)]
    trace = Trace(clock)
    followed = follow(initial(num_groups), trainers, plan, trace, link=link, faults=injected)
    # what a machine computes in the moment in which it dies never leaves it
    doing = {
        activity: {(s.client_id, s.facts["round_index"]) for s in trace.spans if s.activity == activity}
        for activity in ("computing", "uploading")
    }
    done = doing["computing"] & doing["uploading"] - {(i, t) for i, rounds in diverging.items() for t in rounds}
    trained = [sorted(i for i, t in done if t == round_index) for round_index in range(ROUNDS)]
    return Ran(**vars(followed), trained=trained, faults=injected)


def stopped_or_whole(
    *faults: Fault, asked_to_stop=lambda events: False, resumed: RunState | None = None
) -> tuple[EngineResult, list[RunState], list[str]]:
    """Run in real time, with a checkpoint every other round; `asked_to_stop` sees what was told."""
    states, events = list[RunState](), list[str]()
    plan = server_plan(len(EXAMPLES), ROUNDS, 0, stall_timeout_s=500.0, checkpoint_every=2, min_updates=4)
    result = run_here(
        initial(4),
        [ToyTrainer(i, n, None) for i, n in enumerate(EXAMPLES)],
        plan,
        Trace(RealClock()),
        Hooks(lambda *_: None, states.append, lambda: asked_to_stop(events), events.append),
        faults=Faults(faults),
        resumed=resumed,
    )
    return result, states, events


def test_a_stop_does_not_wait_for_a_client_that_is_gone_and_the_run_goes_on_bitwise():
    dead = Fault(2, 5, "upload", "kill")
    stopped, states, events = stopped_or_whole(
        dead, asked_to_stop=lambda events: "client 2 was killed" in events
    )  # without a stop it would wait for 500 seconds
    assert not stopped.finished
    assert any("no longer waiting for client 2" in event for event in events)
    assert [state.round_index for state in states] == [2, 4]
    resumed, _, _ = stopped_or_whole(resumed=states[-1])
    whole, _, _ = stopped_or_whole()
    assert resumed.finished and whole.finished
    assert same(resumed.server.params, whole.server.params)
    assert not same(stopped.server.params, whole.server.params)


def test_a_stop_waits_for_clients_that_only_take_their_time_and_is_saved():
    asked: list[int] = []

    def in_the_sixth_round(events: list[str]) -> bool:
        asked.append(len(asked))
        return len(asked) >= 5  # before rounds 1, 2, 3, 4, 5

    stopped, states, events = stopped_or_whole(asked_to_stop=in_the_sixth_round)
    assert not stopped.finished and not events
    assert [state.round_index for state in states] == [2, 4, 5]
    assert len(asked) == 5, "not while it waits for clients that are there"


def replay(
    ran: Ran, *, delay: int = 1, min_updates: int = 1, num_groups: int = 4, **changes
) -> list[tuple[torch.Tensor, ...]]:
    lost = {(i, t) for t in range(ROUNDS) for i in ran.trained[t] if i not in ran.counted[t]}
    options = {"lost": frozenset(lost), "trained": ran.trained, "schedule": "shuffled", **changes}
    return run_sequential(
        initial(num_groups), OracleProblem(EXAMPLES, ROUNDS, delay, min_updates=min_updates, **options), solve
    ).trajectory


def equal(one, other) -> bool:
    return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))


FAULTS = {
    "an update given up at training": [Fault(2, 4, "train", "drop")],
    "an update given up on the way up": [Fault(2, 4, "upload", "drop")],
    "NaN": [Fault(1, 3, "upload", "nan")],
    "absurdly long": [Fault(3, 5, "train", "scale", 1e6)],
    "everybody gives a round up": [Fault(i, 5, "train", "drop") for i in range(4)],
    "dead for good": [Fault(0, 6, "train", "kill")],
    "dead in the first round": [Fault(3, 0, "train", "kill")],
    "dead while it uploads, and back": [Fault(2, 4, "upload", "kill", 6.0)],
    "dead while it downloads, and back": [Fault(2, 4, "download", "kill", 6.0)],
    "dead between rounds, and back": [Fault(2, 4, "commit", "kill", 6.0)],
    "two dead, one back": [Fault(2, 4, "train", "kill", 9.0), Fault(1, 5, "upload", "kill")],
    "late": [Fault(1, 4, "train", "delay", 8.0)],
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_run_with_faults_is_the_oracles_run_of_those_who_took_part(case, delay):
    ran = run(*FAULTS[case], delay=delay, deadline_factor=3.0)
    assert ran.result.finished
    assert sum(ran.faults.counts.values()) == len(FAULTS[case])
    assert equal(ran.trajectory, replay(ran, delay=delay))
    assert not equal(ran.trajectory, run(delay=delay).trajectory), "the fault changed nothing"
    dead = {fault.client_id for fault in FAULTS[case] if fault.kind == "kill" and fault.value is None}
    for client_id in set(range(4)) - dead:
        client = ran.result.clients[client_id]
        assert same(client.base, ran.result.server.view), "everybody who is there ends with the server's model"


@pytest.mark.parametrize("case", ["an update given up on the way up", "dead while it downloads, and back", "late"])
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_who_misses_a_round_misses_nothing_of_a_group_that_is_always_in_flight(case, delay, num_groups):
    groups = {"delay": delay, "num_groups": num_groups, "schedule": "cyclic"}
    ran = run(*FAULTS[case], deadline_factor=3.0, **groups)
    assert ran.result.finished and equal(ran.trajectory, replay(ran, **groups))
    assert not equal(ran.trajectory, run(**groups).trajectory), "the fault changed nothing"
    assert all(same(client.base, ran.result.server.view) for client in ran.result.clients)


KILLS = [
    *(("train", t) for t in (0, 1, 5, ROUNDS - 1)),
    ("upload", 5),
    ("download", 5),
    ("commit", 5),
    ("upload", 11),
]


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_who_dies_and_is_back_in_time_changes_nothing(delay):
    undisturbed = run(delay=delay)
    for at, t in KILLS:
        ran = run(Fault(2, t, at, "kill", 6.0), delay=delay)
        assert any("is back" in event for event in ran.events), (at, t)
        assert equal(ran.trajectory, undisturbed.trajectory), (at, t)
        assert ran.counted == undisturbed.counted
        assert all(same(client.base, ran.result.server.view) for client in ran.result.clients)
    late = run(Fault(2, 5, "train", "kill", 6.0), delay=delay, deadline_factor=1.5)
    assert not equal(late.trajectory, undisturbed.trajectory)


def test_without_a_deadline_a_silent_client_costs_the_patience_once():
    ran, patient = (run(Fault(0, 6, "train", "kill"), stall_timeout_s=patience) for patience in (20.0, 50.0))
    assert ran.counted[5:] == patient.counted[5:] == [[1, 2, 3]] * 7, "its update of round 5 was on its way"
    assert patient.seconds - ran.seconds == pytest.approx(30.0, rel=0.01), "two rounds were open; both go on then"
    assert any("silent" in event and "client 0: 0 of 1 chunks, 0 bytes" in event for event in ran.events)


def test_a_deadline_follows_the_measured_times():
    fault = Fault(0, 6, "train", "kill")
    strict, generous, none = (run(fault, deadline_factor=factor) for factor in (1.5, 6.0, None))
    assert strict.seconds < generous.seconds < none.seconds
    slow_strict = run(fault, deadline_factor=1.5, step_s=4.0, link=Link(0.0025, 0.0025))
    assert slow_strict.counted == strict.counted
    assert slow_strict.seconds == pytest.approx(4 * strict.seconds, rel=0.05), "everything is 4 times as slow"


def test_a_run_without_faults_never_goes_on_without_anybody_who_is_as_fast_as_the_others():
    patient, hurried = run(), run(deadline_factor=1.5)
    assert equal(patient.trajectory, hurried.trajectory)
    assert patient.counted == hurried.counted == [[0, 1, 2, 3]] * ROUNDS
    assert patient.seconds == hurried.seconds
    assert not hurried.events


def test_a_late_update_is_refused_and_its_client_takes_part_again():
    ran = run(Fault(1, 4, "train", "delay", 4.0), deadline_factor=2.0)
    without = [t for t in range(ROUNDS) if 1 not in ran.counted[t]]
    assert without[0] == 4
    assert ran.result.refused["late"] >= 1
    assert 1 in ran.counted[-1]


def test_below_min_updates_the_server_waits_for_who_comes_back():
    deaths = [Fault(i, 5, "train", "kill", 100.0) for i in (1, 2, 3)]
    waits = run(*deaths, min_updates=3, deadline_factor=2.0)
    assert all(len(counted) >= 3 for counted in waits.counted)
    assert waits.seconds > 100.0
    goes_on = run(*deaths, min_updates=1, deadline_factor=2.0)
    assert [0] in goes_on.counted
    assert goes_on.seconds < 60.0


def test_a_run_whose_clients_are_all_gone_ends_and_names_them():
    deaths = [Fault(i, 5, "train", "kill") for i in range(4)]
    with pytest.raises(
        StallError, match=r"round 5, block \d, from client 0: 0 of 1 chunks, 0 bytes; client 1"
    ) as stall:
        run(*deaths)
    assert "nothing moved for 20 s" in stall.value.what
    with pytest.raises(StallError, match="from client 1: 0 of 1 chunks"):
        run(*deaths[1:], min_updates=2, deadline_factor=2.0)


REFUSED = {
    "nan": ("nan", None, "not_finite"),
    "scale": ("scale", 1e6, "norm"),
    "sign_flip": ("sign_flip", None, None),
    "a little longer": ("scale", 3.0, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_poison_that_no_honest_client_sends_is_refused_and_counted(case):
    kind, value, reason = REFUSED[case]
    ran = run(Fault(2, 4, "upload", kind, value))
    assert ran.result.refused == ({reason: 1} if reason else {})
    assert ran.counted[4] == ([0, 1, 3] if reason else [0, 1, 2, 3])
    assert ran.counted[5] == [0, 1, 2, 3], "it takes part again"
    assert not equal(ran.trajectory, run().trajectory)


@pytest.mark.parametrize("encoding", [Encoding("float32"), Encoding("float32", chunk_bytes=8)])
def test_a_client_whose_training_fails_gives_its_round_up_and_says_why(encoding):
    ran = run(diverging={2: {4, 5}}, min_updates=3, encoding=encoding)
    assert [i for i, counted in enumerate(ran.counted) if 2 not in counted] == [4, 5]
    assert ran.result.refused == {"failed": 2}
    assert "round 5 goes on without client 2: The training loss is not finite" in ran.events
    assert equal(ran.trajectory, replay(ran, min_updates=3))
    assert not equal(ran.trajectory, run(encoding=encoding).trajectory)


@pytest.mark.parametrize(("min_updates", "diverging"), [(4, {2: {4}}), (1, {i: {4} for i in range(4)})])
def test_where_too_few_can_train_the_run_ends_and_says_so(min_updates, diverging):
    with pytest.raises(TrainingError, match=r"could not train round 5: The training loss is not finite") as failed:
        run(diverging=diverging, min_updates=min_updates)
    assert f"federation.min_updates is {min_updates}" in failed.value.cause


@pytest.mark.parametrize("at", ["upload", "download"])
def test_a_flipped_bit_is_found_and_the_chunk_is_sent_again(at):
    undisturbed, ran = run(delay=0), run(Fault(2, 4, at, "corrupt"), delay=0)
    assert equal(ran.trajectory, undisturbed.trajectory)
    assert ran.seconds > undisturbed.seconds
    assert ran.result.refused == ({"corrupt": 1} if at == "upload" else {})


def test_under_the_real_clock_a_dead_client_ends_no_run_either():
    fast = {"link": Link(), "clock": RealClock(), "step_s": 0.0}
    ran = run(Fault(2, 4, "upload", "kill"), Fault(1, 6, "train", "kill", 0.05), stall_timeout_s=0.3, **fast)
    assert ran.result.finished
    assert 2 not in ran.counted[-1]
    assert equal(ran.trajectory, replay(ran))


class Counting(ToyTrainer):
    """It remembers how many rounds it has trained, and has nothing to remember before the first."""

    rounds = 0

    def train(self, *turn):
        self.rounds += 1
        return super().train(*turn)

    def memory(self) -> dict[str, torch.Tensor]:
        return {"rounds": torch.tensor(self.rounds)} if self.rounds else {}

    def remember(self, memory: dict[str, torch.Tensor]) -> None:
        self.rounds = int(memory.get("rounds", 0))


@pytest.mark.parametrize("at", ["train", "upload", "download"])
def test_a_client_that_dies_in_its_first_round_forgets_what_it_trained(at: str):
    def rounds_of(*faults: Fault) -> list[int]:
        trainers = [Counting(i) for i in range(3)]
        plan = server_plan(3, 6, 1, aggregation_s=0.0)
        run_here(initial(4), trainers, plan, Trace(VirtualClock()), link=LINK, faults=Faults(faults))
        return [trainer.rounds for trainer in trainers]

    assert rounds_of(Fault(1, 1, at, "kill", 1.0)) == rounds_of() == [6, 6, 6]
