"""The server: asks a cohort for a round, commits what is due, and tells each client what it has not seen.

    for t in 0 … T − 1:
        commit every round up to t − 1 − d
        send RoundStart(t): the block, and all commits that this client lacks
    drain: commit the rest, send Finish

The delay is in that one index. Everything that a client sees at the start of round t is the state after
commit t − 1 − d, so what it computes does not depend on who is fast. Updates come in chunks; a chunk that
all participants have delivered is folded, and where streaming its new value goes down at once, while the
next chunk is still going up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer, apply_update
from parablock.algorithm.baselines.fedcybgd import client_in_turn
from parablock.algorithm.parablock import NEVER, ServerState, news_for, schedule_round, server_commit
from parablock.algorithm.robust import Rule
from parablock.algorithm.schedule import cohort, next_block
from parablock.engine.folding import RoundFold
from parablock.engine.steps import LocalSteps
from parablock.errors import CodecError
from parablock.trace import Trace
from parablock.wire.messages import Chunk, Finish, Mark, NewValue, RoundStart, Update, from_bytes, to_bytes
from parablock.wire.quantize import Encoding, Vector, bytes_per_element, joined, pack
from parablock.wire.transport import Parcel, ServerEnd

SERVER = -1
"""The client_id whose draws round what the server sends."""


@dataclass(frozen=True)
class ServerPlan:
    """What the server follows; names as in the configuration.

    Attributes:
        in_turn: One client a round, as FedCyBGD has it, in place of a drawn cohort.
        aggregation_s: Simulated seconds of folding a chunk; None: as measured.
    """

    num_clients: int
    num_rounds: int
    delay: int
    schedule: str
    participation: float
    seed: int
    encoding: Encoding
    local_steps: LocalSteps
    stall_timeout_s: float
    checkpoint_every: int
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    aggregation_s: float | None = None
    rule: Rule = field(default_factory=Rule)
    in_turn: bool = False


class Server:
    """The server of a run.

    Args:
        state: The initial parameters, or the state of a checkpoint.
        plan: What to follow.
        transport: The server's end.
        trace: Where aggregation is recorded.
        on_commit: Told the new state and the last chunk of each update, right after each commit.
        on_mark: Told (round_index, state, step_s) at every checkpoint, before the clients are asked for theirs.
        asked_to_stop: Whether the user wants the run to stop at the next round.
        first_round: Where to begin; a checkpoint's round when resuming.
        held: For each client the block versions that it holds.
        step_s: For each client the seconds of a local step, as its last committed update says.
    """

    def __init__(
        self,
        state: ServerState,
        plan: ServerPlan,
        transport: ServerEnd,
        trace: Trace,
        *,
        on_commit: Callable[[ServerState, list[Update]], None],
        on_mark: Callable[[int, ServerState, dict[int, float]], None],
        asked_to_stop: Callable[[], bool],
        first_round: int = 0,
        held: dict[int, tuple[int, ...]] | None = None,
        step_s: dict[int, float] | None = None,
    ) -> None:
        self.state, self._plan, self._transport, self._trace = state, plan, transport, trace
        self._on_commit, self._on_mark, self._asked_to_stop = on_commit, on_mark, asked_to_stop
        self._first_round = first_round
        self._held = dict(held or dict.fromkeys(range(plan.num_clients), (NEVER,) * len(state.params)))
        self._folds = {t: self._new_fold(t) for t in range(state.committed + 1, len(state.history))}
        self.step_s = dict(step_s or {})
        self._announced: dict[int, list[Vector]] = {}
        self._streamed_to: dict[int, set[int]] = {}

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
        size, encoding = self.state.params[block_index].numel(), self._plan.encoding
        num_local_steps = self._plan.local_steps.of_round(
            self.step_s, encoding.payload_bytes(size), streamed=len(encoding.cut(size)) > 1
        )
        self.state = schedule_round(self.state, block_index, num_local_steps)
        steps_before = sum(self.state.local_steps[:t])
        self._folds[t] = self._new_fold(t)
        for client_id in self._cohort(t):
            start = RoundStart(
                t, block_index, num_local_steps, steps_before, self.state.committed, self._news_for(client_id)
            )
            self._send(client_id, t, start)

    def _new_fold(self, t: int) -> RoundFold:
        b = self.state.history[t]
        return RoundFold(
            t, b, self._cohort(t), self._plan.encoding.cut(self.state.params[b].numel()), self._plan.rule
        )

    def _mark(self, t: int, *, stop: bool) -> None:
        self._on_mark(t, self.state, dict(self.step_s))
        for client_id in self._held:
            self._send(client_id, t, Mark(t, stop))

    def _commit_through(self, round_index: int) -> None:
        while self.state.committed < round_index:
            t = self.state.committed + 1
            fold = self._folds[t]
            while not fold.is_complete:
                if not fold.is_next_ready:
                    self._receive(f"the update of round {t} from clients {', '.join(map(str, fold.missing))}")
                    continue
                with (
                    self._trace.span(None, "server", "aggregating", round_index=t),
                    self._trace.clock.working(self._plan.aggregation_s),
                ):
                    self._fold_chunk(t, fold)
            del self._folds[t]
            self.state = server_commit(
                self.state,
                fold.aggregate(),
                self._plan.server_optimizer,
                self._announce if self._is_lossy() else None,
            )
            for update in fold.updates:
                self.step_s[update.client_id] = update.compute_s / update.num_local_steps
            self._on_commit(self.state, fold.updates)

    def _fold_chunk(self, t: int, fold: RoundFold) -> None:
        """Fold the next chunk, and where streaming send its new value to those who will need it."""
        part, mean = fold.fold_next()
        b, encoding = fold.block_index, self._plan.encoding
        lossy = self._is_lossy()
        if not lossy and encoding.chunk_bytes is None:
            return
        moments = tuple(moment[part] for moment in self.state.moments[b])
        value, _ = apply_update(self.state.params[b][part], mean, moments, self._plan.server_optimizer)
        if lossy:
            difference = value.float() - self.state.view[b][part].float()
            vector = pack(difference, encoding.format, fold.noise(encoding, SERVER))
            self._announced[b] = [*(self._announced[b] if part.start else ()), vector]
        else:
            vector = _exact(value)
        if encoding.chunk_bytes is not None:
            self._stream(t, Chunk(b, t, "difference" if lossy else "value", vector), first=part.start == 0)

    def _stream(self, t: int, chunk: Chunk, *, first: bool) -> None:
        needed_in = t + 1 + self._plan.delay
        is_last = needed_in >= self._plan.num_rounds
        if first:
            wanted = self._held if is_last else self._cohort(needed_in)
            before = self.state.versions[chunk.block_index]
            self._streamed_to[chunk.block_index] = {i for i in wanted if self._held[i][chunk.block_index] == before}
        parcel = Parcel(to_bytes(chunk), min(needed_in, self._plan.num_rounds - 1))
        for client_id in sorted(self._streamed_to[chunk.block_index]):
            self._transport.send(client_id, parcel)

    def _announce(self, value: Tensor, view: Tensor) -> Tensor:
        """Give what the clients see of a new value: the view plus the difference that was packed in chunks."""
        differences = self._announced[self.state.history[self.state.committed + 1]]
        assert value.shape == view.shape
        return (view.float() + joined(differences)).to(view.dtype)

    def _receive(self, waiting_for: str) -> None:
        client_id, raw = self._transport.receive(self._plan.stall_timeout_s, waiting_for)
        update = from_bytes(raw)
        fold = self._folds.get(update.round_index) if isinstance(update, Update) else None
        if not isinstance(update, Update):
            problem = f"a {type(update).__name__} instead of an update"
        elif fold is None:
            problem = f"an update of round {update.round_index}, which it was not asked for"
        else:
            problem = fold.problem_with(client_id, update)
            if not problem:
                fold.add(update)
                return
        raise CodecError(
            f"client {client_id} sent {problem}",
            cause="It runs another configuration or another model than the server.",
            remedy="Give all clients the same configuration and the same base model.",
        )

    def _news_for(self, client_id: int) -> tuple[NewValue, ...]:
        held = self._held[client_id]
        news = []
        for new in news_for(self.state, held):
            b = new.block_index
            if client_id in self._streamed_to.get(b, ()):
                self._streamed_to[b].discard(client_id)
                kind, vector = "streamed", _exact(new.value[:0])
            elif len(self._announced.get(b, ())) == 1 and held[b] == self._version_before(b):
                kind, vector = "difference", self._announced[b][0]
            else:
                kind, vector = "value", _exact(new.value)
            news.append(NewValue(b, new.version, new.rho, kind, vector))
        self._held[client_id] = self.state.versions
        return tuple(news)

    def _is_lossy(self) -> bool:
        return self.state.params[0].dtype.itemsize > bytes_per_element(self._plan.encoding.format)

    def _version_before(self, block_index: int) -> int:
        earlier = [t for t in range(self.state.versions[block_index]) if self.state.history[t] == block_index]
        return earlier[-1] if earlier else NEVER

    def _send(self, client_id: int, round_index: int, message: RoundStart | Mark | Finish) -> None:
        self._transport.send(client_id, Parcel(to_bytes(message), round_index))

    def _cohort(self, round_index: int) -> tuple[int, ...]:
        plan, history = self._plan, self.state.history
        if plan.in_turn and round_index >= len(history):
            return ()  # nobody is known before the round's block is
        if plan.in_turn:
            clients, blocks = plan.num_clients, len(self.state.params)
            return (client_in_turn(history, round_index, num_clients=clients, num_blocks=blocks),)
        return cohort(round_index, num_clients=plan.num_clients, participation=plan.participation, seed=plan.seed)


def _exact(value: Tensor) -> Vector:
    return pack(value, str(value.dtype).removeprefix("torch."))
