"""A site that has lost its ledger sends no round again: the server says what it has, and the site refuses."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

import remote_runs
from doors import Door
from dotted import nested
from engines import QUIET, server_plan
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.parablock import ServerState
from parablock.algorithm.robust import Rule
from parablock.clock import RealClock
from parablock.config.load import parse_config
from parablock.deploy import site_training
from parablock.deploy.guarded_trainer import SitePolicy, epsilon_of
from parablock.deploy.policy import OPEN_POLICY, Policy
from parablock.deploy.site import SiteConfig, load_site, shared_config
from parablock.deploy.site_check import check_site
from parablock.engine.plans import Hooks
from parablock.engine.remote import remote_engine
from parablock.engine.remote.frames import HEAD, PART, Hello, Opening
from parablock.engine.remote.numbered_stream import NumberedStream
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.update_form import Differences, FixedPointWords
from parablock.errors import ConfigError, DataError, LedgerError, PolicyError
from parablock.privacy.keystream import Keystream, derive
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.storage.audit_log import AuditLog, verify
from parablock.storage.checkpoint import load_newest, save_checkpoint
from parablock.storage.release_ledger import ACCOUNT, ASKED, RELEASE, REVEAL, SET, SHARES, ReleaseLedger
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from parablock.wire.messages import Leave, Update, to_bytes
from parablock.wire.quantize import Encoding

RUN = {
    "model.name_or_path": "of the server",
    "data.train": [],
    "data.test": ["of the server"],
    "federation.num_clients": 3,
    "federation.num_rounds": 16,
    "engine.name": "remote",
    "wire.streaming": False,
    "privacy.clip_norm": 1.0,
    "privacy.noise_multiplier": 4.0,
    "privacy.mode": "distributed",
    "privacy.secure_aggregation": "masked",
}


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.listener.close()


def site(folder: Path, **more: Any) -> SiteConfig:
    """Client 1, whose rows are not there: an error of theirs shows that it went on to read them."""
    tree = {
        "client_id": 1,
        "state_dir": "state",
        "model": {"name_or_path": "/secret/model"},
        "data": {"train": ["/secret/rows.jsonl"]},
        "policy": OPEN_POLICY,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump({**tree, **more}))
    return load_site(folder / "site.yaml")


def on_record(*lines: tuple[str, int, tuple[int, ...]]) -> ReleaseLedger:
    """What a server has of rounds and clients."""
    ledger = ReleaseLedger()
    for kind, round_index, clients in lines:
        ledger.record(kind, round_index, clients=clients)
    return ledger


SUMS = on_record((SET, 0, (0, 1, 2)), (SET, 3, (0, 1)), (SET, 5, (0, 2)))


def shared() -> str:
    return shared_config(parse_config(nested(RUN)))


def test_a_site_that_has_lost_what_it_released_refuses_in_words_and_tells_a_code(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
):
    one = site(tmp_path)
    error, leave = door.take_part(one, shared(), "ab", releases=SUMS)
    assert isinstance(error, LedgerError)
    assert "ends with nothing in run run, and the server has its update of round 4" in error.what
    assert 'lost_ledgers: {"run": 3}' in error.remedy
    assert leave.problem == "LEDGER its own ledger lacks updates that it has released"
    assert [entry.kind for entry in verify(one.audit_log).entries] == ["join", "leave"]
    for case, releases in {
        "a server that has nothing of this site": on_record((SET, 5, (0, 2))),
        "a run without noise and masks, which has no record": None,
    }.items():
        assert isinstance(door.take_part(one, shared(), "ab", releases=releases)[0], DataError), case
    # the hole that was
    monkeypatch.setattr(site_training, "check_ledger", lambda *_: None)
    assert isinstance(door.take_part(one, shared(), "ab", releases=SUMS)[0], DataError)


FORM = FixedPointWords(FixedPointGrid(2.0, 3), Rule(clip_norm=2.0))


@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "local noise"])
@pytest.mark.parametrize(
    ("fewest", "gives_up"),
    [(2, True), (3, True), (2, False)],
    ids=["two are enough", "all are needed, so it waits", "it waits, the hole that was"],
)
def test_a_session_begins_without_a_site_that_has_lost_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_masked: bool, fewest: int, gives_up: bool
):
    """Client 1 refuses at the start; the server names it, says what its operator does, and goes on with enough."""
    waits = fewest == 3 or not gives_up
    if not gives_up:
        monkeypatch.setattr(RemoteTransport, "given_up", {})
    monkeypatch.setattr(remote_engine, "REMIND_S", 0.1)
    plan = server_plan(3, 6, 1, FORM if is_masked else Differences(Encoding("float32")), min_updates=fewest)
    masking = SecureAggregation(3, 6, 1.0, 0, 600.0) if is_masked else None  # nobody waits so long for its keys
    town = remote_runs.Town(
        tmp_path, plan, [3, 1, 2], masking=masking, protection_of=lambda _: Protection(2.0), keeps_releases=True
    )
    town.releases[-1].record(SET if is_masked else ACCOUNT, 0, clients=(0, 1, 2))
    for client_id in (0, 2):
        town.releases[client_id].record(RELEASE, 0, sha256="of a session before")
    counted, said = list[list[int]](), list[str]()
    hooks = Hooks(
        lambda state, updates, _: counted.append([update.client_id for update in updates]),
        lambda _: None,
        asked_to_stop=lambda: (
            waits
            and all(any(word in line for line in said) for word in ("waiting for clients 1", "lost its ledger"))
        ),
        on_event=said.append,
    )

    def come_when_it_has_refused() -> None:
        while not town.refused:
            time.sleep(0.01)
        for client_id in (0, 2):
            town.start(client_id)

    town.start(1)
    others = threading.Thread(target=come_when_it_has_refused)
    others.start()
    finished = town.serve(hooks).finished
    others.join()
    town.end()
    assert [line for line in said if "client 1 has lost its ledger" in line and "`lost_ledgers`" in line]
    without = "the run begins without client 1: it has lost its ledger" in said
    assert [finished, without] == [not waits] * 2
    # of the first round another update has been released
    assert counted == ([] if waits else [[], *[[0, 2]] * 5])


def test_a_site_that_refuses_as_soon_as_it_is_let_in_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    attach = NumberedStream.attach

    def slowly(stream: NumberedStream, other_wants: int) -> int:
        time.sleep(0.3)
        return attach(stream, other_wants)

    monkeypatch.setattr(NumberedStream, "attach", slowly)
    said = list[str]()
    town = remote_runs.Town(tmp_path, server_plan(2, 3, 1, FORM), [3, 1], keeps_releases=True)
    town.releases[-1].record(ACCOUNT, 0, clients=(0, 1))
    town.start(1)
    hears = RealClock()
    hooks = replace(
        QUIET,
        on_event=said.append,
        asked_to_stop=lambda: hears.now() > 20 or any("lost its ledger" in line for line in said),
    )
    assert not town.serve(hooks).finished
    town.end()
    assert any("client 1 has lost its ledger" in line for line in said)


def test_a_session_begins_without_a_site_that_was_removed(tmp_path: Path):
    said, masking = list[str](), SecureAggregation(3, 3, 1.0, 0, 600.0)
    town = remote_runs.Town(
        tmp_path,
        server_plan(3, 3, 1, FORM, min_updates=2),
        [3, 1, 2],
        masking=masking,
        protection_of=lambda _: Protection(2.0),
    )
    for client_id in (0, 2):
        town.start(client_id)
    hooks = replace(QUIET, on_event=said.append)
    assert town.serve(hooks, on_open=lambda transport: transport.remove(1)).finished
    town.end()
    assert "the run begins without client 1: the server's operator has removed it" in said


def test_a_check_finds_a_lost_ledger_before_the_site_is_started(tmp_path: Path, door: Door):
    for releases, said in ((SUMS, True), (None, False)):
        opening = Opening("run", "checked", shared(), "ab")
        door.listener.open(RemoteTransport(opening, 8, 64, 1 << 20, Trace(RealClock()), releases=releases))
        site(tmp_path)
        found = check_site(tmp_path / "site.yaml", f"127.0.0.1:{door.listener.port}", None)
        assert (
            any("the ledger of this site ends with nothing" in one.found for one in found if not one.is_good)
            is said
        )


def test_a_ledger_that_is_whole_lets_a_site_go_on_and_an_older_copy_does_not(tmp_path: Path, door: Door):
    one = site(tmp_path)
    ledger = ReleaseLedger(AuditLog(one.audit_log), "run")
    ReleaseLedger(AuditLog(one.audit_log), "another run").record(RELEASE, 9, sha256="of another run")
    ledger.record(RELEASE, 0, sha256="a")
    error, _ = door.take_part(one, shared(), "ab", releases=SUMS)
    assert isinstance(error, LedgerError) and "ends with round 1" in error.what
    ledger.record(RELEASE, 3, sha256="b")
    assert isinstance(door.take_part(one, shared(), "ab", releases=SUMS)[0], DataError)
    ledger.record(RELEASE, 7, sha256="c")  # on its way when the server died
    assert isinstance(door.take_part(one, shared(), "ab", releases=SUMS)[0], DataError)


def test_a_ledger_that_differs_in_the_middle_is_refused_by_round_and_by_what_stands_there(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
):
    of_mode = {"privacy.mode": "local", "privacy.secure_aggregation": "none"}
    told, record = shared_config(parse_config(nested({**RUN, **of_mode}))), ReleaseLedger()
    for t in range(40):
        record.record(ACCOUNT, t, clients=(1,), sha256=f"update {t}", whole=True)

    def refusal(name: str, **others: str | None) -> Exception:
        one = site(tmp_path, state_dir=name)
        ledger = ReleaseLedger(AuditLog(one.audit_log), "run")
        for t in range(40):
            if (hash_ := others.get(f"of_{t}", f"update {t}")) is not None:
                ledger.record(RELEASE, t, sha256=hash_)
        return door.take_part(one, told, "ab", releases=record)[0]

    assert isinstance(refusal("same"), DataError)
    error = refusal("one is not there", of_17=None)
    assert isinstance(error, LedgerError) and "lacks round 18 in run run" in error.what
    error = refusal("two are not there", of_17=None, of_3=None)
    assert isinstance(error, LedgerError) and "lacks round 4 and 1 others in run run" in error.what
    error = refusal("one is another", of_35="another")
    assert isinstance(error, LedgerError) and "differ in rounds 33 to 64 of run run" in error.what
    assert 'lost_ledgers: {"run": 39}' in error.remedy
    # the hole that was: the last round alone
    last = lambda ledger, history: ([t for t in (history.last,) if t > ledger.last_release], [])  # noqa: E731
    monkeypatch.setattr(ReleaseLedger, "compare", last)
    assert isinstance(refusal("unseen", of_17=None, of_35="another"), DataError)


@pytest.mark.parametrize("is_masked", [True, False], ids=["masked", "local noise"])
def test_no_server_learns_from_a_ledger_whether_it_has_guessed_a_masked_update(
    tmp_path: Path, door: Door, is_masked: bool
):
    """It says that it knows the update of a round, whose sum it has asked for or not; only one guess is right.

    It may also say that the run is another, without masks.
    """
    without = {"privacy.mode": "local", "privacy.secure_aggregation": "none"}
    one, plain = site(tmp_path), shared_config(parse_config(nested({**RUN, **without})))
    ledger = ReleaseLedger(AuditLog(one.audit_log), "run", is_masked=is_masked)
    for t in (1, 2):
        ledger.record(RELEASE, t, sha256=f"update {t}")
    if is_masked:
        ledger.record(REVEAL, 2, clients=(0, 1))

    def answer(told: str, t: int, guess: str) -> tuple[type[Exception], str, str]:
        record = on_record((ACCOUNT, t, (1,)))
        record._histories[1].add_line(t, {"sha256": guess, **({"masked": True} if is_masked else {})})
        error, leave = door.take_part(one, told, "ab", releases=record)
        return type(error), str(error), leave.problem

    for told, t in product((shared(), plain) if is_masked else (plain,), (1, 2)):
        right, wrong = answer(told, t, f"update {t}"), answer(told, t, "another")
        assert [right[0], wrong[0]] == [LedgerError if is_masked else DataError, LedgerError]
        assert (right == wrong) is is_masked
    if is_masked:  # what an honest server knows
        honest = on_record((SET, 2, (0, 1)))
        honest.record(SHARES, 2, clients=(0, 1), of=(0, 1))
        assert isinstance(door.take_part(one, shared(), "ab", releases=honest)[0], DataError)


@pytest.mark.parametrize("mode", ["local", "central"])
def test_a_record_of_updates_or_means_is_one_too_and_what_was_asked_for_is_given_up(
    tmp_path: Path, door: Door, mode: str
):
    of_mode = {"privacy.mode": mode, "privacy.secure_aggregation": "none"}
    told = shared_config(parse_config(nested({**RUN, **of_mode})))
    record = on_record((ASKED, 5, (0, 1)), (ACCOUNT, 4, (1,)))
    error, _ = door.take_part(site(tmp_path), told, "ab", releases=record)
    assert isinstance(error, LedgerError)
    assert "update of round 5" in error.what and 'lost_ledgers: {"run": 5}' in error.remedy
    only_asked = on_record((ASKED, 5, (0, 1)))  # it need not have answered
    assert isinstance(door.take_part(site(tmp_path), told, "ab", releases=only_asked)[0], DataError)


def test_a_site_that_says_what_is_lost_goes_on_until_it_loses_more(tmp_path: Path, door: Door):
    for lost, refused in (({"run": 2}, True), ({"other": 9}, True), ({"run": 3}, False), ({}, False)):
        error, _ = door.take_part(site(tmp_path, lost_ledgers=lost), shared(), "ab", releases=SUMS)
        assert isinstance(error, LedgerError if refused else DataError), lost
    said = [entry for entry in verify(tmp_path / "state" / "audit.jsonl").entries if entry.kind == "lost"]
    assert [(entry.facts["run"], entry.facts["through"]) for entry in said] == [("run", 3)], (
        "it stands in its log, once"
    )
    log = AuditLog(tmp_path / "state" / "audit.jsonl")
    ledger, other = (ReleaseLedger(log, run) for run in ("run", "other"))
    assert [ledger.may_release(t, "anew") for t in (3, 4)] == [False, True], "also when the line has been taken out"
    assert other.may_release(3, "anew")
    for wrong in ({"run": -1}, {"run": "all"}, ["run"]):
        with pytest.raises(ConfigError, match="lost_ledgers"):
            site(tmp_path, lost_ledgers=wrong)


def test_of_rounds_that_are_lost_nothing_is_released_that_is_not_on_record():
    ledger, whole = (ReleaseLedger(lost_through=through) for through in (3, -1))
    for each in (ledger, whole):
        each.record(RELEASE, 2, sha256="kept")
    assert [ledger.may_release(t, "kept") for t in range(6)] == [False, False, True, False, True, True]
    assert [ledger.fix(REVEAL, t, (0, 1)) for t in (3, 4)] == [(), (0, 1)]
    # the hole that was: a fresh ledger lets any update and any sum of these rounds leave
    assert all(whole.may_release(t, "kept") for t in range(6)) and whole.fix(REVEAL, 3, (0, 1)) == (0, 1)


def test_rounds_that_are_lost_count_for_the_sites_own_epsilon(tmp_path: Path):
    """Of ten rounds, those up to round 5 count as trained; beside four of another run that makes fourteen."""
    config = parse_config(nested({**RUN, "federation.num_rounds": 10}))
    ten, fourteen = (epsilon_of(Counter({4.0: count}), 1e-5) for count in (10, 14))

    def check(bound: float, lost_through: int, trained: int) -> None:
        log = AuditLog(tmp_path / f"{bound}-{lost_through}-{trained}.jsonl")
        for t in range(trained):
            log.append("round", run="another", round=t, noise_multiplier=4.0)
        policy = Policy.model_validate({**OPEN_POLICY, "max_epsilon": bound})
        guard = SitePolicy(policy, log, "run", config, lost_through=lost_through)
        guard.check_run("ab")
        for t in range(6, 10):
            guard.begin_round(t, 0, 8, 100)

    def check_next(bound: float, *, is_recorded: bool) -> None:
        """Ten rounds of a run, of which all are lost, and a run of ten rounds after it."""
        log = AuditLog(tmp_path / f"{bound}-{is_recorded}.jsonl")
        policy = Policy.model_validate({**OPEN_POLICY, "max_epsilon": bound})
        guard = SitePolicy(policy, log, "lost", config, lost_through=10**18)
        for _ in range(2 * is_recorded):
            guard.record_lost()
        SitePolicy(policy, log, "next", config).check_run("ab")

    twenty = epsilon_of(Counter({4.0: 20}), 1e-5)
    check_next(1.001 * twenty, is_recorded=True)
    check_next(0.999 * twenty, is_recorded=False)  # the hole that was
    with pytest.raises(PolicyError, match="max_epsilon"):
        check_next(0.999 * twenty, is_recorded=True)
    check(1.001 * ten, 5, 0)
    check(1.001 * ten, 10**18, 0)  # whatever a server says, a run has no more rounds than it has
    check(1.001 * fourteen, 5, 4)
    with pytest.raises(PolicyError, match="max_epsilon"):
        check(0.999 * fourteen, 5, 4)


@pytest.mark.parametrize("named", [(100.0, 0.8), (0.8, 100.0)], ids=["more noise first", "less noise first"])
def test_rounds_that_are_lost_count_with_the_least_noise_that_was_named(tmp_path: Path, named: tuple[float, ...]):
    """Two sessions of a run whose ten rounds are lost, and a run of ten rounds under the usual noise after it."""
    log = AuditLog(tmp_path / "audit.jsonl")
    spent = epsilon_of(Counter({0.8: 10, 4.0: 10}), 1e-5)

    def guard(bound: float, run: str, multiplier: float, lost_through: int = -1) -> SitePolicy:
        config = parse_config(nested({**RUN, "federation.num_rounds": 10, "privacy.noise_multiplier": multiplier}))
        policy = Policy.model_validate({**OPEN_POLICY, "max_epsilon": bound})
        return SitePolicy(policy, log, run, config, lost_through=lost_through)

    for multiplier in named:
        guard(1.0, "lost", multiplier, 9).record_lost()
    guard(1.001 * spent, "next", 4.0).check_run("ab")
    with pytest.raises(PolicyError, match="max_epsilon"):
        guard(0.999 * spent, "next", 4.0).check_run("ab")
    ten = epsilon_of(Counter({0.8: 10}), 1e-5)
    guard(1.001 * ten, "lost", 100.0, 9).check_run("ab")
    with pytest.raises(PolicyError, match="max_epsilon"):
        guard(0.999 * ten, "lost", 100.0, 9).check_run("ab")


@pytest.mark.parametrize("problem", [LedgerError.told, "its operator stops it"])
def test_nobody_waits_for_a_site_that_is_cut_once_it_has_told_of_its_lost_ledger(problem: str):
    """Its bye never comes. A site that leaves for another reason is waited for, and so is its next process."""
    transport = RemoteTransport(Opening("run", "s", "", ""), 3, 9, 1 << 20, Trace(RealClock()))
    _, stream = transport.welcome(Hello(1, "s", "first", 0, 0.0))
    connection, leave = stream.attach(0), to_bytes(Leave(problem))
    assert stream.take(
        HEAD.pack(PART, 0, 0, len(leave), 0.0) + leave, connection, partial(transport.deliver, 1, stream)
    )
    assert transport.given_up == {}, "its bye may come"
    stream.detach(connection)
    assert [*transport.given_up] == ([1] if problem == LedgerError.told else [])
    transport.welcome(Hello(1, "s", "second", 0, 0.0))
    assert transport.given_up == {}


def noise_of(key: bytes, client_id: int) -> Protection:
    return Protection(1.0, 0.5, lambda t, content: Keystream(derive(key, client_id, t, content)).normals)


@pytest.mark.parametrize("checks", [True, False], ids=["asked", "unasked, the hole that was"])
def test_a_run_that_goes_back_goes_on_without_a_site_that_has_lost_its_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: bool
):
    """The server dies in round 7, and goes back to round 4; client 1 comes back with nothing, its key included."""
    newest, keys, dead, said = SiteStore.newest, dict.fromkeys(range(3), bytes(32)), list[bool](), list[str]()
    counted = dict[int, list[int]]()
    monkeypatch.setattr(
        SiteStore,
        "newest",
        lambda store, sessions: (None, []) if dead and store.folder.name == "1" else newest(store, sessions),
    )
    if not checks:
        monkeypatch.setattr(remote_runs, "check_ledger", lambda *_: None)
    form = Differences(Encoding("float32"))
    plan = replace(server_plan(3, 10, 1, form, checkpoint_every=4), account="updates")
    town = remote_runs.Town(
        tmp_path, plan, [3, 1, 2], protection_of=lambda i: noise_of(keys[i], i), keeps_releases=True
    )

    def on_commit(state: ServerState, updates: Sequence[Update], _: object) -> None:
        counted[state.committed] = [update.client_id for update in updates]
        if state.committed == 5 and not dead:
            dead.append(True)
            raise remote_runs.Died

    hooks = replace(QUIET, on_commit=on_commit, on_event=said.append)
    hooks = replace(hooks, on_checkpoint=lambda state: save_checkpoint(tmp_path / "checkpoints", state, keep=2))
    for client_id in range(3):
        town.start(client_id)
    with suppress(remote_runs.Died):
        town.serve(hooks)
    before, town.releases[1], keys[1] = town.releases[1], ReleaseLedger(), bytes(range(32))
    state, _ = load_newest(tmp_path / "checkpoints")
    assert town.serve(hooks, state, sites=2 if checks else 3).finished
    town.end()
    twice = [t for t in range(10) if before.recorded(RELEASE, t) and town.releases[1].recorded(RELEASE, t)]
    assert counted[9] == ([0, 2] if checks else [0, 1, 2])
    if checks:
        (refused,) = town.refused
        assert re.search(r"ends with nothing in .*the server has its update of round [567]$", refused.what)
        assert "client 1 leaves: LEDGER its own ledger lacks updates that it has released" in said
        assert twice == []
    else:
        assert {4, 5} <= set(twice) and town.refused == []
        assert before.recorded(RELEASE, 5) != town.releases[1].recorded(RELEASE, 5), "another update, other noise"


def test_masked_sites_go_on_through_restarts_whoever_was_the_first_to_give_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The server dies in round 5 twice, and takes rounds from 4 on again; other sites give their shares first."""
    first, deaths, wait = ((0, 1), (0, 2), (1, 2)), list[bool](), MaskedServer._wait_for
    monkeypatch.setattr(
        MaskedServer, "_wait_for", lambda server, clients, came, _=None: wait(server, clients, came)
    )
    record = ReleaseLedger.record

    def record_first(ledger: ReleaseLedger, kind: str, t: int, **facts: Any) -> None:
        record(ledger, kind, t, **(facts | {"clients": first[len(deaths)]} if kind == SHARES else facts))

    monkeypatch.setattr(ReleaseLedger, "record", record_first)
    masking = SecureAggregation(3, 8, 1.0, 0, 20.0)
    plan = server_plan(3, 8, 1, FORM, checkpoint_every=4)
    town = remote_runs.Town(tmp_path, plan, [3, 1, 2], masking=masking, protection_of=lambda _: Protection(2.0))

    def on_commit(state: ServerState, *_: object) -> None:
        if state.committed == 5 and len(deaths) < 2:
            deaths.append(True)
            raise remote_runs.Died

    hooks = replace(QUIET, on_commit=on_commit)
    hooks = replace(hooks, on_checkpoint=lambda state: save_checkpoint(tmp_path / "checkpoints", state, keep=2))
    for client_id in range(3):
        town.start(client_id)
    for is_last in (False, False, True):
        state = load_newest(tmp_path / "checkpoints")[0] if deaths else None
        with nullcontext() if is_last else suppress(remote_runs.Died):
            assert town.serve(hooks, state).finished
    town.end()
    assert town.refused == [] and len(deaths) == 2
    assert len(town.releases[-1].recorded(SHARES, 5)) > 1, "several lines of one round, as intended"
