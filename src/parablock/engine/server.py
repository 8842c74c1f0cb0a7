"""The server: asks a cohort for a round, commits what is due, and tells each client what it has not seen.

    for t in 0 … T − 1:
        commit every round up to t − 1 − d
        send RoundStart(t): the block, and all commits that this client lacks
    drain: commit the rest, send Finish

The delay is in that one index. Everything that a client sees at the start of round t is the state after
commit t − 1 − d, so what it computes does not depend on who is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer, average
from parablock.algorithm.parablock import NEVER, ServerState, news_for, schedule_round, server_commit
from parablock.algorithm.schedule import cohort, next_block
from parablock.errors import CodecError
from parablock.trace import Trace
from parablock.wire.messages import Finish, Mark, NewValue, RoundStart, Update, from_bytes, to_bytes
from parablock.wire.quantize import Encoding, Vector, bytes_per_element, pack
from parablock.wire.transport import Parcel, ServerEnd

SERVER = -1
"""The client_id whose draws round what the server sends."""


@dataclass(frozen=True)
class ServerPlan:
    """What the server follows; names as in the configuration."""

    num_clients: int
    num_rounds: int
    delay: int
    schedule: str
    participation: float
    seed: int
    encoding: Encoding
    stall_timeout_s: float
    checkpoint_every: int
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)


class Server:
    """The server of a run.

    Args:
        state: The initial parameters, or the state of a checkpoint.
        plan: What to follow.
        transport: The server's end.
        trace: Where aggregation is recorded.
        on_commit: Told the new state and the updates of each round, right after its commit.
        on_mark: Told (round_index, state) at every checkpoint, before the clients are asked for their parts.
        asked_to_stop: Whether the user wants the run to stop at the next round.
        first_round: Where to begin; a checkpoint's round when resuming.
        held: For each client the block versions that it holds.
    """

    def __init__(
        self,
        state: ServerState,
        plan: ServerPlan,
        transport: ServerEnd,
        trace: Trace,
        *,
        on_commit: Callable[[ServerState, list[Update]], None],
        on_mark: Callable[[int, ServerState], None],
        asked_to_stop: Callable[[], bool],
        first_round: int = 0,
        held: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.state, self._plan, self._transport, self._trace = state, plan, transport, trace
        self._on_commit, self._on_mark, self._asked_to_stop = on_commit, on_mark, asked_to_stop
        self._first_round = first_round
        self._held = dict(held or dict.fromkeys(range(plan.num_clients), (NEVER,) * len(state.params)))
        self._received: dict[int, dict[int, Update]] = {}
        self._differences: dict[int, Vector] = {}

    def run(self) -> bool:
        """Run all rounds; False when it stopped early because it was asked to."""
        plan = self._plan
        for t in range(self._first_round, plan.num_rounds):
            self._commit_through(t - 1 - plan.delay)
            stop = t > self._first_round and self._asked_to_stop()
            if stop or (t > self._first_round and plan.checkpoint_every and t % plan.checkpoint_every == 0):
                self._mark(t, stop=stop)
            if stop:
                return False
            self._start_round(t)
        self._commit_through(plan.num_rounds - 1)
        for client_id in self._held:
            self._send(client_id, plan.num_rounds - 1, Finish(self.state.committed, self._news_for(client_id)))
        return True

    def _start_round(self, t: int) -> None:
        block_index = next_block(
            self._plan.schedule,
            self.state.history,
            num_blocks=len(self.state.params),
            delay=self._plan.delay,
            seed=self._plan.seed,
            squared_delta=self.state.squared_delta,
        )
        self.state = schedule_round(self.state, block_index)
        for client_id in self._cohort(t):
            start = RoundStart(t, block_index, self.state.committed, self._news_for(client_id))
            self._send(client_id, t, start)

    def _mark(self, t: int, *, stop: bool) -> None:
        self._on_mark(t, self.state)
        for client_id in self._held:
            self._send(client_id, t, Mark(t, stop))

    def _commit_through(self, round_index: int) -> None:
        while self.state.committed < round_index:
            t = self.state.committed + 1
            expected = self._cohort(t)
            while missing := set(expected) - set(self._received.get(t, ())):
                self._receive(f"the update of round {t} from clients {', '.join(map(str, sorted(missing)))}")
            updates = self._received.pop(t)
            with (
                self._trace.span(None, "server", "aggregating", round_index=t, block_index=self.state.history[t]),
                self._trace.clock.working(),
            ):
                deltas = {i: (update.delta.values.float(), update.num_examples) for i, update in updates.items()}
                lossy = self._announce if self._is_lossy() else None
                self.state = server_commit(self.state, average(deltas), self._plan.server_optimizer, lossy)
            self._on_commit(self.state, [updates[i] for i in sorted(updates)])

    def _receive(self, waiting_for: str) -> None:
        client_id, raw = self._transport.receive(self._plan.stall_timeout_s, waiting_for)
        update = from_bytes(raw)
        problem = self._problem_with(client_id, update)
        if problem or not isinstance(update, Update):
            raise CodecError(
                f"client {client_id} sent {problem}",
                cause="It runs another configuration or another model than the server.",
                remedy="Give all clients the same configuration and the same base model.",
            )
        self._received.setdefault(update.round_index, {})[client_id] = update

    def _problem_with(self, client_id: int, update: object) -> str:
        if not isinstance(update, Update):
            return f"a {type(update).__name__} instead of an update"
        t = update.round_index
        if not self.state.committed < t < len(self.state.history) or client_id not in self._cohort(t):
            return f"an update of round {t}, which it was not asked for"
        if update.client_id != client_id:
            return f"an update in the name of client {update.client_id}"
        b, size = self.state.history[t], self.state.params[self.state.history[t]].numel()
        if update.block_index != b or update.delta.values.numel() != size:
            return (
                f"block {update.block_index} with {update.delta.values.numel()} parameters for round {t}, "
                f"which trains block {b} with {size}"
            )
        return "" if update.num_examples > 0 else f"an update of {update.num_examples} examples"

    def _news_for(self, client_id: int) -> tuple[NewValue, ...]:
        held = self._held[client_id]
        news = []
        for new in news_for(self.state, held):
            b, difference = new.block_index, self._differences.get(new.block_index)
            if difference is not None and held[b] == self._version_before(b):
                news.append(NewValue(b, new.version, new.rho, "difference", difference))
            else:
                exact = pack(new.value, str(new.value.dtype).removeprefix("torch."))
                news.append(NewValue(b, new.version, new.rho, "value", exact))
        self._held[client_id] = self.state.versions
        return tuple(news)

    def _announce(self, value: Tensor, view: Tensor) -> Tensor:
        t = self.state.committed + 1
        encoding = self._plan.encoding
        difference = pack(value.float() - view.float(), encoding.format, encoding.noise(t, SERVER))
        self._differences[self.state.history[t]] = difference
        return (view.float() + difference.values.float()).to(view.dtype)

    def _is_lossy(self) -> bool:
        return self.state.params[0].dtype.itemsize > bytes_per_element(self._plan.encoding.format)

    def _version_before(self, block_index: int) -> int:
        earlier = [t for t in range(self.state.versions[block_index]) if self.state.history[t] == block_index]
        return earlier[-1] if earlier else NEVER

    def _send(self, client_id: int, round_index: int, message: RoundStart | Mark | Finish) -> None:
        self._transport.send(client_id, Parcel(to_bytes(message), round_index))

    def _cohort(self, round_index: int) -> tuple[int, ...]:
        plan = self._plan
        return cohort(round_index, num_clients=plan.num_clients, participation=plan.participation, seed=plan.seed)
