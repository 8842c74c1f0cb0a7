"""The server's end of the transport over Flower: an exchange or two with each SuperNode, each in a thread.

    Server.send ──► Outbox of the client ──► exchange (a Flower message) ──► ClientApp ──► trainer
    Server.receive ◄── Inbox of the client ◄── its reply ◄──

Nothing leaves before the server has nothing else to do: what it sends between two waits travels together,
because each Flower message costs a process at the site. A site is asked when something is there for it, or
when the server waits for something of it. An exchange that is overdue is made again; its frames say their places,
so nothing is taken twice, and what was lost is sent again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from parablock.clock import RealClock
from parablock.engine.flower.courier import Arrays, pack, unpack
from parablock.engine.flower.exchange import DIRECTIONS, UP, Reply, Request, error_of, reply_of
from parablock.engine.flower.lanes import Lane, Site, UnderWay, site_among
from parablock.engine.flower.stream import PART_BYTES, Frame
from parablock.engine.pipeline import Thread, start_thread
from parablock.errors import InputError, StallError, WireError
from parablock.trace import Span, Trace
from parablock.wire.transport import Ledger, Parcel, check_for_stop

POLL_S = 0.25
LOOK_S = 3.0
"""How often the server looks for SuperNodes that are back."""
NODE_IS_GONE = 5
"""Flower's code for that."""
HELLO_S = 60.0
"""How long after its greeting a new SuperNode that has not answered is greeted again."""


@dataclass(frozen=True)
class _Asked:
    """One attempt."""

    client_id: int
    lane: Lane
    exchange: UnderWay
    pushed_s: float


@dataclass(frozen=True)
class _Arrived:
    """The end of one attempt: a reply, or why there is none."""

    asked: _Asked
    ended_s: float
    reply: Reply | None = None
    problem: str = ""
    node_is_gone: bool = False


class GridTransport:
    """The server's end over Flower.

    `opening` has the facts of the run that go with every request; `begin` sets its `restore`. `epoch_s` returns the
    seconds since 1970, and `tell` gets the messages for the user.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        opening: Request,
        *,
        epoch_s: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self._grid, self._opening, self._epoch_s, self._tell = grid, opening, epoch_s, tell
        self._sites = {client_id: site_among(num_clients) for client_id in range(num_clients)}
        self._known: dict[int, int] = {}
        self._greetings: dict[str, int] = {}
        self._greeted_s: dict[int, float] = {}
        self._whole: deque[tuple[int, bytes]] = deque()
        self._trace: Trace | None = None
        self._pushing: Thread | None = None
        self._is_over = False
        self._asked_to_stop: Callable[[], bool] = lambda: False
        self.ledger = Ledger()

    # ── before the run ──────────────────────────────────────────────────────────────────────────────

    def gather(self, timeout_s: float) -> frozenset[int]:
        """Wait until every client has a SuperNode; return the rounds whose snapshots all of them keep.

        Raises:
            StallError: Some do not come.
        """
        held: dict[int, frozenset[int]] = {}
        give_up = time.monotonic() + timeout_s
        while True:
            held |= {client_id: frozenset(reply.held_rounds) for client_id, reply in self._greet()}
            missing = [client_id for client_id, site in self._sites.items() if not site.is_complete]
            if not missing:
                break
            if time.monotonic() > give_up:
                raise StallError(
                    f"no SuperNode came for {_clients(missing)} within {timeout_s:g} s",
                    cause=f"{len(self._sites) - len(missing)} of {len(self._sites)} sites have connected.",
                    remedy="Start them with `parablock deploy client`, or raise federation.stall_timeout_s.",
                )
            time.sleep(POLL_S)
        return frozenset.intersection(*held.values())

    def _greet(self) -> Iterator[tuple[int, Reply]]:
        """Ask SuperNodes that are new who they are, and give what has been answered; waits for nothing."""
        now, hello = time.monotonic(), replace(self._opening, hello=True)
        for node_id in self._grid.get_node_ids():
            if node_id not in self._known and now - self._greeted_s.get(node_id, -inf) > HELLO_S:
                (message_id,) = self._grid.push_messages([_message(hello, node_id)])
                self._greetings[message_id], self._greeted_s[node_id] = node_id, now
        for message in self._grid.pull_messages(list(self._greetings)) if self._greetings else ():
            node_id = self._greetings.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                self._tell(f"a new SuperNode cannot answer: {message.error.reason} (code {message.error.code})")
                self._greeted_s.pop(node_id, None)
            elif node_id not in self._known:  # not the answer to an earlier greeting
                reply = reply_of(*unpack(message.content))
                self._welcome(node_id, reply)
                yield reply.client_id, reply

    def _welcome(self, node_id: int, reply: Reply) -> None:
        """Note whose SuperNode it is."""
        if reply.error:
            raise error_of("a site cannot take part", reply.error)
        if reply.client_id not in self._sites:
            raise InputError(
                f"a site says that it is client {reply.client_id}; the last one is {len(self._sites) - 1}",
                remedy="Give each site a client_id of its own, below federation.num_clients.",
            )
        if reply.carries not in DIRECTIONS:
            raise InputError(
                f"a SuperNode of client {reply.client_id} says that it carries {reply.carries!r}",
                remedy=f"Its `carries` is one of {', '.join(DIRECTIONS)}; `parablock deploy client` sets it.",
            )
        site = self._sites[reply.client_id]
        if not site.take_lane(reply.carries, node_id):
            if self._trace is not None:  # whose place it would take may be gone, without that being known yet
                self._tell(f"another SuperNode says that it is client {reply.client_id}; its place is taken")
                return
            raise InputError(
                f"two sites say that they are client {reply.client_id}",
                remedy="Give each site a client_id of its own.",
            )
        self._known[node_id] = reply.client_id
        if site.is_complete:
            self._tell(f"client {reply.client_id} has connected")

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────

    def begin(self, trace: Trace, restore: int | None, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Start the session: from the base model, or from every client's snapshot of a round."""
        assert isinstance(trace.clock, RealClock)
        self._trace, self._clock, self._asked_to_stop = trace, trace.clock, asked_to_stop
        self._arrived = trace.clock.mailbox()
        self._opening = replace(self._opening, restore=restore)
        self._next_look_s = 0.0

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Put a message into the client's stream."""
        self._sites[client_id].out.put(parcel.message, parcel.round_index)

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for the next message of any client; those whose messages are missed are asked."""
        if not self._wait(lambda: bool(self._whole), from_clients, timeout_s=timeout_s):
            raise StallError(
                f"nothing moved for {timeout_s:g} s while waiting for {waiting_for}; "
                f"asked and not answered: {_clients(i for i, s in self._sites.items() if s.is_asked)}",
                cause="A site, or the way to it, is down. "
                + " ".join(f"Client {i} at last: {s.problem}." for i, s in self._sites.items() if s.problem),
                remedy="Bring it back and run `parablock resume`; nothing that was committed is lost.",
            )
        return self._whole.popleft()

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait likewise, until the clock reaches `deadline_s`."""
        found = self._wait(lambda: bool(self._whole), from_clients, deadline_s=deadline_s)
        return self._whole.popleft() if found else None

    def is_there(self, client_id: int) -> bool:
        """Return whether a site has its SuperNodes, and has answered the last time in its time."""
        return self._sites[client_id].is_answering

    def leave(self) -> None:
        """Stop waiting for whatever has not been answered."""
        self._is_over = True

    def close(self, timeout_s: float) -> None:
        """Wait until every client has taken the last message of the run; one that does not come is left."""
        while left := [client_id for client_id, site in self._sites.items() if not site.finished]:
            there = lambda left=left: any(self._sites[client_id].finished for client_id in left)  # noqa: E731
            if not self._wait(there, left, timeout_s=timeout_s):
                self._tell(f"the end of the run did not reach {_clients(left)}; it will learn of it when it asks")
                return

    def _wait(
        self,
        done: Callable[[], bool],
        from_clients: Collection[int] | None,
        *,
        timeout_s: float = inf,
        deadline_s: float = inf,
    ) -> bool:
        """Ask and listen until it is done; False when nothing has moved for so long, or at the deadline."""
        moved_s = self._clock.now()
        while not done():
            self._ask_where_due(self._sites if from_clients is None else from_clients)
            now = self._clock.now()
            if now >= deadline_s or now - moved_s > timeout_s:
                return False
            check_for_stop(self, self._sites if from_clients is None else from_clients, self._asked_to_stop)
            item = self._arrived.get_until(min(now + 1.0, deadline_s))
            if isinstance(item, _Arrived) and self._take(item):
                moved_s = self._clock.now()
        return True

    def _ask_where_due(self, from_clients: Collection[int]) -> None:
        now, due = self._clock.now(), list[tuple[_Asked, Request, int]]()
        if now > self._next_look_s and any(lane.offline for _, _, lane in self._lanes()):
            self._next_look_s = now + LOOK_S
            self._look_for_the_lost()
        for client_id, site, lane in self._lanes():
            if now > lane.overdue_s:
                self._tell(f"client {client_id} has not answered in time; it is asked again")
                lane.give_up()
            while site.is_due(lane, is_missed=client_id in from_clients):
                request = site.ask(lane, self._opening, now)
                due.append((_Asked(client_id, lane, lane.under_way[-1], now), request, site.down.frame_bytes))
        if due:
            push = partial(self._push, due, self._pushing)
            self._pushing = start_thread(self._clock, push, f"{len(due)} exchanges from {now:.1f} s on")

    def _lanes(self) -> list[tuple[int, Site, Lane]]:
        return [(i, site, lane) for i, site in self._sites.items() for lane in site.lanes.values()]

    def _look_for_the_lost(self) -> None:
        """See who is back: a SuperNode with a key under its own number, one without under a new one."""
        online = set(self._grid.get_node_ids())
        for _, _, lane in self._lanes():
            lane.offline = lane.node_id not in online
        if any(lane.offline for _, _, lane in self._lanes()):
            for _ in self._greet():
                pass

    def _push(self, due: Sequence[tuple[_Asked, Request, int]], before: Thread | None) -> None:
        """Push requests together, so that what several sites get is hashed and stored once; wait for each alone.

        Those before them are pushed first, for one may follow another.
        """
        if before is not None:
            before.join()
        arrays: Arrays = {}
        try:
            message_ids = self._grid.push_messages(
                [_message(request, asked.lane.node_id, size, arrays) for asked, request, size in due]
            )
            pushed = list(zip((asked for asked, _, _ in due), message_ids, strict=True))
        except Exception as error:  # whatever Flower's client raises; it is told, and the exchanges made again
            for asked, _, _ in due:
                self._fail(asked, f"{type(error).__name__}: {error}")
            return
        for asked, message_id in pushed:
            name = f"exchange {asked.exchange.attempt} with client {asked.client_id}, {asked.lane.carries}"
            start_thread(self._clock, partial(self._attend, asked, message_id), name)

    def _attend(self, asked: _Asked, message_id: str) -> None:
        """Wait for the reply to one request; in the thread of the exchange."""
        try:
            while asked.lane.is_before(asked.exchange) and not self._is_over:
                time.sleep(POLL_S)  # its SuperNode has not begun with it
            while not self._is_over:
                for answer in self._grid.pull_messages([message_id]):
                    if answer.has_error():
                        self._fail(asked, f"{answer.error.reason} (code {answer.error.code})", answer.error.code)
                    else:
                        reply = reply_of(*unpack(answer.content))
                        self._arrived.put(_Arrived(asked, self._clock.now(), reply))
                    return
                time.sleep(POLL_S)
        except Exception as error:
            self._fail(asked, f"{type(error).__name__}: {error}")

    def _fail(self, asked: _Asked, problem: str, code: int = 0) -> None:
        self._arrived.put(_Arrived(asked, self._clock.now(), problem=problem, node_is_gone=code == NODE_IS_GONE))

    def _take(self, item: _Arrived) -> bool:
        """Take the end of an attempt; tell whether the site gave a sign of life."""
        asked, reply = item.asked, item.reply
        client_id, lane, site = asked.client_id, asked.lane, self._sites[asked.client_id]
        exchange = asked.exchange
        lane.end(exchange, is_lost=reply is None)
        if reply is None:
            self._tell(f"an exchange with client {client_id} failed and is made again: {item.problem}")
            lane.more, lane.silent, site.problem = True, True, item.problem
            lane.free_s = item.ended_s
            if item.node_is_gone:  # as far as Flower knows: it may be on its feet, and still receiving this one
                lane.offline = lane.doubted = True
            return False
        if reply.error:
            raise error_of(f"client {client_id} has given up", reply.error)
        if reply.client_id != client_id:
            raise WireError(f"client {client_id} answered as client {reply.client_id}")
        fresh = site.inbox.fresh(reply.frames, follows=exchange.follows > 0)
        self._record(asked, item.ended_s, reply, fresh)
        lane.silent = lane.doubted = False
        if lane.carries != UP:  # the other one knows of them too, but not when they came
            site.out.acknowledge(reply.wanted, reply.ahead)
            site.sent_before = max(reply.wanted, site.sent_before)
        for message, _ in site.inbox.take(reply.frames, follows=exchange.follows > 0):
            self._whole.append((client_id, message))
        site.finished = site.finished or reply.finished
        return True

    def _record(self, asked: _Asked, ended_s: float, reply: Reply, fresh: list[Frame]) -> None:
        """Count the bytes, and put the client's spans and the two transfers on the record."""
        assert self._trace is not None
        client_id, lane, site = asked.client_id, asked.lane, self._sites[asked.client_id]
        begun_s = max(asked.pushed_s, lane.free_s)
        lane.free_s = ended_s
        origin = self._epoch_s() - self._clock.now()
        arrived = min(max(reply.arrived_s - origin, begun_s), ended_s)
        left = min(max(reply.left_s - origin, arrived), ended_s)
        self._transfer(client_id, "downloading", site.brought(lane, reply), begun_s, arrived)
        self._transfer(client_id, "uploading", fresh, left, ended_s)
        site.note(lane, asked.exchange, reply, fresh, (begun_s, arrived, left, ended_s))
        for name, activity, start_s, duration_s, facts in reply.spans:
            self._trace.spans.append(
                Span(client_id, str(name), str(activity), start_s - origin, duration_s, dict(facts))
            )

    def _transfer(
        self, client_id: int, activity: str, frames: Sequence[Frame], start_s: float, end_s: float
    ) -> None:
        total = sum(len(frame.content) for frame in frames)
        if not total:
            return
        assert self._trace is not None
        facts: dict[str, Any] = {"round_index": frames[-1].round_index, "payload_bytes": total}
        self._trace.spans.append(Span(client_id, "communication", activity, start_s, end_s - start_s, facts))
        count = self.ledger.count_up if activity == "uploading" else self.ledger.count_down
        for frame in frames:
            share = (end_s - start_s) * len(frame.content) / total
            count(Parcel(frame.content, frame.round_index), client_id, share)


def _message(
    request: Request, node_id: int, array_bytes: int = PART_BYTES, arrays: Arrays | None = None
) -> Message:
    return Message(pack(request, array_bytes, arrays), node_id, MessageType.TRAIN)


def _clients(client_ids: Any) -> str:
    return ", ".join(f"client {client_id}" for client_id in client_ids) or "none"
