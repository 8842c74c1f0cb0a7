r"""ParaBlock: federated block coordinate descent with d rounds of updates in flight.

Source: arXiv 2511.19959 (Wang, Cao, Chen). With d = 0 this is standard FL-BCD; with d = 1 the update of
round t − 1 travels while round t is computed, and a round costs max(compute, communication).

| symbol | here | meaning |
|---|---|---|
| x, x^b | `ServerState.params`, `params[b]` | the server's parameters, block b of them |
| z | `ClientState.base` | what a client last saw committed |
| F | `ClientState.in_flight` | its own updates that were sent and are not committed |
| v^b | `working_block(…)` | where training of block b starts: base + overlay of F |
| y^b | `trained` | v^b after K local steps |
| Δ_i | `delta` | y^b − v^b, fp32, this sign everywhere |
| Δ̄, ρ_b | `Aggregate.mean_delta`, `.rho` | weighted mean; ‖Δ̄‖² / Σ w_i‖Δ_i‖² |
| α_s | `overlay_weight(…)` | the client's prediction of the aggregate from its own update |

Every value is a flat vector of one block and is never changed in place; every function takes a state and
gives a new one, which shares what did not change. So a state can be kept, compared and saved at will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate, ServerOptimizer, apply_update

T = TypeVar("T")

NEVER = -1
"""The version of a block that was never committed."""


@dataclass(frozen=True)
class InFlight:
    """One of the client's own updates: sent, not committed.

    Attributes:
        round_index: The round s that made it.
        block_index: Its block.
        delta: Δ_s as the server decodes it: flat, fp32.
    """

    round_index: int
    block_index: int
    delta: Tensor


@dataclass(frozen=True)
class ClientState:
    """What a client holds between rounds.

    Attributes:
        base: z, one flat vector for each block, in the run's dtype; bitwise the server's view as of
            `versions`.
        versions: For each block the round whose commit made this value; `NEVER` at the start.
        rho: ρ_b as of the last visit of each block; 1 at the start.
        in_flight: F, oldest first; at most d long when a round starts.
    """

    base: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rho: tuple[float, ...]
    in_flight: tuple[InFlight, ...] = ()


@dataclass(frozen=True)
class Commit:
    """The server's new value of one block, as every client takes it over.

    Attributes:
        block_index: The block.
        version: The round whose aggregate made the value.
        value: The new z^b, flat, in the run's dtype.
        rho: ρ_b of that aggregate.
    """

    block_index: int
    version: int
    value: Tensor
    rho: float


@dataclass(frozen=True)
class ServerState:
    """What the server holds between commits.

    Attributes:
        params: x, one flat vector for each block, in the run's dtype.
        view: What the clients hold of x; the same tensors unless the way down is lossy.
        versions: For each block the round of its last commit.
        rho: ρ_b of the last commit of each block.
        squared_delta: Mean squared element of the last Δ̄ of each block; infinite before the first.
        moments: The server optimizer's state for each block.
        committed: The newest committed round; all rounds up to it are committed.
        history: The block of every round that has been scheduled, b_0 … b_t.
        local_steps: The local steps K of each of these rounds, as `steps_of` reads them.
    """

    params: tuple[Tensor, ...]
    view: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rho: tuple[float, ...]
    squared_delta: tuple[float, ...]
    moments: tuple[tuple[Tensor, ...], ...]
    committed: int = NEVER
    history: tuple[int, ...] = ()
    local_steps: tuple[tuple[int, ...], ...] = ()


def initial_client(params: Sequence[Tensor]) -> ClientState:
    """Start a client from the initial parameters, one flat vector for each block."""
    return ClientState(tuple(params), (NEVER,) * len(params), (1.0,) * len(params))


def initial_server(params: Sequence[Tensor]) -> ServerState:
    """Start the server from the same initial parameters."""
    blocks = len(params)
    return ServerState(
        params=tuple(params),
        view=tuple(params),
        versions=(NEVER,) * blocks,
        rho=(1.0,) * blocks,
        squared_delta=(inf,) * blocks,
        moments=((),) * blocks,
    )


# ── client: one round ───────────────────────────────────────────────────────────────────────────────


def commit(state: ClientState, commits: Sequence[Commit], committed: int) -> ClientState:
    """Take the aggregates over: the correction.

    Each block takes the server's value exactly, and the own updates of all rounds up to `committed` leave
    F, whether the server counted them or not. What the client had guessed about the others is thrown away
    and replaced by what they did; nothing is subtracted back, so nothing drifts.

    Args:
        state: The client before.
        commits: The blocks that are newer than the client's.
        committed: The newest round that these commits include.
    """
    base, versions, rho = list(state.base), list(state.versions), list(state.rho)
    for news in commits:
        base[news.block_index] = news.value
        versions[news.block_index] = news.version
        rho[news.block_index] = news.rho
    still_in_flight = tuple(own for own in state.in_flight if own.round_index > committed)
    return ClientState(tuple(base), tuple(versions), tuple(rho), still_in_flight)


def overlay_weight(rule: str, rho: float) -> float:
    """Give α: how much of an own update in flight the client trains on with.

    `own` keeps all of it; `aligned` scales it to the length that the average had when the block was
    visited last; `none` leaves it out (naive staleness, kept as the ablation).
    """
    return {"own": 1.0, "aligned": sqrt(rho), "none": 0.0}[rule]


def working_block(state: ClientState, block_index: int, rule: str) -> Tensor:
    """Make v^b = z^b + Σ α_s Δ_s over the updates of this block in flight, oldest first.

    Each sum is rounded to the run's dtype before the next, as the server's commits are. Without an update
    in flight this is the base tensor itself.
    """
    value = state.base[block_index]
    alpha = overlay_weight(rule, state.rho[block_index])
    for own in state.in_flight:
        if own.block_index == block_index and alpha != 0.0:
            value = (value.float() + alpha * own.delta).to(value.dtype)
    return value


def working_parameters(state: ClientState, rule: str) -> tuple[Tensor, ...]:
    """Make v: the working value of every block."""
    return tuple(working_block(state, block_index, rule) for block_index in range(len(state.base)))


def delta_of(trained: Tensor, start: Tensor) -> Tensor:
    """Give Δ = y^b − v^b in fp32."""
    return trained.float() - start.float()


def put_in_flight(state: ClientState, round_index: int, block_index: int, delta: Tensor) -> ClientState:
    """Append the update of this round, as the server will decode it, to F."""
    return replace(state, in_flight=(*state.in_flight, InFlight(round_index, block_index, delta)))


# ── server: one commit ──────────────────────────────────────────────────────────────────────────────


def schedule_round(state: ServerState, block_index: int, local_steps: tuple[int, ...]) -> ServerState:
    """Write down the block and the local steps of the next round."""
    return replace(state, history=(*state.history, block_index), local_steps=(*state.local_steps, local_steps))


def steps_of(local_steps: tuple[int, ...], client_id: int) -> int:
    """Give a client's K of a round: there is a number for each client, or one where all have the same."""
    return local_steps[client_id] if len(local_steps) > 1 else local_steps[0]


def server_commit(
    state: ServerState,
    aggregate: Aggregate,
    optimizer: ServerOptimizer,
    announce: Callable[[Tensor, Tensor], Tensor] | None = None,
    into: Tensor | None = None,
) -> ServerState:
    """Commit the next round: x^b ← x^b + η Δ̄, or a step of the block's server optimizer.

    Args:
        state: The server before; the round committed is `state.committed + 1`, its block is in `history`.
        aggregate: Δ̄ and ρ of that round.
        optimizer: What is done with Δ̄.
        announce: What the clients hold of the new value, given (new x^b, old view^b), where the way down
            is lossy. The difference x − view stays with the server and travels at the next visit.
        into: Memory for the new value, as `apply_update` has it; None: new.
    """
    round_index = state.committed + 1
    block_index = state.history[round_index]
    value, moments = apply_update(
        state.params[block_index], aggregate.mean_delta, state.moments[block_index], optimizer, into
    )
    seen = value if announce is None else announce(value, state.view[block_index])
    return replace(
        state,
        params=_put(state.params, block_index, value),
        view=_put(state.view, block_index, seen),
        versions=_put(state.versions, block_index, round_index),
        rho=_put(state.rho, block_index, aggregate.rho),
        squared_delta=_put(state.squared_delta, block_index, aggregate.squared_delta),
        moments=_put(state.moments, block_index, moments),
        committed=round_index,
    )


def commit_nothing(state: ServerState) -> ServerState:
    """Pass over the next round, which has no update that counts: its block keeps value, version and moments."""
    return replace(state, committed=state.committed + 1)


def news_for(state: ServerState, versions: Sequence[int]) -> tuple[Commit, ...]:
    """List what a client with these block versions has not seen: one aggregate, or a catch-up of several."""
    return tuple(
        Commit(block_index, state.versions[block_index], state.view[block_index], state.rho[block_index])
        for block_index, version in enumerate(versions)
        if version < state.versions[block_index]
    )


def _put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Tell whether two models are bitwise equal, block by block."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
