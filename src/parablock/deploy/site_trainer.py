"""The long-lived trainer of a site: `python -m parablock.deploy.site_trainer SITE.yaml SESSION_FOLDER`.

A ClientApp starts it, and it outlives that ClientApp and the SuperNode. It keeps the model, trains while Flower
carries bytes, writes its snapshots into the site's state folder, and ends with the run or with its lease.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from parablock.algorithm.parablock import NEVER, ClientState, ServerState, initial_client, initial_server
from parablock.clock import RealClock
from parablock.config.keys import RunConfig
from parablock.deploy.site import SiteConfig, configuration_at, load_site
from parablock.engine.client import Client, Communication, restore_client
from parablock.engine.flower.local_socket import address_of, listen, secret_of
from parablock.engine.flower.mailbox import TrainerMailbox
from parablock.engine.flower.masked import MaskedMailbox
from parablock.engine.flower.session import Position, SessionFolder
from parablock.engine.plans import ClientStart
from parablock.engine.update_form import UpdateForm
from parablock.errors import CheckpointError, DataError, ModelError
from parablock.experiment.engines import checkpoints_kept, client_plan, update_form
from parablock.experiment.inputs import read_inputs
from parablock.experiment.protections import adds_noise, masking_of, new_secret
from parablock.methods.choose import make_method_model
from parablock.storage.checkpoint import ClientSnapshot, RunState, load_newest, save_checkpoint
from parablock.trace import Trace


def main(site_file: Path, session: Path) -> None:
    """Serve one session of one run."""
    site = load_site(site_file)
    folder = SessionFolder(site.state_dir, session.parent.name, session.name.removeprefix("session-"))
    with (site.state_dir / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one copy of the model at a site: an earlier trainer goes first
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _serve(site, folder)


def _serve(site: SiteConfig, folder: SessionFolder) -> None:
    clock = RealClock()
    trace = Trace(clock)
    mailbox = TrainerMailbox(
        site.client_id,
        listen(address_of(site.state_dir)),
        secret_of(site.state_dir),
        folder,
        trace,
        epoch_s=datetime.now(UTC).timestamp() - clock.now(),
        lease_s=site.lease_s,
    )
    with mailbox:  # it answers from now on, also with whatever goes wrong below
        _train(site, folder, mailbox, trace)


def _train(site: SiteConfig, folder: SessionFolder, mailbox: TrainerMailbox, trace: Trace) -> None:
    request = folder.opened_by()
    config = configuration_at(site, request.config)
    with trace.clock.working():
        job = read_inputs(config, all_rows_of=site.client_id if site.share == "all" else None)
    if job.manifest["base_sha256"] != request.base_sha256:
        raise ModelError(
            f"{config.model.name_or_path} of client {site.client_id} is not the server's base model: "
            f"{job.manifest['base_sha256'][:12]} and {request.base_sha256[:12]}",
            cause="The two folders hold different weights, or another precision.",
            remedy="Copy the server's model folder to the site.",
        )
    if not job.train[site.client_id]:
        raise DataError(
            f"client {site.client_id} has no rows to train on",
            remedy="Give its files in `data.train` of its own file.",
        )
    model = make_method_model(job, (site.client_id,))
    (trainer,) = model.trainers
    secret = folder.secret(new_secret) if adds_noise(config) else None
    plan = client_plan(config, model.form or update_form(config, secret), secret)

    def hand_in(round_index: int, taken: ClientSnapshot) -> None:
        save_checkpoint(folder.snapshots, _stored(round_index, taken, client.state), keep=checkpoints_kept(config))
        in_flight = sum(map(len, taken.sent.values()))
        # what has come ahead of its commit is taken again, and with it this very mark
        again = client.chunks_ahead + 1 if client.chunks_ahead else 0
        folder.move_to(Position(round_index, mailbox.wanted_before(again), mailbox.first_sent(in_flight)))

    client = Client(
        site.client_id,
        plan,
        trainer,
        _sealed(mailbox, folder, config, site.client_id),
        trace,
        start=_start(folder, model.take_params(), plan.form),
        hand_in=hand_in,
        warn=logging.getLogger("parablock").warning,
    )
    client.run()


def _sealed(
    mailbox: TrainerMailbox, folder: SessionFolder, config: RunConfig, client_id: int
) -> AbstractContextManager[Communication]:
    """Return the channel that the client sends through: the mailbox, or one that masks the updates first."""
    masking = masking_of(config)
    if masking is None:
        return nullcontext(mailbox)
    folder.begin_secrets()
    restored = folder.position.round_index
    first_open = 0 if restored is None else max(0, restored - config.federation.delay)
    return MaskedMailbox(mailbox, masking.client_side(client_id, first_open))


def _start(folder: SessionFolder, params: tuple[Tensor, ...], form: UpdateForm) -> ClientStart:
    """Return where the session goes on: the newest snapshot of it, or the base model."""
    round_index = folder.position.round_index
    if round_index is None:
        return ClientStart(initial_client(params))
    stored, passed_over = load_newest(folder.snapshots, {round_index})
    if stored is None:
        raise CheckpointError(
            f"there is no snapshot of round {round_index} in {folder.snapshots}",
            cause="; ".join(passed_over) or "It was removed.",
            remedy="Start the run anew; what was trained stands in the server's checkpoints.",
        )
    (snapshot,) = stored.clients
    return restore_client(snapshot, stored.server, form)


def _stored(round_index: int, snapshot: ClientSnapshot, state: ClientState) -> RunState:
    """Make a checkpoint of one client: its base stands where a run's checkpoint has the server's parameters."""
    blocks = {own.round_index: own.block_index for own in state.in_flight}
    base: ServerState = replace(
        initial_server(state.base),
        versions=state.versions,
        rho=state.rho,
        committed=min(blocks, default=round_index) - 1 if blocks else NEVER,
        history=tuple(blocks.get(t, 0) for t in range(round_index)),
        local_steps=((0,),) * round_index,
    )
    return RunState(round_index, base, (replace(snapshot, client_id=0),), {}, [])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
