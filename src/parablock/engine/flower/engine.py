"""The Flower engine: the server of every engine, with sites behind SuperNodes instead of threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

from parablock.algorithm.parablock import ServerState
from parablock.engine.contract import EngineInput, EngineResult, make_checkpoint, make_server
from parablock.engine.flower.grid import GridTransport
from parablock.engine.flower.pace import ask_often, push_a_few_at_a_time
from parablock.storage.checkpoint import ClientSnapshot
from parablock.wire.transport import StopAsked

PAUSE_S = 1.0
"""How long the server waits at most before it asks again for the next part of a reply that is on its way."""


def server_app(main: Callable[[Grid, Context], None]) -> ServerApp:
    """Make the ServerApp that calls `main`."""
    app = ServerApp()
    app.main()(main)
    return app


def run_over_flower(given: EngineInput, transport: GridTransport) -> EngineResult:
    """Run all rounds, or those that a checkpoint has left; see `run_in_process`.

    A site that is gone may be started again, so a round that lacks updates waits for it, and says so. At each
    checkpoint the server writes its own part before the next round is announced, and every site writes its part
    at home. A resumed run starts where all of them have one. The clock is real, the input has no trainers, and the
    transport is connected to every client.

    Raises:
        ParaBlockError: Whatever the server or a site ended with.
    """
    ask_often(http_grid, "pull_objects", PAUSE_S)
    push_a_few_at_a_time(http_grid)
    given = replace(given, server=replace(given.server, waits_for_return=True))
    resumed, plan, hooks = given.resumed, given.server, given.hooks
    transport.begin(given.trace, None if resumed is None else resumed.round_index, hooks.asked_to_stop)

    def on_mark(round_index: int, state: ServerState, memory: dict[str, Any]) -> None:
        clients = (
            ClientSnapshot(client_id, versions, state.rho, {})
            for client_id, versions in sorted(server.held.items())
        )
        hooks.on_checkpoint(
            make_checkpoint(round_index, state, clients, memory, ledger=transport.ledger, spans=given.trace.spans)
        )

    server = make_server(given, given.take_params(), transport, on_mark)
    finished = False
    try:
        finished = server.run()
        transport.close(plan.stall_timeout_s)
    except StopAsked as stop:  # the sites learn of it when they are asked to go on from their snapshots
        hooks.on_event(str(stop))
    finally:
        transport.leave()
    traffic = transport.ledger.of_round(plan.num_rounds - 1)
    return EngineResult(server.state, (), finished, traffic, dict(server.refused))
