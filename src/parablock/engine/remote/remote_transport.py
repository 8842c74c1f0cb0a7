"""The server's end of the transport to real sites: a stream for each, and what is known of them.

It is the session behind the `Listener`. Readers of the connections deliver messages; the server's thread takes
them. While too many bytes of a site wait, nothing more is confirmed to it, so that it stops; messages to it go on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

from parablock.clock import Clock
from parablock.engine.remote.client_place import ClientPlace
from parablock.engine.remote.frames import PART_BYTES, Hello, Opening, Reception, utc_s
from parablock.engine.remote.listener import NotAdmitted
from parablock.engine.remote.numbered_stream import MOST_AHEAD_BYTES, Delivered, NumberedStream
from parablock.engine.remote.site_spans import SPANS_KEPT, spans_of
from parablock.errors import CodecError, LedgerError, ParaBlockError, StallError
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Span, Trace
from parablock.wire.messages import Leave, from_bytes, kind_of, to_bytes
from parablock.wire.sealing import SEALING_KINDS
from parablock.wire.transport import MESSAGE_BYTES, Ledger, Parcel, check_for_stop

LOOK_S, STOP_LOOK_S = 0.01, 0.5
RETURN_S = 5.0
"""How long a server that ends waits for sites whose line is cut to call again."""
MAX_LIVES = 4
"""New processes of a site that are given time to load, one after the other, until it is asked for another round."""
WAITING_BYTES = 32 << 20
"""Bytes of a site's messages that wait for the server, beside the newest, before nothing more is confirmed."""
HELD_BYTES = MOST_AHEAD_BYTES + 2 * PART_BYTES
"""Bytes that may come after that; the reader of a site that sends more waits, and with it what goes down."""


class RemoteTransport:
    """The server's end, for the sites of one session.

    Args:
        opening: The session.
        num_clients: Clients of the run.
        num_rounds: Rounds of the run.
        max_message_bytes: Longest message that a site may send.
        trace: Records transfers, and the spans that sites tell of. Its clock is real.
        asked_to_stop: Whether the user wants the run to stop.
        tell: Gets a line for the log.
        releases: What the server has on record of its sites.

    Attributes:
        failure: The error with which the server's thread ends the run as soon as it looks; None: there is none.
    """

    def __init__(
        self,
        opening: Opening,
        num_clients: int,
        num_rounds: int,
        max_message_bytes: int,
        trace: Trace,
        *,
        asked_to_stop: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda _: None,
        releases: ReleaseLedger | None = None,
    ) -> None:
        self._releases = releases or ReleaseLedger()
        self.opening, self._num_rounds, self._max_message_bytes = opening, num_rounds, max_message_bytes
        self._trace, self._clock, self._asked_to_stop, self._tell = trace, trace.clock, asked_to_stop, tell
        self._origin_s = utc_s() - trace.clock.now()
        self._inbox = trace.clock.mailbox()
        self._void = WeakSet[NumberedStream]()  # of processes that left before the run began, and came again
        self.has_begun, self._is_over = False, False
        self.failure: ParaBlockError | None = None
        self.places = {client_id: ClientPlace(self._new_stream(client_id)) for client_id in range(num_clients)}
        self.ledger = Ledger()
        self.waiting_for = ""

    @property
    def clock(self) -> Clock:
        """The run's clock."""
        return self._clock

    # ── the session, in the threads of the listener ─────────────────────────────────────────────────

    def welcome(self, hello: Hello) -> tuple[Reception, NumberedStream | None]:
        """Return the answer to a greeting, and the site's stream."""
        place = self.places.get(hello.client_id)
        if place is None:
            raise NotAdmitted(
                f"there is no client {hello.client_id}; the run has clients 0 to {len(self.places) - 1}"
            )
        now_s = utc_s()
        with place.room:
            if place.is_removed:
                words = f"client {hello.client_id} has been removed from the run by the server's operator"
                # into other runs it is let in
                raise NotAdmitted(f"{words}, who may undo it", is_temporary=True)
            is_new = hello.incarnation != place.incarnation
            fits = hello.wanted == 0 if is_new else not place.must_rejoin  # a process that was replaced begins anew
            in_session = hello.session == self.opening.session and fits
            if is_new and place.told not in (None, self._releases.history_of(hello.client_id)):
                in_session = False  # what came last of an earlier process of it, it has to know
            place.knows_end = place.knows_end or self._is_over
            if self._is_over or not in_session:
                return Reception(0, False, now_s, self._opening_for(hello.client_id), self._is_over), None
            if self.failure is not None:
                raise NotAdmitted("the server is about to end, by an error of its own", is_temporary=True)
            was_there = place.must_rejoin or place.incarnation is not None
            begins_anew = is_new and was_there and not self.has_begun  # nothing it has said was read
            if is_new:
                place.rejoins = not begins_anew and (place.incarnation is not None or place.must_rejoin)
                place.has_sent = place.lacks_ledger = False
            if begins_anew:
                self._void.add(place.stream)
            if begins_anew or (is_new and place.rejoins):
                place.stream.close()
                place.stream = self._new_stream(hello.client_id)
                place.room.notify_all()
            place.incarnation, place.must_rejoin, place.since_s = hello.incarnation, False, now_s
            if is_new and place.lives < MAX_LIVES:  # a line that comes back is no sign of work, a new process is
                place.lives, place.moved_s = place.lives + 1, self._clock.now()
            self._clock.progress()
            return Reception(place.stream.wanted, place.rejoins, now_s), place.stream

    def _opening_for(self, client_id: int) -> Opening:
        self.places[client_id].told = history = self._releases.history_of(client_id)
        return replace(self.opening, history=history, asked=self._releases.last_asked(client_id))

    def moved(self, client_id: int) -> None:
        """Note that something has come which the run waits for."""
        self.places[client_id].moved_s = self._clock.now()
        self._clock.progress()

    def begins(self, client_id: int, stream: NumberedStream, first_part: bytes, round_index: int) -> None:
        """Record that an update begins to come, before it is taken; of a stream that is closed nothing is taken."""
        with self.places[client_id].room:
            if kind_of(first_part) == "Update" and not stream.is_closed:
                self._releases.begins(client_id, round_index)

    def deliver(self, client_id: int, stream: NumberedStream, delivered: Delivered) -> None:
        """Take a message of a stream; waits while too many wait already.

        Raises:
            CodecError: A process joins late, or again; each `Join` may cost a model on its way down.
        """
        if delivered.is_note:
            self._record_spans(client_id, delivered.content)
            return
        place = self.places[client_id]
        self._record(client_id, "uploading", delivered)
        place.up_bytes += len(delivered.content)
        place.last_round = max(place.last_round, self._round_of(delivered))
        with place.room:
            place.room.wait_for(lambda: place.held_bytes <= HELD_BYTES or stream.is_closed)
            if stream.is_closed:
                return  # the site has been removed, or another process of it has joined
            kind = kind_of(delivered.content)
            if place.has_sent and kind == "Join":
                raise CodecError("it joins once more, without a new process")
            place.has_sent = place.has_sent or kind not in SEALING_KINDS  # keys and shares go ahead of it
            if kind == "Leave":
                self._hear(client_id, delivered.content)
            cost = len(delivered.content) + MESSAGE_BYTES
            place.held_bytes += cost if place.waiting_bytes > WAITING_BYTES else 0
            place.waiting_bytes += cost
            stream.hold(place.waiting_bytes > WAITING_BYTES)
            self._inbox.put((client_id, delivered.content, stream))

    def _hear(self, client_id: int, message: bytes) -> None:
        """Tell why a client leaves, where the server that takes its messages does not, or not enough."""
        with suppress(CodecError):  # the server counts it
            leave = from_bytes(message)
            assert isinstance(leave, Leave)
            if not self.has_begun:
                self._tell(f"client {client_id} leaves before the run begins: {leave.problem}".removesuffix(": "))
            if leave.problem == LedgerError.told and not self.places[client_id].lacks_ledger:
                self.places[client_id].lacks_ledger = True
                self._tell(
                    f"client {client_id} has lost its ledger: its operator puts back the newest state_dir, or "
                    "writes into its file the line `lost_ledgers` that its log names, and starts it again; with "
                    "masks it takes part once this server is started again too"
                )

    def left(self, client_id: int, stream: NumberedStream) -> None:
        """Note that a site says bye: it takes part again once a new process of it joins."""
        place = self.places[client_id]
        if place.stream is stream:
            place.must_rejoin, place.since_s = True, utc_s()

    def fail(self, error: ParaBlockError) -> None:
        """Let the server's thread end the run with an error that is no site's."""
        self.failure = error
        self._inbox.put(error)

    def remove(self, client_id: int) -> None:
        """Remove a client from the run; those who ask get no answer any more."""
        place = self.places[client_id]
        with place.room:
            if not place.is_removed:
                place.is_removed = place.must_rejoin = True
                place.stream.close()
                place.room.notify_all()
                self._inbox.put((client_id, to_bytes(Leave("the operator has removed it")), place.stream))

    def readmit(self, client_id: int) -> None:
        """Let a removed client join again."""
        self.places[client_id].is_removed = False

    # ── the server's thread ─────────────────────────────────────────────────────────────────────────

    @property
    def given_up(self) -> dict[int, str]:
        """The clients that no start of the run waits for, with the reason."""
        places = self.places.items()
        lost = {i: "it has lost its ledger" for i, place in places if place.lacks_ledger and not self.is_there(i)}
        return lost | {i: "the server's operator has removed it" for i, place in places if place.is_removed}

    def begin(self) -> frozenset[int]:
        """Begin the run with the clients that are there; return the others, which take part once they join."""
        self.has_begun = True  # from now on a new process joins
        for place in self.places.values():
            with place.room:
                place.must_rejoin = place.must_rejoin or not place.stream.has_connection
                place.moved_s = self._clock.now()
        return frozenset(client_id for client_id, place in self.places.items() if place.must_rejoin)

    @property
    def there(self) -> list[int]:
        """The clients that take part and are connected."""
        return [client_id for client_id in self.places if self.is_there(client_id)]

    def is_there(self, client_id: int) -> bool:
        """Return whether a client takes part and is connected."""
        place = self.places[client_id]
        return not place.must_rejoin and place.stream.has_connection

    def send(self, client_id: int, parcel: Parcel) -> None:
        """Put a message into the client's stream; nothing, where it does not take part."""
        place = self.places[client_id]
        if not (self.has_begun and place.must_rejoin):
            place.stream.put(parcel.message, parcel.round_index)
            if parcel.round_index > place.asked_round:
                place.asked_round, place.spans_left, place.lives = parcel.round_index, SPANS_KEPT, 0
                place.moved_s = self._clock.now()

    def receive(
        self, timeout_s: float, waiting_for: str, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes]:
        """Wait for a message of any client, as long as something of the awaited comes, whatever others do."""
        awaited = self.places if from_clients is None else from_clients
        self.waiting_for = waiting_for
        check = partial(self._look, from_clients or (), awaited, timeout_s)
        try:
            while (opened := self._open(self._inbox.get(timeout_s, waiting_for, check))) is None:
                pass
            return opened
        except StallError as stalled:
            gone = [f"client {i}" for i in awaited if not self.is_there(i)]
            raise StallError(
                stalled.what,
                cause=f"Not connected: {', '.join(gone) or 'none; those that are there compute, or are blocked'}.",
                remedy="They go on as soon as they are back; nothing that was committed is lost.",
            ) from None

    def _look(self, from_clients: Collection[int], awaited: Collection[int], timeout_s: float) -> None:
        """Look whether the wait has to end."""
        check_for_stop(self, awaited, self._asked_to_stop)
        now_s, silent = self._clock.now(), [self.places[client_id] for client_id in from_clients]
        if silent and all(now_s - place.moved_s > timeout_s for place in silent):
            for place in silent:
                place.moved_s = now_s  # whoever waits on has the same patience again
            raise StallError(f"for {timeout_s:g} s nothing came of what the run waits for: {self.waiting_for}")

    def receive_until(
        self, deadline_s: float, from_clients: Collection[int] | None = None
    ) -> tuple[int, bytes] | None:
        """Wait for the next message of any client; None if the clock reaches `deadline_s` first."""
        awaited = self.places if from_clients is None else from_clients
        while True:
            item = self._inbox.get_until(min(deadline_s, self._clock.now() + STOP_LOOK_S))
            if item is not None and (opened := self._open(item)) is not None:
                return opened
            if self._clock.now() >= deadline_s:
                return None
            check_for_stop(self, awaited, self._asked_to_stop)

    def close(self, timeout_s: float) -> None:
        """Wait until every client that is there has the last message of the run, and say bye."""
        moved_s, left_bytes = self._clock.now(), -1
        while waits := [
            i for i, place in self.places.items() if not place.must_rejoin and place.stream.waiting_bytes
        ]:
            now_bytes = sum(self.places[i].stream.waiting_bytes for i in waits)
            if now_bytes != left_bytes:
                moved_s, left_bytes = self._clock.now(), now_bytes
            patience_s = timeout_s if any(map(self.is_there, waits)) else min(timeout_s, RETURN_S)
            if self._asked_to_stop():
                break
            if self._clock.now() - moved_s > patience_s:
                self._tell(f"the end of the run did not reach {', '.join(f'client {i}' for i in waits)}")
                break
            self._drop_late()
        self.leave()

    def leave(self) -> None:
        """End the session for all, and wait a moment for those whose line is cut just now."""
        self._is_over = True
        give_up_s = self._clock.now() + RETURN_S
        while waits := [place for place in self.places.values() if not (place.must_rejoin or place.knows_end)]:
            for place in waits:
                place.knows_end = place.stream.has_connection and place.stream.say_bye(LOOK_S)
            if self._clock.now() > give_up_s:
                break
            with suppress(ParaBlockError):  # the run has an end, or an error, by now
                self._drop_late()
        for place in self.places.values():
            place.stream.close()
            with place.room:
                place.room.notify_all()

    def _drop_late(self) -> None:
        """Let a moment pass, and drop what comes: confirmations come behind what a full inbox keeps waiting."""
        until_s = self._clock.now() + LOOK_S
        while (late := self._inbox.get_until(until_s)) is not None:
            self._open(late)

    def _open(self, item: Any) -> tuple[int, bytes] | None:
        if isinstance(item, BaseException):
            raise item
        client_id, message, stream = item
        place = self.places[client_id]
        with place.room:
            place.waiting_bytes = max(0, place.waiting_bytes - len(message) - MESSAGE_BYTES)
            if place.waiting_bytes <= WAITING_BYTES:
                place.held_bytes = 0
            place.stream.hold(place.waiting_bytes > WAITING_BYTES)
            place.room.notify_all()
        is_void = stream in self._void or (stream is not place.stream and kind_of(message) == "Join")
        return None if is_void else (client_id, message)  # a Join asks for what its own process lacks

    # ── the record ──────────────────────────────────────────────────────────────────────────────────

    def _new_stream(self, client_id: int) -> NumberedStream:
        return NumberedStream(utc_s, self._max_message_bytes, partial(self._confirmed, client_id))

    def _confirmed(self, client_id: int, delivered: Delivered) -> None:
        self._record(client_id, "downloading", delivered)
        self.places[client_id].down_bytes += len(delivered.content)

    def _round_of(self, delivered: Delivered) -> int:
        return min(max(delivered.round_index, 0), self._num_rounds - 1)

    def _record(self, client_id: int, activity: str, delivered: Delivered) -> None:
        """Count a transfer, from when its first part left, or the one before had ended, to when it was there."""
        place, is_up = self.places[client_id], activity == "uploading"
        end_s = delivered.arrived_s
        free_s = max(self._origin_s, place.up_free_s if is_up else place.down_free_s)
        begin_s = min(end_s, max(delivered.sent_s, free_s))
        if is_up:
            place.up_free_s = end_s
        else:
            place.down_free_s = end_s
        t = self._round_of(delivered)
        count = self.ledger.count_up if is_up else self.ledger.count_down
        count(Parcel(delivered.content, t), client_id, end_s - begin_s)
        facts = {"round_index": t, "payload_bytes": len(delivered.content)}
        start_s = begin_s - self._origin_s
        self._keep(client_id, Span(client_id, "communication", activity, start_s, end_s - begin_s, facts))

    def _record_spans(self, client_id: int, note: bytes) -> None:
        place, now_s = self.places[client_id], self._clock.now()
        try:
            spans = spans_of(client_id, note, self._origin_s, now_s)
        except ValueError:
            if not place.is_garbled:
                self._tell(f"client {client_id} sends records that cannot be read; they are left out")
            place.is_garbled = True
            return
        for span in spans:
            self._keep(client_id, span)

    def _keep(self, client_id: int, span: Span) -> None:
        place = self.places[client_id]
        if place.spans_left > 0:
            place.spans_left -= 1
            self._trace.spans.append(span)
