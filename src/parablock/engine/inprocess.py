"""The in-process engine: server and clients in one process, each client with its two threads.

The server runs in the caller's thread. Under the real clock the clients share this machine's cores; under the
virtual clock each has a machine and a link of its own, in simulated time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from parablock.algorithm.parablock import ServerState, initial_client
from parablock.engine.client import Client, restore_client
from parablock.engine.contract import EngineInput, EngineResult, make_checkpoint, make_server
from parablock.engine.faults import Faults, FaultyEnd, Killed
from parablock.engine.pipeline import Machines, Pipeline
from parablock.engine.plans import ClientStart, Hooks
from parablock.errors import StallError
from parablock.storage.checkpoint import ClientSnapshot, RunState
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Trace
from parablock.wire.messages import Mark, to_bytes
from parablock.wire.transport import MemoryTransport, Parcel, StopAsked


class _Checkpoints:
    """Collects the parts of each checkpoint; the last part completes it. A dead machine's part is on its disk."""

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
                clients = (parts[client_id] for client_id in sorted(parts))
                ledger, spans = self._transport.ledger, self._trace.spans
                self._hooks.on_checkpoint(
                    make_checkpoint(
                        round_index, server, clients, memory, ledger=ledger, spans=spans, faults=self._faults
                    )
                )


class _Machine:
    """One client's machine: it starts the client, and starts it again after a crash."""

    def __init__(
        self,
        make: Callable[[ClientStart], Client],
        start: ClientStart,
        transport: MemoryTransport,
        checkpoints: _Checkpoints,
        trace: Trace,
        on_event: Callable[[str], None],
    ) -> None:
        self._make, self._transport, self._checkpoints = make, transport, checkpoints
        self._clock, self._on_event = trace.clock, on_event
        self._over = self._clock.mailbox()
        self.client = make(start)
        self._keep()

    def _keep(self, record: Callable[[], None] = lambda: None) -> None:
        """Keep the state that the machine would find on its disk after a crash."""
        self._kept = self.client.state, self.client.snapshot()
        record()

    def run(self) -> None:
        """Run the client until the run is over, or the machine is gone for good."""
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
            start = ClientStart(state, snapshot.sent, snapshot.residuals, snapshot.memory, rejoins=True)
            self.client = self._make(start)
            self._keep()

    def stop_waiting(self) -> None:
        """End the wait for a restart, because the run is over."""
        self._over.put(True)


def run_in_process(given: EngineInput) -> EngineResult:
    """Run all rounds after the checkpoint, if there is one, with threads in this process.

    Raises:
        ParaBlockError: The error of the server, or of the first client to fail. No thread is left.
    """
    given = replace(given, resumed=given.resumed and _without_lost_updates(given.resumed))
    trace, hooks, faults, plan, masking = given.trace, given.hooks, given.faults, given.server, given.masking
    params, num_clients = given.take_params(), len(given.trainers)
    transport = MemoryTransport(trace.clock, given.link, num_clients, hooks.asked_to_stop)
    checkpoints = _Checkpoints(trace, transport, num_clients, hooks, faults)
    server = make_server(given, params, transport, checkpoints.on_mark, given.excluded)

    def make_client(client_id: int, start: ClientStart) -> Client:
        releases, first = given.releases_of(client_id), given.first_open_round
        kept = releases or ReleaseLedger()
        interceptor = masking.client_side(client_id, first, kept, tell=hooks.on_event) if masking else None
        end = FaultyEnd(client_id, transport, faults, trace.clock) if faults else transport
        pipeline = Pipeline(client_id, end, trace, stall_timeout_s=plan.stall_timeout_s, interceptor=interceptor)
        return Client(
            client_id,
            given.client,
            given.trainers[client_id],
            pipeline,
            trace,
            start=replace(start, releases=releases),
            hand_in=checkpoints.hand_in,
            faults=faults,
            warn=hooks.on_event,
        )

    def start_of(client_id: int) -> ClientStart:
        if given.resumed is None:
            return ClientStart(initial_client(params))
        return restore_client(given.resumed.clients[client_id], given.resumed.server, given.client.form)

    machines = [
        _Machine(partial(make_client, i), start_of(i), transport, checkpoints, trace, hooks.on_event)
        for i in range(num_clients)
    ]
    bodies = [machine.run for machine in machines]
    with Machines(trace.clock, bodies, transport.fail, stall_timeout_s=plan.stall_timeout_s):
        try:
            finished = server.run()
        except StopAsked as stop:
            finished = False
            hooks.on_event(str(stop))
            _dismiss(transport, num_clients, len(server.state.history))
        for machine in machines:
            machine.stop_waiting()
    return EngineResult(
        server.state,
        tuple(machine.client.state for machine in machines),
        finished,
        transport.ledger.of_round(plan.num_rounds - 1),
        dict(server.refused),
    )


def _without_lost_updates(resumed: RunState) -> RunState:
    """Return a checkpoint whose server waits only for updates that some client still has."""
    memory = dict(resumed.progress["server"])
    memory["asked"] = {
        t: [i for i in asked if int(t) in resumed.clients[i].sent] for t, asked in memory["asked"].items()
    }
    return replace(resumed, progress={**resumed.progress, "server": memory})


def _dismiss(transport: MemoryTransport, num_clients: int, round_index: int) -> None:
    """Stop the clients in the middle of a round; their snapshots belong to no checkpoint."""
    for client_id in range(num_clients):
        transport.send(client_id, Parcel(to_bytes(Mark(round_index, stop=True)), round_index))
