"""Every crash point of a small run, with other clients after it: nothing leaves twice under one noise or mask.

A run dies before or after each line of its ledger, and at each commit; it goes on from its last checkpoint, without
one of its clients in a round. Everything that leaves a client or the server is watched over all lives of the run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import engine_input, server_plan
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.robust import RoundAggregation, Rule
from parablock.clock import VirtualClock
from parablock.engine.faults import Fault, Faults
from parablock.engine.inprocess import run_in_process
from parablock.engine.plans import Hooks
from parablock.engine.releasing import Releasing
from parablock.engine.update_form import Differences, FixedPointWords
from parablock.privacy.discrete_gaussian import DiscreteGaussian
from parablock.privacy.keystream import Keystream, derive
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.storage.audit_log import AuditLog
from parablock.storage.checkpoint import RunState
from parablock.storage.release_ledger import ACCOUNT, SET, ReleaseLedger
from parablock.trace import Trace
from parablock.wire.messages import from_bytes, kind_of
from parablock.wire.quantize import Encoding
from parablock.wire.transport import MemoryTransport
from toy import ToyTrainer, initial

CLIENTS, ROUNDS, KEY = 3, 3, bytes(range(32))
MODES = ("masked", "local", "central", "distributed")
GRID = FixedPointGrid(1.0, CLIENTS, noise_multiplier=0.5, fewest_clients=2)
GAUSSIAN = DiscreteGaussian(GRID.noise_variance)


class Died(Exception):  # noqa: N818
    """The process is gone."""


@dataclass
class Watched:
    """What has left over all lives: by client and round, by round, and by noise."""

    updates: dict[tuple[int, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    sets: dict[int, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))
    means: dict[int, set[tuple[tuple[int, ...], str]]] = field(default_factory=lambda: defaultdict(set))
    covered: dict[bytes, set[bytes]] = field(default_factory=lambda: defaultdict(set))

    @property
    def leaks(self) -> list[str]:
        return [
            *(f"{len(each)} updates of {place}" for place, each in self.updates.items() if len(each) > 1),
            *(f"round {t}: sums over {sorted(each)}" for t, each in self.sets.items() if len(each) > 1),
            *("one noise on two updates or means" for each in self.covered.values() if len(each) > 1),
        ]

    def releases_of(self, client_id: int) -> int:
        """Count the noisy updates of a client, or the noisy means with one."""
        if self.means:
            return sum(client_id in clients for each in self.means.values() for clients, _ in each)
        if self.sets:
            return sum(client_id in clients for each in self.sets.values() for clients in each)
        return sum(len(each) for (i, _), each in self.updates.items() if i == client_id)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Watch what leaves clients and the server in this test."""
    found = Watched()
    finish, apply, hide = MemoryTransport.finish_upload, Protection.apply, Protection.hide
    add, count = RoundAggregation._add_noise, Releasing.count_mean
    mask, answer = MaskedClient._mask, MaskedClient._answer_reveal

    def uploaded(self: Any, client_id: int, parcel: Any, seconds: float) -> None:
        if kind_of(parcel.message) == "Update" and (update := from_bytes(parcel.message)).delta.format == "float32":
            found.updates[client_id, update.round_index].add(update.delta.raw.numpy().tobytes())
        finish(self, client_id, parcel, seconds)

    def applied(self: Protection, delta: Tensor, round_index: int) -> tuple[Tensor, float]:
        protected, factor = apply(self, delta, round_index)
        if self.normals is not None:
            clipped = replace(self, normals=None).apply(delta, round_index)[0]
            found.covered[(protected - clipped).mul(1e3).round().numpy().tobytes()].add(clipped.numpy().tobytes())
        return protected, factor

    def hidden(self: Protection, words: Tensor, round_index: int) -> None:
        before = words.clone()
        hide(self, words, round_index)
        if self.integers is not None:
            found.covered[(words - before).numpy().tobytes()].add(before.numpy().tobytes())

    def added(self: Any, mean: Tensor, clients: tuple[int, ...]) -> Tensor:
        before = mean.clone()
        noisy = add(self, mean, clients)
        found.covered[(noisy - before).mul(1e3).round().numpy().tobytes()].add(before.numpy().tobytes())
        return noisy

    def counted(self: Any, fold: Any, part: slice) -> None:
        count(self, fold, part)
        if self._account == "means":  # the mean leaves after this
            found.means[fold.round_index].add((tuple(fold.expected), fold.content))

    def masked(self: Any, parcel: Any) -> Any:
        answers = mask(self, parcel)
        if kind_of(answers[-1].message) == "Update":  # after the word on its partners
            update = from_bytes(parcel.message)
            found.updates[self._client_id, update.round_index].add(update.delta.raw.numpy().tobytes())
        return answers

    def answered(self: Any, message: Any) -> Any:
        answers = answer(self, message)
        if from_bytes(answers[0].message).shares.num_elements:
            found.sets[message.round_index].add(message.clients)
        return answers

    for owner, name, watch in (
        (MemoryTransport, "finish_upload", uploaded),
        (Protection, "apply", applied),
        (Protection, "hide", hidden),
        (RoundAggregation, "_add_noise", added),
        (Releasing, "count_mean", counted),
        (MaskedClient, "_mask", masked),
        (MaskedClient, "_answer_reveal", answered),
    ):
        monkeypatch.setattr(owner, name, watch)
    return found


class MortalLog(AuditLog):
    """A log whose process dies at one of its lines, before it is written or after."""

    def __init__(self, path: Path, dies_at: int | None = None, *, before: bool = True) -> None:
        super().__init__(path)
        self.lines, self.dies_at, self.before = 0, dies_at, before

    def append(self, kind: str, **facts: Any) -> str:
        self.lines += 1
        if self.dies_at is not None and (self.lines > self.dies_at or (self.before and self.lines == self.dies_at)):
            raise Died
        hash_ = super().append(kind, **facts)
        if self.lines == self.dies_at:
            raise Died
        return hash_


class NoLog:
    """What a process that remembers nothing has instead."""

    lines = 0


def live(
    mode: str,
    log: MortalLog | NoLog,
    resumed: RunState | None = None,
    *,
    dies_after: int | None = None,
    without: tuple[int, int] | None = None,
    noise_of: Callable[[int, str], bytes] = lambda t, content: derive(KEY, t, content),
) -> tuple[RunState | None, ReleaseLedger]:
    """Run to the end or to the death; return the last checkpoint, and the ledger of the server."""
    states: list[RunState] = []
    clock = VirtualClock(start_s=resumed.progress["clock_s"] if resumed else 0.0)

    def on_commit(state: Any, *_: Any) -> None:
        if dies_after is not None and state.committed == dies_after:
            raise Died

    def keep(state: RunState) -> None:
        state.progress["clock_s"] = clock.now()
        states.append(state)

    def ledger(name: str) -> ReleaseLedger:
        return ReleaseLedger(log if isinstance(log, AuditLog) else None, name)

    def noise(t: int, clients: tuple[int, ...], content: str) -> Any:
        return Keystream(derive(noise_of(t, content), *clients)).normals

    rule = Rule(clip_norm=1.0, noise_multiplier=0.5 if mode == "central" else 0.0)
    form = FixedPointWords(GRID if mode == "distributed" else FixedPointGrid(1.0, CLIENTS), rule)
    if mode in ("local", "central"):
        form = Differences(Encoding("float32"), rule, noise if mode == "central" else None)
    plan = server_plan(CLIENTS, ROUNDS, 1, form, min_updates=2, checkpoint_every=2)
    plan = replace(plan, account={"local": "updates", "central": "means"}.get(mode, ""))

    def protection_of(client_id: int) -> Protection:
        def integers(t: int, content: str) -> Any:
            return partial(GAUSSIAN.draw, Keystream(derive(noise_of(t, content), client_id)))

        if mode != "local":
            return Protection(1.0, integers=integers if mode == "distributed" else None)
        return Protection(1.0, 0.5, lambda t, content: Keystream(derive(noise_of(t, content), client_id)).normals)

    faults = Faults([] if without is None else [Fault(without[0], without[1], "train", "drop")])
    releases = ledger("server")
    given = engine_input(
        initial(2),
        [ToyTrainer(i, i + 1) for i in range(CLIENTS)],
        plan,
        Trace(clock),
        Hooks(on_commit, keep),
        resumed=resumed,
        faults=faults,
        protection_of=protection_of,
        masking=None if mode in ("local", "central") else SecureAggregation(CLIENTS, ROUNDS, 1.0, 0, 20.0),
    )
    given = replace(given, releases=releases, releases_of=lambda i: ledger(f"client-{i}"))
    with suppress(Died):
        assert run_in_process(given).finished
    return (states[-1] if states else resumed), ledger("server")


def crash_points(mode: str, path: Path) -> Iterator[tuple[MortalLog, int | None]]:
    whole = MortalLog(path / "whole.jsonl")
    live(mode, whole)
    assert whole.lines > 2 * ROUNDS
    for number in range(1, whole.lines + 1):
        for before in (True, False):
            yield MortalLog(path / f"{number}-{before}.jsonl", number, before=before), None
    for committed in range(ROUNDS):
        yield MortalLog(path / f"commit-{committed}.jsonl"), committed


@pytest.mark.parametrize("mode", MODES)
def test_after_no_crash_does_a_round_of_a_client_leave_under_one_mask_or_noise_again(
    mode: str, watched: Watched, tmp_path: Path
):
    for number, (log, committed) in enumerate(crash_points(mode, tmp_path)):
        for life in (watched.updates, watched.sets, watched.means, watched.covered):
            life.clear()
        state, _ = live(mode, log, dies_after=committed)
        without = (number % CLIENTS, 1 + number % (ROUNDS - 1))
        _, ledger = live(mode, MortalLog(log.path), state, without=without)
        assert watched.leaks == [], (log.path.name, without)
        if mode != "masked":
            counted = ledger.releases_by_client(counts=SET if mode == "distributed" else ACCOUNT)
            for client_id in range(CLIENTS):
                assert counted[client_id] >= watched.releases_of(client_id)
                unknown = ROUNDS if mode == "local" else 1  # asked for, or written down, and then the process died
                assert counted[client_id] <= watched.releases_of(client_id) + unknown


@pytest.mark.parametrize("mode", MODES)
def test_without_a_ledger_and_with_noise_of_the_round_alone_they_do(mode: str, watched: Watched):
    found = []
    for committed in range(1, ROUNDS):
        for life in (watched.updates, watched.sets, watched.means, watched.covered):
            life.clear()
        old = {"noise_of": lambda t, _: derive(KEY, t)}
        live(mode, NoLog(), dies_after=committed, **old)
        live(mode, NoLog(), without=(0, 0), **old)
        found += watched.leaks
    assert found


@pytest.mark.parametrize("mode", MODES)
def test_a_crash_without_a_change_after_it_ends_bitwise_as_none(mode: str, watched: Watched, tmp_path: Path):
    whole, _ = live(mode, MortalLog(tmp_path / "whole.jsonl"))
    once = {place: set(each) for place, each in watched.updates.items()}
    state, _ = live(mode, MortalLog(tmp_path / "log.jsonl"), dies_after=1)
    again, ledger = live(mode, MortalLog(tmp_path / "log.jsonl"), state)
    assert once == watched.updates
    assert whole is not None and again is not None
    assert torch.equal(whole.server.params[0], again.server.params[0])
    if mode != "masked":
        counts = SET if mode == "distributed" else ACCOUNT
        assert ledger.releases_by_client(counts=counts) == dict.fromkeys(range(CLIENTS), ROUNDS)
