"""The oracle: a sequential reference implementation of the method, without threads, bytes or clocks.

Every engine must end with bitwise the same numbers, for every delay, link speed and clock: the overlap changes the
schedule, not the mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from parablock.algorithm.aggregate import Aggregate, Kinds, ServerOptimizer, average
from parablock.algorithm.parablock import (
    ClientState,
    ServerState,
    commit,
    commit_nothing,
    delta_of,
    initial_client,
    initial_server,
    news_for,
    put_in_flight,
    schedule_round,
    server_commit,
    working_parameters,
)
from parablock.algorithm.schedule import client_in_turn, cohort, next_block

Solve = Callable[[int, int, int, tuple[Tensor, ...]], Tensor]
"""(client_id, round_index, block_index, working parameters v) → y^b, after K local steps on block b."""


@dataclass(frozen=True)
class OracleProblem:
    """A federated run without its data and model.

    Attributes:
        num_examples: Training examples of each of the M clients.
        num_rounds: T.
        delay: d.
        in_flight: aligned | mean | share | own | none.
        schedule: A block schedule by name, or the block of every round.
        participation: Part of the clients in a cohort.
        server_optimizer: The server optimizer.
        seed: The run's seed.
        encode: (Δ, block_index, round_index, client_id) → Δ as the server decodes it.
        aggregate: ({client_id: (Δ, examples)}, round_index) → the round's aggregate.
        announce: (new value, old view, round_index) → new view of the clients; None if the downlink is exact.
        in_turn: Whether one client trains in each round, as in FedCyBGD, instead of a cohort.
        lost: (client_id, round_index) of updates that never arrive, or are refused.
        trained: The clients of each round; None: the cohort of `participation`.
        min_updates: A round with fewer updates is void.
        kinds: The kinds of parameters in a group, if `aggregate` returns a ρ of each.
    """

    num_examples: Sequence[int]
    num_rounds: int
    delay: int
    in_flight: str = "aligned"
    schedule: str | Sequence[int] = "cyclic"
    participation: float = 1.0
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    seed: int = 0
    encode: Callable[[Tensor, int, int, int], Tensor] = lambda delta, *_: delta
    aggregate: Callable[[Mapping[int, tuple[Tensor, int]], int], Aggregate] = lambda updates, _: average(updates)
    announce: Callable[[Tensor, Tensor, int], Tensor] | None = None
    in_turn: bool = False
    lost: frozenset[tuple[int, int]] = frozenset()
    trained: Sequence[Sequence[int]] | None = None
    min_updates: int = 1
    kinds: Kinds | None = None


@dataclass
class OracleResult:
    """The end of a run: the drained server, every client after the drain, and x after each commit."""

    server: ServerState
    clients: list[ClientState]
    trajectory: list[tuple[Tensor, ...]]


def run_sequential(params: Sequence[Tensor], problem: OracleProblem, solve: Solve) -> OracleResult:
    """Run FL-BCD (delay 0) or ParaBlock (delay ≥ 1), round after round and client after client."""
    server = initial_server(params)
    clients = [initial_client(params) for _ in problem.num_examples]
    updates: list[dict[int, tuple[Tensor, int]]] = []
    trajectory: list[tuple[Tensor, ...]] = []

    def commit_through(round_index: int) -> None:
        nonlocal server
        while server.committed < round_index:
            if len(updates[server.committed + 1]) < problem.min_updates:
                server = commit_nothing(server)
                trajectory.append(server.params)
                continue
            aggregate = problem.aggregate(updates[server.committed + 1], server.committed + 1)
            announce = problem.announce and partial(_of_round, problem.announce, server.committed + 1)
            server = server_commit(server, aggregate, problem.server_optimizer, announce)
            trajectory.append(server.params)

    for t in range(problem.num_rounds):
        commit_through(t - 1 - problem.delay)
        b = _block_of_round(problem, server)
        server = schedule_round(server, b, (1,))  # any K: `solve` takes the local steps
        updates.append({})
        asked = _cohort_of_round(problem, server, t)
        for i in asked:
            client = commit(clients[i], news_for(server, clients[i].versions), server.committed)
            v = working_parameters(client, problem.in_flight, len(asked), problem.kinds)
            y = solve(i, t, b, v)
            delta = problem.encode(delta_of(y, v[b]), b, t, i)
            clients[i] = put_in_flight(client, t, b, delta)
            if (i, t) not in problem.lost:
                updates[t][i] = (delta, problem.num_examples[i])

    commit_through(problem.num_rounds - 1)  # the drain
    clients = [commit(client, news_for(server, client.versions), server.committed) for client in clients]
    return OracleResult(server, clients, trajectory)


def _of_round(announce: Callable[[Tensor, Tensor, int], Tensor], t: int, value: Tensor, view: Tensor) -> Tensor:
    return announce(value, view, t)


def _block_of_round(problem: OracleProblem, server: ServerState) -> int:
    if not isinstance(problem.schedule, str):
        return problem.schedule[len(server.history)]
    return next_block(
        problem.schedule,
        server.history,
        num_blocks=len(server.params),
        delay=problem.delay,
        seed=problem.seed,
        squared_delta=server.squared_delta,
    )


def _cohort_of_round(problem: OracleProblem, server: ServerState, round_index: int) -> tuple[int, ...]:
    if problem.trained is not None:
        return tuple(problem.trained[round_index])
    num_clients = len(problem.num_examples)
    if problem.in_turn:
        num_blocks = len(server.params)
        return (client_in_turn(server.history, round_index, num_clients=num_clients, num_blocks=num_blocks),)
    return cohort(round_index, num_clients=num_clients, participation=problem.participation, seed=problem.seed)
