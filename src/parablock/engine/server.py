"""The server: asks a cohort for each round, commits updates after the delay, and sends clients new values.

    for t in 0 … T − 1:
        commit every round up to t − 1 − d
        send RoundStart(t): the block, and all commits that this client lacks
    drain: commit the rest, send Finish

The delay is in that one index. Everything that a client sees at the start of round t is the state after
commit t − 1 − d, so its computation does not depend on the clients' speeds. Updates come in chunks. A chunk is
folded when all participants have delivered it; with streaming, its new value goes down while the next chunk is
still going up.

A round waits for every client that was asked. It goes on without a client that skips the round, whose update is
refused, that misses the deadline, or that has been silent for `stall_timeout_s`, as long as `min_updates` are left.
A round that can no longer get them is void and leaves its block as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from parablock.algorithm.aggregate import apply_update
from parablock.algorithm.parablock import (
    NEVER,
    Commit,
    ServerState,
    commit_nothing,
    schedule_round,
    server_commit,
    steps_of,
)
from parablock.algorithm.schedule import next_block
from parablock.engine.downlink import Downlink
from parablock.engine.participation import Participation
from parablock.engine.plans import Hooks, ServerPlan, ServerStart
from parablock.engine.refusals import Refusal, Refusals
from parablock.engine.releasing import Releasing
from parablock.engine.round_fold import RoundFold
from parablock.engine.strays import Strays
from parablock.errors import CodecError, StallError
from parablock.storage.release_ledger import ReleaseLedger
from parablock.trace import Trace
from parablock.wire.messages import Join, Leave, Mark, NewValue, RoundStart, Skip, Update, Welcome, from_bytes
from parablock.wire.transport import MaskedTransport, ServerTransport

SERVER = -1
"""The client_id of the draws that round the server's values."""


class Server:
    """The server of a run.

    Args:
        start: The state to begin from.
        plan: The server's settings.
        transport: The server's end of the transport.
        trace: Records aggregation.
        hooks: Callbacks; `on_commit` is called right after each commit.
        on_mark: Called with (round_index, state, memory) at a checkpoint, before clients are asked for snapshots.
        masked: The transport where updates come masked; None: they do not.
        releases: The account of what is released, over all processes of the run; None: it begins here.
    """

    def __init__(
        self,
        start: ServerStart,
        plan: ServerPlan,
        transport: ServerTransport,
        trace: Trace,
        *,
        hooks: Hooks,
        on_mark: Callable[[int, ServerState, dict[str, Any]], None],
        masked: MaskedTransport | None = None,
        releases: ReleaseLedger | None = None,
    ) -> None:
        self.state, self._plan, self._transport, self._trace = start.state, plan, transport, trace
        self._hooks, self._on_mark, self._is_masked = hooks, on_mark, masked is not None
        self._on_event, self._first_round, memory = hooks.on_event, start.first_round, start.memory
        never = dict.fromkeys(range(plan.num_clients), (NEVER,) * len(start.state.params))
        self._downlink = Downlink(transport, plan.form.encoding, start.held or never, start.overwritten)
        self._participation = Participation(plan, memory, start.absent, is_masked=self._is_masked)
        self.step_s = {int(client_id): float(s) for client_id, s in memory.get("step_s", {}).items()}
        refusals, ledger = Refusals(memory.get("refused", {}), hooks.on_event), releases or ReleaseLedger()
        self.refused, self._count = refusals.counts, refusals.count
        self._releasing = Releasing(plan.account, ledger, masked, refusals, self._participation)
        self._fewest = max(1, min(plan.min_updates, plan.num_clients))
        late = (plan.delay + 2) * max(len(plan.form.cuts(block.numel())) for block in start.state.params)
        self._strays = Strays(self._participation, refusals, self._releasing, start.state.committed, late)
        self._marked, self._folds = start.first_round, dict[int, RoundFold]()
        asked = {int(t): tuple(clients) for t, clients in memory.get("asked", {}).items()}
        for t in range(self.state.committed + 1, len(self.state.history)):
            there = [i for i in asked.get(t, self._cohort(t)) if i not in start.absent]
            self._participation.ask(t, there, trace.clock.now())
            self._folds[t] = self._new_fold(t)

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """The block versions that each client holds."""
        return dict(self._downlink.held)

    @property
    def overwritten(self) -> tuple[tuple[int, Commit], ...]:
        """Values that open rounds may ask for again; see `RunState`."""
        return self._downlink.overwritten

    def run(self) -> bool:
        """Run all rounds; return False if the user stopped the run."""
        try:
            return self._run()
        finally:
            for fold in self._folds.values():
                fold.close()

    def _run(self) -> bool:
        plan = self._plan
        for client_id in range(plan.num_clients):
            if not self._releasing.can_mask(client_id):
                self._take_leave(client_id, Leave("it has sent no keys"))
        for t in range(self._first_round, plan.num_rounds):
            self._commit_through(t - 1 - plan.delay)
            stop = t > self._first_round and self._hooks.asked_to_stop()
            if stop or (t > self._first_round and plan.checkpoint_every and t % plan.checkpoint_every == 0):
                self._mark(t, stop=stop)
            if stop:
                return False
            self._start_round(t)
        self._commit_through(plan.num_rounds - 1)
        for client_id in range(plan.num_clients):
            self._downlink.finish(self.state, client_id, is_lost=self._participation.is_absent(client_id))
        return True

    def _start_round(self, t: int) -> None:
        state, plan = self.state, self._plan
        block_index = next_block(
            plan.schedule,
            state.history,
            num_blocks=len(state.params),
            delay=plan.delay,
            seed=plan.seed,
            squared_delta=state.squared_delta,
        )
        self.state = schedule_round(state, block_index, self._local_steps(t, block_index))
        self._participation.ask(t, self._enough_of(self._cohort(t), t), self._trace.clock.now())
        self._folds[t] = self._new_fold(t)
        self._releasing.count_asked(t, self._participation.asked_in(t))
        for client_id in self._participation.asked_in(t):
            self._ask(client_id, t, self._downlink.news_for(self.state, client_id))

    def _local_steps(self, t: int, block_index: int) -> tuple[int, ...]:
        """Choose K from the speeds of the clients that can be asked."""
        drawn = self._plan.cohort_of(t, (*self.state.history, block_index), len(self.state.params))
        step_s = {i: self.step_s[i] for i in self._participation.candidates(drawn) if i in self.step_s}
        return self._plan.local_steps_for(step_s, self.state.params[block_index].numel())

    def _enough_of(self, drawn: tuple[int, ...], t: int) -> tuple[int, ...]:
        """Return the clients to ask, once enough of them are there."""
        while len(clients := self._participation.candidates(drawn)) < self._fewest:
            if self._is_masked and self._participation.num_present >= self._fewest:
                return ()  # nobody stands in for others: masks are made for those that are drawn
            self._wait(f"clients to come back: round {t + 1} needs {self._fewest}, {len(clients)} are there")
        return clients

    def _ask(self, client_id: int, t: int, news: tuple[NewValue, ...]) -> None:
        *before, steps = (steps_of(row, client_id) for row in self.state.local_steps[: t + 1])
        start = RoundStart(t, self.state.history[t], steps, sum(before), self._committed_before(t), news)
        self._downlink.send(client_id, t, start)

    def _committed_before(self, t: int) -> int:
        return max(NEVER, t - 1 - self._plan.delay)

    def _new_fold(self, t: int) -> RoundFold:
        b = self.state.history[t]
        asked = {i: steps_of(self.state.local_steps[t], i) for i in self._participation.asked_in(t)}
        size, plan, cap = self.state.params[b].numel(), self._plan, self._plan.max_client_examples
        is_counted = bool(plan.account)
        return RoundFold(t, b, asked, size, plan.form, plan.folder, is_accounted=is_counted, max_examples=cap)

    def _mark(self, t: int, *, stop: bool) -> None:
        self._marked, memory = t, self._participation.memory(self.state.committed + 1)
        self._on_mark(t, self.state, memory | {"step_s": dict(self.step_s), "refused": dict(self.refused)})
        for client_id in range(self._plan.num_clients):
            self._downlink.send(client_id, t, Mark(t, stop))

    # ── committing ──────────────────────────────────────────────────────────────────────────────────

    def _commit_through(self, round_index: int) -> None:
        while self.state.committed < round_index:
            fold = self._folds[self.state.committed + 1]
            while len(fold.expected) >= self._fewest and not fold.is_complete:
                if fold.is_next_ready:
                    self._fold_chunk(fold)
                elif (nuisance := self._strays.nuisance(fold, self._fewest)) is not None:
                    self._refuse(nuisance, fold, Refusal("useless", "no update, again and again"))
                else:
                    self._wait_for(fold)
            block, overwritten = fold.block_index, self.state
            self._commit(fold)
            if self.state.versions[block] != overwritten.versions[block]:  # else the round was void
                self._downlink.remember_until(fold.round_index + self._plan.delay, overwritten, block)
            self._folds.pop(fold.round_index).close()
            self._downlink.forget_old(self.state.committed)

    def _commit(self, fold: RoundFold) -> None:
        t, b, updates = fold.round_index, fold.block_index, fold.updates
        if len(fold.expected) < self._fewest or fold.absurd:
            self._downlink.retract(b)
            self.state, updates = commit_nothing(self.state), []
            why = f"is refused: {fold.absurd}" if fold.absurd else f"cannot get {self._fewest} updates any more"
            self._on_event(f"round {t + 1} {why}; block {b} stays as it was")
        else:
            announce = partial(self._downlink.announce, b) if self._downlink.is_lossy(self.state) else None
            aggregate = fold.aggregate()
            self._downlink.announce_news(b, self._plan.form.news(aggregate))
            mean = aggregate.mean_delta  # the fold's own memory, free after this
            self.state = server_commit(self.state, aggregate, self._plan.server_optimizer, announce, into=mean)
        self._strays.counted[t] = tuple(update.client_id for update in updates)
        for update in updates:
            self.step_s[update.client_id] = update.compute_s / update.num_local_steps
        self._hooks.on_commit(self.state, updates, self._transport.ledger.of_round(t))

    def _fold_chunk(self, fold: RoundFold) -> None:
        """Fold the next chunk, and with streaming send its new value to the clients that will need it."""
        outliers = fold.outliers(self.state.params[fold.block_index]) if fold.is_last_next else {}
        for client_id, problem in outliers.items():
            self._refuse(client_id, fold, problem)
        for client_id, problem in (lost := {} if outliers else self._releasing.unmask(fold)).items():
            self._take_out(client_id, fold, problem)
        if outliers or lost:
            return
        plan = self._plan
        with (
            self._trace.span(None, "server", "aggregating", round_index=fold.round_index),
            self._trace.clock.working(plan.aggregation_s),
        ):
            part, mean = fold.fold_next()
            self._releasing.count_mean(fold, part)
            streams = plan.form.encoding.chunk_bytes is not None
            if not streams and not self._downlink.is_lossy(self.state):
                return
            b, state = fold.block_index, self.state
            moments = tuple(moment[part] for moment in state.moments[b])
            value, _ = apply_update(state.params[b][part], mean, moments, plan.server_optimizer)
            chunk = self._downlink.pack_chunk(self.state, b, part, value, fold.noise(plan.form.encoding, SERVER))
            if streams and not fold.began_again:
                needed_in = fold.round_index + 1 + plan.delay
                wanted = range(plan.num_clients) if needed_in >= plan.num_rounds else self._cohort(needed_in)
                present = [i for i in wanted if i in fold.expected or not self._participation.is_absent(i)]
                t = min(needed_in, plan.num_rounds - 1)
                self._downlink.stream(state, chunk, present, t, first=part.start == 0)

    # ── receiving ───────────────────────────────────────────────────────────────────────────────────

    def _wait_for(self, fold: RoundFold) -> None:
        """Wait for the next message, or go on without the clients that are late or silent."""
        t, now_s = fold.round_index, self._trace.clock.now()
        enough = len(fold.delivered) >= self._fewest
        deadline_s = self._participation.deadline_s(t, fold.missing) if enough else None
        lacking = "; ".join(fold.progress_of(client_id) for client_id in fold.missing)
        waiting_for = f"the update of round {t + 1}, block {fold.block_index}, from {lacking}"
        if deadline_s is None:
            try:
                self._wait(waiting_for, fold.missing, can_go_on=enough)
            except StallError:
                if not enough:
                    raise
                self._go_on_without_the_missing(fold, "silent", f"for {self._plan.stall_timeout_s:g} s")
        elif now_s >= deadline_s:
            self._go_on_without_the_missing(fold, "late", f"at {now_s:.1f} s")
        elif (received := self._transport.receive_until(deadline_s, fold.missing)) is not None:
            self._take(*received)

    def _go_on_without_the_missing(self, fold: RoundFold, reason: str, how: str) -> None:
        """Take out the clients that are waited for; silent ones leave the later open rounds too."""
        for client_id in fold.missing:
            refusal = Refusal(reason, f"{fold.progress_of(client_id)}, {reason} {how}")
            self._on_event(f"round {fold.round_index + 1} goes on without {refusal.text}")
            self._take_out(client_id, fold, refusal)
            for later in self._folds.values() if reason == "silent" else ():
                if client_id in later.expected and len(later.expected) > self._fewest:
                    self._take_out(client_id, later, refusal)

    def _wait(self, waiting_for: str, clients: Collection[int] | None = None, *, can_go_on: bool = False) -> None:
        while True:
            try:
                received = self._transport.receive(self._plan.stall_timeout_s, waiting_for, clients)
                break
            except StallError as error:
                if can_go_on or not self._plan.waits_for_return:
                    raise
                self._on_event(f"still waiting for {waiting_for}. {error.cause}")
        self._take(*received)

    def _take(self, client_id: int, raw: bytes) -> None:
        try:
            message = from_bytes(raw)
        except CodecError as error:
            self._count(client_id, Refusal("corrupt", f"a message that cannot be decoded: {error.what}"))
            return
        match message:
            case Update():
                self._take_update(client_id, message)
            case Skip():
                self._take_skip(client_id, message)
            case Leave():
                self._take_leave(client_id, message)
            case Join():
                self._welcome(client_id, message)
            case _:
                self._count(client_id, Refusal("misfit", f"a {type(message).__name__} instead of an update"))

    def _take_skip(self, client_id: int, skip: Skip) -> None:
        t = skip.round_index
        self._participation.answered(client_id, t, self._trace.clock.now())
        if (fold := self._folds.get(t)) is None or client_id not in fold.expected:
            self._strays.skip(client_id)
            return
        self._take_out(client_id, fold, Refusal("skipped", "a message that it skips the round"))
        if not skip.problem:
            return
        self.refused["failed"] += 1
        if len(fold.expected) < self._fewest and fold.ends_run(of_one_client=not self._plan.waits_for_return):
            raise fold.training_error(client_id, skip.problem, self._plan.min_updates)
        self._on_event(f"round {t + 1} goes on without client {client_id}: {skip.problem}")

    def _take_leave(self, client_id: int, leave: Leave) -> None:
        """Go on without a client that has left, in all open rounds."""
        self._on_event(f"client {client_id} leaves" + (f": {leave.problem}" if leave.problem else ""))
        self._participation.leaves(client_id)
        for fold in self._folds.values():
            if client_id in fold.expected and client_id not in fold.delivered:
                self._take_out(client_id, fold, Refusal("left", "that it leaves"))

    def _take_update(self, client_id: int, update: Update) -> None:
        t = update.round_index
        if (fold := self._folds.get(t)) is None or client_id not in fold.expected:
            self._strays.take(client_id, update, fold, self._trace.clock.now())
            return
        problem = fold.take(client_id, update)
        if problem is not None and problem.reason in ("duplicate", "foreign"):
            self._count(client_id, problem)
        elif problem is not None:
            self._refuse(client_id, fold, problem)
        elif client_id in fold.delivered:
            self._releasing.count_update(fold, client_id)
            self._strays.delivered(client_id, t, self._trace.clock.now())

    def _refuse(self, client_id: int, fold: RoundFold, problem: Refusal) -> None:
        self._count(client_id, problem)
        self._participation.answered(client_id, fold.round_index, self._trace.clock.now())
        self._take_out(client_id, fold, problem)
        if fold.ends_run(of_one_client=not self._plan.waits_for_return):
            fold.check_one_fits()

    def _take_out(self, client_id: int, fold: RoundFold, problem: Refusal) -> None:
        self._releasing.count_update(fold, client_id)
        fold.take_out(client_id, problem)
        self._retract_if_begun_again(fold)

    def _retract_if_begun_again(self, fold: RoundFold) -> None:
        if fold.began_again:
            self._downlink.retract(fold.block_index)

    def _welcome(self, client_id: int, join: Join) -> None:
        """Ask a restarted client for the updates that it owes, and a checkpoint that it may have missed."""
        if misfit := self._downlink.misfit(self.state, join.versions):
            self._count(client_id, Refusal("misfit", misfit))
            return
        if not self._releasing.can_mask(client_id):
            self._take_leave(client_id, Leave("its secrets are gone; it takes part when the run is started again"))
            return
        self._downlink.joins(client_id, join.versions)
        self._strays.joins(client_id, self._trace.clock.now())
        owed = [f for f in self._folds.values() if client_id in f.expected and client_id not in f.delivered]
        lacking = tuple((f.round_index, f.first_lacking(client_id)) for f in owed if f.round_index in join.sent)
        self._downlink.send(client_id, max(0, len(self.state.history) - 1), Welcome(lacking))
        self._on_event(f"client {client_id} is back")
        self._ask_again(client_id, [fold for fold in owed if fold.round_index < self._marked], join)
        if self._plan.waits_for_return and self._marked - 1 in {*join.sent, *(fold.round_index for fold in owed)}:
            self._downlink.send(client_id, self._marked, Mark(self._marked, stop=False))
        self._ask_again(client_id, [fold for fold in owed if fold.round_index >= self._marked], join)

    def _ask_again(self, client_id: int, owed: list[RoundFold], join: Join) -> None:
        for fold in owed:
            t = fold.round_index
            self._participation.owes(client_id, t)
            if t in join.sent:
                continue
            news = self._downlink.news_as_of(self.state, client_id, self._committed_before(t))
            if news is None:
                self._participation.answered(client_id, t, self._trace.clock.now())
                self._take_out(client_id, fold, Refusal("lost", "its restart"))
                continue
            self._releasing.forget(fold, client_id)
            self._retract_if_begun_again(fold)
            self._ask(client_id, t, news)

    def _cohort(self, round_index: int) -> tuple[int, ...]:
        return self._plan.cohort_of(round_index, self.state.history, len(self.state.params))
