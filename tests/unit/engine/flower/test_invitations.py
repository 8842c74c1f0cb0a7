"""Who is invited, who may come in, and a whole run over the loopback with a grid that loses ClientApps."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from engines import QUIET, engine_input, run_here, server_plan
from parablock.algorithm.parablock import same
from parablock.clock import RealClock
from parablock.engine.flower import invitations as module
from parablock.engine.flower.invitations import AGAIN_S, Invitations, run_in_federation
from parablock.engine.flower.joining import ANSWER, FAILED, INVITATION, OVER, SIMULATED, Invitation, client_app
from parablock.engine.flower.run_certificate import make_run_certificate
from parablock.engine.plans import ClientPlan
from parablock.engine.remote.listener import Caller, Listener, NotAdmitted
from parablock.engine.remote.remote_engine import RunFacts
from parablock.engine.remote.site_channel import Refused, SessionOver, SiteCaller, SiteChannel
from parablock.engine.remote.site_client import run_client
from parablock.engine.update_form import Differences
from parablock.errors import InputError
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from parablock.wire.quantize import Encoding
from toy import ToyTrainer, initial


@pytest.fixture(autouse=True)
def _in_a_process_of_flower(monkeypatch: pytest.MonkeyPatch):
    """Messages can be made only where Flower has started the process and said which task it is."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)


class PaperGrid(Grid):
    """A grid that only writes down what is pushed, and gives back the replies that a test puts there."""

    def __init__(self, *nodes: int) -> None:
        self.nodes, self.pushed, self.replies = set(nodes), list[Message](), dict[str, Message]()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(f"message-{len(self.pushed)}")
            self.pushed.append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def answer(self, number: int, content: RecordDict | Error) -> None:
        reply = Message(content, reply_to=self.pushed[number])
        reply.metadata.__dict__["_reply_to_message_id"] = f"message-{number}"
        self.replies[f"message-{number}"] = reply

    set_run = create_message = send_and_receive = run = None


class Door:
    """Invitations to the nodes of a grid, and what is told."""

    def __init__(self, *nodes: int, client_of: dict[int, int] | None = None) -> None:
        self.grid, self.told, self.there = PaperGrid(*nodes), list[str](), set[int]()
        self.invitations = Invitations(self.grid, "PEM", client_of or {}, self.told.append)
        self.invitations.is_there = self.there.__contains__

    def look(self) -> list[int]:
        """Return the nodes that get an invitation now."""
        before = len(self.grid.pushed)
        self.invitations.look()
        return [message.metadata.dst_node_id for message in self.grid.pushed[before:]]

    def token(self, number: int) -> str:
        return str(self.grid.pushed[number].content[INVITATION]["token"])

    def knock(self, client_id: object, token: str) -> int:
        return self.invitations.admit(Caller("here", "", b"", f"{client_id}:{token}"))

    def refused(self, client_id: object, token: str) -> NotAdmitted:
        with pytest.raises(NotAdmitted) as refusal:
            self.knock(client_id, token)
        return refusal.value


def left(why: str) -> RecordDict:
    return RecordDict({ANSWER: ConfigRecord({"why": why})})


def test_each_node_gets_one_invitation_with_a_token_of_its_own_and_a_time_to_live():
    door = Door(7, 5)
    assert door.look() == [5, 7]
    assert door.look() == []
    door.grid.nodes.add(9)
    assert door.look() == [9]
    told = [message.content[INVITATION] for message in door.grid.pushed]
    assert len({record["token"] for record in told}) == 3
    assert {len(bytes.fromhex(str(record["token"]))) for record in told} == {32}
    assert {(record["certificate"], record["epoch"]) for record in told} == {("PEM", 1)}
    assert {message.metadata.message_type for message in door.grid.pushed} == {"train.join"}
    assert min(message.metadata.ttl for message in door.grid.pushed) > 300 * 86400


def test_a_token_lets_in_and_nothing_else_does():
    door = Door(5, 7)
    door.look()
    assert door.knock(0, door.token(0)) == 0
    assert door.knock(0, door.token(0)) == 0
    wrong = secrets.token_hex(32)
    for who, token in ((0, wrong), (0, ""), (0, door.token(0)[:-1]), ("", door.token(0)), ("-1", door.token(0))):
        assert not door.refused(who, token).is_temporary
    assert "client 0 is node 5" in door.told
    assert not any(door.token(n) in line for line in door.told for n in (0, 1))


def test_a_used_invitation_ends_the_earlier_ones_and_an_unused_one_ends_none():
    door = Door(5)
    door.look()
    door.knock(0, door.token(0))
    door.grid.answer(0, Error(8, "gone"))
    assert door.look() == [5]
    assert door.knock(0, door.token(0)) == 0, "the trainer may live although Flower has lost it"
    assert door.knock(0, door.token(1)) == 0
    assert not door.refused(0, door.token(0)).is_temporary
    assert door.knock(0, door.token(1)) == 0


def test_the_first_node_is_the_client_as_long_as_it_is_there():
    door = Door(5, 7)
    door.look()
    door.knock(0, door.token(0))
    door.there.add(0)
    assert door.refused(0, door.token(1)).is_temporary
    assert door.knock(1, door.token(1)) == 1
    door.there.clear()
    assert door.knock(0, door.token(1)) == 0
    assert door.told[-1] == "client 0 is node 7"


def test_a_client_that_is_bound_to_a_node_comes_from_no_other():
    door = Door(5, 7, client_of={5: 0})
    door.look()
    assert door.knock(0, door.token(0)) == 0
    for client_id, number in ((0, 1), (1, 0), (1, 1)):
        assert not door.refused(client_id, door.token(number)).is_temporary


def test_a_site_whose_stream_is_gone_is_invited_again_once_its_node_is_free_and_online():
    door = Door(5)
    door.look()
    door.knock(0, door.token(0))
    door.there.add(0)
    door.grid.answer(0, Error(5, "no sign of it"))
    assert door.look() == [], "the stream is the truth"
    door.there.clear()
    door.grid.nodes.clear()
    assert door.look() == []
    door.grid.nodes.add(5)
    assert door.look() == [5]
    assert door.grid.pushed[1].content[INVITATION]["epoch"] == 2


def test_a_site_that_cannot_take_part_is_left_alone_for_a_while():
    door = Door(5)
    door.look()
    door.grid.answer(0, left(FAILED))
    assert door.look() == []
    assert "the site at node 5 has ended its part: failed" in door.told
    door.invitations.nodes[5].not_before_s -= AGAIN_S
    assert door.look() == [5]
    for answer in (left(OVER), left("x" * 1000), RecordDict({"unread": ConfigRecord({"why": "x"})})):
        door.grid.answer(len(door.grid.pushed) - 1, answer)
        assert door.look() == []
        door.invitations.nodes[5].not_before_s -= AGAIN_S
        assert door.look() == [5]
    assert max(map(len, door.told)) < 100


def test_an_invitation_that_nobody_follows_is_repeated_only_after_long():
    door = Door(5)
    door.look()
    door.knock(0, door.token(0))
    assert door.look() == []
    door.invitations.nodes[5].invited_s -= module.SILENT_S + 1
    assert door.look() == [5]


def test_a_flower_that_does_not_answer_is_told_of_once_and_asked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    door, calls = Door(5), list[int]()

    def away() -> Iterable[int]:
        calls.append(1)
        if len(calls) < 5:
            raise ConnectionError("away")
        return [5]

    door.grid.get_node_ids = away
    door.invitations.begin(1234, door.there.__contains__)
    while not door.grid.pushed:
        pass
    door.invitations.part()
    assert door.grid.pushed[0].content[INVITATION]["port"] == 1234
    assert sum("Flower does not answer" in line for line in door.told) == 1


# ── a whole run ─────────────────────────────────────────────────────────────────────────────────────

EXAMPLES = [3, 1, 2]
BLOCKS, ROUNDS = 4, 9
PLAN = server_plan(len(EXAMPLES), ROUNDS, 1, Differences(Encoding("float32", chunk_bytes=8)))


class Killed(BaseException):
    """A ClientApp is gone from one moment to the next."""


class Mortal(ToyTrainer):
    """Dies in some of its rounds, once in each."""

    dies: set[tuple[int, int]]

    def train(self, round_index, *asked):
        result = super().train(round_index, *asked)
        if (self.client_id, round_index) in self.dies:
            self.dies.remove((self.client_id, round_index))
            raise Killed
        return result


class Federation(PaperGrid):
    """Nodes that run a ClientApp in a thread for each message; one that dies is Flower's error of code 8."""

    def __init__(self, folder: Path, make_trainer: Callable[[int, int, None], ToyTrainer]) -> None:
        super().__init__(*(100 + i for i in range(len(EXAMPLES))))
        self.folder, self.make_trainer, self.app = folder, make_trainer, client_app(self.join)
        self.threads, self.errors = list[threading.Thread](), list[BaseException]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        first, ids = len(self.pushed), super().push_messages(messages)
        for number, message in enumerate(messages, first):
            self.threads.append(threading.Thread(target=self.run_app, args=(number, message), daemon=True))
            self.threads[-1].start()
        return ids

    def run_app(self, number: int, message: Message) -> None:
        context = Context(
            1, message.metadata.dst_node_id, {"client": message.metadata.dst_node_id - 100}, RecordDict(), {}
        )
        try:
            self.answer(number, self.app(message, context).content)
        except Killed:
            self.answer(number, Error(8, "ClientApp stopped responding"))
        except BaseException as error:
            self.errors.append(error)

    def join(self, invitation: Invitation, context: Context) -> str:
        client_id = int(str(context.node_config["client"]))
        caller = SiteCaller(client_id, invitation.server(client_id, "127.0.0.1"), lambda _: None)
        welcome, trace = caller.ask(), Trace(RealClock())
        channel = SiteChannel(caller, welcome.opening, secrets.token_hex(8), trace, lease_s=20.0)
        rejoins = channel.open()
        try:
            with suppress(SessionOver), channel:
                run_client(
                    client_id,
                    ClientPlan("aligned", PLAN.form, PLAN.delay + 1),
                    self.make_trainer(client_id, EXAMPLES[client_id], None),
                    channel,
                    trace,
                    store=SiteStore(self.folder / str(client_id)),
                    take_params=lambda: initial(BLOCKS),
                    marks_kept=3,
                    rejoins=rejoins,
                )
        except Killed:
            channel.stream.close()
            raise
        channel.close()
        return OVER


def federated(grid: Grid, told: list[str]):
    hooks = type(QUIET)(lambda *_: None, lambda _: None, on_event=told.append)
    given = engine_input(initial(BLOCKS), [], PLAN, Trace(RealClock()), hooks)
    return run_in_federation(given, grid, RunFacts("run", "", ""), port=0, client_of={})


def test_a_federation_whose_clientapps_die_gives_what_one_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOOK_S", 0.01)

    monkeypatch.setattr(Mortal, "dies", {(0, 2), (1, 2), (0, 5)}, raising=False)
    told, federation = list[str](), Federation(tmp_path, Mortal)
    result = federated(federation, told)
    for thread in federation.threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not federation.errors
    assert result.finished and not Mortal.dies
    assert len(federation.pushed) == len(EXAMPLES) + 3
    trainers = [ToyTrainer(i, count, None) for i, count in enumerate(EXAMPLES)]
    here = run_here(initial(BLOCKS), trainers, PLAN, Trace(RealClock()), QUIET)
    assert same(result.server.params, here.server.params)
    assert not same(result.server.params, initial(BLOCKS))


def test_a_simulation_is_told_at_once_what_to_use_instead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    grid = PaperGrid(1, 2, 3)
    push = grid.push_messages

    def answered(messages: Iterable[Message]) -> Iterable[str]:
        ids = push(messages)
        grid.answer(len(grid.pushed) - 1, left(SIMULATED))
        return ids

    grid.push_messages = answered
    with pytest.raises(InputError, match="Flower's simulation") as refusal:
        federated(grid, [])
    assert "virtual" in refusal.value.remedy


def test_an_impostor_with_a_certificate_of_the_same_name_is_not_the_server():
    credentials, mine = make_run_certificate()
    _, other = make_run_certificate()
    listener = Listener("127.0.0.1:0", credentials, lambda _: None, num_clients=1, tell=lambda _: None)
    try:
        for certificate, problem in ((other, "CERTIFICATE_VERIFY_FAILED"), (mine, "not ready")):
            server = Invitation(listener.port, certificate, "token", 1).server(0, "127.0.0.1")
            with pytest.raises(ConnectionError, match=problem):
                SiteCaller(0, server, lambda _: None).ask()
    finally:
        listener.close()


def test_a_site_with_a_stale_token_is_refused_for_good():
    door, (credentials, certificate) = Door(5), make_run_certificate()
    listener = Listener("127.0.0.1:0", credentials, door.invitations.admit, num_clients=1, tell=door.told.append)
    try:
        server = Invitation(listener.port, certificate, secrets.token_hex(32), 1).server(0, "127.0.0.1")
        with pytest.raises(Refused, match="does not count"):
            SiteCaller(0, server, lambda _: None).ask()
    finally:
        listener.close()


def test_an_invitation_shows_its_secret_to_no_log():
    assert "secret" not in repr(Invitation(1, "PEM", "secret", 1))
    assert Invitation(1, "PEM", "secret", 1).server(3, "::1").address == "[::1]:1"
