"""The ClientApp of a site, as Flower loads it: the trainer itself, which stays in one message for a whole run.

It runs what is installed at the site. Flower may interrupt it at any time: the SuperNode is gone, or the run is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from parablock.clock import RealClock
from parablock.deploy.site import SiteConfig, is_simulated, load_site, site_file
from parablock.deploy.site_service import only_process
from parablock.deploy.site_session import take_part
from parablock.engine.flower.joining import (
    FAILED,
    OVER,
    REFUSED,
    SIMULATED,
    UNREACHABLE,
    Invitation,
    client_app,
)
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.grpc_options import settle_environment
from parablock.engine.remote.site_channel import Refused, SessionOver, SiteCaller
from parablock.errors import ConfigError, ParaBlockError, StallError

LOGGER = logging.getLogger("parablock")
PAUSE_S = 1.0
CONNECT_S = 120.0
"""How long a server that has invited the site may be out of reach before the site asks for another invitation: that
of another run comes to a node only once this one is answered."""
PARTING_S = 3.0
"""How long a server that has ended the session may be out of reach."""
OTHER_SERVER = "CERTIFICATE_VERIFY_FAILED"
"""gRPC's word where the certificate is not the one of the invitation: the run has another server by now."""


def join(invitation: Invitation, context: Any) -> str:
    """Take part in the run that an invitation is for; return why that is over. Details stay in this site's log."""
    try:
        if is_simulated(context.node_config):
            LOGGER.error(
                "this is Flower's simulation, which has no sites. Simulate with `parablock run` and "
                "engine.clock: virtual; for a federation start SuperNodes."
            )
            return SIMULATED
        site = load_site(site_file(context.node_config))
        site = site.model_copy(
            update={"lease_s": min(site.lease_s, CONNECT_S)}
        )  # another server waits behind this one
        server = invitation.server(site.client_id, server_host(context.node_config))
        with only_process(site):
            return take_part_until_over(site, SiteCaller(site.client_id, server, LOGGER.info))
    except ParaBlockError as error:
        LOGGER.error("this site leaves the run: %s", error.in_one_line)
    except Exception:  # Flower would tell the server its text
        LOGGER.exception("this site leaves the run")
    return FAILED


def server_host(node_config: Mapping[str, Any]) -> str:
    """Return the name or address of the server, as this site reaches it.

    Raises:
        ConfigError: The SuperNode does not say it.
    """
    host = node_config.get("data-host") or node_config.get("server-host")
    if not host:
        problem = '--node-config has no server-host: give the host of --superlink there too, as server-host="HOST"'
        raise ConfigError([problem], source="the SuperNode")
    return str(host)


def take_part_until_over(
    site: SiteConfig,
    caller: SiteCaller,
    take_part: Callable[[SiteConfig, SiteCaller, Opening], None] = take_part,
) -> str:
    """Take part in sessions until there is no more to do; return why.

    Raises:
        ParaBlockError: This site cannot take part.
    """
    clock = RealClock()
    give_up_s = clock.now() + CONNECT_S
    while True:
        try:
            welcome = caller.ask()
            if welcome.is_over or welcome.opening is None:
                return OVER
            LOGGER.info("takes part in run %s, session %s", welcome.opening.run, welcome.opening.session)
            take_part(site, caller, welcome.opening)
            LOGGER.info("the run has ended, or stops")
            return OVER
        except SessionOver:
            LOGGER.info("the session has ended")
            give_up_s = clock.now() + PARTING_S  # most often the server ends with it
        except Refused as error:
            LOGGER.error("%s", error.in_one_line)
            return REFUSED
        except StallError as error:
            LOGGER.error("%s", error.in_one_line)
            return UNREACHABLE
        except ConnectionError as problem:
            caller.say(f"waiting for the server: {problem}")
            if OTHER_SERVER in str(problem) or clock.now() > give_up_s:
                return UNREACHABLE
        clock.sleep(PAUSE_S)


def _join(invitation: Invitation, context: Any) -> str:
    logging.basicConfig(format="%(asctime)s %(message)s")  # into the log of the SuperNode, or of its helper
    LOGGER.setLevel(logging.INFO)
    settle_environment()
    return join(invitation, context)


app = client_app(_join)
