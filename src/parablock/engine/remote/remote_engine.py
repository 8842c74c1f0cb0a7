"""The engine of real sites: the server of every engine, with a stream for each site instead of threads."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from parablock.algorithm.parablock import ServerState, initial_server
from parablock.engine.contract import EngineInput, EngineResult, longest_update, make_checkpoint, make_server
from parablock.engine.plans import Hooks
from parablock.engine.remote.frames import Opening
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_transport import RemoteTransport
from parablock.storage.checkpoint import ClientSnapshot
from parablock.wire.transport import StopAsked, Traffic

LOOK_S = 0.05
REMIND_S = 30.0
"""How often the server says whom it waits for."""
MOST_SESSIONS = 60
"""How many sessions a run remembers, so that what sites keep of them counts."""


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run that its sites have to know; see `Opening`."""

    run: str
    config: str
    base_sha256: str
    base_parts: Mapping[str, str] = field(default_factory=dict)


def run_remote(
    given: EngineInput,
    listener: Listener,
    facts: RunFacts,
    *,
    num_sites: int,
    on_open: Callable[[RemoteTransport], None] = lambda _: None,
) -> EngineResult:
    """Run all rounds, or those that a checkpoint has left, with sites that connect to the listener.

    The run begins once `num_sites` sites are there, or enough of those that have not lost their ledger and were not
    removed. It begins again from the server's checkpoint whatever sites have kept. A round that lacks updates waits
    for sites to come back, and says so. `on_open` gets the transport as soon as sites may connect. The clock is
    real, and the input has no trainers.

    Raises:
        ParaBlockError: The error of the server; no site's trouble is one.
    """
    given = replace(given, server=replace(given.server, waits_for_return=True))
    hooks = given.hooks
    opening = _opening(given, facts)
    params = given.take_params()
    transport = RemoteTransport(
        opening,
        given.server.num_clients,
        given.server.num_rounds,
        longest_update(given.server, [block.numel() for block in params]),
        given.trace,
        asked_to_stop=hooks.asked_to_stop,
        tell=hooks.on_event,
        releases=given.releases,
    )

    def on_mark(round_index: int, state: ServerState, memory: dict[str, Any]) -> None:
        clients = (
            ClientSnapshot(client_id, versions, state.rho, {})
            for client_id, versions in sorted(server.held.items())
        )
        memory = {**memory, "sessions": {**opening.sessions, opening.session: round_index}}
        ledger, spans = transport.ledger, given.trace.spans
        hooks.on_checkpoint(
            make_checkpoint(
                round_index, state, clients, memory, ledger=ledger, spans=spans, overwritten=server.overwritten
            )
        )

    finished = False
    listener.open(transport)
    on_open(transport)
    try:
        if not _gather(transport, num_sites, given.server.min_updates, hooks):
            state = initial_server(params) if given.resumed is None else given.resumed.server
            return EngineResult(state, (), False, Traffic())
        identity, context = listener.identity, opening.context
        for client_id, why in transport.given_up.items():
            hooks.on_event(f"the run begins without client {client_id}: {why}")
        absent = transport.begin()
        server = make_server(given, params, transport, on_mark, absent, identity=identity, context=context)
        del params  # the server keeps what it needs
        finished = server.run()
        transport.close(given.server.stall_timeout_s)
    except StopAsked as stop:  # sites learn of it when they are asked to go on from what they have kept
        hooks.on_event(str(stop))
    finally:
        transport.leave()
    traffic = transport.ledger.of_round(given.server.num_rounds - 1)
    return EngineResult(server.state, (), finished, traffic, dict(server.refused))


def _opening(given: EngineInput, facts: RunFacts) -> Opening:
    resumed = given.resumed
    sessions = {} if resumed is None else resumed.progress["server"].get("sessions", {})
    return Opening(
        run=facts.run,
        session=secrets.token_hex(8),
        config=facts.config,
        base_sha256=facts.base_sha256,
        base_parts=dict(facts.base_parts),
        restored=-1 if resumed is None else resumed.round_index,
        sessions=dict(list(sessions.items())[-MOST_SESSIONS:]),
    )


def _gather(transport: RemoteTransport, num_sites: int, fewest: int, hooks: Hooks) -> bool:
    """Wait until enough sites are there; return False if the user stops the run before.

    Sites that are given up are not waited for, as long as `fewest` others are there.
    """
    remind_s = transport.clock.now()
    while len(there := transport.there) < _awaited(transport, num_sites, fewest):
        if transport.failure is not None:
            raise transport.failure
        if hooks.asked_to_stop():
            return False
        if transport.clock.now() >= remind_s:
            missing = [str(client_id) for client_id in transport.places if client_id not in there]
            hooks.on_event(f"{len(there)} of {num_sites} sites are there; waiting for clients {', '.join(missing)}")
            remind_s += REMIND_S
        transport.clock.sleep(LOOK_S)
    return True


def _awaited(transport: RemoteTransport, num_sites: int, fewest: int) -> int:
    """Return how many sites have to be there."""
    left = len(transport.places) - len(transport.given_up)
    return min(num_sites, left) if left >= fewest else num_sites
