"""A server's door on the loopback, at which a real site asks for a session that it cannot take part in."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from parablock.clock import RealClock
from parablock.deploy.site import SiteConfig
from parablock.deploy.site_session import take_part
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.engine.remote.site_channel import ServerEnd, SiteCaller
from parablock.errors import ParaBlockError
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Trace
from parablock.wire.messages import Leave, from_bytes


class Door:
    """A server that opens one session after another, and hears what a site says."""

    def __init__(self) -> None:
        self.listener = Listener("127.0.0.1:0", None, lambda _: None, num_clients=8, tell=lambda _: None)
        self._sessions = 0

    def take_part(
        self,
        site: SiteConfig,
        shared: str,
        base_sha256: str,
        base_parts: Mapping[str, str] | None = None,
        releases: ReleaseLedger | None = None,
    ) -> tuple[ParaBlockError, Leave]:
        """Let a site take part, which must fail; return its error, and what the server heard of it."""
        self._sessions += 1
        opening = Opening("run", f"s{self._sessions}", shared, base_sha256, base_parts=dict(base_parts or {}))
        transport = RemoteTransport(opening, 8, 64, 1 << 20, Trace(RealClock()), releases=releases)
        self.listener.open(transport)
        end = ServerEnd(f"127.0.0.1:{self.listener.port}", None)
        caller = SiteCaller(site.client_id, end, lambda _: None)
        asked = caller.ask().opening
        assert asked is not None and asked.session == opening.session
        with pytest.raises(ParaBlockError) as caught:
            take_part(site, caller, asked)
        heard = transport.receive_until(transport.clock.now() + 20)
        assert heard is not None
        client_id, message = heard
        leave = from_bytes(message)
        assert client_id == site.client_id and isinstance(leave, Leave)
        return caught.value, leave
