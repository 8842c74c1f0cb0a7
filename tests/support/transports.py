"""Every transport behind one face: a server and its clients meet, exchange bytes, and part.

A new transport is one more row of `TRANSPORTS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from pages import ROOT, python_of
from parablock.clock import Clock, RealClock, VirtualClock
from parablock.engine.pipeline import Machines, Pipeline
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.remote.site_channel import ServerEnd, SessionOver, SiteCaller, SiteChannel
from parablock.errors import ParaBlockError
from parablock.trace import Trace
from parablock.wire.transport import Ledger, Link, MemoryTransport, Parcel

END = Parcel(b"the end", 99)
"""The server's last message, as every run has one: a client ends once it has it."""


class Gone(Exception):  # noqa: N818
    """Raised by a client that vanishes without a word."""


class Mail(Protocol):
    """A client's side, as its compute thread sees it."""

    def send(self, message: bytes, round_index: int) -> None: ...

    def receive(self) -> bytes: ...


class Meet(Protocol):
    """Let a server and clients, numbered from 0, do what they do; return what was counted.

    Args:
        server: Called with the server's end and its clock.
        client: Called with its number and its side, in a thread of each client.
        num_clients: How many there are.
        patience_s: How long anybody waits where nothing moves, seconds.
        asked_to_stop: Whether the user wants the run to stop.
    """

    def __call__(
        self,
        server: Callable[[RemoteTransport | MemoryTransport, Clock], None],
        client: Callable[[int, Mail], None],
        *,
        num_clients: int = 2,
        patience_s: float = 10.0,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Ledger: ...


def part(transport: RemoteTransport | MemoryTransport, num_clients: int) -> None:
    for client_id in range(num_clients):
        transport.send(client_id, END)


def in_memory(make_clock: Callable[[], Clock], folder: Path) -> Meet:
    def meet(server, client, *, num_clients=2, patience_s=10.0, asked_to_stop=lambda: False):
        clock = make_clock()
        transport, trace = MemoryTransport(clock, Link(), num_clients, asked_to_stop), Trace(clock)

        def body(client_id: int) -> None:
            try:
                with Pipeline(client_id, transport, trace, stall_timeout_s=patience_s) as mail:
                    client(client_id, mail)
                    assert mail.receive() == END.message
            except Gone:
                transport.detach(client_id)

        bodies = [partial(body, client_id) for client_id in range(num_clients)]
        with Machines(clock, bodies, transport.fail, stall_timeout_s=patience_s):
            server(transport, clock)
            part(transport, num_clients)
        return transport.ledger

    return meet


def in_a_folder(folder: Path) -> Meet:
    made = python_of((ROOT / "docs/extending.md").read_text(), "class FolderTransport")

    def meet(server, client, *, num_clients=2, patience_s=10.0, asked_to_stop=lambda: False):
        clock = RealClock()
        transport = made.FolderTransport(folder, num_clients, clock, asked_to_stop)

        def body(client_id: int) -> None:
            with suppress(Gone), made.FolderMailbox(folder, client_id, clock, patience_s) as mail:
                client(client_id, mail)
                assert mail.receive() == END.message

        bodies = [partial(body, client_id) for client_id in range(num_clients)]
        with Machines(clock, bodies, transport.fail, stall_timeout_s=patience_s):
            server(transport, clock)
            part(transport, num_clients)
        return transport.ledger

    return meet


def over_grpc(folder: Path) -> Meet:
    def meet(server, client, *, num_clients=2, patience_s=10.0, asked_to_stop=lambda: False):
        clock, opening = RealClock(), Opening("run", "session", "", "")
        transport = RemoteTransport(opening, num_clients, 100, 1 << 20, Trace(clock), asked_to_stop=asked_to_stop)
        listener = Listener("127.0.0.1:0", None, lambda _: None, num_clients=num_clients, tell=lambda _: None)
        listener.open(transport)
        failed = clock.mailbox()

        def body(client_id: int) -> None:
            caller = SiteCaller(client_id, ServerEnd(f"127.0.0.1:{listener.port}", None), lambda _: None)
            channel = SiteChannel(
                caller, opening, f"process{client_id}", Trace(RealClock()), lease_s=patience_s, decode=bytes
            )
            channel.open()
            try:
                with suppress(SessionOver), channel:
                    client(client_id, channel)
                    assert channel.receive() == END.message
            except Gone:
                channel.stream.close()
                gone.add(client_id)
            except ParaBlockError as error:
                failed.put(error)
            finally:
                if client_id not in gone:
                    channel.close()

        gone = set[int]()
        threads = [threading.Thread(target=body, args=(client_id,)) for client_id in range(num_clients)]
        for thread in threads:
            thread.start()
        while len(transport.there) < num_clients:
            time.sleep(0.001)
        transport.begin()
        try:
            server(transport, clock)
            part(transport, num_clients)
            transport.close(patience_s)
        finally:
            transport.leave()
            for thread in threads:
                thread.join()
            listener.close()
        return transport.ledger

    return meet


TRANSPORTS: dict[str, Callable[[Path], Meet]] = {
    "memory, real clock": partial(in_memory, RealClock),
    "memory, virtual clock": partial(in_memory, VirtualClock),
    "gRPC": over_grpc,
    "files in a folder": in_a_folder,
}


CONNECTED = {"gRPC"}
"""Transports whose connection is a sign of life, also while the server has nothing to say."""
