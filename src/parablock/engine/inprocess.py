"""The in-process engine: server and clients in one process, each client with its two threads.

The server has the caller's thread. Under the real clock the clients share this machine's cores; under the
virtual clock each has a machine and a link of its own, in simulated time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from parablock.algorithm.parablock import ClientState, ServerState, initial_client, initial_server
from parablock.engine.client import Client, restore_client
from parablock.engine.contract import EngineResult, Hooks, Masking, StopAsked, is_past, look_for_a_stop, memory_of
from parablock.engine.faults import NO_FAULTS, Faults, FaultyEnd, Killed
from parablock.engine.pipeline import Machines, Pipeline
from parablock.engine.server import Server, ServerPlan
from parablock.errors import StallError
from parablock.privacy.protection import Protection
from parablock.storage.checkpoint import ClientSnapshot, RunState
from parablock.trace import Trace
from parablock.wire.messages import Mark, to_bytes
from parablock.wire.transport import Link, MemoryTransport, Parcel

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer


class _Checkpoints:
    """Collects the parts of each checkpoint; the last part to arrive completes it.

    A machine that is gone has its part on its disk.
    """

    def __init__(
        self, trace: Trace, transport: MemoryTransport, num_clients: int, hooks: Hooks, faults: Faults
    ) -> None:
        self._trace, self._transport, self._num_clients = trace, transport, num_clients
        self._hooks, self._faults = hooks, faults
        self._servers: dict[int, tuple[ServerState, dict[str, Any]]] = {}
        self._parts: dict[int, dict[int, ClientSnapshot]] = {}
        self._gone: dict[int, ClientSnapshot] = {}

    def on_mark(self, round_index: int, server: ServerState, memory: dict[str, Any]) -> None:
        self._parts[round_index] = {}
        self._servers[round_index] = server, memory
        for snapshot in self._gone.values():
            self.hand_in(round_index, snapshot)

    def goes(self, snapshot: ClientSnapshot) -> None:
        self._gone[snapshot.client_id] = snapshot
        for round_index in tuple(self._parts):
            self.hand_in(round_index, snapshot)

    def returns(self, client_id: int) -> None:
        del self._gone[client_id]

    def hand_in(self, round_index: int, snapshot: ClientSnapshot) -> None:
        parts = self._parts.get(round_index, {})
        parts[snapshot.client_id] = snapshot
        if len(parts) == self._num_clients and self._parts.pop(round_index, None) is not None:
            server, memory = self._servers.pop(round_index)
            with self._trace.clock.working(0.0):
                self._hooks.on_checkpoint(
                    RunState(
                        round_index,
                        server,
                        tuple(parts[client_id] for client_id in sorted(parts)),
                        {
                            "downlink": self._downlink(server.committed + 1, round_index),
                            "server": memory,
                            "faults": self._faults.happened_before(round_index, server.committed),
                        },
                        [span for span in list(self._trace.spans) if is_past(span, round_index, server.committed)],
                    )
                )

    def _downlink(self, first: int, end: int) -> dict[int, dict[int, tuple[int, float]]]:
        return {t: dict(self._transport.ledger.of_round(t).down) for t in range(first, end)}


class _Machine:
    """One client's machine: it starts the client, and again after it was gone."""

    def __init__(
        self,
        make: Callable[..., Client],
        transport: MemoryTransport,
        checkpoints: _Checkpoints,
        trace: Trace,
        on_event: Callable[[str], None],
    ) -> None:
        self._make, self._transport, self._checkpoints = make, transport, checkpoints
        self._clock, self._on_event = trace.clock, on_event
        self._over = self._clock.mailbox()
        self.client = make()
        self._keep()

    def _keep(self) -> None:
        """Note what the machine would find on its disk, as of the client's last message."""
        self._kept = self.client.state, self.client.snapshot()

    def run(self) -> None:
        """Be the client's machine until the run is over, or the machine is gone for good."""
        while True:
            client_id = self.client.client_id
            try:
                self.client.run(self._keep)
                return
            except Killed as killed:
                back_s = killed.back_s
                self._on_event(f"client {client_id} was killed")
            except StallError as stalled:
                back_s = None
                self._on_event(f"client {client_id} gave up: {stalled.what}")
            state, snapshot = self._kept
            self._transport.detach(client_id)
            self._checkpoints.goes(snapshot)
            if back_s is None or self._over.get_until(back_s) is not None:
                return
            self._checkpoints.returns(client_id)
            self.client = self._make(state, snapshot)
            self._keep()

    def stop_waiting(self) -> None:
        """Note that the run is over, so that nobody has to come back."""
        self._over.put(True)


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
    faults: Faults = NO_FAULTS,
    protection_of: Callable[[int], Protection | None] = lambda _: None,
    masking: Masking | None = None,
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
        faults: What is to go wrong.
        protection_of: What the updates of a client_id go through before they are encoded.
        masking: Hides single updates from the server; None: it sees them.

    Raises:
        ParaBlockError: Whatever the server or the first client to fail ended with. No thread is left.
    """
    transport = MemoryTransport(trace.clock, link, len(trainers))
    checkpoints = _Checkpoints(trace, transport, len(trainers), hooks, faults)
    first_open = 0 if resumed is None else resumed.server.committed + 1
    collector = masking.make_server(transport, first_open) if masking else None

    def make_client(client_id: int, state: ClientState | None = None, kept: ClientSnapshot | None = None) -> Client:
        sent, back = dict[int, list[bytes]](), kept is not None
        if kept is not None:
            sent = kept.sent
        elif resumed is not None:
            kept = resumed.clients[client_id]
            state, sent = restore_client(kept, resumed.server, plan.grid)
        if kept is not None:
            trainers[client_id].remember(kept.memory)
        end = FaultyEnd(client_id, transport, faults, trace.clock) if faults else transport
        return Client(
            client_id,
            state or initial_client(params),
            trainers[client_id],
            Pipeline(
                client_id,
                end,
                trace,
                stall_timeout_s=plan.stall_timeout_s,
                courier=masking.make_client(client_id, first_open) if masking else None,
            ),
            trace,
            in_flight=in_flight,
            encoding=plan.encoding,
            hand_in=checkpoints.hand_in,
            sent=sent,
            residuals=None if kept is None else kept.residuals,
            rejoins=back,
            faults=faults,
            protection=protection_of(client_id),
            grid=plan.grid,
            factors=plan.factors,
            warn=hooks.on_event,
        )

    machines = [
        _Machine(partial(make_client, client_id), transport, checkpoints, trace, hooks.on_event)
        for client_id in range(len(trainers))
    ]
    if resumed is not None:
        transport.ledger.restore_downlink(resumed.progress["downlink"])
    server = Server(
        initial_server(params) if resumed is None else resumed.server,
        plan,
        collector or transport,
        trace,
        on_commit=lambda state, updates: hooks.on_commit(
            state, updates, transport.ledger.of_round(state.committed)
        ),
        on_mark=checkpoints.on_mark,
        asked_to_stop=hooks.asked_to_stop,
        on_event=hooks.on_event,
        first_round=0 if resumed is None else resumed.round_index,
        held=None if resumed is None else {client.client_id: client.versions for client in resumed.clients},
        masks_of=collector.masks_of if collector else None,
        memory=None if resumed is None else memory_of(resumed),
    )
    bodies = [machine.run for machine in machines]
    transport.look = look_for_a_stop(transport, len(trainers), hooks.asked_to_stop)
    with Machines(trace.clock, bodies, transport.fail, stall_timeout_s=plan.stall_timeout_s):
        try:
            finished = server.run()
        except StopAsked as stop:
            finished = False
            hooks.on_event(str(stop))
            _dismiss(transport, len(trainers), len(server.state.history))
        for machine in machines:
            machine.stop_waiting()
    return EngineResult(
        server.state,
        tuple(machine.client.state for machine in machines),
        finished,
        transport.ledger.of_round(plan.num_rounds - 1),
        dict(server.refused),
    )


def _dismiss(transport: MemoryTransport, num_clients: int, round_index: int) -> None:
    """Send the clients home in the middle of a round; what they hand in belongs to no checkpoint."""
    for client_id in range(num_clients):
        transport.send(client_id, Parcel(to_bytes(Mark(round_index, stop=True)), round_index))
