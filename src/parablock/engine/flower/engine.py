"""The Flower engine: the server of every engine, with sites behind SuperNodes instead of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid
from torch import Tensor

from parablock.algorithm.parablock import ServerState, initial_server
from parablock.engine.contract import EngineResult, Hooks, Masking, StopAsked, is_past, look_for_a_stop
from parablock.engine.flower.grid import GridTransport
from parablock.engine.flower.pace import ask_often, push_a_few_at_a_time
from parablock.engine.server import Server, ServerPlan
from parablock.storage.checkpoint import ClientSnapshot, RunState
from parablock.trace import Trace

PAUSE_S = 1.0
"""How long the server waits at most before it asks again for the next part of a reply that is on its way."""


def server_app(main: Callable[[Grid, Context], None]) -> ServerApp:
    """Make the ServerApp that calls `main`."""
    app = ServerApp()
    app.main()(main)
    return app


def run_over_flower(
    take_params: Callable[[], Sequence[Tensor]],
    plan: ServerPlan,
    trace: Trace,
    hooks: Hooks,
    transport: GridTransport,
    *,
    resumed: RunState | None = None,
    masking: Masking | None = None,
) -> EngineResult:
    """Run all rounds, or those that a checkpoint has left; see `run_in_process`.

    A site that is gone may be started again, so a round that lacks updates waits for it, and says so. At each
    checkpoint the server writes its own part before the next round is announced, and every site writes its part
    at home. A resumed run starts where all of them have one.

    Args:
        take_params: Gives the initial parameters, one flat vector for each block, of which it keeps none.
        plan: What the server follows.
        trace: Records the run; its clock is real.
        hooks: Who keeps the records.
        transport: Connected to every client.
        resumed: Where to go on; every client has a snapshot of the same round.
        masking: Hides single updates from the server; None: it sees them.

    Raises:
        ParaBlockError: Whatever the server or a site ended with.
    """
    ask_often(http_grid, "pull_objects", PAUSE_S)
    push_a_few_at_a_time(http_grid)
    transport.begin(trace, None if resumed is None else resumed.round_index)
    first_open = 0 if resumed is None else resumed.server.committed + 1
    collector = masking.make_server(transport, first_open) if masking else None

    def on_mark(round_index: int, state: ServerState, memory: dict[str, Any]) -> None:
        clients = tuple(
            ClientSnapshot(client_id, versions, state.rho, {})
            for client_id, versions in sorted(server.held.items())
        )
        down = {t: dict(transport.ledger.of_round(t).down) for t in range(state.committed + 1, round_index)}
        spans = [span for span in list(trace.spans) if is_past(span, round_index, state.committed)]
        hooks.on_checkpoint(
            RunState(round_index, state, clients, {"downlink": down, "server": memory, "faults": []}, spans)
        )

    if resumed is not None:
        transport.ledger.restore_downlink(resumed.progress["downlink"])
    server = Server(
        _first_state(take_params, resumed),
        replace(plan, waits_for_return=True),
        collector or transport,
        trace,
        on_commit=lambda state, updates: hooks.on_commit(
            state, updates, transport.ledger.of_round(state.committed)
        ),
        on_mark=on_mark,
        asked_to_stop=hooks.asked_to_stop,
        on_event=hooks.on_event,
        first_round=0 if resumed is None else resumed.round_index,
        held=None if resumed is None else {client.client_id: client.versions for client in resumed.clients},
        masks_of=collector.masks_of if collector else None,
        memory=None if resumed is None else resumed.progress["server"],
    )
    transport.look = look_for_a_stop(transport, plan.num_clients, hooks.asked_to_stop)
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


def _first_state(take_params: Callable[[], Sequence[Tensor]], resumed: RunState | None) -> ServerState:
    """Give what the server starts from, and leave the initial parameters to nobody else."""
    params = take_params()
    return initial_server(params) if resumed is None else resumed.server
