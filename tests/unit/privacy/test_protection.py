"""Clipping, noise and its accounting: what they are worth, by hand, and that secrets stay secret."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import erfc, exp, log, log1p, pi, sqrt

import numpy as np
import pytest
import torch
from dp_accounting.rdp import RdpAccountant

from engines import QUIET, run_here, server_plan
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.clock import VirtualClock
from parablock.engine.update_form import Differences, FixedPointWords, LocalUpdate
from parablock.privacy.accounting import Accountant
from parablock.privacy.discrete_gaussian import DiscreteGaussian
from parablock.privacy.keystream import Keystream, derive, new_key
from parablock.privacy.protection import Integers, Protection, summed_multiplier, threshold_of
from parablock.trace import Trace
from parablock.training.trainer import Trained
from parablock.wire.quantize import Encoding
from toy import ToyTrainer

KEY = bytes(range(32))


def renyi_epsilon(multiplier: float, releases: int, delta: float) -> float:
    """ε by hand: a Gaussian's Rényi divergence of order a is a/(2z²); T of them add up; the best order counts."""
    orders = [order for order in RdpAccountant()._orders if order > 1]
    return min(
        releases * a / (2 * multiplier**2) + log1p(-1 / a) - log(delta * a) / (a - 1) for a in map(float, orders)
    )


def exact_delta(multiplier: float, releases: int, epsilon: float) -> float:
    """δ of T Gaussian releases, which are one of multiplier z/√T (Balle and Wang 2018, theorem 8)."""
    mu = sqrt(releases) / multiplier  # sensitivity over deviation

    def normal_tail(x: float) -> float:
        return erfc(x / sqrt(2)) / 2

    return normal_tail(epsilon / mu - mu / 2) - exp(epsilon) * normal_tail(epsilon / mu + mu / 2)


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 1), (2.0, 16), (8.0, 64)])
def test_epsilon_is_that_of_the_formula_and_not_below_the_exact_one(multiplier: float, releases: int):
    found = Accountant(multiplier, "central", 1e-5).epsilon(releases)
    assert found == pytest.approx(renyi_epsilon(multiplier, releases, 1e-5), rel=1e-9)
    # an upper bound, and not by much: at this ε the exact δ is below 1e-5, and above it at an ε a tenth smaller
    assert exact_delta(multiplier, releases, found) < 1e-5 < exact_delta(multiplier, releases, 0.85 * found)


def test_more_rounds_less_noise_and_local_inputs_cost_more():
    central = Accountant(2.0, "central", 1e-5)
    assert central.epsilon(0) == 0.0
    assert central.epsilon(4) < central.epsilon(5)
    assert central.epsilon(4) < Accountant(1.0, "central", 1e-5).epsilon(4)
    # two updates are up to 2·C apart where one and none are C apart
    assert Accountant(2.0, "local", 1e-5).epsilon(4) == Accountant(1.0, "central", 1e-5).epsilon(4)


def test_a_keystream_is_repeated_by_its_key_alone_and_drawn_in_parts_is_the_same():
    whole = Keystream(derive(KEY, "a", 1)).normals(1000)
    stream = Keystream(derive(KEY, "a", 1))
    assert torch.equal(torch.cat([stream.normals(600), stream.normals(400)]), whole)
    for other in (derive(KEY, "a", 2), derive(KEY, "b", 1), derive(new_key(), "a", 1)):
        assert not torch.equal(Keystream(other).normals(1000), whole)


def test_drawn_numbers_are_standard_normal():
    drawn = Keystream(derive(KEY, "moments")).normals(200_001).double()
    assert len(drawn) == 200_001
    # standard errors: mean 0.0022, variance 0.0032, fourth moment 0.022
    assert abs(float(drawn.mean())) < 0.01
    assert float(drawn.square().mean()) == pytest.approx(1, abs=0.015)
    assert float(drawn.pow(4).mean()) == pytest.approx(3, abs=0.1)
    assert abs(float((drawn[::2][:-1] * drawn[1::2]).mean())) < 0.02  # a pair shares its radius, not its sign


def test_a_client_sends_no_more_than_the_bound_and_its_noise_has_the_deviation_asked_for():
    delta = torch.full((10_000,), 0.1)  # norm 10
    clipped, factor = Protection(2.0).apply(delta, 0)
    assert factor == pytest.approx(0.2)
    assert float(clipped.double().norm()) == pytest.approx(2.0)
    short, factor = Protection(20.0).apply(delta, 0)
    assert short is delta and factor == 1.0
    noisy, _ = Protection(2.0, 0.5, lambda t, content: Keystream(derive(KEY, t, content)).normals).apply(delta, 3)
    assert float((noisy - clipped).std()) == pytest.approx(1.0, rel=0.05)  # 0.5 · 2


def test_the_server_adds_noise_to_a_mean_in_which_every_client_counts_once():
    updates = {0: (torch.full((10_000,), 0.01), 1), 1: (torch.full((10_000,), 0.03), 999)}
    rule = Rule(clip_norm=4.0, noise_multiplier=0.5)
    noisy = aggregate_by(rule, updates, lambda clients, _: Keystream(derive(KEY, *clients)).normals)
    assert float((noisy.mean_delta - 0.02).std()) == pytest.approx(0.5 * 4.0 / 2, rel=0.05)
    assert abs(float(noisy.mean_delta.mean() - 0.02)) < 0.05  # standard error 0.01
    quiet = aggregate_by(Rule(clip_norm=4.0), updates)
    assert float(quiet.mean_delta.mean()) == pytest.approx(0.02998)


def test_a_sum_of_the_fewest_clients_has_the_noise_asked_for_and_one_of_all_has_more():
    size, bound = 20_000, 4.0
    deltas = {i: torch.full((size,), 0.001 * (i + 1)) for i in range(9)}
    grid = FixedPointGrid(bound, 9, 0.5, threshold_of(9))
    gaussian = DiscreteGaussian(grid.noise_variance)
    for present in (6, 9):
        mean = noisy_mean(grid, gaussian, {i: deltas[i] for i in range(present)}, derive(KEY, "sum"))
        noise = present * (mean - sum(deltas[i] for i in range(present)) / present)
        assert float(noise.std()) == pytest.approx(0.5 * bound * sqrt(present / 6), rel=0.03)
        assert abs(float(noise.mean())) < 0.1  # standard error 0.017
    quiet = noisy_mean(FixedPointGrid(bound, 9), None, deltas, KEY)
    assert torch.allclose(quiet, sum(deltas.values()) / 9, atol=1e-6)
    # the grid of nine clients for six would be too little, and that is seen
    too_fine = DiscreteGaussian(FixedPointGrid(bound, 9, 0.5, 9).noise_variance)
    mean = noisy_mean(grid, too_fine, {i: deltas[i] for i in range(6)}, derive(KEY, "sum"))
    assert float((6 * mean).std()) < 0.9 * 0.5 * bound


def test_no_update_is_longer_on_the_grid_of_noise_than_the_sensitivity_that_is_counted():
    """All elements are 512.7 units; rounded to nearest they would be 513, and the update too long."""
    grid, size = FixedPointGrid(1.0, 1000, 1000.0, threshold_of(1000)), 100_000
    assert round(grid.levels / sqrt(size), 1) == 512.7
    for too_long in (1.0, 1 + 1e-6):  # as by a rounding error
        words = grid.encode(torch.full((size,), too_long / sqrt(size))).double()
        assert 0.998 * grid.levels < float(words.norm()) <= grid.levels and words[-1] == 0
    assert float(torch.full((size,), 513.0, dtype=torch.float64).norm()) > grid.levels


def test_what_a_sum_of_discrete_gaussians_is_short_of_one_is_the_tau_of_the_paper():
    assert summed_multiplier(1.5, 8, 81.0) == 1.5
    by_hand = 1 / (1 / 1.5 + 2**20 * 10 * 7 * exp(-2 * pi**2 * 4.0 / 2))
    assert summed_multiplier(1.5, 8, 4.0) == pytest.approx(by_hand, rel=1e-12) and by_hand < 1.5
    assert summed_multiplier(1.5, 8, 0.2) == 0.0, "the theorem says nothing there, and no noise counts"


def test_noise_that_cannot_be_is_absurd_and_honest_noise_is_not():
    grid = FixedPointGrid(1.0, 3, 1.0, 2)
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * grid.deviation_of_mean(3)
    assert grid.absurd(noise, 0.0, 3) == ""
    assert "long" in grid.absurd(1.2 * noise, 0.0, 3)
    assert "last word is not 0" in grid.absurd(noise, 1e-9, 3)


def test_rho_is_made_of_the_noisy_mean_alone_and_near_what_it_was():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(100_000, generator=generator)
    updates = {i: (3 * common / common.norm(), 1) for i in range(4)}  # all alike and as long as the bound: ρ = 1
    rule = Rule(clip_norm=3.0, noise_multiplier=0.02)
    found = aggregate_by(rule, updates, lambda clients, _: Keystream(derive(KEY, *clients)).normals)
    assert found.rho == pytest.approx(1.0, abs=0.1)
    assert found.squared_delta * 100_000 / 9 > 1.5  # which the noise makes longer
    short = {i: (0.7 * delta, n) for i, (delta, n) in updates.items()}
    assert aggregate_by(rule, short, lambda *_: Keystream(derive(KEY)).normals).rho == pytest.approx(0.49, abs=0.1)
    grid = FixedPointGrid(3.0, 4, 0.02, 3)
    aggregation = FixedPointWords(grid, Rule(clip_norm=3.0)).aggregation(0)
    gaussian = DiscreteGaussian(grid.noise_variance)
    words = {i: (grid.encode(delta), n) for i, (delta, n) in updates.items()}
    for i, (numbers, _) in words.items():
        numbers[:-1] += torch.from_numpy(gaussian.draw(Keystream(derive(KEY, i)), 100_000))
    aggregation.fold(words)
    assert aggregation.aggregate().rho == pytest.approx(1.0, abs=0.1)
    nothing = {i: (0 * delta, n) for i, (delta, n) in updates.items()}
    assert aggregate_by(rule, nothing, lambda *_: Keystream(derive(KEY)).normals).rho == 1 / 4, "as of 4 strangers"


def test_words_fill_their_range_evenly():
    counts = np.bincount(Keystream(derive(KEY, "words")).words(1 << 16) >> 24, minlength=256)
    assert (
        (counts - 256.0) ** 2 / 256
    ).sum() < 340  # chi-square, 255 degrees of freedom: 340 is exceeded once in 3000


class Spiky(ToyTrainer):
    """A trainer whose update has one large element in 64, beside which rounding leaves nothing."""

    def train(self, round_index, block_index, num_local_steps, steps_before, working) -> Trained:
        return Trained(working[block_index] + torch.tensor([1.0] + 63 * [0.01]).repeat(2), 0.0)


@pytest.mark.parametrize(("payload_format", "told"), [("int4", ["98.4%"]), ("int8", []), ("float32", [])])
def test_an_update_of_which_rounding_leaves_little_is_warned_about_once(payload_format: str, told: list[str]):
    plan = server_plan(1, 3, 0, Differences(Encoding(payload_format)))
    lines: list[str] = []
    hooks = replace(QUIET, on_event=lines.append)
    run_here([torch.zeros(128)], [Spiky(0)], plan, Trace(VirtualClock()), hooks)
    assert [line.split("rounding sets ")[1].split(" ")[0] for line in lines] == told


# -- an audit: what an attacker who knows everything else makes of the releases ----------------------------------


def noisy_mean(
    grid: FixedPointGrid, gaussian: DiscreteGaussian | None, deltas: dict[int, torch.Tensor], key: bytes
) -> torch.Tensor:
    """Return what the server knows of a masked sum: the mean of words with each client's noise."""
    form, words = FixedPointWords(grid, Rule(clip_norm=grid.clip_norm)), {}
    for i, delta in deltas.items():

        def integers(t: int, content: str, i: int = i) -> Integers:
            return partial(gaussian.draw, Keystream(derive(key, i, t, content)))

        protection = Protection(grid.clip_norm, integers=integers if gaussian else None)
        update = LocalUpdate(0, i, delta, torch.zeros_like(delta), protection=protection)
        words[i] = form.encode(update).chunks[0].values, 1
    aggregation = form.aggregation(0)
    aggregation.fold(words)
    assert not aggregation.absurd
    return aggregation.aggregate().mean_delta


def separation(mode: str, multiplier: float, releases: int, repetitions: int) -> float:
    """Return how many deviations a planted update moves an attacker's sum of projections, less two standard errors.

    The planted update is as long as the bound; without it there are zeros, or with local noise its opposite.
    """
    size, bound, seen = 20, 1.0, {True: [], False: []}
    direction = torch.zeros(size).index_fill_(0, torch.tensor([3]), bound)
    others = {i: (0.1 * torch.ones(size) / size**0.5, 1) for i in (1, 2)}
    rule = Rule(clip_norm=bound, noise_multiplier=multiplier)
    grid = FixedPointGrid(bound, 4, multiplier, 3)  # one of four is gone: what is left has the least noise
    gaussian = DiscreteGaussian(grid.noise_variance) if mode == "distributed" and multiplier else None
    for is_planted in seen:
        for repetition in range(repetitions):
            total = 0.0
            for t in range(releases):
                key = derive(KEY, "audit", str(is_planted), repetition, t)
                if mode == "local":
                    own = direction if is_planted else -direction
                    normals = lambda t, content, key=key: Keystream(derive(key, content)).normals  # noqa: E731
                    noisy = Protection(bound, multiplier, normals if multiplier else None).apply(own, t)[0]
                    total += float(noisy[3])
                elif mode == "distributed":
                    own = direction if is_planted else 0 * direction
                    deltas = {0: own, **{i: delta for i, (delta, _) in others.items()}}
                    total += 3 * float(noisy_mean(grid, gaussian, deltas, key)[3])
                else:
                    own = direction if is_planted else 0 * direction
                    noise = (lambda clients, content, key=key: Keystream(key).normals) if multiplier else None
                    found = aggregate_by(rule, {0: (own, 1), **others}, noise).mean_delta
                    total += 3 * float(found[3])
            seen[is_planted].append(total)
    with_it, without = (torch.tensor(values).double() for values in seen.values())
    deviation = ((with_it.var() + without.var()) / 2).sqrt()
    moved = float((with_it.mean() - without.mean()) / deviation) if deviation > 0 else float("inf")
    return moved - 2 * sqrt(2 / repetitions) if moved < 1e3 else moved


def least_epsilon(mu: float, delta: float) -> float:
    """Return the ε that two normal distributions so many deviations apart have, by bisection of their exact δ."""
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(1 / mu, 1, middle) > delta else (low, middle)
    return low


@pytest.mark.parametrize(
    ("mode", "multiplier", "releases", "repetitions"),
    [("central", 1.5, 3, 500), ("local", 3.0, 3, 500), ("distributed", 1.5, 3, 200)],
)
def test_what_an_attacker_measures_is_at_most_the_epsilon_that_is_told_and_near_it(
    mode: str, multiplier: float, releases: int, repetitions: int
):
    told = Accountant(multiplier, mode, 1e-5).epsilon(releases)
    measured = least_epsilon(separation(mode, multiplier, releases, repetitions), 1e-5)
    assert told / 3 < measured <= told
    assert separation(mode, 0.0, releases, repetitions=20) > 100 * separation(mode, multiplier, releases, 20)
