"""A site's channel to the server: it calls, takes part in a session, and calls again after every cut.

It stands where `Pipeline` stands in one process, so that the `Client` above it is the same: the compute thread
sends and receives, and threads of the channel keep the connection and prepare what leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any, NoReturn

import grpc
import psutil

from parablock.clock import Clock
from parablock.engine.pipeline import Interceptor, start_thread
from parablock.engine.remote.frames import (
    Hello,
    Opening,
    Reception,
    greeting_from_bytes,
    greeting_to_bytes,
    utc_s,
)
from parablock.engine.remote.grpc_options import METHOD, SITE_OPTIONS
from parablock.engine.remote.numbered_stream import Delivered, NumberedStream
from parablock.engine.remote.site_inbox import SiteInbox
from parablock.errors import CodecError, InputError, ParaBlockError, StallError
from parablock.privacy.identities import Identity
from parablock.trace import Trace
from parablock.wire.messages import Leave, Message, from_bytes, to_bytes
from parablock.wire.transport import Parcel

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pauses between two calls."""
FIRST_ANSWER_S = 10.0
"""How long a server may take to answer which session there is; one that shuts down may never answer."""
NOTE_ROWS = 2000
"""Spans in a record at most, well below the length of a note."""
PARTING_S = 5.0
"""How long a site that leaves waits for its last word to arrive."""
HAS_LEFT = "the server is still at the run that this site has left"

_FINAL = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
)


class SessionOver(Exception):  # noqa: N818  (it is no fault)
    """The session has ended, or another one has taken its place; the site asks again."""


class Refused(InputError):  # noqa: N818
    """The server refuses this site, and waiting does not cure it."""


@dataclass(frozen=True)
class ServerEnd:
    """How a site reaches its server.

    Attributes:
        address: host:port.
        credentials: Returns gRPC's credentials of the channel, read anew for each call; None: no TLS.
        token: The value of the `authorization` header; None: none.
        options: Further options of the channel.
        diagnose: Says more about a connection that cannot be made; empty: nothing is known.
        identity: Vouches for this site's keys of secure aggregation; None where sites have no certificates.
    """

    address: str
    credentials: Callable[[], grpc.ChannelCredentials] | None
    token: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    diagnose: Callable[[], str] = lambda: ""
    identity: Identity | None = None


class SiteCaller:
    """Calls the server in the name of a client."""

    def __init__(self, client_id: int, server: ServerEnd, tell: Callable[[str], None]) -> None:
        self.client_id, self._server, self.tell = client_id, server, tell
        self.address, self.identity = server.address, server.identity
        self._last_problem = ""

    def ask(self) -> Reception:
        """Ask once which session there is.

        Raises:
            Refused: The server refuses this site.
            ConnectionError: There is no server, or it is not ready.
        """
        hello = Hello(self.client_id, "", "", 0, utc_s())
        with self.call(lambda: hello, iter(()), timeout_s=FIRST_ANSWER_S) as (welcome, _):
            return welcome

    def wait_for_session(
        self, clock: Clock, finished: str = "", meanwhile: Callable[[], None] = lambda: None
    ) -> Opening:
        """Ask until there is a session other than a `finished` one; do something `meanwhile`."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                welcome = self.ask()
                opening = None if welcome.is_over else welcome.opening
                if opening and opening.session != finished:
                    return opening
                self.say(HAS_LEFT if opening else "the server has no run for this site at present")
            except ConnectionError as problem:
                self.say(f"waiting for the server: {problem}")
            meanwhile()
            clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def say(self, problem: str) -> None:
        """Tell of a problem once, until another one comes."""
        if problem != self._last_problem:
            self._last_problem = problem
            self.tell(problem)

    @contextmanager
    def call(
        self, hello: Callable[[], Hello], frames: Iterator[bytes], timeout_s: float | None = None
    ) -> Iterator[tuple[Reception, Any]]:
        """Make one call; yield the server's greeting and the call, whose items are the server's frames.

        Raises:
            Refused: The server refuses this site.
            ConnectionError: The call cannot be made, or was cut.
        """

        def outgoing() -> Iterator[bytes]:
            yield greeting_to_bytes(hello())
            yield from frames

        server, options = self._server, [*SITE_OPTIONS, *self._server.options]
        credentials = server.credentials and server.credentials()
        metadata = (("authorization", server.token),) if server.token else ()
        try:
            with (
                grpc.insecure_channel(server.address, options)
                if credentials is None
                else grpc.secure_channel(server.address, credentials, options)
            ) as channel:
                exchange: Any = channel.stream_stream(METHOD)  # frames cross as they are
                call = exchange(outgoing(), timeout=timeout_s, metadata=metadata)
                try:
                    if (greeting := next(call, None)) is None:
                        raise ConnectionError("the server ended the call")
                    yield greeting_from_bytes(Reception, greeting), call
                finally:
                    call.cancel()
        except grpc.RpcError as error:
            self._raise(error)

    def _raise(self, error: Any) -> NoReturn:
        words = " ".join(str(error.details()).split())
        if error.code() in _FINAL:
            raise Refused(
                f"the server at {self._server.address} refuses client {self.client_id}: {words}",
                remedy="Waiting does not cure this. Clear it up with the server's operator, and start again.",
            ) from None
        more = self._server.diagnose() if error.code() == grpc.StatusCode.UNAVAILABLE else ""
        raise ConnectionError(more or words) from None


class SiteChannel:
    """One client's communication in one session.

    Args:
        caller: Calls the server.
        opening: The session.
        incarnation: A random word of this process.
        trace: Records waits; its spans go to the server's record. Its clock is real.
        lease_s: How long the site keeps its model without a sign of the server.
        decode: Makes of a message of the server what `receive` returns, as soon as it is there, while the compute
            thread computes.
    """

    def __init__(
        self,
        caller: SiteCaller,
        opening: Opening,
        incarnation: str,
        trace: Trace,
        *,
        lease_s: float,
        decode: Callable[[bytes], bytes | Message] = from_bytes,
    ) -> None:
        self._caller, self.opening, self._incarnation, self._decode = caller, opening, incarnation, decode
        self._trace, self._clock, self._lease_s = trace, trace.clock, lease_s
        self._origin_s = utc_s() - trace.clock.now()  # seconds since 1970 by the server's clock, at zero of ours
        self.inbox, self._attached = SiteInbox(trace.clock), trace.clock.mailbox()
        self.stream = NumberedStream(self._server_s, psutil.virtual_memory().total)
        self._interceptor: Interceptor | None = None
        self._intercepting = Lock()
        self._ended: BaseException | None = None
        self._failed: BaseException | None = None
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._heard_s = trace.clock.now()
        self._spans_told, self.tells_spans = 0, True  # whether the server may know when this site computed
        self._leaves, self._problem, self._is_open = True, "", False

    def open(self) -> bool:
        """Connect; return whether an earlier process of this site took part in the session.

        Raises:
            SessionOver: It has ended.
            Refused: The server refuses this site.
        """
        self._thread = start_thread(self._clock, self._keep_connected, "connection")
        while (item := self._attached.get_until(self._clock.now() + 1.0)) is None:
            pass
        if isinstance(item, BaseException):
            raise item
        self._worker = start_thread(self._clock, self._do_work, "outgoing")
        return bool(item)

    def intercept(self, interceptor: Interceptor) -> None:
        """Let an interceptor change the messages from now on."""
        self._interceptor = interceptor
        self._put(interceptor.opening())

    # ── the compute thread ──────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> SiteChannel:
        return self

    def __exit__(self, _: object, error: BaseException | None, tb: object) -> None:
        if error is None:  # the run is over, or stops
            self._leaves = False
            self._tell_spans()
        elif isinstance(error, ParaBlockError):
            self._problem = error.told

    def close(self) -> None:
        """Leave the session: say so, if the run goes on, and end the connection."""
        self._work.put(None)
        self._worker.join()
        self.inbox.close()
        if self._ended is None:
            if self._leaves:
                self.stream.put(to_bytes(Leave(self._problem)), 0)
            patience_s = PARTING_S if self.stream.has_connection else 0.0
            if self.stream.flush(patience_s):
                self.stream.say_bye(patience_s)
        self.stream.close()
        self._thread.join()

    def send(self, message: bytes, round_index: int) -> None:
        """Hand a message over to the stream to the server, or raise the channel's error; returns at once."""
        if (error := self._ended or self._failed) is not None:
            raise error
        self._tell_spans()
        self._work.put(partial(self._send, Parcel(message, round_index)))

    def defer(self, work: Callable[[], None]) -> None:
        """Let the channel do something before it sends what it is given from now on; returns at once.

        Its error surfaces in the compute thread, as those of the connection do, and nothing leaves after it.
        """
        self._work.put(work)

    def receive(self) -> bytes | Message:
        """Wait for the next message of the server.

        Raises:
            CodecError: It cannot be read.
            SessionOver: The session has ended.
            Refused: The server refuses this site.
            StallError: There has been no sign of the server for `lease_s`.
        """
        with self._trace.span(self._caller.client_id, "compute", "waiting"):
            while True:
                message: bytes | Message | None = self.inbox.take_until(self._clock.now() + 1.0)
                if message is not None:
                    return message
                if not self.stream.has_connection and self._clock.now() - self._heard_s > self._lease_s:
                    raise StallError(
                        f"no sign of the server for {self._lease_s:g} s",
                        cause="It, or the way to it, is down.",
                        remedy="Nothing is to be done here: the site goes on as soon as the server is back.",
                    )

    def _do_work(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._failed = error
                self.inbox.fail(error)
                return

    def _send(self, parcel: Parcel) -> None:
        if self._interceptor is None:
            self.stream.put(parcel.message, parcel.round_index)
            return
        with self._intercepting:
            self._put(self._interceptor.outgoing(parcel))

    def _tell_spans(self) -> None:
        spans = self._trace.spans[self._spans_told :] if self.tells_spans else []
        self._spans_told = len(self._trace.spans)
        rows = [[s.activity, self._origin_s + s.start_s, s.duration_s, s.facts] for s in spans]
        for first in range(0, len(rows), NOTE_ROWS):
            self.stream.put(json.dumps(rows[first : first + NOTE_ROWS]).encode(), 0, is_note=True)

    def _put(self, parcels: list[Parcel]) -> None:
        for parcel in parcels:
            self.stream.put(parcel.message, parcel.round_index)

    # ── the connection's thread ─────────────────────────────────────────────────────────────────────

    def _keep_connected(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self.stream.is_closed:
            try:
                with self._connection() as (welcome, numbers, call):
                    if welcome.opening is not None or welcome.is_over:
                        raise SessionOver
                    self._heard_s, pause_s = self._clock.now(), FIRST_PAUSE_S
                    self._caller.say(f"connected with {self._caller.address}")
                    self._carry(welcome, numbers, call)
            except ConnectionError as problem:
                self._caller.say(f"not connected, and tried again: {problem}")
            except BaseException as error:  # whatever it is, the compute thread has to hear of it
                ended = SessionOver() if isinstance(error, EOFError) else error
                self._ended = ended
                if self._is_open:
                    self.inbox.fail(ended)
                else:
                    self._attached.put(ended)
                self.stream.close()
                return
            if not self.stream.is_closed:
                self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    @contextmanager
    def _connection(self) -> Iterator[tuple[Reception, SimpleQueue[int | None], Any]]:
        """Make one call, whose frames wait for the number of its connection."""
        numbers: SimpleQueue[int | None] = SimpleQueue()
        asked_s = utc_s()

        def hello() -> Hello:
            session = self.opening.session
            return Hello(self._caller.client_id, session, self._incarnation, self.stream.wanted, asked_s)

        def frames() -> Iterator[bytes]:
            if (number := numbers.get()) is not None:
                yield from self.stream.frames(number)

        try:
            with self._caller.call(hello, frames()) as (welcome, call):
                came_s = utc_s()
                self._origin_s = welcome.now_s + (came_s - asked_s) / 2 - self._clock.now()
                yield welcome, numbers, call
        finally:
            numbers.put(None)

    def _carry(self, welcome: Reception, numbers: SimpleQueue[int | None], call: Any) -> None:
        try:
            connection = self.stream.attach(welcome.wanted)
        except CodecError:  # another process of this site has taken its place
            raise SessionOver from None
        numbers.put(connection)
        if not self._is_open:  # from now on a last word finds its way
            self._is_open = True
            self._attached.put(welcome.rejoins)
        try:
            for frame in call:
                self._heard_s = self._clock.now()
                self.stream.take(frame, connection, self._take)
                if self.inbox.await_room(call.is_active):
                    self._heard_s = self._clock.now()
        finally:
            self.stream.detach(connection)

    def _take(self, delivered: Delivered) -> None:
        if self._interceptor is not None:
            with self._intercepting:
                answers = self._interceptor.incoming(Parcel(delivered.content, delivered.round_index))
            if answers is not None:
                self._put(answers)
                return
        try:
            self.inbox.put(self._decode(delivered.content), len(delivered.content))
        except CodecError as error:  # the connection is none the worse for it
            self.inbox.fail(error)

    def _server_s(self) -> float:
        return self._origin_s + self._clock.now()
