"""The plans of server and client: their settings, their starts, and the hooks that they call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.parablock import ClientState, Commit, ServerState
from parablock.algorithm.schedule import client_in_turn, cohort
from parablock.engine.local_steps import LocalSteps
from parablock.engine.update_form import UpdateForm
from parablock.privacy.protection import Protection
from parablock.storage.checkpoint import RunState
from parablock.storage.release_ledger import ReleaseLedger
from parablock.wire.messages import Update
from parablock.wire.transport import Traffic


@dataclass(frozen=True)
class ServerPlan:
    """The settings of a server; names as in the configuration.

    Attributes:
        form: The form of updates, and of the values that go down.
        aggregation_s: Simulated seconds of folding a chunk; None: as measured.
        in_turn: Whether a round asks one client, in turn, instead of a drawn cohort.
        min_updates: Fewest updates that a commit needs.
        deadline_factor: A round waits for this multiple of the median answer time; None: for all answers.
        waits_for_return: Whether a round that lacks updates waits, without limit, for clients to come back.
        folder: The folder of updates that memory does not hold; None: that of temporary files.
        max_client_examples: Largest weight of a client: more examples count as so many; None: no cap.
        account: What noise hides and an account of ε counts: updates | means; empty: nothing.
    """

    num_clients: int
    num_rounds: int
    delay: int
    schedule: str
    participation: float
    seed: int
    form: UpdateForm
    local_steps: LocalSteps
    stall_timeout_s: float
    checkpoint_every: int
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    aggregation_s: float | None = None
    in_turn: bool = False
    min_updates: int = 1
    deadline_factor: float | None = None
    waits_for_return: bool = False
    folder: Path | None = None
    max_client_examples: int | None = None
    account: str = ""

    def local_steps_for(self, step_s: Mapping[int, float], num_parameters: int) -> tuple[int, ...]:
        """Return K for a block of this size; see `LocalSteps.of_round`."""
        size, encoding = self.form.num_elements(num_parameters), self.form.encoding
        payload_bytes, streamed = encoding.payload_bytes(size), len(encoding.cut(size)) > 1
        return self.local_steps.of_round(step_s, self.num_clients, payload_bytes, streamed=streamed)

    def cohort_of(self, round_index: int, history: Sequence[int], num_blocks: int) -> tuple[int, ...]:
        """Return the clients drawn for a round; with turns, none before the round's block is known."""
        if not self.in_turn:
            return cohort(
                round_index, num_clients=self.num_clients, participation=self.participation, seed=self.seed
            )
        if round_index >= len(history):
            return ()
        return (client_in_turn(history, round_index, num_clients=self.num_clients, num_blocks=num_blocks),)


@dataclass(frozen=True)
class ClientPlan:
    """The settings of every client of a run.

    Attributes:
        in_flight: aligned | mean | share | own | none.
        form: The form of updates, as the server's.
        num_ahead: The most new values of a block that come ahead of their commits: d + 1.
        protection_of: client_id → clipping and noise of its updates; None: none.
        num_updates: M: the clients that a round asks.
    """

    in_flight: str
    form: UpdateForm
    num_ahead: int
    protection_of: Callable[[int], Protection | None] = lambda _: None
    num_updates: int = 1


@dataclass(frozen=True)
class ServerStart:
    """The start of a server, at the beginning or from a checkpoint.

    Attributes:
        state: The initial parameters, or the state of a checkpoint.
        first_round: The next round.
        held: The block versions that each client holds; None: none of any block.
        memory: The plain values that `on_mark` got: clients asked, seconds of steps and of answers.
        absent: The clients that are not there; they take part once they join.
        overwritten: Values that open rounds may ask for again; see `RunState`.
    """

    state: ServerState
    first_round: int = 0
    held: Mapping[int, tuple[int, ...]] | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    absent: frozenset[int] = frozenset()
    overwritten: tuple[tuple[int, Commit], ...] = ()


@dataclass(frozen=True)
class ClientStart:
    """The start of a client, at the beginning or from a snapshot.

    Attributes:
        state: The initial parameters, or the result of `restore_client`.
        sent: Updates in flight when the run was interrupted; they are sent again first.
        residuals: The residual of each block, for error feedback.
        memory: What its trainer remembers, an empty memory included; None if the trainer is new.
        rejoins: Whether the run went on without the client, which then sends `Join` first.
        releases: What this client has released in the run; None: nobody asks for it.
    """

    state: ClientState
    sent: Mapping[int, list[bytes]] = field(default_factory=dict)
    residuals: Mapping[int, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] | None = None
    rejoins: bool = False
    releases: ReleaseLedger | None = None


@dataclass(frozen=True)
class Hooks:
    """Callbacks for the records of a run; all are called outside simulated time.

    Attributes:
        on_commit: (state after the commit, its updates, traffic of the round), in the server's thread.
        on_checkpoint: A complete checkpoint, from the thread that completed it; `progress` holds the engine's part.
        asked_to_stop: Whether the user wants the run to stop at the next round, or at once if a client is gone.
        on_event: (text) of a problem that the run survives, from any thread.
    """

    on_commit: Callable[[ServerState, list[Update], Traffic], None]
    on_checkpoint: Callable[[RunState], None]
    asked_to_stop: Callable[[], bool] = lambda: False
    on_event: Callable[[str], None] = lambda _: None
