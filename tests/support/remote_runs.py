"""A server and its sites over gRPC on the loopback, in threads that die when a test says so."""

from __future__ import annotations

import secrets
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Empty

from torch import Tensor

from engines import QUIET, engine_input
from parablock.clock import RealClock
from parablock.deploy.guarded_trainer import check_ledger
from parablock.engine.contract import EngineResult
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_engine import RunFacts, run_remote
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.remote.site_channel import Refused, ServerEnd, SessionOver, SiteCaller, SiteChannel
from parablock.engine.remote.site_client import run_client
from parablock.errors import LedgerError
from parablock.privacy.identities import Identity
from parablock.storage.checkpoint import RunState
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace
from toy import ToyTrainer, initial

BLOCKS = 4


class Died(BaseException):
    """A process is gone from one moment to the next."""


class Town:
    """Sites that stay, each in a thread, and servers that come one after another at one address."""

    def __init__(
        self,
        folder: Path,
        plan: ServerPlan,
        examples: Sequence[int],
        *,
        make_trainer: Callable[[int, int, None], ToyTrainer] = ToyTrainer,
        masking=None,
        identity_of: Callable[[int], Identity | None] = lambda _: None,
        protection_of=lambda _: None,
        address_of: Callable[[int, int], str] = lambda client_id, port: f"127.0.0.1:{port}",
        num_blocks: int = BLOCKS,
        keeps_releases: bool = False,
    ) -> None:
        self.keeps_releases = keeps_releases or masking is not None
        self.num_blocks = num_blocks
        self.folder, self.plan, self.examples, self.make_trainer = folder, plan, examples, make_trainer
        self.masking, self.protection_of, self.address_of = masking, protection_of, address_of
        self.identity_of = identity_of
        self.told, self.errors, self.refused = list[str](), list[BaseException](), list[LedgerError]()
        self.deaths, self.is_over = 0, threading.Event()
        self.channels = dict[int, SiteChannel]()
        self.listener: Listener | None = None
        self.transport: RemoteTransport | None = None
        self.port = 0
        self.threads = dict[int, threading.Thread]()
        self.releases = defaultdict[int, ReleaseLedger](partial(ReleaseLedger, is_masked=masking is not None))
        """What each site has released, and the server (−1), over all sessions."""

    def start(self, client_id: int) -> None:
        """Start a site's process."""
        self.threads[client_id] = threading.Thread(target=self._site, args=(client_id,), daemon=True)
        self.threads[client_id].start()

    def serve(self, hooks: Hooks = QUIET, resumed: RunState | None = None, *, sites: int | None = None, **options):
        """Run a server to its end, or its death."""
        everybody = len(self.examples)
        self.listener = Listener(
            f"127.0.0.1:{self.port}",
            None,
            lambda _: None,
            num_clients=everybody,
            tell=self.told.append,
            identity=self.identity_of(-1),
        )
        self.port = self.listener.port
        self.transport = None

        def on_open(transport: RemoteTransport) -> None:
            self.transport = transport
            options.get("on_open", lambda _: None)(transport)

        given = engine_input(
            self.served(),
            [],
            self.plan,
            Trace(RealClock()),
            hooks,
            resumed=resumed,
            masking=self.masking,
        )
        try:
            return run_remote(
                replace(given, releases=self.releases[-1]),
                self.listener,
                RunFacts("run", "", ""),
                num_sites=everybody if sites is None else sites,
                on_open=on_open,
            )
        finally:
            self.listener.close()

    def run(self, hooks: Hooks = QUIET) -> EngineResult:
        """Start all sites, run a server, and end."""
        for client_id in range(len(self.examples)):
            self.start(client_id)
        try:
            return self.serve(hooks)
        finally:
            self.end()

    def end(self) -> None:
        """End all sites."""
        self.is_over.set()
        for thread in self.threads.values():
            thread.join(20)
            assert not thread.is_alive()
        if self.errors:
            raise self.errors[0]

    def cut(self, client_id: int) -> None:
        """Cut a site's connection, as a router would."""
        stream = self.transport and self.transport.places[client_id].stream
        if stream:
            stream.detach(stream._connection)

    def params(self) -> list[Tensor]:
        """What every site begins with."""
        return initial(self.num_blocks)

    def served(self) -> list[Tensor]:
        """What the server begins with."""
        return initial(self.num_blocks)

    def before_sending(self, client_id: int, message: bytes) -> None:
        """Do what a site does before a message leaves it."""

    def _site(self, client_id: int) -> None:
        finished = ""
        while not self.is_over.is_set():
            try:
                finished = self._process(client_id, finished)
            except Died:
                self.deaths += 1
            except (SessionOver, Refused, Leaves):
                pass
            except LedgerError as error:
                self.refused.append(error)
                return
            except BaseException as error:
                self.errors.append(error)
                return

    def _process(self, client_id: int, finished: str) -> str:
        clock = RealClock()
        server = ServerEnd(self.address_of(client_id, self.port), None)
        caller = SiteCaller(client_id, server, lambda _: None)
        while not self.is_over.is_set():
            with suppress(ConnectionError):
                caller = SiteCaller(
                    client_id, ServerEnd(self.address_of(client_id, self.port), None), lambda _: None
                )
                welcome = caller.ask()
                if not welcome.is_over and welcome.opening.session != finished:
                    break
            clock.sleep(0.01)
        else:
            return finished
        trace = Trace(clock)
        channel = SiteChannel(caller, welcome.opening, secrets.token_hex(8), trace, lease_s=20.0)
        self.channels[client_id] = channel
        send = channel.send

        def send_later(message: bytes, round_index: int) -> None:
            self.before_sending(client_id, message)
            send(message, round_index)

        channel.send = send_later
        rejoins = channel.open()
        try:
            with channel:
                check_ledger(self.releases[client_id], welcome.opening)
                if self.masking:
                    restored = welcome.opening.restored
                    first_open = 0 if restored < 0 else max(0, restored - self.plan.delay)
                    signs = {"identity": self.identity_of(client_id), "context": welcome.opening.context}
                    channel.intercept(
                        self.masking.client_side(client_id, first_open, self.releases[client_id], **signs)
                    )
                run_client(
                    client_id,
                    ClientPlan(
                        "aligned", self.plan.form, self.plan.delay + 1, self.protection_of, len(self.examples)
                    ),
                    self.make_trainer(client_id, self.examples[client_id], None),
                    channel,
                    trace,
                    store=SiteStore(self.folder / str(client_id)),
                    take_params=self.params,
                    marks_kept=3,
                    rejoins=rejoins,
                    releases=self.releases[client_id] if self.keeps_releases else None,
                )
        except Died:  # who is dead says no bye, and does nothing that was still to be done
            channel.stream.close()
            with suppress(Empty):
                while True:
                    channel._work.get_nowait()
            channel._work.put(None)
            channel._worker.join()
            raise
        except BaseException:
            channel.close()
            raise
        channel.close()
        return welcome.opening.session


class Leaves(Exception):  # noqa: N818
    """A site is stopped by its operator."""
