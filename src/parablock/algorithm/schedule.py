"""Schedules: the block that each round trains, and the clients that take part.

A schedule is a function of the run's seed, of the blocks trained before (`history`) and, for `importance`, of the
sizes of their last aggregates. If there are more blocks than rounds in flight, no schedule trains a block whose
update is still on its way. `shuffled` always excludes half of all blocks, and `random` the last one. So runs that
differ only in a small delay train the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from parablock.seeding import generator_for

SCHEDULES = ("cyclic", "reversed", "shuffled", "random", "importance")


def next_block(
    schedule: str,
    history: Sequence[int],
    *,
    num_blocks: int,
    delay: int,
    seed: int,
    squared_delta: Sequence[float],
) -> int:
    """Choose the block b_t of round t = len(history).

    Args:
        schedule: cyclic | reversed | shuffled (a new permutation for each cycle) | random (independent
            draws) | importance (the largest mean squared delta × rounds since the last visit).
        history: b_0 … b_{t−1}.
        num_blocks: B.
        delay: d; the last d blocks are in flight.
        seed: The run's seed.
        squared_delta: For each block the mean squared element of its last committed Δ̄; infinite before the first.
    """
    round_index = len(history)
    position = round_index % num_blocks
    if schedule == "cyclic":
        return position
    if schedule == "reversed":
        return num_blocks - 1 - position
    apart = max(delay, {"shuffled": num_blocks // 2, "random": 1}.get(schedule, 0))
    recent = set(history[-apart:]) if 0 < apart < num_blocks else set()
    candidates = [block for block in range(num_blocks) if block not in recent]
    if schedule == "importance":
        return max(candidates, key=lambda block: (_importance(block, history, squared_delta), -block))
    if schedule == "shuffled":
        this_cycle = set(history[round_index - position :])
        candidates = [block for block in candidates if block not in this_cycle]
    elif schedule != "random":
        raise ValueError(f"{schedule!r} is no block schedule; there are {', '.join(SCHEDULES)}")
    return candidates[int(generator_for(seed, "schedule", round_index).integers(len(candidates)))]


def _importance(block: int, history: Sequence[int], squared_delta: Sequence[float]) -> float:
    visits = [round_index for round_index, visited in enumerate(history) if visited == block]
    if not visits:
        return inf
    measured = squared_delta[block] < inf  # not while its first update is in flight
    return squared_delta[block] * (len(history) - visits[-1]) if measured else 0.0


def blocks_never_visited(
    schedule: str, *, num_rounds: int, num_blocks: int, delay: int, seed: int
) -> tuple[int, ...]:
    """Return the blocks that a run of this length would never train.

    `importance` visits every block before it returns to any, so no measurements are needed.
    """
    history: list[int] = []
    missing, unmeasured = set(range(num_blocks)), [inf] * num_blocks
    while missing and len(history) < num_rounds:
        block = next_block(
            schedule, history, num_blocks=num_blocks, delay=delay, seed=seed, squared_delta=unmeasured
        )
        history.append(block)
        missing.discard(block)
    return tuple(sorted(missing))


def cohort(round_index: int, *, num_clients: int, participation: float, seed: int) -> tuple[int, ...]:
    """Draw the clients of a round, ascending: the share `participation` of them, at least one."""
    size = max(1, round(participation * num_clients))
    if size >= num_clients:
        return tuple(range(num_clients))
    drawn = generator_for(seed, "cohort", round_index).choice(num_clients, size=size, replace=False)
    return tuple(sorted(int(client_id) for client_id in drawn))


def client_in_turn(history: Sequence[int], round_index: int, *, num_clients: int, num_blocks: int) -> int:
    """Return the one client that trains the block of a round; `history` is b_0 … b_t.

    With at least as many blocks as clients, block b is client b mod M's at every visit; with fewer, clients
    b, b + B, b + 2B … share it and take turns.
    """
    block = history[round_index]
    if num_blocks >= num_clients:
        return block % num_clients
    owners = range(block, num_clients, num_blocks)
    earlier_visits = list(history[:round_index]).count(block)
    return owners[earlier_visits % len(owners)]
