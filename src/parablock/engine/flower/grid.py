"""The server's end of the transport over Flower: one exchange at a time with each site, in a thread of its own.

    Server.send ──► Outbox of the client ──► exchange (a Flower message) ──► ClientApp ──► trainer
    Server.receive ◄── Inbox of the client ◄── its reply ◄──

Nothing leaves before the server has nothing else to do: what it sends between two waits travels together,
because each Flower message costs a process at the site. A site is asked when something is there for it, or
when the server waits for something of it. An exchange that is overdue is made again; its frames have numbers,
so nothing is taken twice, and what was lost is sent again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from parablock.clock import RealClock
from parablock.engine.flower.courier import pack, unpack
from parablock.engine.flower.exchange import Reply, Request, error_of, reply_of
from parablock.engine.flower.stream import PART_BYTES, Frame, Inbox, Outbox
from parablock.engine.pipeline import start_thread
from parablock.errors import InputError, StallError, WireError
from parablock.trace import Span, Trace
from parablock.wire.transport import Ledger, Parcel

POLL_S = 0.25
LOOK_S = 3.0
"""How often the server looks for SuperNodes that are back."""

HELLO_S = 60.0
"""How long after its greeting a new SuperNode that has not answered is greeted again."""

WAIT_S = 60.0
"""How long a site may wait for its trainer before it replies that there is nothing yet."""

LEAST_BYTES, MOST_BYTES = 8 << 20, 512 << 20
TOGETHER_BYTES = 2 << 30
"""What the replies of all sites may carry at once, so that memory does not grow with the sites."""

WORTH_MEASURING = 64 << 10
"""Bytes of a reply from which on its time tells the speed of the link."""

PUSH_S = 60.0
"""How long the upload of one reply should take: a third of Flower's push session."""

SLACK_S = 20.0
"""What an exchange may take beyond its bytes and its waiting before it is made again."""


@dataclass
class _Site:
    """One client, seen from the server."""

    node_id: int | None = None
    most_bytes: int = MOST_BYTES
    out: Outbox = field(default_factory=Outbox)
    inbox: Inbox = field(default_factory=Inbox)
    attempt: int = 0
    outstanding: bool = False
    offline: bool = False
    silent: bool = False
    overdue_s: float = 0.0
    more: bool = False
    problem: str = ""
    finished: bool = False
    bytes_per_s: float = 0.0
    largest: int = 0
    asked_bytes: int = 0
    was_full: bool = False
    held_s: float = inf
    sent_before: int = 0

    @property
    def budget_bytes(self) -> int:
        """How much one reply may carry, from the speed that was measured."""
        return int(max(LEAST_BYTES, min(self.most_bytes, self.bytes_per_s * PUSH_S)))

    def patience_s(self, request_bytes: int) -> float:
        """How long an exchange may take: what earlier ones took, or all that it may carry where more may come."""
        speed = (self.bytes_per_s or LEAST_BYTES / PUSH_S) / 2
        held_s = min(WAIT_S, 1.5 * self.held_s + 10.0)
        reply_bytes = self.budget_bytes if self.was_full else self.largest or LEAST_BYTES
        return held_s + SLACK_S + (request_bytes + reply_bytes) / speed


@dataclass(frozen=True)
class _Arrived:
    """The end of one attempt: a reply, or why there is none."""

    client_id: int
    attempt: int
    pushed_s: float
    ended_s: float
    reply: Reply | None
    problem: str
    node_is_gone: bool


class GridTransport:
    """The server's end over Flower.

    Args:
        grid: Flower's.
        num_clients: How many sites take part.
        opening: What every request says of the run; `restore` is set by `begin`.
        epoch_s: Gives the time since 1970.
        tell: Told what a user should know while the run goes on.
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
        share = min(MOST_BYTES, TOGETHER_BYTES // num_clients)
        self._sites = {client_id: _Site(most_bytes=share) for client_id in range(num_clients)}
        self._known: dict[int, int] = {}
        self._greetings: dict[str, int] = {}
        self._greeted_s: dict[int, float] = {}
        self._whole: deque[tuple[int, bytes]] = deque()
        self._trace: Trace | None = None
        self._is_over = False
        self.look: Callable[[Collection[int] | None], None] = lambda _: None
        self.ledger = Ledger()

    # ── before the run ──────────────────────────────────────────────────────────────────────────────

    def gather(self, timeout_s: float) -> frozenset[int]:
        """Wait until every client has a SuperNode; give the rounds whose snapshots all of them keep.

        Raises:
            StallError: Some do not come.
        """
        held: dict[int, frozenset[int]] = {}
        give_up = time.monotonic() + timeout_s
        while len(held) < len(self._sites):
            held |= {client_id: frozenset(reply.held_rounds) for client_id, reply in self._greet()}
            missing = [client_id for client_id in self._sites if client_id not in held]
            if missing and time.monotonic() > give_up:
                raise StallError(
                    f"no SuperNode came for {_clients(missing)} within {timeout_s:g} s",
                    cause=f"{len(held)} of {len(self._sites)} sites have connected.",
                    remedy="Start them with `parablock deploy client`, or raise federation.stall_timeout_s.",
                )
            if missing:
                time.sleep(POLL_S)
        return frozenset.intersection(*held.values())

    def _greet(self) -> Iterator[tuple[int, Reply]]:
        """Ask SuperNodes that are new who they are, and give what has been answered; waits for nothing."""
        now, hello = time.monotonic(), Request(**{**vars(self._opening), "hello": True})
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
        site = self._sites[reply.client_id]
        if site.node_id is not None and not site.offline:
            raise InputError(
                f"two sites say that they are client {reply.client_id}",
                remedy="Give each site a client_id of its own.",
            )
        self._known[node_id] = reply.client_id
        site.node_id = node_id
        self._tell(f"client {reply.client_id} has connected")

    # ── the run ─────────────────────────────────────────────────────────────────────────────────────

    def begin(self, trace: Trace, restore: int | None) -> None:
        """Start the session: from the base model, or from every client's snapshot of a round."""
        assert isinstance(trace.clock, RealClock)
        self._trace, self._clock = trace, trace.clock
        self._arrived = trace.clock.mailbox()
        self._opening = Request(**{**vars(self._opening), "restore": restore})
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
                f"asked and not answered: {_clients(i for i, s in self._sites.items() if s.outstanding)}",
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
        """Tell whether a site has a SuperNode, and has answered the last time in its time."""
        return not (self._sites[client_id].offline or self._sites[client_id].silent)

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
            self.look(from_clients)
            item = self._arrived.get_until(min(now + 1.0, deadline_s))
            if isinstance(item, _Arrived) and self._take(item):
                moved_s = self._clock.now()
        return True

    def _ask_where_due(self, from_clients: Collection[int]) -> None:
        now = self._clock.now()
        if any(site.offline for site in self._sites.values()) and now > self._next_look_s:
            self._next_look_s = now + LOOK_S
            self._look_for_the_lost()
        for client_id, site in self._sites.items():
            if site.outstanding and now > site.overdue_s:
                self._tell(f"client {client_id} has not answered in time; it is asked again")
                site.outstanding = False
                site.more = site.silent = True
            due = site.more or not site.out.is_empty or client_id in from_clients
            if due and not site.outstanding and not site.offline:
                self._ask(client_id, site)

    def _look_for_the_lost(self) -> None:
        """See who is back: a SuperNode with a key under its own number, one without under a new one."""
        online = set(self._grid.get_node_ids())
        for site in self._sites.values():
            if site.offline and site.node_id in online:
                site.offline = False
        if any(site.offline for site in self._sites.values()):
            for client_id, _ in self._greet():
                self._sites[client_id].offline = False

    def _ask(self, client_id: int, site: _Site) -> None:
        frames = tuple(site.out.after(0, site.budget_bytes))
        request = Request(
            **{
                **vars(self._opening),
                "wanted": site.inbox.wanted,
                "budget_bytes": site.budget_bytes,
                "wait_s": WAIT_S,
                "frames": frames,
            }
        )
        size = sum(len(frame.content) for frame in frames)
        site.attempt += 1
        site.outstanding, site.more, site.asked_bytes = True, False, site.budget_bytes
        site.overdue_s = self._clock.now() + site.patience_s(size)
        assert site.node_id is not None
        message, attempt, pushed_s = _message(request, site.node_id), site.attempt, self._clock.now()

        def attend() -> None:
            reply, problem, gone = self._attend(message)
            self._arrived.put(
                _Arrived(client_id, attempt, pushed_s, self._clock.now(), reply, problem, node_is_gone=gone)
            )

        start_thread(self._clock, attend, f"exchange {attempt} with client {client_id}")

    def _attend(self, message: Message) -> tuple[Reply | None, str, bool]:
        """Push one request and wait for its reply; in the thread of the exchange."""
        try:
            (message_id,) = self._grid.push_messages([message])
            while not self._is_over:
                for answer in self._grid.pull_messages([message_id]):
                    if answer.has_error():
                        return None, f"{answer.error.reason} (code {answer.error.code})", answer.error.code == 5
                    return reply_of(*unpack(answer.content)), "", False
                time.sleep(POLL_S)
        except Exception as error:  # whatever Flower's client raises; it is told, and the exchange made again
            return None, f"{type(error).__name__}: {error}", False
        return None, "stopped", False

    def _take(self, item: _Arrived) -> bool:
        """Take the end of an attempt; tell whether the site gave a sign of life."""
        site = self._sites[item.client_id]
        if item.attempt == site.attempt:
            site.outstanding = False
        reply = item.reply
        if reply is None:
            self._tell(f"an exchange with client {item.client_id} failed and is made again: {item.problem}")
            site.more = site.silent = True
            site.problem = item.problem
            site.offline = site.offline or item.node_is_gone
            return False
        if reply.error:
            raise error_of(f"client {item.client_id} has given up", reply.error)
        if reply.client_id != item.client_id:
            raise WireError(f"client {item.client_id} answered as client {reply.client_id}")
        site.silent = False
        before = site.inbox.wanted
        fresh = [frame for frame in reply.frames if frame.number >= before]
        self._record(item, reply, site, fresh)
        site.out.acknowledge(reply.wanted)
        site.sent_before = max(reply.wanted, site.sent_before)
        for message, _ in site.inbox.take(fresh):
            self._whole.append((item.client_id, message))
        site.finished = site.finished or reply.finished
        return True

    def _record(self, item: _Arrived, reply: Reply, site: _Site, fresh: Sequence[Frame]) -> None:
        """Count the bytes, and put the client's spans and the two transfers on the record."""
        assert self._trace is not None
        origin = self._epoch_s() - self._clock.now()
        down = [frame for frame in site.out.after(site.sent_before, 1 << 62) if frame.number < reply.wanted]
        arrived = min(max(reply.arrived_s - origin, item.pushed_s), item.ended_s)
        left = min(max(reply.left_s - origin, arrived), item.ended_s)
        self._transfer(item.client_id, "downloading", down, item.pushed_s, arrived)
        self._transfer(item.client_id, "uploading", fresh, left, item.ended_s)
        size = sum(len(frame.content) for frame in fresh)
        site.largest, site.held_s = max(site.largest, size), left - arrived
        site.was_full = size + PART_BYTES > site.asked_bytes
        if size > WORTH_MEASURING and item.ended_s > left:
            site.bytes_per_s = size / (item.ended_s - left)
        for lane, activity, start_s, duration_s, facts in reply.spans:
            self._trace.spans.append(
                Span(item.client_id, str(lane), str(activity), start_s - origin, duration_s, dict(facts))
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


def _message(request: Request, node_id: int) -> Message:
    return Message(pack(request), node_id, MessageType.TRAIN)


def _clients(client_ids: Any) -> str:
    return ", ".join(f"client {client_id}" for client_id in client_ids) or "none"
