"""In the real engine: masks cancel, so that a masked run is bitwise that of the same grid without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from engines import run_here, server_plan
from parablock.algorithm.fixed_point import FixedPointAggregation, FixedPointGrid
from parablock.algorithm.parablock import same
from parablock.algorithm.robust import Rule
from parablock.algorithm.schedule import cohort
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.clock import RealClock, VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.faults import Fault, Faults
from parablock.engine.plans import Hooks
from parablock.engine.update_form import FixedPointWords
from parablock.privacy.discrete_gaussian import DiscreteGaussian
from parablock.privacy.keystream import Keystream, derive
from parablock.privacy.protection import Protection
from parablock.privacy.secure_aggregation import SecureAggregation
from parablock.storage.checkpoint import RunState
from parablock.trace import Trace
from parablock.wire.transport import Link
from toy import ToyTrainer, initial, solve

CLIENTS, ROUNDS = 8, 10
GRID = FixedPointGrid(2.0, CLIENTS)
DROPPING = tuple(
    Fault(client_id, round_index, "upload", "drop")
    for round_index, clients in {2: (1, 6), 3: (0,), 7: (3, 4)}.items()
    for client_id in clients
)


def protection_with(grid: FixedPointGrid, client_id: int) -> Protection:
    """Clipping, and on a grid with noise the client's part of it."""
    if grid.noise_multiplier == 0:
        return Protection(2.0)
    gaussian = DiscreteGaussian(grid.noise_variance)
    own = derive(bytes(32), "client", client_id)
    return Protection(2.0, integers=lambda t, content: partial(gaussian.draw, Keystream(derive(own, t, content))))


def run(
    *,
    masked: bool,
    delay: int = 1,
    clock=None,
    participation: float = 1.0,
    faults: Sequence[Fault] = (),
    stop_at: int | None = None,
    resumed: RunState | None = None,
    num_groups: int = 4,
    noise: float = 0.0,
) -> tuple[EngineResult, list[list[int]], list[RunState], float]:
    clock = clock or VirtualClock(start_s=resumed.progress["clock_s"] if resumed else 0.0)
    size = len(cohort(0, num_clients=CLIENTS, participation=participation, seed=0))
    grid = replace(GRID, num_clients=size, noise_multiplier=noise, fewest_clients=size - size // 3)
    form = FixedPointWords(grid, Rule(clip_norm=2.0))
    plan = server_plan(CLIENTS, ROUNDS, delay, form, participation=participation, min_updates=size - size // 3)
    counted: list[list[int]] = []
    states: list[RunState] = []

    def keep(state: RunState) -> None:
        state.progress["clock_s"] = clock.now()
        states.append(state)

    rounds = iter(range(100))
    result = run_here(
        initial(num_groups),
        [ToyTrainer(i, i + 1) for i in range(CLIENTS)],
        plan,
        Trace(clock),
        Hooks(
            lambda state, updates, traffic: counted.append([update.client_id for update in updates]),
            keep,
            asked_to_stop=lambda: stop_at is not None and next(rounds) == stop_at,
        ),
        link=Link(0.05, 0.05),
        faults=Faults(faults),
        resumed=resumed,
        protection_of=partial(protection_with, grid),
        masking=SecureAggregation(CLIENTS, ROUNDS, participation, 0, 20.0) if masked else None,
    )
    return result, counted, states, clock.now()


@pytest.mark.parametrize(("delay", "num_groups"), [(0, 4), (1, 4), (2, 4), (1, 1), (2, 1), (1, 2)])
def test_masked_is_plain_bitwise_and_the_plain_grid_is_the_oracle(delay: int, num_groups: int):
    plain, masked = (run(masked=how, delay=delay, num_groups=num_groups)[0] for how in (False, True))
    assert same(plain.server.params, masked.server.params)
    assert plain.server.rho == masked.server.rho
    assert all(same(client.base, plain.server.view) for client in masked.clients)

    def on_the_grid(updates, t):
        del t
        aggregation = FixedPointAggregation(GRID, Rule())
        aggregation.fold({i: (words[i], n) for i, (_, n) in updates.items()})
        return aggregation.aggregate()

    words: dict[int, torch.Tensor] = {}
    kept: dict[tuple[int, int], torch.Tensor] = {}

    def encode(delta: torch.Tensor, b: int, t: int, i: int) -> torch.Tensor:
        kept[t, i] = GRID.encode(Protection(2.0).apply(delta, t)[0])
        return GRID.decode(kept[t, i])

    def aggregate(updates, t):
        words.update({i: kept[t, i] for i in updates})
        return on_the_grid(updates, t)

    problem = OracleProblem(
        range(1, CLIENTS + 1), ROUNDS, delay, schedule="shuffled", encode=encode, aggregate=aggregate
    )
    assert same(plain.server.params, run_sequential(initial(num_groups), problem, solve).server.params)
    assert not same(plain.server.params, run(masked=False, delay=delay + 1, num_groups=num_groups)[0].server.params)


def test_two_of_eight_drop_and_the_sum_is_still_that_of_the_plain_grid():
    plain, plain_counted, *_ = run(masked=False, faults=DROPPING)
    masked, counted, *_ = run(masked=True, faults=DROPPING)
    assert counted == plain_counted
    assert counted[2] == [0, 2, 3, 4, 5, 7]
    assert same(plain.server.params, masked.server.params)
    assert not same(plain.server.params, run(masked=False)[0].server.params)


def test_too_few_updates_make_a_round_void_and_the_run_goes_on():
    faults = [Fault(client_id, 4, "train", "drop") for client_id in (0, 2, 5)]
    plain, plain_counted, *_ = run(masked=False, faults=faults)
    masked, counted, *_ = run(masked=True, faults=faults)
    assert counted == plain_counted
    assert counted[4] == []
    assert len(counted[5]) == CLIENTS
    assert same(plain.server.params, masked.server.params)


def test_cohorts_sum_among_themselves():
    plain, counted, *_ = run(masked=False, participation=0.5)
    assert same(plain.server.params, run(masked=True, participation=0.5)[0].server.params)
    assert {len(clients) for clients in counted} == {4}


def test_under_the_real_clock_masked_is_plain_too():
    assert same(run(masked=True, clock=RealClock())[0].server.params, run(masked=False)[0].server.params)


def test_a_stopped_run_goes_on_with_new_masks_to_the_same_end():
    whole = run(masked=True)[0]
    stopped, _, (state,), _ = run(masked=True, stop_at=5)
    assert not stopped.finished
    resumed = run(masked=True, resumed=state)[0]
    assert resumed.finished
    assert same(resumed.server.params, whole.server.params)


def test_noise_of_the_clients_is_in_a_masked_sum_as_on_the_plain_grid_dropouts_and_resume_included():
    noisy = partial(run, faults=DROPPING, noise=0.5)
    plain, counted, *_ = noisy(masked=False)
    masked = noisy(masked=True)[0]
    assert same(plain.server.params, masked.server.params)
    assert plain.server.rho == masked.server.rho
    assert counted[2] == [0, 2, 3, 4, 5, 7]
    assert not same(plain.server.params, run(masked=False, faults=DROPPING, noise=0.25)[0].server.params)
    _, _, (state,), _ = noisy(masked=True, stop_at=5)
    resumed = noisy(masked=True, resumed=state)[0]
    assert same(resumed.server.params, masked.server.params), "the same noise again, under other masks"


def test_the_exchange_stays_hidden_under_the_computation():
    # 64 bytes of words in messages of some 300 bytes at 50 kbit/s: about 50 ms each way, beside steps of 1 s
    plain_s, masked_s = run(masked=False)[3], run(masked=True)[3]
    assert plain_s == pytest.approx(ROUNDS * 1.0, abs=0.5)
    # the keys and shares of all rounds before the first, and afterwards nothing in the way of the next step
    assert plain_s < masked_s < plain_s + 4.0
