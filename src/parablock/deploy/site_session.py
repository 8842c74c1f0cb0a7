"""A site in one session of a run: its trainer, its channel to the server, and what it keeps on its disk."""

from __future__ import annotations

import logging
import secrets
from contextlib import closing
from pathlib import Path

from parablock.clock import RealClock
from parablock.config.keys import RunConfig
from parablock.deploy.site import SiteConfig, configuration_at
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.site_channel import SiteCaller, SiteChannel
from parablock.engine.remote.site_client import run_client
from parablock.errors import DataError, ModelError, ParaBlockError
from parablock.experiment.engines import checkpoints_kept, client_plan, update_form
from parablock.experiment.inputs import read_inputs
from parablock.experiment.protections import adds_noise, masking_of, new_secret, releases_of
from parablock.methods.choose import make_method_model
from parablock.storage.audit_log import FILE_NAME, AuditLog
from parablock.storage.files import write_beside
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace

LOGGER = logging.getLogger("parablock")


def take_part(site: SiteConfig, caller: SiteCaller, opening: Opening) -> None:
    """Take part in a session to its end.

    Raises:
        SessionOver: The session has ended, or another has taken its place.
        Refused: The server refuses this site.
        ParaBlockError: This site cannot take part; the server has been told that it leaves.
    """
    trace = Trace(RealClock())
    channel = SiteChannel(caller, opening, secrets.token_hex(8), trace, lease_s=site.lease_s)
    rejoins = channel.open()
    with closing(channel), channel:
        _train(site, caller, channel, opening, trace, rejoins=rejoins)


def _train(
    site: SiteConfig, caller: SiteCaller, channel: SiteChannel, opening: Opening, trace: Trace, *, rejoins: bool
) -> None:
    config = configuration_at(site, opening.config)
    with trace.clock.working():
        job = read_inputs(config, all_rows_of=site.client_id if site.share == "all" else None)
    _check_base(config, site, str(job.manifest["base_sha256"]), opening.base_sha256)
    if not job.train[site.client_id]:
        raise DataError(
            f"client {site.client_id} has no rows to train on",
            remedy="Give its files in `data.train` of its own file.",
        )
    model = make_method_model(job, (site.client_id,))
    (trainer,) = model.trainers
    store = SiteStore(site.state_dir / opening.run)
    store.free_finished()
    secret = _noise_key(store.folder) if adds_noise(config) else None
    LOGGER.info("the model is there, and %d rows to train on", len(job.train[site.client_id]))
    plan = client_plan(config, model.form or update_form(config, secret, model.kinds), secret)
    releases = releases_of(config, AuditLog(site.state_dir / FILE_NAME), opening.run)
    _mask(caller, channel, config, releases, rejoins=rejoins)
    run_client(
        site.client_id,
        plan,
        trainer,
        channel,
        trace,
        store=store,
        take_params=model.take_params,
        marks_kept=checkpoints_kept(config),
        rejoins=rejoins,
        releases=releases,
    )


def _check_base(config: RunConfig, site: SiteConfig, own: str, servers: str) -> None:
    if own != servers:
        raise ModelError(
            f"{config.model.name_or_path} of client {site.client_id} is not the server's base model: "
            f"{own[:12]} and {servers[:12]}",
            cause="The two folders hold different weights, or another precision.",
            remedy="Copy the server's model folder to the site.",
        )


def _mask(
    caller: SiteCaller, channel: SiteChannel, config: RunConfig, releases: ReleaseLedger, *, rejoins: bool
) -> None:
    """Let updates leave masked, if the run says so."""
    masking, opening = masking_of(config), channel.opening
    if masking is None:
        return
    if rejoins:
        raise ParaBlockError(
            "this site ended while updates were masked, and its secrets with it",
            cause="Secrets are in memory alone.",
            remedy="The run goes on without this site; it takes part again once the server starts the run again.",
        )
    first_open = 0 if opening.restored < 0 else max(0, opening.restored - config.federation.delay)
    client = masking.client_side(
        caller.client_id,
        first_open,
        releases,
        identity=caller.identity,
        context=f"{opening.run} {opening.session}",
        tell=LOGGER.warning,
    )
    channel.intercept(client)


def _noise_key(folder: Path) -> bytes:
    """Read the key of this site's noise in this run, or make it; it never leaves the site."""
    path = folder / "noise_key"
    if not path.exists():
        with write_beside(path) as beside:
            beside.write_bytes(new_secret())
            beside.chmod(0o600)
    return path.read_bytes()
