"""The contract of an engine: its input, its result, and the parts that all engines share.

An engine connects one server with its clients: in one process over simulated links, or at real sites. For a given
delay every engine returns bitwise the parameters of `algorithm/sequential.py`; only time differs. A new engine
implements `Engine`, carries bytes by a `ServerTransport` and calls `make_server`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from parablock.algorithm.parablock import ClientState, Commit, ServerState, initial_server
from parablock.clock import Clock
from parablock.engine.faults import NO_FAULTS, Faults
from parablock.engine.pipeline import Interceptor
from parablock.engine.plans import ClientPlan, Hooks, ServerPlan, ServerStart
from parablock.engine.server import Server
from parablock.privacy.identities import Identity
from parablock.storage.checkpoint import ClientSnapshot, RunState
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Span, Trace
from parablock.wire.transport import Ledger, Link, MaskedTransport, ServerTransport, Traffic

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer


LEAST_MESSAGE_BYTES = 16 << 20
"""Shortest limit of a client's message: the letters of secure aggregation are not updates."""


class Masking(Protocol):
    """Makes the two sides of secure aggregation, for the rounds from `first_round` on."""

    def client_side(
        self, client_id: int, first_round: int, revealed: ReleaseLedger, *, tell: Callable[[str], None]
    ) -> Interceptor:
        """Make a client's side."""

    def server_side(
        self,
        inner: ServerTransport,
        first_round: int,
        fixed: ReleaseLedger,
        clock: Clock,
        *,
        most_kept_bytes: int,
        identity: Identity | None,
        context: str,
    ) -> MaskedTransport:
        """Make the server's side, over a transport."""


@dataclass(frozen=True)
class EngineInput:
    """The input of an engine.

    Attributes:
        server: The settings of the server.
        client: The settings of every client.
        take_params: Returns the initial parameters, one flat vector for each block, and keeps none of them.
        trainers: The local training of the clients in this process, in order of client_id.
        trace: Records the run; its clock is the run's.
        hooks: The callbacks of the recorder.
        link: The simulated link of each client.
        resumed: The checkpoint to go on from; None: at the beginning.
        faults: The faults to inject.
        masking: Hides single updates from the server; None: the server sees them.
        releases: What the server releases, and has released before it was resumed.
        releases_of: client_id → the same of a client in this process; None: nobody asks for it.
        excluded: The clients in this process that no round asks.
    """

    server: ServerPlan
    client: ClientPlan
    take_params: Callable[[], Sequence[Tensor]]
    trainers: Sequence[Trainer]
    trace: Trace
    hooks: Hooks
    link: Link = Link()  # noqa: RUF009  (it is frozen)
    resumed: RunState | None = None
    faults: Faults = NO_FAULTS
    masking: Masking | None = None
    releases: ReleaseLedger = field(default_factory=ReleaseLedger)
    releases_of: Callable[[int], ReleaseLedger | None] = lambda _: None
    excluded: frozenset[int] = frozenset()

    @property
    def first_open_round(self) -> int:
        """The first round that is not committed."""
        return 0 if self.resumed is None else self.resumed.server.committed + 1


@dataclass(frozen=True)
class EngineResult:
    """The end of a run.

    Attributes:
        server: The server's state; drained if `finished`.
        clients: The states of the clients in this process.
        finished: False if the user stopped the run before its last round.
        last_traffic: Traffic of the last round, with the drain.
        refused: Reason → number of refused messages.
    """

    server: ServerState
    clients: tuple[ClientState, ...]
    finished: bool
    last_traffic: Traffic
    refused: dict[str, int] = field(default_factory=dict)


class Engine(Protocol):
    """Connects the server and the clients of a run.

    Attributes:
        is_local: Whether the clients train in this process.
    """

    is_local: bool

    def run(self, given: EngineInput) -> EngineResult:
        """Run all rounds after the checkpoint, if there is one."""


def longest_update(plan: ServerPlan, block_sizes: Sequence[int]) -> int:
    """Return the longest message that a client may send, bytes, which holds a whole update."""
    encoding = plan.form.encoding
    sizes = [encoding.payload_bytes(plan.form.num_elements(size)) for size in block_sizes]
    return max(LEAST_MESSAGE_BYTES, max(sizes) + (1 << 20))


def make_server(
    given: EngineInput,
    params: Sequence[Tensor],
    transport: ServerTransport,
    on_mark: Callable[[int, ServerState, dict[str, Any]], None],
    absent: frozenset[int] = frozenset(),
    *,
    identity: Identity | None = None,
    context: str = "",
) -> Server:
    """Make the server of a run over a transport; a resumed one does not use the initial `params`.

    The `absent` clients take part once they join. `identity` checks what masked clients sign, for this `context`.
    """
    resumed, clock = given.resumed, given.trace.clock
    masked = None
    if given.masking is not None:
        sizes = [block.numel() for block in (params if resumed is None else resumed.server.params)]
        masked = given.masking.server_side(
            transport,
            given.first_open_round,
            given.releases,
            clock,
            most_kept_bytes=(given.server.delay + 1) * longest_update(given.server, sizes),
            identity=identity,
            context=context,
        )
    if resumed is None:
        start = ServerStart(initial_server(params), absent=absent)
    else:
        transport.ledger.restore_downlink(resumed.progress["downlink"])
        held = {client.client_id: client.versions for client in resumed.clients}
        memory, overwritten = resumed.progress["server"], resumed.overwritten
        start = ServerStart(resumed.server, resumed.round_index, held, memory, absent, overwritten)
    return Server(
        start,
        given.server,
        masked or transport,
        given.trace,
        hooks=given.hooks,
        on_mark=on_mark,
        masked=masked,
        releases=given.releases,
    )


def make_checkpoint(
    round_index: int,
    server: ServerState,
    clients: Iterable[ClientSnapshot],
    memory: Mapping[str, Any],
    *,
    ledger: Ledger,
    spans: Sequence[Span],
    faults: Faults = NO_FAULTS,
    overwritten: tuple[tuple[int, Commit], ...] = (),
) -> RunState:
    """Return a checkpoint before a round.

    Args:
        round_index: The next round.
        server: The server's state.
        clients: Every client's snapshot, in order of client_id.
        memory: The values that the server passed to `on_mark`.
        ledger: The traffic so far.
        spans: The trace so far.
        faults: The faults of the run.
        overwritten: See `RunState`.
    """
    open_rounds = range(server.committed + 1, round_index)
    progress = {
        "downlink": {t: dict(ledger.of_round(t).down) for t in open_rounds},
        "server": dict(memory),
        "faults": faults.happened_before(round_index, server.committed),
    }
    past = [span for span in list(spans) if _is_past(span, round_index, server.committed)]
    return RunState(round_index, server, tuple(clients), progress, past, overwritten)


def _is_past(span: Span, round_index: int, committed: int) -> bool:
    """Return whether a resumed run will not repeat this span."""
    t = span.facts.get("round_index", -1)
    return t < round_index and not (span.activity == "uploading" and t > committed)
