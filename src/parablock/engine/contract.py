"""TODO parablock.engine.contract."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from parablock.algorithm.parablock import ClientState, ServerState
from parablock.config.keys import RunConfig
from parablock.engine.faults import Faults
from parablock.engine.pipeline import Interceptor
from parablock.storage.checkpoint import RunState
from parablock.trace import Span, Trace
from parablock.wire.messages import Update
from parablock.wire.transport import ServerEnd, Traffic

if TYPE_CHECKING:
    from parablock.training.trainer import Trainer


class StopAsked(BaseException):
    """The run is asked to stop, and waits for clients that are gone; never seen by users.

    Args:
        gone: Who.
    """

    def __init__(self, gone: Iterable[int]) -> None:
        self.gone = tuple(gone)
        names = ", ".join(f"client {client_id}" for client_id in self.gone)
        super().__init__(f"asked to stop, and no longer waiting for {names}: gone, or silent for long")


class Presence(Protocol):
    """What knows who is there."""

    def is_there(self, client_id: int) -> bool:
        """Tell whether a client is known to be gone, or silent beyond its time."""


def look_for_a_stop(
    presence: Presence, num_clients: int, asked_to_stop: Callable[[], bool]
) -> Callable[[Collection[int] | None], None]:
    """Give what a server's end does while it waits for some clients; None: for anybody.

    Raises:
        StopAsked: By what is given, where it is time to stop.
    """

    def look(from_clients: Collection[int] | None) -> None:
        awaited = range(num_clients) if from_clients is None else from_clients
        gone = [client_id for client_id in awaited if not presence.is_there(client_id)]
        if gone and asked_to_stop():
            raise StopAsked(gone)

    return look


@dataclass(frozen=True)
class EngineInput:
    """What an engine runs.

    Attributes:
        config: The run.
        secret: The key of the noise, where some is added.
        take_params: Gives the initial parameters, one flat vector for each block, of which it keeps none.
        trainers: Of the clients that train in this process, in order of client_id.
        trace: Records the run; its clock is the run's.
        hooks: Who keeps the records.
        resumed: Where to go on; None: at the beginning.
        faults: What is to go wrong.
        folder: The run directory.
    """

    config: RunConfig
    secret: bytes | None
    take_params: Callable[[], Sequence[Tensor]]
    trainers: Sequence[Trainer]
    trace: Trace
    hooks: Hooks
    resumed: RunState | None
    faults: Faults
    folder: Path


class Engine(Protocol):
    """What brings the server and the clients of a run together.

    Attributes:
        is_local: Whether the clients train in this process.
        held_rounds: The rounds of the checkpoints that the clients can go on from; None: of all.
    """

    is_local: bool
    held_rounds: frozenset[int] | None

    def run(self, given: EngineInput) -> EngineResult:
        """Run all rounds, or those that a checkpoint has left."""


@dataclass(frozen=True)
class Hooks:
    """What the engine tells whoever keeps the records; all are called outside simulated time.

    Attributes:
        on_commit: (state after the commit, its updates, traffic of the round), in the server's thread.
        on_checkpoint: A complete checkpoint, from the thread that completed it; `progress` holds the engine's part.
        asked_to_stop: Whether the user wants the run to stop at the next round, or at once where a client is gone.
        on_event: Told in words what went wrong, and that the run goes on, from any thread.
    """

    on_commit: Callable[[ServerState, list[Update], Traffic], None]
    on_checkpoint: Callable[[RunState], None]
    asked_to_stop: Callable[[], bool] = lambda: False
    on_event: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class EngineResult:
    """How a run ended.

    Attributes:
        server: The server's state; drained when `finished`.
        clients: Every client's state.
        finished: False when the run was asked to stop before its last round.
        last_traffic: Traffic of the last round, with the drain.
        refused: How many messages of clients were refused, by reason.
    """

    server: ServerState
    clients: tuple[ClientState, ...]
    finished: bool
    last_traffic: Traffic
    refused: dict[str, int] = field(default_factory=dict)


class MaskedEnd(ServerEnd, Protocol):
    """A server's end of a transport over which updates come masked."""

    def masks_of(self, round_index: int, clients: Sequence[int], size: int) -> Tensor:
        """Give the sum of the masks of these clients' updates; see `MaskedServer.masks_of`."""


class Masking(Protocol):
    """Makes the two sides of secure aggregation, for the rounds from `first_round` on."""

    def make_client(self, client_id: int, first_round: int) -> Interceptor:
        """Make a client's side."""

    def make_server(self, inner: ServerEnd, first_round: int) -> MaskedEnd:
        """Make the server's side, over a transport."""


def memory_of(resumed: RunState) -> dict[str, Any]:
    """Give the server's memory, without the updates of open rounds that nobody has any more."""
    memory = dict(resumed.progress["server"])
    memory["asked"] = {
        t: [i for i in asked if int(t) in resumed.clients[i].sent] for t, asked in memory["asked"].items()
    }
    return memory


def is_past(span: Span, round_index: int, committed: int) -> bool:
    """Tell whether a resumed run will not repeat this span."""
    t = span.facts.get("round_index", -1)
    return t < round_index and not (span.activity == "uploading" and t > committed)
