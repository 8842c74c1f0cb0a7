"""What a site does in a session once it is connected: its rows, its model, its trainer, its part in the rounds.

The libraries of models load with this module. The server sees the site by then.
"""

from __future__ import annotations

import logging
from pathlib import Path

from parablock.config.keys import RunConfig
from parablock.deploy.guarded_trainer import GuardedTrainer, SitePolicy, check_ledger
from parablock.deploy.site import SiteConfig, configuration_at
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.site_channel import SiteCaller, SiteChannel
from parablock.engine.remote.site_client import run_client
from parablock.errors import DataError, ModelError, ParaBlockError, StorageError
from parablock.experiment.engines import checkpoints_kept, client_plan, form_of
from parablock.experiment.inputs import BaseModel, read_inputs
from parablock.experiment.protections import adds_noise, masking_of, new_secret, releases_of
from parablock.methods.choose import make_method_model
from parablock.model.save import different_parts
from parablock.storage.audit_log import AuditLog
from parablock.storage.files import write_beside
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.run_directory import SECRET_BYTES
from parablock.storage.site_store import SiteStore
from parablock.trace import Trace

LOGGER = logging.getLogger("parablock")


def train(
    site: SiteConfig, caller: SiteCaller, channel: SiteChannel, trace: Trace, log: AuditLog, *, rejoins: bool
) -> None:
    """Train in a session, over its channel, to its end; see `take_part`.

    `log` gets what the policy finds and what is released; `rejoins` says that an earlier process took part.
    """
    LOGGER.info("reads its rows and its model")
    opening = channel.opening
    config = configuration_at(site, opening.config)
    lost_through = site.lost_ledgers.get(opening.run, -1)
    releases = releases_of(config, log, opening.run, lost_through=lost_through)
    check_ledger(releases, opening)  # before a row is read, as the policy
    guard = SitePolicy(site.policy, log, opening.run, config, lost_through=lost_through)
    guard.record_lost()
    guard.check_run(opening.base_sha256)
    with trace.clock.working():
        job = read_inputs(
            config,
            all_rows_of=site.client_id if site.share == "all" else None,
            check_base=lambda base: _check_base(site, base, opening),
        )
    if not job.train[site.client_id]:
        raise DataError(
            f"client {site.client_id} has no rows to train on",
            remedy="Give its files in `data.train` of its own file.",
        )
    guard.check_rows(len(job.train[site.client_id]), job.left_out)
    model = make_method_model(job, (site.client_id,))
    (trainer,) = model.trainers
    store = SiteStore(site.state_dir / "runs" / opening.run)  # whatever a server calls its run
    store.free_finished()
    secret = _noise_key(store.folder) if adds_noise(config) else None
    LOGGER.info("the model is there, and %d rows to train on", len(job.train[site.client_id]))
    for line in job.left_out:
        LOGGER.warning("%s", line)
    plan = client_plan(config, form_of(model, config, secret), secret)
    _mask(caller, channel, config, releases, rejoins=rejoins)
    run_client(
        site.client_id,
        plan,
        GuardedTrainer(trainer, guard, tells_loss="train_loss" in site.policy.metrics),
        channel,
        trace,
        store=store,
        take_params=model.take_params,
        marks_kept=checkpoints_kept(config),
        rejoins=rejoins,
        releases=releases,
    )


def _check_base(site: SiteConfig, own: BaseModel, opening: Opening) -> None:
    if own.sha256 != opening.base_sha256:
        raise ModelError(
            f"{site.model.name_or_path} of client {site.client_id} is not the server's base model: "
            + different_parts(own.parts, opening.base_parts),
            cause="The two folders differ, or the precision, or the versions of the libraries that read them.",
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
            "updates are masked, and this site has no secrets of this session",
            cause="They are made when it begins, and are in memory alone: the site ended since, or was not there.",
            remedy="The run goes on without this site; it takes part again once the server starts the run again.",
        )
    first_open = 0 if opening.restored < 0 else max(0, opening.restored - config.federation.delay)
    client = masking.client_side(
        caller.client_id,
        first_open,
        releases,
        identity=caller.identity,
        context=opening.context,
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
    key = path.read_bytes()
    if len(key) != SECRET_BYTES:
        raise StorageError(
            f"{path} holds {len(key)} bytes, not the {SECRET_BYTES} of a key",
            cause="It was changed, or the disk lost a part of it.",
            remedy="Put it back. With another key the noise of rounds that were released would not be the same.",
        )
    return key
