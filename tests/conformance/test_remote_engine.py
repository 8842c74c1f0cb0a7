"""The engine of real sites gives bit for bit what one process gives, whoever dies and wherever the line is cut."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
from torch import Tensor

from engines import QUIET, run_here, server_plan
from parablock.algorithm.aggregate import Kinds
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.parablock import same
from parablock.algorithm.robust import Rule
from parablock.clock import RealClock
from parablock.engine.client import Client
from parablock.engine.contract import EngineResult
from parablock.engine.plans import Hooks, ServerPlan
from parablock.engine.remote.remote_transport import SPANS_KEPT, RemoteTransport
from parablock.engine.update_form import Differences, FixedPointWords, SparseDifferences
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.storage.checkpoint import RunState, load_newest, save_checkpoint
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from parablock.wire.messages import kind_of
from parablock.wire.quantize import Encoding
from remote_runs import BLOCKS, Died, Town
from toy import ToyTrainer, initial

EXAMPLES = [3, 1, 2]
ROUNDS = 9
CHUNKED = Encoding("float32", chunk_bytes=8)


def plan(delay: int, encoding: Encoding = CHUNKED, examples: Sequence[int] = EXAMPLES, **changes) -> ServerPlan:
    return server_plan(len(examples), ROUNDS, delay, Differences(encoding), checkpoint_every=2, **changes)


def in_process(
    plan: ServerPlan,
    examples: Sequence[int] = EXAMPLES,
    protection_of=lambda _: None,
    num_blocks: int = BLOCKS,
) -> EngineResult:
    trainers = [ToyTrainer(i, count, None) for i, count in enumerate(examples)]
    return run_here(initial(num_blocks), trainers, plan, Trace(RealClock()), QUIET, protection_of=protection_of)


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(
    "encoding",
    [Encoding("float32"), CHUNKED, Encoding("int8", chunk_bytes=8), Encoding("int8", error_feedback=True)],
    ids=repr,
)
def test_sites_give_what_one_process_gives(tmp_path: Path, delay: int, encoding: Encoding):
    result = Town(tmp_path, plan(delay, encoding), EXAMPLES).run()
    assert result.finished
    assert same(result.server.params, in_process(plan(delay, encoding)).server.params)
    if delay:
        assert not same(result.server.params, in_process(plan(0, encoding)).server.params)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("examples", [(3, 1), (3, 1, 2, 5)], ids=["two sites", "four sites"])
def test_two_sites_and_four_give_what_one_process_gives(tmp_path: Path, delay: int, examples: tuple[int, ...]):
    method = plan(delay, examples=examples)
    assert same(Town(tmp_path, method, examples).run().server.params, in_process(method, examples).server.params)


class Mortal(ToyTrainer):
    """Dies in some of its rounds, once in each."""

    dies: ClassVar[set[tuple[int, int]]]

    def train(self, round_index, *asked):
        result = super().train(round_index, *asked)
        if (self.client_id, round_index) in self.dies:
            self.dies.remove((self.client_id, round_index))
            raise Died
        return result


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("schedule", ["shuffled", "random", "cyclic"])
@pytest.mark.parametrize("encoding", [CHUNKED, Encoding("int8", error_feedback=True)], ids=repr)
def test_sites_that_die_in_training_change_nothing(tmp_path: Path, delay: int, schedule: str, encoding: Encoding):
    class Dying(Mortal):
        dies: ClassVar = {(0, 2), (1, 2), (2, 4), (0, 5), (1, ROUNDS - 1)}

    method = replace(plan(delay, encoding), schedule=schedule, min_updates=len(EXAMPLES))
    town = Town(tmp_path, method, EXAMPLES, make_trainer=Dying)
    result = town.run()
    assert town.deaths == 5
    assert same(result.server.params, in_process(method).server.params)
    assert not result.refused


FORMS = {
    "float32": Differences(CHUNKED),
    "int4": Differences(Encoding("int4", "stochastic", error_feedback=True)),
    "sparse2": SparseDifferences(Encoding("sparse2-1640", error_feedback=True)),
    "two kinds": Differences(Encoding("float32"), kinds=Kinds((2, 1, 1, 1), 2)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("delay", "num_groups"), [(0, 1), (1, 1), (2, 1), (1, 2)])
def test_groups_that_come_back_while_they_are_in_flight_are_those_of_one_process(
    tmp_path: Path, form: str, delay: int, num_groups: int
):
    class Dying(Mortal):
        dies: ClassVar = {(0, 2), (1, 3), (2, 4), (0, 5), (1, ROUNDS - 1)}

    method = replace(plan(delay), form=FORMS[form], schedule="cyclic", min_updates=len(EXAMPLES))
    town = Town(tmp_path, method, EXAMPLES, make_trainer=Dying, num_blocks=num_groups)
    result = town.run()
    assert town.deaths == 5 and not result.refused
    alone = in_process(method, num_blocks=num_groups).server
    assert same(result.server.params, alone.params) and result.server.rho == alone.rho
    if delay:
        assert not same(alone.params, in_process(replace(method, delay=0), num_blocks=num_groups).server.params)


def test_sites_that_die_anywhere_change_nothing(tmp_path: Path, monkeypatch):
    """Each line of a site's store and channel is a place to die at, now and then."""
    from parablock.engine.remote.site_channel import SiteChannel

    draw, lock = Random(1), threading.Lock()

    def deadly(owner, name):
        inner = getattr(owner, name)

        def call(self, *args, **kwargs):
            with lock:
                before, after = (draw.random() < 0.04 for _ in range(2))
            if before:
                raise Died
            result = inner(self, *args, **kwargs)
            if after:
                raise Died
            return result

        monkeypatch.setattr(owner, name, call)

    for name in ("save_latest", "save_mark", "_put", "_put_update", "_sweep", "newest"):
        deadly(SiteStore, name)
    for name in ("send", "receive"):
        deadly(SiteChannel, name)
    method = replace(plan(1), num_rounds=20, min_updates=len(EXAMPLES))
    town = Town(tmp_path, method, EXAMPLES)
    result = town.run()
    assert town.deaths > 10
    assert same(result.server.params, in_process(method).server.params)


def test_a_line_that_is_cut_at_any_time_changes_nothing_and_no_update_comes_twice(tmp_path: Path):
    class Slow(ToyTrainer):
        def train(self, *asked):
            time.sleep(0.01)
            return super().train(*asked)

    method = replace(plan(1), num_rounds=30)
    town = Town(tmp_path, method, EXAMPLES, make_trainer=Slow)
    draw, is_over = Random(2), threading.Event()

    def cutter() -> None:
        while not is_over.wait(0.02):
            town.cut(draw.randrange(len(EXAMPLES)))

    thread = threading.Thread(target=cutter)
    thread.start()
    try:
        result = town.run()
    finally:
        is_over.set()
        thread.join()
    assert sum("is connected" in line for line in town.told) > 10
    assert same(result.server.params, in_process(method).server.params)
    assert not result.refused


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("dies_after", range(1, ROUNDS - 1))
def test_a_server_that_dies_goes_on_from_its_newest_checkpoint(tmp_path: Path, delay: int, dies_after: int):
    method = replace(plan(delay), min_updates=len(EXAMPLES))
    town = Town(tmp_path / "sites", method, EXAMPLES)
    for client_id in range(len(EXAMPLES)):
        town.start(client_id)

    def on_checkpoint(state: RunState) -> None:
        save_checkpoint(tmp_path / "checkpoints", state, keep=2)

    def on_commit(state, *_) -> None:
        if state.committed == dies_after:
            raise Died

    with pytest.raises(Died):
        town.serve(Hooks(on_commit, on_checkpoint))
    state, _ = load_newest(tmp_path / "checkpoints")
    assert state is None or state.round_index >= dies_after - 1 - delay
    result = town.serve(replace(QUIET, on_checkpoint=on_checkpoint), state)
    town.end()
    assert same(result.server.params, in_process(method).server.params)
    assert not any("cannot get" in line for line in town.told)


@pytest.mark.parametrize(("delay", "seed"), [(0, 1), (1, 2), (1, 3), (2, 4)])
def test_server_and_sites_that_die_again_and_again_end_with_the_same_model(tmp_path: Path, delay: int, seed: int):
    draw = Random(seed)

    class Dying(ToyTrainer):
        def train(self, *asked):
            if draw.random() < 0.1:
                raise Died
            return super().train(*asked)

    method = replace(plan(delay), num_rounds=24, min_updates=len(EXAMPLES))
    town = Town(tmp_path / "sites", method, EXAMPLES, make_trainer=Dying)
    for client_id in range(len(EXAMPLES)):
        town.start(client_id)

    def on_checkpoint(state: RunState) -> None:
        save_checkpoint(tmp_path / "checkpoints", state, keep=2)
        if draw.random() < 0.3:
            raise Died

    def on_commit(*_) -> None:
        if draw.random() < 0.05:
            raise Died

    result, servers = None, 0
    while result is None:
        state, _ = load_newest(tmp_path / "checkpoints")
        servers += 1
        with suppress(Died):
            result = town.serve(Hooks(on_commit, on_checkpoint), state)
    town.end()
    assert servers + town.deaths > 3, "by draws of threads that take turns as they like"
    assert same(result.server.params, in_process(method).server.params)


def on_the_grid(delay: int) -> ServerPlan:
    form = FixedPointWords(FixedPointGrid(2.0, len(EXAMPLES)), Rule(clip_norm=2.0))
    return replace(plan(delay, Encoding("float32")), form=form, min_updates=2)


@pytest.mark.parametrize("delay", [0, 1])
def test_masked_updates_of_sites_give_the_plain_grid_of_one_process(tmp_path: Path, delay: int):
    masking = SecureAggregation(len(EXAMPLES), ROUNDS, 1.0, 0, 20.0)
    protection_of = lambda _: Protection(2.0)  # noqa: E731
    town = Town(tmp_path, on_the_grid(delay), EXAMPLES, masking=masking, protection_of=protection_of)
    plain = in_process(on_the_grid(delay), protection_of=protection_of)
    assert same(town.run().server.params, plain.server.params)


class Seals:
    """A proof that everybody can make of everybody, but for one client."""

    def __init__(self, client_id: int, liar: int | None) -> None:
        self.client_id, self.liar = client_id, liar

    def sign(self, content: bytes) -> bytes:
        return b"false" if self.client_id == self.liar else sha256(content + bytes([self.client_id])).digest()

    def is_by(self, client_id: int, content: bytes, proof: bytes) -> bool:
        return proof == sha256(content + bytes([client_id])).digest()


@pytest.mark.parametrize("liar", [None, 1])
def test_a_site_with_a_false_proof_takes_no_part_and_the_others_go_on(tmp_path: Path, liar: int | None):
    masking, counted = SecureAggregation(len(EXAMPLES), ROUNDS, 1.0, 0, 20.0), list[list[int]]()
    options = {"protection_of": lambda _: Protection(2.0), "identity_of": lambda i: Seals(i % 256, liar)}
    town = Town(tmp_path, on_the_grid(1), EXAMPLES, masking=masking, **options)
    on_commit = lambda state, updates, _: counted.append([update.client_id for update in updates])  # noqa: E731
    result = town.run(replace(QUIET, on_commit=on_commit))
    assert counted == [[i for i in range(len(EXAMPLES)) if i != liar]] * ROUNDS
    assert result.refused.get("misfit", 0) == (liar is not None)


def test_what_a_site_kept_and_had_not_recorded_when_it_died_is_recorded_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record, send_again, unrecorded = ReleaseLedger.record, Client._send_again, list[int]()

    def dying(ledger: ReleaseLedger, kind: str, round_index: int, **facts) -> None:
        if ledger is town.releases[1] and (kind, round_index) == ("release", 2) and not town.deaths:
            raise Died
        record(ledger, kind, round_index, **facts)

    def watched(client: Client, updates) -> None:
        updates = list(updates)
        is_recorded = client._releases is None or client._releases.recorded("release", 2)
        unrecorded.extend(t for t, _ in updates if client.client_id == 1 and t == 2 and not is_recorded)
        send_again(client, updates)

    monkeypatch.setattr(ReleaseLedger, "record", dying)
    town = Town(tmp_path / "town", plan(1, Encoding("float32")), EXAMPLES, keeps_releases=True)
    assert town.run().finished
    assert town.deaths == 1
    recorded = [t for t in range(ROUNDS) if town.releases[1].recorded("release", t)]
    assert recorded == list(range(ROUNDS))
    monkeypatch.setattr(Client, "_send_again", watched)
    monkeypatch.setattr(Client, "_record_kept", lambda _: None)
    town = Town(tmp_path / "before", plan(1, Encoding("float32")), EXAMPLES, keeps_releases=True)
    assert town.run().finished
    assert 2 in unrecorded, "the hole that was"
    assert not town.releases[1].recorded("release", 2)


def test_a_masked_site_that_dies_has_lost_its_secrets_and_the_others_go_on(tmp_path: Path):
    class Dying(Mortal):
        dies: ClassVar = {(1, 2)}

    masking = SecureAggregation(len(EXAMPLES), ROUNDS, 1.0, 0, 20.0)
    protection_of = lambda _: Protection(2.0)  # noqa: E731
    town = Town(
        tmp_path, on_the_grid(1), EXAMPLES, make_trainer=Dying, masking=masking, protection_of=protection_of
    )
    counted, told = dict[int, list[int]](), list[str]()

    def on_commit(state, updates, _) -> None:
        counted[state.committed] = [update.client_id for update in updates]

    assert town.run(replace(QUIET, on_commit=on_commit, on_event=told.append)).finished
    assert town.deaths == 1
    everybody = list(range(len(EXAMPLES)))
    assert counted[0] == everybody
    assert all(clients == [i for i in everybody if i != 1] for t, clients in counted.items() if t >= 2)
    assert any("client 1 leaves: its secrets are gone" in line for line in told)


@pytest.mark.parametrize("loses", [False, True], ids=["everybody keeps its state", "a site loses its state"])
def test_a_masked_run_whose_server_dies_goes_on_with_new_masks_to_the_same_end(
    tmp_path: Path, loses: bool, monkeypatch: pytest.MonkeyPatch
):
    newest, deliver = SiteStore.newest, RemoteTransport.deliver
    shared, has_shared = list[int](), threading.Event()

    def watched(transport: RemoteTransport, client_id: int, stream, delivered) -> None:
        deliver(transport, client_id, stream, delivered)
        if dead and client_id == 1 and kind_of(delivered.content) == "Shares":
            has_shared.set()

    def newest_or_lost(store: SiteStore, sessions):
        if not (loses and dead and store.folder.name == "1"):
            return newest(store, sessions)
        shared.append(has_shared.wait(20))  # as a large model is read, its keys and shares go ahead
        return None, []

    monkeypatch.setattr(SiteStore, "newest", newest_or_lost)
    monkeypatch.setattr(RemoteTransport, "deliver", watched)
    masking = SecureAggregation(len(EXAMPLES), ROUNDS, 1.0, 0, 20.0)
    protection_of = lambda _: Protection(2.0)  # noqa: E731
    method = replace(on_the_grid(1), checkpoint_every=2)
    town = Town(tmp_path, method, EXAMPLES, masking=masking, protection_of=protection_of)
    counted = dict[int, list[int]]()

    def on_commit(state, updates, _) -> None:
        counted[state.committed] = [update.client_id for update in updates]
        if state.committed == 5 and not dead:
            dead.append(True)
            raise Died

    def on_checkpoint(state: RunState) -> None:
        save_checkpoint(tmp_path / "checkpoints", state, keep=2)

    dead: list[bool] = []
    for client_id in range(len(EXAMPLES)):
        town.start(client_id)
    hooks = replace(QUIET, on_commit=on_commit, on_checkpoint=on_checkpoint)
    with suppress(Died):
        town.serve(hooks)
    state, _ = load_newest(tmp_path / "checkpoints")
    result = town.serve(hooks, state)
    town.end()
    plain = in_process(on_the_grid(1), protection_of=protection_of)
    assert result.finished and len(counted) == ROUNDS
    assert shared == [True] * loses
    assert counted[ROUNDS - 1] == list(range(len(EXAMPLES))), "who has lost its state takes part again"
    assert same(result.server.params, plain.server.params) or loses


class Talkative(ToyTrainer):
    """Does more in a round than the record of one note holds."""

    SPANS = 14_000
    town: ClassVar[Town]

    def train(self, round_index, *asked):
        if round_index == 1 and self.client_id == 0:
            trace = self.town.channels[0]._trace
            for _ in range(self.SPANS):
                with trace.span(0, "compute", "waiting", round_index=round_index, block_index=2):
                    pass
        return super().train(round_index, *asked)


def test_a_round_of_more_spans_than_a_note_holds_is_recorded_as_far_as_a_site_may(tmp_path: Path):
    traces = list[Trace]()
    Talkative.town = Town(tmp_path, plan(1), EXAMPLES, make_trainer=Talkative)
    Talkative.town.run(replace(QUIET, on_commit=lambda *_: traces.append(Talkative.town.transport._trace)))
    told = [span for span in traces[-1].spans if span.client_id == 0 and span.facts.get("round_index") == 1]
    assert len(told) >= SPANS_KEPT - 10
    assert not any("left out" in line for line in Talkative.town.told)


def test_a_site_keeps_no_value_that_a_commit_has_replaced(tmp_path: Path):
    begun = list[weakref.ref[Tensor]]()

    class Weighed(Town):
        def params(self) -> list[Tensor]:
            given = super().params()
            begun.extend(map(weakref.ref, given))
            return given

    left = list[int]()

    def on_commit(*_: object) -> None:
        gc.collect()
        left.append(sum(one() is not None for one in begun))

    Weighed(tmp_path, plan(0), EXAMPLES).run(replace(QUIET, on_commit=on_commit))
    assert left[0] == len(EXAMPLES) * BLOCKS and left[-1] <= len(EXAMPLES), (
        "of one block, whose news are on their way"
    )
