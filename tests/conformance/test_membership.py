"""Sites come and go in the middle of a run, and the model is bitwise that of the oracle told who counted when."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from engines import server_plan
from parablock.algorithm.parablock import same
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.engine.plans import Hooks
from parablock.engine.update_form import Differences
from parablock.storage.checkpoint import RunState
from parablock.wire.messages import from_bytes, kind_of
from parablock.wire.quantize import CHUNK_PIECE, Encoding
from remote_runs import BLOCKS, Died, Leaves, Town
from toy import ToyTrainer, Walker, initial, solve

EXAMPLES = [3, 1, 2, 5, 4, 2, 1, 3]
ROUNDS = 18
JOIN, LEAVE, REMOVED, RETURN = {6, 7}, {2: 8, 3: 10}, {4}, {2}
"""Two join at a third, two leave in these rounds, one is removed, and one of those who left returns."""


class MovingTown(Town):
    """Sites that have left wait until they are told to return; one that was removed stays away."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.may_return = {client_id: threading.Event() for client_id in range(len(EXAMPLES))}
        self.has_left, self.is_away, self.trained = set[int](), set[int](), [set[int]() for _ in range(ROUNDS)]

    def _process(self, client_id: int, finished: str) -> str:
        if client_id in self.has_left:
            self.is_away.add(client_id)
            while not (self.may_return[client_id].wait(0.02) or self.is_over.is_set()):
                pass
            if self.is_over.is_set():
                return finished
        return super()._process(client_id, finished)


def move(tmp_path: Path, delay: int, encoding: Encoding):
    plan = server_plan(8, ROUNDS, delay, Differences(encoding), checkpoint_every=4, min_updates=3)
    counted, events = dict[int, list[int]](), list[str]()

    class Moving(ToyTrainer):
        def train(self, round_index, *asked):
            if round_index >= LEAVE.get(self.client_id, ROUNDS) and self.client_id not in town.has_left:
                town.has_left.add(self.client_id)
                raise Leaves
            town.trained[round_index].add(self.client_id)
            return super().train(round_index, *asked)

    town = MovingTown(tmp_path, plan, EXAMPLES, make_trainer=Moving)

    def wait_for(holds) -> None:
        ready = threading.Event()
        for _ in range(3000):
            if holds():
                return
            ready.wait(0.01)
        raise AssertionError("nobody came")

    def on_commit(state, updates, _) -> None:
        t = state.committed
        counted[t] = [update.client_id for update in updates]
        if t == 5:
            for client_id in JOIN:
                town.start(client_id)
            wait_for(lambda: all(town.transport.is_there(i) and town.transport.places[i].has_sent for i in JOIN))
        if t == 7:
            town.has_left |= REMOVED
            town.transport.remove(*REMOVED)
        if t == 10:
            for client_id in RETURN:
                wait_for(lambda: 2 in town.is_away)
                town.may_return[client_id].set()
            wait_for(lambda: all(town.transport.is_there(i) and town.transport.places[i].has_sent for i in RETURN))

        if t == ROUNDS - 2:
            for client_id in REMOVED:  # its operator stops it, who waits to be let in again
                town.channels[client_id].stream.close()
                town.channels[client_id].inbox.fail(Leaves())
            wait_for(lambda: town.is_away >= REMOVED)

    for client_id in set(range(8)) - JOIN:
        town.start(client_id)
    try:
        result = town.serve(Hooks(on_commit, lambda _: None, on_event=events.append), sites=6)
    finally:
        town.end()
    return result, counted, town, events


def told(counted: dict[int, list[int]], trained: list[set[int]], delay: int) -> OracleProblem:
    took_part = [sorted(set(counted[t]) | trained[t]) for t in range(ROUNDS)]
    lost = {(i, t) for t in range(ROUNDS) for i in took_part[t] if i not in counted[t]}
    return OracleProblem(
        EXAMPLES, ROUNDS, delay, schedule="shuffled", trained=took_part, lost=frozenset(lost), min_updates=3
    )


def resumed_problem(trained: set[tuple[int, int]], counted: dict[int, list[int]], delay: int) -> OracleProblem:
    """The oracle's problem of three sites: who has trained in which round, and whose update counted in each."""
    took_part = trained | {(i, t) for t, of in counted.items() for i in of}
    return OracleProblem(
        EXAMPLES[:3],
        len(counted),
        delay,
        schedule="shuffled",
        trained=[sorted(i for i, of in took_part if of == t) for t in range(len(counted))],
        lost=frozenset((i, t) for i, t in took_part if i not in counted[t]),
        min_updates=2,
    )


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("encoding", [Encoding("float32"), Encoding("float32", chunk_bytes=8)], ids=repr)
def test_sites_join_leave_are_removed_and_return_in_the_middle(tmp_path: Path, delay: int, encoding: Encoding):
    result, counted, town, events = move(tmp_path, delay, encoding)
    assert result.finished and not result.refused
    problem = told(counted, town.trained, delay)
    oracle = run_sequential(initial(BLOCKS), problem, solve).server
    assert same(result.server.params, oracle.params)
    assert result.server.history == oracle.history

    assert [set(counted[t]) for t in range(5)] == [set(range(6))] * 5
    last = set(counted[ROUNDS - 1])
    assert last == {0, 1, 2, 5, 6, 7}, "two have joined, one has returned"
    assert all(2 not in counted[t] for t in (8, 9, 10)) and all(3 not in counted[t] for t in range(10, ROUNDS))
    assert all(4 not in counted[t] for t in range(8 + delay + 1, ROUNDS))
    assert any("client 4 leaves: the operator has removed it" in line for line in events)

    everybody = told({t: list(range(8)) for t in range(ROUNDS)}, [set() for _ in range(ROUNDS)], delay)
    assert not same(result.server.params, run_sequential(initial(BLOCKS), everybody, solve).server.params)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_site_that_was_away_at_the_checkpoint_goes_on_from_what_it_really_holds(tmp_path: Path, delay: int):
    """It misses rounds and the checkpoint of round 6, is back, and the server dies before that of round 12."""
    plan = server_plan(3, ROUNDS, delay, Differences(Encoding("float32")), checkpoint_every=6, min_updates=2)
    counted, states, trained = dict[int, list[int]](), list[RunState](), dict[str, set[tuple[int, int]]]()

    class Leaving(ToyTrainer):
        def train(self, round_index, *asked):
            if self.client_id == 2 and round_index == 5 and 2 not in town.has_left:
                town.has_left.add(2)
                raise Leaves
            session = town.channels[self.client_id].opening.session
            trained.setdefault(session, set()).add((self.client_id, round_index))
            return super().train(round_index, *asked)

    def on_commit(state, updates, _) -> None:
        t = state.committed
        counted[t] = [update.client_id for update in updates]
        if t == 6 - delay:
            town.may_return[2].set()
            for _ in range(3000):  # until its Join waits, which the server takes between two commits
                if town.transport.is_there(2) and town.transport.places[2].has_sent:
                    break
                time.sleep(0.01)
        if t > 6 and len(trained) == 1:
            if 2 in counted[t]:
                raise Died
            for _ in range(1000):  # the others do not wait for it
                if any(i == 2 and of > 6 for i, of in next(iter(trained.values()))):
                    break
                time.sleep(0.01)

    town = MovingTown(tmp_path, plan, EXAMPLES[:3], make_trainer=Leaving)
    for client_id in range(3):
        town.start(client_id)
    try:
        with pytest.raises(Died):
            town.serve(Hooks(on_commit, states.append))
        assert [state.round_index for state in states] == [6]
        assert town.has_left == {2} and 2 not in counted[5]
        result = town.serve(Hooks(on_commit, lambda _: None), states[-1])
    finally:
        town.end()
    first, second = trained.values()
    assert (2, 6) in second and ((2, 5) in second) == (delay == 1), "round 5, open at the checkpoint, asks it again"
    problem = resumed_problem({(i, t) for i, t in first if t < 6} | second, counted, delay)
    assert same(result.server.params, run_sequential(initial(BLOCKS), problem, solve).server.params)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_goes_on_from_its_newest_checkpoint_though_a_site_was_away_for_twenty_rounds(
    tmp_path: Path, delay: int
):
    """It leaves in round 3; the server dies after round 25 and goes on; the site is back with its old state."""
    rounds, left, dies = 30, 3, 25
    plan = server_plan(3, rounds, delay, Differences(Encoding("float32")), checkpoint_every=4, min_updates=2)
    counted, states, trained = dict[int, list[int]](), list[RunState](), dict[str, set[tuple[int, int]]]()

    class Leaving(ToyTrainer):
        def train(self, round_index, *asked):
            if self.client_id == 2 and round_index == left and 2 not in town.has_left:
                town.has_left.add(2)
                raise Leaves
            session = town.channels[self.client_id].opening.session
            trained.setdefault(session, set()).add((self.client_id, round_index))
            return super().train(round_index, *asked)

    def on_commit(state, updates, _) -> None:
        counted[state.committed] = [update.client_id for update in updates]
        if state.committed == dies and len(trained) == 1:
            raise Died

    town = MovingTown(tmp_path, plan, EXAMPLES[:3], make_trainer=Leaving)
    for client_id in range(3):
        town.start(client_id)
    try:
        with pytest.raises(Died):
            town.serve(Hooks(on_commit, states.append))
        before = dict(counted)
        assert all(before[t] == [0, 1] for t in range(left + 1, dies)), "twenty rounds and more"
        newest = states[-1]
        assert newest.round_index == 24
        counted.clear()
        town.may_return[2].set()
        result = town.serve(Hooks(on_commit, lambda _: None), newest)
    finally:
        town.end()
    again = newest.server.committed + 1
    assert sorted(counted) == list(range(again, rounds)) and again >= 24 - delay, "it does not begin anew"
    counted = before | counted
    assert sorted(counted) == list(range(rounds)) and counted[rounds - 1] == [0, 1, 2]
    first, second = trained.values()
    problem = resumed_problem({(i, t) for i, t in first if t < 24} | second, counted, delay)
    assert same(result.server.params, run_sequential(initial(BLOCKS), problem, solve).server.params)
    everybody = OracleProblem(EXAMPLES[:3], rounds, delay, schedule="shuffled", min_updates=2)
    assert not same(result.server.params, run_sequential(initial(BLOCKS), everybody, solve).server.params)


def noting(counted: list[list[int]], events: list[str]) -> Hooks:
    """Note whose updates count, round after round, and what is told."""
    return Hooks(
        lambda _, updates, __: counted.append([update.client_id for update in updates]),
        lambda _: None,
        on_event=events.append,
    )


def test_a_site_that_moves_slowly_stays_where_another_hangs_amid_its_chunks(tmp_path: Path):
    over = threading.Event()

    class Uneven(Town):
        def before_sending(self, client_id, message):
            if kind_of(message) == "Update" and (update := from_bytes(message)).round_index >= 1:
                if client_id == 1 and update.chunk_index >= 1:
                    over.wait(120)  # it hangs after its first chunk
                if client_id == 2 and update.round_index == 1:
                    over.wait(0.8)  # a chunk now and then, within the patience

        def params(self):
            return [torch.full((5 * CHUNK_PIECE,), 0.1 * b) for b in range(self.num_blocks)]

        served = params

        def serve(self, *arguments, **options):
            try:
                return super().serve(*arguments, **options)
            finally:
                over.set()

    plan = server_plan(3, 4, 1, Differences(Encoding("float32", chunk_bytes=4 * CHUNK_PIECE)), stall_timeout_s=2.0)
    counted, events = list[list[int]](), list[str]()
    town = Uneven(tmp_path, plan, EXAMPLES[:3], make_trainer=lambda client_id, *_: Walker(client_id, 0.0))
    town.run(noting(counted, events))
    assert counted[0] == [0, 1, 2] and all(2 in clients and 1 not in clients for clients in counted[1:])
    assert not any("without client 2" in line for line in events)


@pytest.mark.parametrize("min_updates", [1, 3])
def test_a_site_that_dies_again_and_again_holds_a_round_only_where_it_cannot_do_without(
    tmp_path: Path, min_updates: int
):
    lives = iter(range(9))

    class Crashing(ToyTrainer):
        def train(self, round_index, *asked):
            if self.client_id == 2 and round_index >= 2 and next(lives, None) is not None:
                raise Died
            return super().train(round_index, *asked)

    plan = server_plan(3, 5, 1, Differences(Encoding("float32")), min_updates=min_updates, stall_timeout_s=60.0)
    counted, events = list[list[int]](), list[str]()
    town = Town(tmp_path, plan, EXAMPLES[:3], make_trainer=Crashing)
    town.run(noting(counted, events))
    gave_up = "refused (useless): client 2 sent no update, again and again"
    if min_updates == 3:
        assert counted == [[0, 1, 2]] * 5 and town.deaths == 9 and gave_up not in events
    else:
        assert counted[0] == [0, 1, 2] and [0, 1] in counted
        assert events.count(gave_up) >= 1 and town.deaths >= 5


@pytest.mark.parametrize("trouble", ["gone", "hangs", "hangs, and its line flaps", "dies before it joins"])
def test_a_site_that_does_nothing_is_not_waited_for_whatever_lines_are_cut(tmp_path: Path, trouble: str):
    idle, over, all_cuts_made = threading.Event(), threading.Event(), threading.Event()
    towns, cut_off = list[Town](), 2 if trouble.endswith("flaps") else 0

    class Idle(ToyTrainer):
        def train(self, round_index, *asked):
            if self.client_id == 2 and round_index >= 2:
                idle.set()
                if not trouble.startswith("hangs"):
                    raise Died
                over.wait(120)
            return super().train(round_index, *asked)

    class Noisy(Town):
        def serve(self, *arguments, **options):
            towns.append(self)
            cutter = threading.Thread(target=cut_on_and_on)
            cutter.start()
            try:
                return super().serve(*arguments, **options)
            finally:
                over.set()
                cutter.join()

        def params(self):
            if trouble == "dies before it joins" and idle.is_set() and not over.wait(0.3):
                raise Died  # nobody else loads a model by then
            return super().params()

    def cut_on_and_on() -> None:
        for _ in range(150):
            if over.wait(0.2):
                return
            towns[0].cut(cut_off)
        all_cuts_made.set()
        over.set()

    def address_of(client_id: int, port: int) -> str:
        is_shut = client_id == 2 and idle.is_set() and trouble == "gone"
        return "127.0.0.1:9" if is_shut else f"127.0.0.1:{port}"

    plan = server_plan(3, 5, 1, Differences(Encoding("float32")), stall_timeout_s=2.0)
    counted, events = list[list[int]](), list[str]()
    town = Noisy(tmp_path, plan, EXAMPLES[:3], make_trainer=Idle, address_of=address_of)
    town.run(noting(counted, events))
    assert counted[0] == [0, 1, 2] and counted[2:] == [[0, 1]] * 3  # the update of round 1 may die with its site
    assert not all_cuts_made.is_set(), "the round was held as long as lines were cut"
    assert sum(f"client {cut_off}" in line and "connected" in line for line in town.told) > 3, "lines were cut"
    assert (trouble != "dies before it joins") or town.deaths > 4
