"""The in-process engine: server and clients in one process, each client with its two threads.

The server has the caller's thread. Under the real clock the clients share this machine's cores; under the
virtual clock each has a machine and a link of its own, in simulated time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from parablock.algorithm.parablock import ClientState, ServerState, initial_client, initial_server
from parablock.checkpoint import ClientSnapshot, RunState
from parablock.engine.client import Client, Trainer, restore_client
from parablock.engine.pipeline import Machines, Pipeline
from parablock.engine.server import Server, ServerPlan
from parablock.trace import Span, Trace
from parablock.wire.link import Link
from parablock.wire.messages import Update
from parablock.wire.transport import MemoryTransport, Traffic


@dataclass(frozen=True)
class Hooks:
    """What the engine tells whoever keeps the records; all are called outside simulated time.

    Attributes:
        on_commit: (state after the commit, its updates, traffic of the round), in the server's thread.
        on_checkpoint: A complete checkpoint, from the thread that completed it; `progress` holds the engine's part.
        asked_to_stop: Whether the user wants the run to stop at the next round.
    """

    on_commit: Callable[[ServerState, list[Update], Traffic], None]
    on_checkpoint: Callable[[RunState], None]
    asked_to_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class EngineResult:
    """How a run ended.

    Attributes:
        server: The server's state; drained when `finished`.
        clients: Every client's state.
        finished: False when the run was asked to stop before its last round.
        last_traffic: Traffic of the last round, with the drain.
    """

    server: ServerState
    clients: tuple[ClientState, ...]
    finished: bool
    last_traffic: Traffic


class _Checkpoints:
    """Collects the parts of each checkpoint; the last part to arrive completes it."""

    def __init__(self, trace: Trace, transport: MemoryTransport, num_clients: int, hooks: Hooks) -> None:
        self._trace, self._transport, self._num_clients, self._hooks = trace, transport, num_clients, hooks
        self._servers: dict[int, tuple[ServerState, dict[int, float]]] = {}
        self._parts: dict[int, dict[int, ClientSnapshot]] = {}

    def on_mark(self, round_index: int, server: ServerState, step_s: dict[int, float]) -> None:
        self._parts[round_index] = {}
        self._servers[round_index] = server, step_s

    def hand_in(self, round_index: int, snapshot: ClientSnapshot) -> None:
        parts = self._parts[round_index]
        parts[snapshot.client_id] = snapshot
        if len(parts) == self._num_clients and self._parts.pop(round_index, None) is not None:
            server, step_s = self._servers.pop(round_index)
            with self._trace.clock.working(0.0):
                self._hooks.on_checkpoint(
                    RunState(
                        round_index,
                        server,
                        tuple(parts[client_id] for client_id in sorted(parts)),
                        {"downlink": self._downlink(server.committed + 1, round_index), "step_s": step_s},
                        [span for span in list(self._trace.spans) if _is_past(span, round_index, server.committed)],
                    )
                )

    def _downlink(self, first: int, end: int) -> dict[int, dict[int, tuple[int, float]]]:
        return {t: dict(self._transport.ledger.of_round(t).down) for t in range(first, end)}


def run_in_process(
    params: Sequence[Tensor],
    trainers: Sequence[Trainer],
    plan: ServerPlan,
    trace: Trace,
    hooks: Hooks,
    *,
    link: Link,
    in_flight: str,
    resumed: RunState | None = None,
) -> EngineResult:
    """Run all rounds, or those that a checkpoint has left.

    Args:
        params: The initial parameters, one flat vector for each block.
        trainers: Local training of each client, in order of client_id.
        plan: What the server follows.
        trace: Records the run; its clock is the run's.
        hooks: Who keeps the records.
        link: Every client's link.
        in_flight: own | aligned | none.
        resumed: Where to go on.

    Raises:
        ParaBlockError: Whatever the server or the first client to fail ended with. No thread is left.
    """
    transport = MemoryTransport(trace.clock, link, len(trainers))
    checkpoints = _Checkpoints(trace, transport, len(trainers), hooks)
    clients = []
    for client_id, trainer in enumerate(trainers):
        state, sent = initial_client(params), dict[int, list[bytes]]()
        if resumed is not None:
            snapshot = resumed.clients[client_id]
            state, sent = restore_client(snapshot, resumed.server)
            trainer.remember(snapshot.memory)
        pipeline = Pipeline(client_id, transport, trace, stall_timeout_s=plan.stall_timeout_s)
        clients.append(
            Client(
                client_id,
                state,
                trainer,
                pipeline,
                trace,
                in_flight=in_flight,
                encoding=plan.encoding,
                hand_in=checkpoints.hand_in,
                sent=sent,
                residuals=None if resumed is None else resumed.clients[client_id].residuals,
            )
        )
    if resumed is not None:
        transport.ledger.restore_downlink(resumed.progress["downlink"])
    server = Server(
        initial_server(params) if resumed is None else resumed.server,
        plan,
        transport,
        trace,
        on_commit=lambda state, updates: hooks.on_commit(
            state, updates, transport.ledger.of_round(state.committed)
        ),
        on_mark=checkpoints.on_mark,
        asked_to_stop=hooks.asked_to_stop,
        first_round=0 if resumed is None else resumed.round_index,
        held=None if resumed is None else {client.client_id: client.versions for client in resumed.clients},
        step_s=None if resumed is None else {int(i): float(s) for i, s in resumed.progress["step_s"].items()},
    )
    bodies = [client.run for client in clients]
    with Machines(trace.clock, bodies, transport.fail, stall_timeout_s=plan.stall_timeout_s):
        finished = server.run()
    return EngineResult(
        server.state,
        tuple(client.state for client in clients),
        finished,
        transport.ledger.of_round(plan.num_rounds - 1),
    )


def _is_past(span: Span, round_index: int, committed: int) -> bool:
    """Tell whether a resumed run will not repeat this span."""
    t = span.facts.get("round_index", -1)
    return t < round_index and not (span.activity == "uploading" and t > committed)
