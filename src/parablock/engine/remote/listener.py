"""The server's door: one TCP port, and a stream for each site that may enter.

Nothing of a call is read before its identity is known, and nothing of it is kept before its greeting fits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Protocol
from urllib.parse import unquote

import grpc

from parablock.engine.pipeline import thread_pool
from parablock.engine.remote.frames import Hello, Reception, greeting_from_bytes, greeting_to_bytes
from parablock.engine.remote.grpc_options import METHOD, SERVER_OPTIONS
from parablock.engine.remote.numbered_stream import Delivered, NumberedStream
from parablock.errors import CodecError, InputError, ParaBlockError
from parablock.privacy.identities import Identity

QUIET_S, MOST_REFUSALS = 60.0, 1000
"""How long a refusal is not told again, so that callers who ask on and on fill no log; how many are remembered."""
MOST_UNNAMED = 20
"""How many callers without a name are told of in `QUIET_S`: they have as many addresses as they like."""
GRACE_S = 2.0
"""How long connections may take to end when the listener closes."""


@dataclass(frozen=True)
class Caller:
    """A call before its greeting.

    Attributes:
        address: Where it comes from, for the log.
        name: The name in its certificate; empty without one.
        certificate: Its certificate, PEM; empty without one.
        token: The value of the `authorization` header; empty without one.
    """

    address: str
    name: str
    certificate: bytes
    token: str


class NotAdmitted(Exception):  # noqa: N818  (it is an answer)
    """The call is refused; `str` says why, to the caller and the log. Waiting cures it only if `is_temporary`."""

    def __init__(self, why: str, *, is_temporary: bool = False) -> None:
        super().__init__(why)
        self.is_temporary = is_temporary


class Session(Protocol):
    """What stands behind the door: the run, as far as calls are concerned."""

    def welcome(self, hello: Hello) -> tuple[Reception, NumberedStream | None]:
        """Return the answer to a greeting, and the stream that the call goes on with; None: the call ends.

        Raises:
            NotAdmitted: The site cannot take part.
        """

    def moved(self, client_id: int) -> None:
        """Note that something has come which the run waits for."""

    def deliver(self, client_id: int, stream: NumberedStream, delivered: Delivered) -> None:
        """Take a message; waits while too many wait already.

        Raises:
            CodecError: It cannot come over this stream.
        """

    def begins(self, client_id: int, stream: NumberedStream, first_part: bytes, round_index: int) -> None:
        """Note that a message begins to come, before it is taken."""

    def left(self, client_id: int, stream: NumberedStream) -> None:
        """Note that a site says bye."""

    def fail(self, error: ParaBlockError) -> None:
        """End the run with an error of the server's own, such as that its disk is full."""


class Listener(grpc.GenericRpcHandler):
    """The listening end of all connections.

    Args:
        address: host:port; port 0 is any free one.
        credentials: gRPC's credentials of the server; None: no TLS.
        admit: Returns the client id that a caller may take, or None for any. Raises `NotAdmitted`.
        num_clients: Sites that may be connected at a time.
        tell: Gets a line for the log.
        identity: Checks what sites sign; None where they have no certificates of an authority.

    Attributes:
        port: Where it listens.
        tell: As given; another one may take its place.
        tell_of_unnamed: Gets the lines on callers without a certificate; likewise.
        look: Called now and then by whoever shows the listener.
        certificates: The certificate with which each client was last let in, PEM; empty without one.
        refused: How many calls were refused.

    Raises:
        InputError: The address cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ServerCredentials | None,
        admit: Callable[[Caller], int | None],
        *,
        num_clients: int,
        tell: Callable[[str], None],
        identity: Identity | None = None,
    ) -> None:
        self._admit, self.tell, self.tell_of_unnamed, self.identity = admit, tell, tell, identity
        self.look: Callable[[], None] = lambda: None
        self._session: Session | None = None
        self._calls: dict[Any, grpc.ServicerContext] = {}
        self.certificates: dict[int, bytes] = {}
        self.refused = 0
        self._refusals: dict[tuple[str, str], tuple[float, int]] = {}
        self._unnamed_told_s = deque[float](maxlen=MOST_UNNAMED)
        self._pool = thread_pool(4 * num_clients + 8)
        self._server = grpc.server(
            self._pool, handlers=[self], options=SERVER_OPTIONS, maximum_concurrent_rpcs=2 * num_clients + 4
        )
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InputError(
                f"the server cannot listen at {address}: {error}",
                cause="Another program listens there, or the address is not one of this machine.",
                remedy="Look for it with `ss -ltnp`, or choose another --address.",
            ) from None
        self._server.start()

    def open(self, session: Session) -> None:
        """Let sites in from now on."""
        self._session = session

    def close(self) -> None:
        """End all connections and free the port."""
        self._server.stop(GRACE_S).wait()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Answer gRPC's question for the handler of a method."""
        if handler_call_details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._serve)

    def _serve(self, incoming: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        caller = _caller_of(context)
        try:
            may_be = self._admit(caller)
            self._only_newest(caller if may_be is None else may_be, context)
            hello = greeting_from_bytes(Hello, next(incoming, b""))
            if may_be not in (None, hello.client_id):
                raise NotAdmitted(f"the certificate of {caller.name} is not that of client {hello.client_id}")
            if self._session is None:
                raise NotAdmitted("the server is not ready yet: it reads its model", is_temporary=True)
            session = self._session
            welcome, stream = session.welcome(hello)
        except CodecError as problem:
            self._refuse(caller, context, str(problem).replace("\n", " "), is_temporary=False)
        except NotAdmitted as problem:
            self._refuse(caller, context, str(problem), is_temporary=problem.is_temporary)
        yield greeting_to_bytes(welcome)
        if stream is None:
            return
        try:
            connection = stream.attach(hello.wanted)
        except CodecError as problem:
            self._refuse(caller, context, str(problem).replace("\n", " "), is_temporary=True)
        ended = partial(self._detach, hello.client_id, session, stream, connection, "the connection ended")
        context.add_callback(ended)
        self.certificates[hello.client_id] = caller.certificate
        self._tell_of_site(session, f"client {hello.client_id} is connected, from {caller.address}")
        self._pool.submit(self._read, hello.client_id, incoming, session, stream, connection)
        yield from stream.frames(connection)

    def _only_newest(self, who: object, context: grpc.ServicerContext) -> None:
        """End an earlier call of the same site: the newest wins."""
        before = self._calls.get(who)
        self._calls[who] = context
        if before is not None:
            before.cancel()

        def ended() -> None:
            if self._calls.get(who) is context:
                del self._calls[who]

        context.add_callback(ended)

    def _read(
        self,
        client_id: int,
        incoming: Iterator[bytes],
        session: Session,
        stream: NumberedStream,
        connection: int,
    ) -> None:
        why = "the connection ended"
        deliver, begins = (partial(how, client_id, stream) for how in (session.deliver, session.begins))
        try:
            for frame in incoming:
                if not stream.is_present(connection):
                    return
                if stream.take(frame, connection, deliver, begins):
                    session.moved(client_id)
        except EOFError:
            session.left(client_id, stream)
            why = "it says bye"
        except CodecError as problem:
            why = f"refused: {problem.what}"
            self.refused += 1
        except ParaBlockError as error:  # it is the server's own
            session.fail(error)
            why = "the server fails"
        except Exception as cut:  # gRPC's iterator raises a bare Exception when a call is cut
            why = f"the connection was cut {cut}".strip()
        finally:
            self._detach(client_id, session, stream, connection, why)

    def _detach(self, client_id: int, session: Session, stream: NumberedStream, connection: int, why: str) -> None:
        if stream.detach(connection):
            self._tell_of_site(session, f"client {client_id} is not connected any more: {why}")

    def _tell_of_site(self, session: Session, line: str) -> None:
        try:
            self.tell(line)
        except ParaBlockError as error:  # what is told is recorded too
            session.fail(error)

    def _refuse(self, caller: Caller, context: grpc.ServicerContext, why: str, *, is_temporary: bool) -> None:
        if not is_temporary:
            self.note_refusal(caller, why)
        status = grpc.StatusCode  # UNAVAILABLE would mean that there is no connection
        context.abort(status.FAILED_PRECONDITION if is_temporary else status.PERMISSION_DENIED, why)

    def note_refusal(self, caller: Caller, why: str) -> None:
        """Count and tell a refusal; tell the same one again only after a while, with how many came meanwhile.

        Beyond `MOST_UNNAMED` in a while, callers without a name are counted alone.
        """
        self.refused += 1
        now_s, who = time.monotonic(), (caller.name or caller.address.rpartition(":")[0], why)
        told_s, untold = self._refusals.get(who, (-inf, 0))
        if now_s - told_s < QUIET_S:
            self._refusals[who] = told_s, untold + 1
            return
        if not caller.name:
            last_s = self._unnamed_told_s
            if len(last_s) == MOST_UNNAMED and now_s - last_s[0] < QUIET_S:
                return
            last_s.append(now_s)
        if len(self._refusals) >= MOST_REFUSALS:
            self._refusals.clear()
        self._refusals[who] = now_s, 0
        more = f" ({untold} more times since it was said)" if untold else ""
        tell = self.tell if caller.name else self.tell_of_unnamed
        tell(f"refused {caller.name or 'a caller'} from {caller.address}: {why}{more}")


def _caller_of(context: grpc.ServicerContext) -> Caller:
    known: Any = context.auth_context()
    token = dict(context.invocation_metadata()).get("authorization", "")
    (name, *_), (certificate, *_) = known.get("x509_common_name", [b""]), known.get("x509_pem_cert", [b""])
    return Caller(unquote(context.peer()), name.decode(errors="replace"), certificate, str(token))
