from __future__ import annotations

from math import inf

import pytest

from parablock.algorithm.schedule import SCHEDULES, blocks_never_visited, client_in_turn, cohort, next_block


def blocks_of(schedule: str, rounds: int, *, num_blocks: int = 6, delay: int = 1, seed: int = 0) -> list[int]:
    history: list[int] = []
    for _ in range(rounds):
        history.append(
            next_block(
                schedule,
                history,
                num_blocks=num_blocks,
                delay=delay,
                seed=seed,
                squared_delta=[float(b + 1) if b in history[: -delay or None] else inf for b in range(num_blocks)],
            )
        )
    return history


def test_cyclic_and_reversed():
    assert blocks_of("cyclic", 8) == [0, 1, 2, 3, 4, 5, 0, 1]
    assert blocks_of("reversed", 8) == [5, 4, 3, 2, 1, 0, 5, 4]


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_shuffled_visits_every_block_once_a_cycle_and_avoids_those_in_flight(delay):
    history = blocks_of("shuffled", 60, delay=delay)
    for cycle in range(10):
        assert sorted(history[6 * cycle : 6 * cycle + 6]) == list(range(6))
    for t in range(delay, 60):
        assert history[t] not in history[t - delay : t]
    if delay < 5:  # with B − 1 in flight only one order is possible
        assert history[:6] != history[6:12]
        assert history != blocks_of("shuffled", 60, delay=delay, seed=1)


@pytest.mark.parametrize("schedule", ["cyclic", "reversed", "shuffled", "random"])
def test_delays_0_and_1_train_the_same_blocks_so_that_nothing_else_differs(schedule):
    assert blocks_of(schedule, 60, delay=0) == blocks_of(schedule, 60, delay=1)
    if schedule == "shuffled":
        assert blocks_of(schedule, 60, delay=0) == blocks_of(schedule, 60, delay=3)
        assert blocks_of(schedule, 60, delay=0) != blocks_of(schedule, 60, delay=5)


@pytest.mark.parametrize("schedule", ["random", "importance"])
def test_other_schedules_avoid_blocks_in_flight_where_they_can(schedule):
    history = blocks_of(schedule, 100, delay=2)
    assert all(history[t] not in history[t - 2 : t] for t in range(2, 100))
    crowded = blocks_of(schedule, 20, num_blocks=2, delay=5)
    assert set(crowded) == {0, 1}


def test_random_draws_with_replacement():
    history = blocks_of("random", 60)
    assert any(sorted(history[6 * c : 6 * c + 6]) != list(range(6)) for c in range(10))


def test_importance_visits_all_first_then_what_moves_most_and_waits_longest():
    history = blocks_of("importance", 6, delay=0)
    assert history == [0, 1, 2, 3, 4, 5]
    # after round 5 block b has waited 6 − b rounds, times b + 1: 6·1, 5·2, 4·3, 3·4, 2·5, 1·6; the first 12 is 2's
    assert blocks_of("importance", 7, delay=0)[6] == 2


def test_an_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="importance"):
        blocks_of("zigzag", 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_never_visited_are_found_before_the_run(schedule):
    missed = blocks_never_visited(schedule, num_rounds=4, num_blocks=6, delay=1, seed=0)
    assert len(missed) >= 2
    assert blocks_never_visited(schedule, num_rounds=60, num_blocks=6, delay=1, seed=0) == ()


def test_cohorts_are_drawn_by_round_and_seed_and_ascend():
    drawn = [cohort(t, num_clients=10, participation=0.3, seed=0) for t in range(50)]
    assert all(len(clients) == 3 and list(clients) == sorted(set(clients)) for clients in drawn)
    assert set().union(*drawn) == set(range(10))
    assert len(set(drawn)) > 10
    assert drawn[0] != cohort(0, num_clients=10, participation=0.3, seed=1) or drawn[1] != cohort(
        1, num_clients=10, participation=0.3, seed=1
    )
    assert cohort(3, num_clients=10, participation=1.0, seed=0) == tuple(range(10))
    assert len(cohort(3, num_clients=10, participation=0.01, seed=0)) == 1


@pytest.mark.parametrize(("num_clients", "num_blocks"), [(4, 4), (2, 5), (3, 8), (5, 2), (8, 3), (3, 1)])
def test_blocks_have_owners_and_everybody_has_a_turn(num_clients: int, num_blocks: int) -> None:
    history = [t % num_blocks for t in range(6 * num_clients * num_blocks)]
    turns = [
        (client_in_turn(history, t, num_clients=num_clients, num_blocks=num_blocks), block)
        for t, block in enumerate(history)
    ]
    assert {client for client, _ in turns} == set(range(num_clients))
    assert {block for _, block in turns} == set(range(num_blocks))
    blocks_of = {client: {b for c, b in turns if c == client} for client in range(num_clients)}
    owners = [sum(block in blocks for blocks in blocks_of.values()) for block in range(num_blocks)]
    if num_blocks >= num_clients:
        assert owners == [1] * num_blocks
    else:
        assert {len(blocks) for blocks in blocks_of.values()} == {1}
