"""The client of a site: the client of every engine, with a disk from which it goes on after any death."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from parablock.algorithm.parablock import ClientState, initial_client, put_in_flight
from parablock.engine.client import Client
from parablock.engine.plans import ClientPlan, ClientStart
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.site_channel import SiteChannel
from parablock.engine.update_form import UpdateForm
from parablock.storage.checkpoint import ClientSnapshot
from parablock.storage.release_ledger import ReleaseLedger
from parablock.storage.site_store import SiteStore, StoredClient
from parablock.trace import Trace
from parablock.wire.messages import Update, from_bytes

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer

LOGGER = logging.getLogger("parablock")


def run_client(
    client_id: int,
    plan: ClientPlan,
    trainer: Trainer,
    channel: SiteChannel,
    trace: Trace,
    *,
    store: SiteStore,
    take_params: Callable[[], Sequence[Tensor]],
    marks_kept: int,
    rejoins: bool,
    releases: ReleaseLedger | None = None,
) -> None:
    """Run a client through a session, from its newest state that belongs to the run, or from the initial
    parameters, which `take_params` returns, one flat vector for each block, and keeps none of.

    Its state is on the disk before an update leaves; the next round may be trained meanwhile. `rejoins` says that
    an earlier process took part in the session, and `releases` what this site has released. What was stored of a
    finished run goes when the next run begins.
    """
    opening = channel.opening

    def hand_in(round_index: int, taken: ClientSnapshot) -> None:
        if not client.is_rejoining and max(taken.sent, default=-1) < round_index:
            mark = opening.session_of(round_index), round_index, client.state, taken
            channel.defer(lambda: store.save_mark(*mark, keep=marks_kept))

    def keep(record: Callable[[], None]) -> None:
        newest = client.state.in_flight[-1]
        end = newest.round_index + 1
        latest = opening.session_of(end), end, client.state, client.snapshot()
        channel.defer(lambda: store.save_latest(*latest))
        channel.defer(record)
        LOGGER.info("round %d: block %d trained", end, newest.block_index)  # to people, rounds count from 1

    client = Client(
        client_id,
        plan,
        trainer,
        nullcontext(channel),
        trace,
        start=replace(_start(store, opening, take_params(), plan.form, rejoins=rejoins), releases=releases),
        hand_in=hand_in,
        warn=LOGGER.warning,
    )
    client.run(keep)
    if client.has_finished:
        channel.defer(store.finish)


def _start(
    store: SiteStore, opening: Opening, params: Sequence[Tensor], form: UpdateForm, *, rejoins: bool
) -> ClientStart:
    sessions = {**opening.sessions, opening.session: sys.maxsize}
    store.forget_newer(sessions)
    stored, passed_over = store.newest(sessions)
    for reason in passed_over:
        LOGGER.warning("passed over a damaged state: %s", reason)
    if stored is None:
        return ClientStart(initial_client(params), rejoins=rejoins or opening.restored >= 0)
    store.begin_with(stored)
    is_where_the_server_is = stored.session != opening.session and stored.round_index == opening.restored
    return _restored(stored, params, form, rejoins=rejoins or not is_where_the_server_is)


def _restored(stored: StoredClient, params: Sequence[Tensor], form: UpdateForm, *, rejoins: bool) -> ClientStart:
    snapshot = stored.snapshot
    base = tuple(stored.blocks.get(b, value) for b, value in enumerate(params))
    state = ClientState(base, snapshot.versions, snapshot.rho)
    for t, messages in sorted(snapshot.sent.items()):
        updates = [update for update in map(from_bytes, messages) if isinstance(update, Update)]
        state = put_in_flight(state, t, updates[0].block_index, form.decode([update.delta for update in updates]))
    return ClientStart(state, snapshot.sent, snapshot.residuals, snapshot.memory, rejoins)
