"""Clients that take as many local steps as their speed allows: same bits as the oracle told the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from engines import run_here, server_plan
from parablock.algorithm.aggregate import Aggregate, average
from parablock.algorithm.parablock import same, steps_of
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.algorithm.sequential import OracleProblem, run_sequential
from parablock.clock import VirtualClock
from parablock.engine.contract import EngineResult
from parablock.engine.local_steps import FillTheWait, FixedSteps, LocalSteps
from parablock.engine.update_form import Differences
from parablock.trace import Trace
from parablock.training.trainer import Trained
from parablock.wire.quantize import Encoding
from parablock.wire.transport import Link
from toy import ToyTrainer, initial, solve

EXAMPLES, ROUNDS = [3, 1, 2, 5], 12
STEP_S = (1.0, 0.3, 4.0, 2.0)
LINK = Link(32e-6, 64e-6)
Updates = Mapping[int, tuple[Tensor, int]]


class PacedTrainer(ToyTrainer):
    """Takes the steps that it is asked for, from the place in its data that belongs to them."""

    def __init__(self, client_id: int, num_examples: int, step_time_s: float) -> None:
        super().__init__(client_id, num_examples, step_time_s)
        self.taken = 0

    def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
        assert steps_before == self.taken
        self.taken += num_local_steps
        return Trained(
            solve(self.client_id, round_index, block_index, working, num_local_steps=num_local_steps), 0.0
        )


def threaded(delay: int, rule: Rule, local_steps: LocalSteps) -> EngineResult:
    form = Differences(Encoding("float32"), rule)
    plan = server_plan(4, ROUNDS, delay, form, local_steps=local_steps, stall_timeout_s=60.0)
    trainers = [PacedTrainer(i, n, STEP_S[i]) for i, n in enumerate(EXAMPLES)]
    return run_here(initial(4), trainers, plan, Trace(VirtualClock()), link=LINK)


def sequential(
    delay: int, steps: tuple[tuple[int, ...], ...], aggregate: Callable[[Updates], Aggregate], *, evened: bool
) -> tuple[Tensor, ...]:
    def fold(updates: Updates, t: int) -> Aggregate:
        if not evened:
            return aggregate(updates)
        mean = sum(n * steps_of(steps[t], i) for i, (_, n) in updates.items()) / sum(EXAMPLES)
        factors = {i: mean / steps_of(steps[t], i) for i in updates}
        return aggregate({i: (delta * factors[i], n) for i, (delta, n) in updates.items()})

    problem = OracleProblem(EXAMPLES, ROUNDS, delay, schedule="shuffled", aggregate=fold)
    paced = lambda i, t, b, v: solve(i, t, b, v, num_local_steps=steps_of(steps[t], i))  # noqa: E731
    return run_sequential(initial(4), problem, paced).server.params


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("rule", [Rule(), Rule("median"), Rule(clip_norm=0.3)], ids=["mean", "median", "clipped"])
def test_unequal_steps_are_evened_out_as_in_the_oracle(delay: int, rule: Rule):
    result = threaded(delay, rule, FillTheWait(LINK, 1, 40))
    steps = result.server.local_steps
    assert len(set(steps[-1])) == 4, f"every client has a number of its own: {steps[-1]}"
    aggregate = average if rule == Rule() else lambda updates: aggregate_by(rule, updates)
    expected = sequential(delay, steps, aggregate, evened=True)
    assert same(result.server.params, expected)
    assert not same(expected, sequential(delay, steps, aggregate, evened=False))
    assert not same(expected, sequential(delay, ((5,),) * ROUNDS, aggregate, evened=True))


def test_steps_that_are_equal_change_no_bit():
    result = threaded(1, Rule(), FixedSteps(3))
    steps = result.server.local_steps
    assert steps == ((3,),) * ROUNDS
    assert same(result.server.params, sequential(1, steps, average, evened=False))


def test_more_steps_give_a_client_no_more_say():
    # One walks up and one down, by 1/8 a step: together they stay where they are, whoever is fast. The mean of the
    # updates themselves, +K_0 / 8 and −K_1 / 8, would follow the fast one.
    class Walker(ToyTrainer):
        def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
            step = (0.125, -0.125)[self.client_id]
            return Trained(working[block_index] + num_local_steps * step, 0.0)

    def end_of(step_s: tuple[float, float]) -> float:
        plan = server_plan(2, 4, 0, local_steps=FillTheWait(Link(), 1, 16))
        trainers = [Walker(i, 1, each_s) for i, each_s in enumerate(step_s)]
        result = run_here((torch.zeros(3),), trainers, plan, Trace(VirtualClock()))
        assert result.server.local_steps[-1] == tuple(round(max(step_s) / each_s) for each_s in step_s)
        return float(result.server.params[0][0])

    assert end_of((1.0, 8.0)) == end_of((1.0, 1.0)) == 0.0
