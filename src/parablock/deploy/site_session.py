"""A site in one session of a run: it joins, trains, and ends or leaves, all of it in its log."""

from __future__ import annotations

import secrets
import sys
from contextlib import closing
from hashlib import sha256

from parablock.clock import RealClock
from parablock.deploy.allocation import libraries_load
from parablock.deploy.site import SiteConfig
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.site_channel import SiteCaller, SiteChannel
from parablock.errors import ParaBlockError
from parablock.storage.audit_log import AuditLog
from parablock.trace import Trace


def take_part(site: SiteConfig, caller: SiteCaller, opening: Opening) -> None:
    """Take part in a session to its end.

    Raises:
        SessionOver: The session has ended, or another has taken its place.
        Refused: The server refuses this site.
        ParaBlockError: This site cannot take part; the server has been told that it leaves.
    """
    trace, log = Trace(RealClock()), AuditLog(site.audit_log)
    channel = SiteChannel(caller, opening, secrets.token_hex(8), trace, lease_s=site.lease_s)
    channel.tells_spans = "timeline" in site.policy.metrics
    rejoins = channel.open()
    log.append(
        "join",
        run=opening.run,
        session=opening.session,
        server=caller.address,
        config_sha256=sha256(opening.config.encode()).hexdigest(),
        base_sha256=opening.base_sha256,
    )
    try:
        with closing(channel), channel:
            load_libraries()
            from parablock.deploy.site_training import train

            train(site, caller, channel, trace, log, rejoins=rejoins)
    except ParaBlockError as error:
        log.append("leave", run=opening.run, words=error.what)
        raise
    log.append("end", run=opening.run, session=opening.session)


def load_libraries() -> None:
    """Load what trains, unless it is there."""
    if "parablock.deploy.site_training" not in sys.modules:
        with libraries_load():
            import parablock.deploy.site_training  # noqa: F401
