r"""ParaBlock: federated block coordinate descent with d rounds of updates in flight.

Source: arXiv 2511.19959 (Wang, Cao, Chen). With d = 0 this is standard FL-BCD; with d = 1 the update of
round t − 1 travels while round t is computed, and a round costs max(compute, communication).

| symbol | here | meaning |
|---|---|---|
| x, x^b | `ServerState.params`, `params[b]` | the server's parameters, block b of them |
| z | `ClientState.base` | the committed parameters that a client holds |
| F | `ClientState.in_flight` | the client's own updates that are sent but not committed |
| v^b | `working_block(…)` | the start of training of block b: base + overlay of F |
| y^b | `trained` | v^b after K local steps |
| Δ_i | `delta` | y^b − v^b, fp32, this sign everywhere |
| Δ̄, ρ_b | `Aggregate.mean_delta`, `.rho` | weighted mean; ‖Δ̄‖² / Σ w_i‖Δ_i‖² |
| α_b | `overlay_weight(…)` | the client's prediction of the aggregate from its own update; `aligned` is ours |

Every value is a flat vector of one block and is never changed in place. Every function takes a state and returns a
new one, which shares all unchanged tensors. So a state can be kept, compared and saved at any time. The two
threads are in `engine/pipeline.py`, a whole run in one thread is `sequential.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from parablock.algorithm.aggregate import Aggregate, Kinds, Rho, ServerOptimizer, apply_update, each_rho

T = TypeVar("T")

NEVER = -1
"""The version of a block that was never committed."""


@dataclass(frozen=True)
class InFlight:
    """A client's own update that is sent but not committed.

    Attributes:
        round_index: The round s that made it.
        block_index: Its block.
        delta: Δ_s as the server decodes it; flat, fp32.
    """

    round_index: int
    block_index: int
    delta: Tensor


@dataclass(frozen=True)
class ClientState:
    """The state of a client between rounds.

    Attributes:
        base: z, one flat vector for each block, in the run's dtype; bitwise the server's view as of `versions`.
        versions: For each block the round whose commit made this value; `NEVER` at the start.
        rho: ρ_b as of the last visit of each block; 1 at the start.
        in_flight: F, oldest first; at most d updates when a round starts.
    """

    base: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rho: tuple[Rho, ...]
    in_flight: tuple[InFlight, ...] = ()


@dataclass(frozen=True)
class Commit:
    """The server's new value of one block, as every client receives it.

    Attributes:
        block_index: The block.
        version: The round whose aggregate made the value.
        value: The new z^b, flat, in the run's dtype.
        rho: ρ_b of that aggregate.
    """

    block_index: int
    version: int
    value: Tensor
    rho: Rho


@dataclass(frozen=True)
class ServerState:
    """The state of the server between commits.

    Attributes:
        params: x, one flat vector for each block, in the run's dtype.
        view: x as the clients hold it; the same tensors unless the downlink is lossy.
        versions: For each block the round of its last commit.
        rho: ρ_b of the last commit of each block.
        squared_delta: Mean squared element of the last Δ̄ of each block; infinite before the first.
        moments: The server optimizer's state for each block.
        committed: The newest committed round; all rounds up to it are committed.
        history: The block of every scheduled round, b_0 … b_t.
        local_steps: The local steps K of each of these rounds, as `steps_of` reads them.
    """

    params: tuple[Tensor, ...]
    view: tuple[Tensor, ...]
    versions: tuple[int, ...]
    rho: tuple[Rho, ...]
    squared_delta: tuple[float, ...]
    moments: tuple[tuple[Tensor, ...], ...]
    committed: int = NEVER
    history: tuple[int, ...] = ()
    local_steps: tuple[tuple[int, ...], ...] = ()


def initial_client(params: Sequence[Tensor]) -> ClientState:
    """Return a client's first state, with the initial parameters: one flat vector for each block."""
    return ClientState(tuple(params), (NEVER,) * len(params), (1.0,) * len(params))


def initial_server(params: Sequence[Tensor]) -> ServerState:
    """Return the server's first state, with the same initial parameters."""
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
    """Replace the base by the server's committed values: the correction.

    Each block takes the server's value exactly. The client's updates of all rounds up to `committed` leave F,
    whether the server counted them or not. The overlay is dropped with them, never subtracted, so nothing drifts.

    Args:
        state: The client before.
        commits: The blocks that are newer at the server.
        committed: The newest round that these commits include.
    """
    base, versions, rho = list(state.base), list(state.versions), list(state.rho)
    for news in commits:
        base[news.block_index] = news.value
        versions[news.block_index] = news.version
        rho[news.block_index] = news.rho
    still_in_flight = tuple(own for own in state.in_flight if own.round_index > committed)
    return ClientState(tuple(base), tuple(versions), tuple(rho), still_in_flight)


def overlay_weight(rule: str, rho: float, num_updates: int = 1) -> float:
    """Return α, the weight of the client's own updates in flight, of `num_updates` in a round.

    `own` keeps an update whole; `aligned` scales it to the length that the average had at the block's last visit;
    `mean` is the least-squares prediction of that average; `share` is the client's own part of it; `none` leaves
    the update out (naive staleness, kept as the ablation).
    """
    return {"own": 1.0, "aligned": sqrt(rho), "mean": rho, "share": 1 / num_updates, "none": 0.0}[rule]


def working_block(
    state: ClientState, block_index: int, rule: str, num_updates: int = 1, kinds: Kinds | None = None
) -> Tensor:
    """Return v^b = z^b + Σ α_b Δ_s over the updates of this block in flight, oldest first.

    Each sum is rounded to the run's dtype before the next, as the server's commits are. Without an update in flight
    the result is the base tensor itself.
    """
    value = state.base[block_index]
    alphas = [overlay_weight(rule, rho, num_updates) for rho in each_rho(state.rho[block_index])]
    for own in state.in_flight:
        if own.block_index == block_index and any(alphas):
            alpha = alphas[0] if kinds is None or len(alphas) == 1 else kinds.spread(alphas)
            value = (alpha * own.delta).add_(value).to(value.dtype)
    return value


def working_parameters(
    state: ClientState, rule: str, num_updates: int = 1, kinds: Kinds | None = None
) -> tuple[Tensor, ...]:
    """Return v: the working value of every block; parameters of each of `kinds` have a ρ of their own."""
    return tuple(working_block(state, b, rule, num_updates, kinds) for b in range(len(state.base)))


def delta_of(trained: Tensor, start: Tensor) -> Tensor:
    """Return Δ = y^b − v^b in fp32."""
    return trained.float() - start.float()


def put_in_flight(state: ClientState, round_index: int, block_index: int, delta: Tensor) -> ClientState:
    """Append this round's update to F, as the server will decode it."""
    return replace(state, in_flight=(*state.in_flight, InFlight(round_index, block_index, delta)))


# ── server: one commit ──────────────────────────────────────────────────────────────────────────────


def schedule_round(state: ServerState, block_index: int, local_steps: tuple[int, ...]) -> ServerState:
    """Append the block and the local steps of the next round to the history."""
    return replace(state, history=(*state.history, block_index), local_steps=(*state.local_steps, local_steps))


def steps_of(local_steps: tuple[int, ...], client_id: int) -> int:
    """Return a client's K of a round; `local_steps` has a number for each client, or one for all."""
    return local_steps[client_id] if len(local_steps) > 1 else local_steps[0]


def server_commit(
    state: ServerState,
    aggregate: Aggregate,
    optimizer: ServerOptimizer,
    announce: Callable[[Tensor, Tensor], Tensor] | None = None,
    into: Tensor | None = None,
) -> ServerState:
    """Commit the next round: x^b ← x^b + Δ̄, or a step of the block's server optimizer.

    Args:
        state: The server before; the next round is `state.committed + 1`, and its block is in `history`.
        aggregate: Δ̄ and ρ of that round.
        optimizer: The server optimizer.
        announce: (new x^b, old view^b) → new view^b, for a lossy downlink. The difference x − view stays with the
            server and travels at the next visit.
        into: Memory for the new value, as in `apply_update`; None: new memory.
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
    """Pass over a round without a valid update: its block keeps value, version and moments."""
    return replace(state, committed=state.committed + 1)


def news_for(state: ServerState, versions: Sequence[int]) -> tuple[Commit, ...]:
    """Return the commits that a client with these block versions lacks: one, or several to catch up."""
    return tuple(
        Commit(block_index, state.versions[block_index], state.view[block_index], state.rho[block_index])
        for block_index, version in enumerate(versions)
        if version < state.versions[block_index]
    )


def _put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Return whether two models are bitwise equal, block by block."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
