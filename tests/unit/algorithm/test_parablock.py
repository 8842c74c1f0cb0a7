"""The invariants of the method, on a non-convex toy whose blocks interact (see `toy`)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.parablock import (
    ClientState,
    Commit,
    InFlight,
    commit,
    initial_client,
    initial_server,
    overlay_weight,
    same,
    schedule_round,
    server_commit,
    working_block,
)
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.algorithm.sequential import OracleProblem, OracleResult, run_sequential
from parablock.seeding import generator_for
from toy import SIZE, initial, loss_of, objective, solve

EXAMPLES = [3, 1, 2, 5]
BLOCKS = 4


def outcome(
    delay: int, *, rule: str = "aligned", rounds: int = 24, examples: list[int] | None = None, **kw
) -> OracleResult:
    problem = OracleProblem(examples or EXAMPLES, rounds, delay, in_flight=rule, **kw)
    return run_sequential(initial(BLOCKS, kw.pop("dtype", torch.float32)), problem, solve)


def plain_fl_bcd(rounds: int) -> tuple[Tensor, ...]:
    """FL-BCD as a textbook writes it: one parameter list, no states, no versions, no overlay."""
    params = list(initial(BLOCKS))
    for t in range(rounds):
        b = t % BLOCKS
        deltas = [solve(i, t, b, tuple(params)) - params[b] for i in range(len(EXAMPLES))]
        mean = deltas[0] * (EXAMPLES[0] / sum(EXAMPLES))
        for delta, examples in zip(deltas[1:], EXAMPLES[1:], strict=True):
            mean = mean + delta * (examples / sum(EXAMPLES))
        params[b] = params[b] + mean
    return tuple(params)


@pytest.mark.parametrize("rule", ["own", "aligned", "none"])
def test_delay_0_is_fl_bcd_bitwise_for_every_overlay(rule):
    expected = plain_fl_bcd(24)
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-6)
        for a, b in zip(outcome(0, rule=rule).server.params, expected, strict=True)
    )
    assert same(outcome(0, rule=rule).server.params, outcome(0, rule="own").server.params)
    assert not same(outcome(1, rule=rule).server.params, expected)


@pytest.mark.parametrize("delay", [0, 1, 2, 5])
@pytest.mark.parametrize("rule", ["own", "aligned", "none"])
def test_the_drained_model_is_the_start_plus_all_mean_deltas(delay, rule):
    sums = [block.clone() for block in initial(BLOCKS)]
    kept: dict[tuple[int, int], Tensor] = {}

    def recording(i: int, t: int, b: int, working: tuple[Tensor, ...]) -> Tensor:
        trained = solve(i, t, b, working)
        kept[t, i] = trained - working[b]
        sums[b] += kept[t, i] * EXAMPLES[i] / sum(EXAMPLES)
        return trained

    end = run_sequential(initial(BLOCKS), OracleProblem(EXAMPLES, 24, delay, in_flight=rule), recording)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(end.server.params, sums, strict=True))
    without_one = [s - kept[7, 3] * EXAMPLES[3] / sum(EXAMPLES) * (b == 7 % BLOCKS) for b, s in enumerate(sums)]
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(end.server.params, without_one, strict=True))


HARD = {
    "plain": {},
    "dropouts": {"lost": frozenset({(0, 3), (2, 4), (3, 4), (1, 9)})},
    "momentum": {"server_optimizer": ServerOptimizer("momentum", 0.5)},
    "adam": {"server_optimizer": ServerOptimizer("adam", 0.05)},
    "participation": {"participation": 0.5},
    "lossy both ways": {
        "encode": lambda delta, *_: delta.bfloat16().float(),
        "announce": lambda new, view, _: view + (new - view).bfloat16().float(),
    },
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_after_the_drain_every_client_holds_the_servers_view(name, delay):
    end = outcome(delay, **HARD[name])
    for client in end.clients:
        assert same(client.base, end.server.view)
        assert client.in_flight == ()
    if name != "plain":
        assert not same(end.server.params, outcome(delay).server.params), f"{name} changed nothing"
    assert same(end.server.view, end.server.params) == (name != "lossy both ways")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["cyclic", "random"])
def test_one_client_does_not_notice_the_delay_with_own_and_aligned(dtype, schedule):
    def end(delay: int, rule: str) -> tuple[Tensor, ...]:
        problem = OracleProblem([7], 20, delay, in_flight=rule, schedule=_same_blocks(schedule, 20))
        return run_sequential(initial(BLOCKS, dtype), problem, solve).server.params

    sequential = end(0, "own")
    for delay in (1, 2, 5):
        assert same(end(delay, "own"), sequential)
        assert same(end(delay, "aligned"), sequential)
        assert not same(end(delay, "none"), sequential)


def _same_blocks(schedule: str, rounds: int) -> list[int]:
    """A block order that does not depend on the delay: 0, 1, 2, 3, 0, … or draws that recur in flight."""
    draws = generator_for(0, "test").integers(BLOCKS, size=rounds).tolist()
    return draws if schedule == "random" else [t % BLOCKS for t in range(rounds)]


def test_identical_clients_follow_the_sequential_trajectory_with_own_and_not_with_none():
    def identical(i: int, t: int, b: int, working: tuple[Tensor, ...]) -> Tensor:
        del i
        return solve(0, t, b, working)

    def end(delay: int, rule: str) -> Tensor:
        problem = OracleProblem([1, 1, 1], 24, delay, in_flight=rule)
        return torch.cat(run_sequential(initial(BLOCKS), problem, identical).server.params)

    assert torch.allclose(end(1, "own"), end(0, "own"), atol=1e-5)
    assert torch.allclose(end(1, "aligned"), end(0, "own"), atol=1e-5)
    assert not torch.allclose(end(1, "none"), end(0, "own"), atol=1e-3)


def test_round_0_is_the_same_for_every_delay_and_overlay():
    first = outcome(0).trajectory[0]
    for delay in (1, 2, 4):
        for rule in ("own", "aligned", "none"):
            found = outcome(delay, rule=rule).trajectory
            assert same(found[0], first)
            assert not same(found[5], outcome(0).trajectory[5])


def test_never_taking_the_aggregate_for_the_own_copy_is_visibly_worse():
    """The negative control of the correction: each client keeps its own deltas for ever."""
    kept: list[list[Tensor]] = [[block.clone() for block in initial(BLOCKS)] for _ in EXAMPLES]

    def uncorrected(i: int, t: int, b: int, working: tuple[Tensor, ...]) -> Tensor:
        trained = solve(i, t, b, tuple(kept[i]))
        delta = trained - kept[i][b]
        kept[i][b] = trained
        return working[b] + delta

    problem = OracleProblem(EXAMPLES, 200, 1)
    corrected = run_sequential(initial(BLOCKS), problem, solve)
    wrong = run_sequential(initial(BLOCKS), problem, uncorrected)
    assert loss_of(wrong.server.params, 4) > 1.02 * loss_of(corrected.server.params, 4)


def test_a_block_that_recurs_in_flight_loses_no_work():
    order = _same_blocks("random", 60)
    assert any(a == b for a, b in itertools.pairwise(order)), "blocks do recur in flight"
    best = loss_of(outcome(0, rounds=3000).server.params, 4)
    gap = {d: loss_of(outcome(d, rounds=60, schedule=order).server.params, 4) - best for d in (0, 1)}
    assert 0 < gap[1] <= 2 * gap[0]
    assert 2 * gap[0] < loss_of(initial(BLOCKS), 4) - best, "the bound means something"


def test_commit_replaces_and_retires_and_nothing_is_subtracted():
    state = initial_client([torch.zeros(2), torch.zeros(2)])
    state = ClientState(
        state.base, state.versions, state.rho, (InFlight(4, 0, torch.ones(2)), InFlight(5, 1, torch.ones(2)))
    )
    new = Commit(0, 4, torch.tensor([0.1, 0.2]), 0.25)
    after = commit(state, [new], committed=4)
    assert after.base[0] is new.value  # the very tensor: exact by construction
    assert [own.round_index for own in after.in_flight] == [5]
    assert after.versions == (4, -1)
    assert after.rho == (0.25, 1.0)
    assert state.versions == (-1, -1), "the state before is unchanged"
    # an update that the server did not count retires all the same
    assert commit(state, [], committed=4).in_flight == after.in_flight


def test_overlay_weights():
    assert overlay_weight("own", 0.25) == 1.0
    assert overlay_weight("aligned", 0.25) == 0.5  # √ρ
    assert overlay_weight("mean", 0.25) == 0.25  # ρ: least squares
    assert overlay_weight("share", 0.25, 8) == 0.125  # 1/M, whatever the others did
    assert overlay_weight("none", 0.25) == 0.0
    state = ClientState((torch.tensor([1.0]),), (0,), (0.25,), (InFlight(1, 0, torch.tensor([4.0])),))
    assert working_block(state, 0, "own").item() == 5.0
    assert working_block(state, 0, "aligned").item() == 3.0  # 1 + ½·4
    assert working_block(state, 0, "none") is state.base[0]


def test_the_toys_blocks_interact():
    """The control of this file: an objective that splits over its blocks would pass everything."""
    x = torch.cat(initial(BLOCKS)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(0, BLOCKS)(x), x)
    moved = x.detach().clone()
    moved[:SIZE] += 0.5
    moved.requires_grad_()
    (other,) = torch.autograd.grad(objective(0, BLOCKS)(moved), moved)
    assert (gradient - other)[SIZE:].abs().max() > 1e-2


@pytest.mark.parametrize("gives_memory", [False, True])
def test_a_commit_leaves_the_updates_alone_unless_it_is_given_their_memory(gives_memory):
    updates = {i: (torch.full((4,), float(i)), 1) for i in range(4)}
    aggregate = aggregate_by(Rule("krum"), updates)  # an update of a client, as it is
    (own,) = [delta for delta, _ in updates.values() if delta.data_ptr() == aggregate.mean_delta.data_ptr()]
    before, state = own.clone(), schedule_round(initial_server([torch.ones(4)]), 0, (1,))
    into = aggregate.mean_delta if gives_memory else None
    committed = server_commit(state, aggregate, ServerOptimizer(), into=into)
    assert torch.equal(committed.params[0], 1 + before)
    assert torch.equal(own, before) != gives_memory
    assert (committed.params[0].data_ptr() == own.data_ptr()) == gives_memory
