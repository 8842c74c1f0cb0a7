"""The server's end of a run inside a Flower federation: who is invited, and who may come in.

    ServerApp                                Flower                          ClientApp, the trainer of a site
      join: port, certificate, token, epoch ────────► waits until the node is free ───► calls the port, takes part
      left: why  ◄──────────────────────────────────────────────────────────────────── has no more to do

A node gets one invitation at a time. Each has a token of its own, and an epoch, which counts up: once a token is
used, those of earlier epochs count no more. Who comes by a token says which client it is, and the first node that
is a client stays that client. The stream is the truth: what Flower says of a node only decides whether another
invitation makes sense.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from parablock.clock import RealClock
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.flower.joining import ANSWER, INVITATION, SIMULATED
from parablock.engine.flower.run_certificate import VALID_DAYS, make_run_certificate
from parablock.engine.pipeline import start_thread
from parablock.engine.remote.grpc_options import settle_environment
from parablock.engine.remote.listener import Caller, Listener, NotAdmitted
from parablock.engine.remote.remote_engine import RunFacts, run_remote
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.errors import InputError

LOOK_S = 1.0
"""How often Flower is asked for nodes and answers."""
AGAIN_S = 60.0
"""How long a node whose site has ended its part is left alone."""
SILENT_S = 180.0
"""How long an invitation that nobody comes by, nor answers, is believed to be on its way."""
PARTING_S = 5.0
"""How long the end of a run waits for the sites' answers."""
TTL_S = VALID_DAYS * 86400.0


@dataclass
class Node:
    """A SuperNode, as the server knows it.

    Attributes:
        epoch: The number of its newest invitation.
        tokens: Epoch → token, of the invitations that still count.
        message_id: The invitation that it has not answered; None: none.
        invited_s: When it got that one.
        client_id: The client that it is; None: nobody has come yet.
        not_before_s: When it may be invited again.
    """

    epoch: int = 0
    tokens: dict[int, str] = field(default_factory=dict)
    message_id: str | None = None
    invited_s: float = 0.0
    client_id: int | None = None
    not_before_s: float = 0.0


class Invitations:
    """Invites the nodes of a federation, and admits those who come.

    Args:
        grid: Flower's way to the nodes; used by one thread.
        certificate: Its certificate, PEM.
        client_of: Node id → client id, as the operator has bound them; empty: the first who comes is the client.
        tell: Gets a line for the log.
    """

    def __init__(
        self, grid: Grid, certificate: str, client_of: Mapping[int, int], tell: Callable[[str], None]
    ) -> None:
        self._grid, self._certificate, self._client_of, self._tell = grid, certificate, client_of, tell
        self._port = 0
        self.nodes: dict[int, Node] = {}
        self.is_there: Callable[[int], bool] = lambda _: False
        self.is_simulated = False
        self._clock, self._is_over, self._told = RealClock(), False, ""

    # ── the door, in the threads of the listener ────────────────────────────────────────────────────

    def admit(self, caller: Caller) -> int:
        """Return the client that a caller is, by its token; see `Listener`."""
        who, _, token = caller.token.partition(":")
        found = None
        for node_id, node in list(self.nodes.items()):  # all of them, so that time says nothing
            for epoch, expected in list(node.tokens.items()):
                if hmac.compare_digest(expected.encode(), token.encode()):
                    found = node_id, node, epoch
        if found is None or not (who.isdecimal() and len(who) < 10):
            raise NotAdmitted("this invitation does not count, or not any more")
        node_id, node, epoch = found
        client_id = int(who)
        self._check_client(node_id, client_id)
        node.tokens = {e: kept for e, kept in list(node.tokens.items()) if e >= epoch}
        if node.client_id != client_id:
            for other in list(self.nodes.values()):
                other.client_id = None if other.client_id == client_id else other.client_id
            node.client_id = client_id
            self._tell(f"client {client_id} is node {node_id}")
        return client_id

    def _check_client(self, node_id: int, client_id: int) -> None:
        if self._client_of:
            if self._client_of.get(node_id) != client_id:
                raise NotAdmitted(f"node {node_id} is not the one that is bound to client {client_id}")
            return
        holder = next((n for n, node in list(self.nodes.items()) if node.client_id == client_id), node_id)
        if holder != node_id and self.is_there(client_id):
            raise NotAdmitted(
                f"client {client_id} is node {holder}, which is connected; node {node_id} cannot be it too",
                is_temporary=True,  # a node that lost its power has another number afterwards
            )

    # ── Flower, in a thread of its own ──────────────────────────────────────────────────────────────

    def _keep_inviting(self) -> None:
        while not self._is_over:
            self._try(self.look)
            self._clock.sleep(LOOK_S)
        self._try(self._await_answers)

    def _try(self, ask: Callable[[], None]) -> None:
        """Ask Flower for something; its errors are told and mean nothing else: the streams live without it."""
        try:
            ask()
            self._told = ""
        except Exception as problem:
            words = f"Flower does not answer, and is asked again: {type(problem).__name__}: {problem!s:.200}"
            if words != self._told:
                self._tell(words)
            self._told = words

    def look(self) -> None:
        """Take answers, and invite the nodes that are online and whose site is missing."""
        self._take_answers()
        now_s = self._clock.now()
        for node_id in sorted(set(self._grid.get_node_ids())):
            node = self.nodes.setdefault(node_id, Node())
            is_missing = node.client_id is None or not self.is_there(node.client_id)
            is_silent = node.client_id is not None and now_s > node.invited_s + SILENT_S
            if is_missing and (node.message_id is None or is_silent) and now_s >= node.not_before_s:
                self._invite(node_id, node, now_s)
            elif not is_missing:
                node.invited_s = now_s  # how long it has been silent counts from the end of its stream

    def begin(self, port: int, is_there: Callable[[int], bool]) -> None:
        """Start inviting sites to a port; `is_there` says whether a client is connected."""
        self._port, self.is_there = port, is_there
        self._thread = start_thread(self._clock, self._keep_inviting, "invitations")

    def stop(self) -> None:
        """Invite nobody any more."""
        self._is_over = True

    def part(self) -> None:
        """Invite nobody any more, and wait a moment for the answers of those who were there."""
        self.stop()
        self._thread.join(2 * PARTING_S)  # a call of Flower may hang

    def _await_answers(self) -> None:
        give_up_s = self._clock.now() + PARTING_S
        while any(node.message_id and node.client_id is not None for node in self.nodes.values()):
            if self._clock.now() > give_up_s:
                return
            self._clock.sleep(LOOK_S / 4)
            self._take_answers()

    def _invite(self, node_id: int, node: Node, now_s: float) -> None:
        token = secrets.token_hex(32)
        record = ConfigRecord(
            {"port": self._port, "certificate": self._certificate, "token": token, "epoch": node.epoch + 1}
        )
        message = Message(RecordDict({INVITATION: record}), node_id, f"train.{INVITATION}", ttl=TTL_S)
        node.tokens[node.epoch + 1] = token  # before it leaves: who is invited may come at once
        ids = list(self._grid.push_messages([message]))
        if not ids or not ids[0]:
            raise ConnectionError(f"node {node_id} could not be invited")
        node.epoch, node.message_id, node.invited_s = node.epoch + 1, ids[0], now_s
        self._tell(f"node {node_id} is invited" + (f" again, invitation {node.epoch}" if node.epoch > 1 else ""))

    def _take_answers(self) -> None:
        waiting = {node.message_id: node_id for node_id, node in self.nodes.items() if node.message_id}
        for reply in self._grid.pull_messages(list(waiting)) if waiting else ():
            node_id = waiting.get(reply.metadata.reply_to_message_id)
            if node_id is None:
                continue
            node = self.nodes[node_id]
            node.message_id = None
            if reply.has_error():
                self._tell(f"node {node_id} has lost its ClientApp, says Flower (code {reply.error.code})")
                continue
            self._take_answer(node_id, node, _word_of(reply))

    def _take_answer(self, node_id: int, node: Node, why: str) -> None:
        self._tell(f"the site at node {node_id} has ended its part: {why}")
        self.is_simulated = self.is_simulated or why == SIMULATED
        node.not_before_s = self._clock.now() + AGAIN_S  # at once it would answer the same


class Watcher(Protocol):
    """Shows a session."""

    def watch(self, transport: RemoteTransport) -> None:
        """Begin to."""


def run_in_federation(
    given: EngineInput,
    grid: Grid,
    facts: RunFacts,
    *,
    port: int,
    client_of: Mapping[int, int],
    board: Callable[[Listener], AbstractContextManager[Watcher]] | None = None,
) -> EngineResult:
    """Run with the sites of a Flower federation, which call at `port`, 0 for any free one; see `run_remote`.

    A `board` shows the listener and the transport while the run lasts.

    Raises:
        InputError: The port is busy, or Flower only simulates its nodes.
        ParaBlockError: The error of the server.
    """
    settle_environment()
    credentials, certificate = make_run_certificate()
    hooks, num_clients = given.hooks, given.server.num_clients
    tell = hooks.on_event
    invitations = Invitations(grid, certificate, client_of, tell)
    listener = Listener(f"0.0.0.0:{port}", credentials, invitations.admit, num_clients=num_clients, tell=tell)

    def begin(transport: RemoteTransport) -> None:
        tell(f"sites are awaited at port {listener.port}")
        if watcher is not None:
            watcher.watch(transport)
        invitations.begin(listener.port, transport.is_there)

    def asked_to_stop() -> bool:
        return invitations.is_simulated or hooks.asked_to_stop()

    given = replace(given, hooks=replace(hooks, asked_to_stop=asked_to_stop))
    with closing(listener), board(listener) if board else nullcontext() as watcher:
        try:
            result = run_remote(given, listener, facts, num_sites=num_clients, on_open=begin)
        finally:
            invitations.stop()
        if invitations.is_simulated:
            raise InputError(
                "this run was started in Flower's simulation, which has no sites",
                remedy="Simulate with `parablock run` and engine.clock: virtual; for real sites start SuperNodes.",
            )
        invitations.part()
    return result


def server_app(main: Callable[[Grid, Any], None]) -> ServerApp:
    """Make the ServerApp that calls `main`."""
    app = ServerApp()
    app.main()(main)
    return app


def _word_of(reply: Message) -> str:
    """Return why a site has ended its part; never more than a word."""
    try:
        return str(reply.content[ANSWER]["why"])[:20]
    except (KeyError, TypeError):
        return "unknown"
