"""Aggregation rules: what they give, what they withstand, and that a cut block is the whole one."""

from __future__ import annotations

import pytest
import torch

from parablock.algorithm.aggregate import PIECE, Kinds, average
from parablock.algorithm.robust import RoundAggregation, Rule, aggregate_by, clip_factor, krum

Updates = dict[int, tuple[torch.Tensor, int]]


def honest(num_clients: int, size: int = 200, spread: float = 0.1) -> Updates:
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(size, generator=generator)
    return {i: (common + spread * torch.randn(size, generator=generator), i + 1) for i in range(num_clients)}


def with_attackers(updates: Updates, factor: float, *who: int) -> Updates:
    return {i: (delta * factor if i in who else delta, n) for i, (delta, n) in updates.items()}


def distance(rule: Rule, updates: Updates, reference: torch.Tensor) -> float:
    return float((aggregate_by(rule, updates).mean_delta - reference).norm() / reference.norm())


def test_the_median_is_that_of_each_element_whoever_has_how_many_examples():
    updates = {
        0: (torch.tensor([1.0, 9.0]), 100),
        1: (torch.tensor([2.0, 7.0]), 1),
        2: (torch.tensor([6.0, 8.0]), 1),
    }
    assert aggregate_by(Rule("median"), updates).mean_delta.tolist() == [2.0, 8.0]
    updates[3] = (torch.tensor([3.0, 0.0]), 1)
    assert aggregate_by(Rule("median"), updates).mean_delta.tolist() == [2.5, 7.5]  # of four: the middle two
    assert average(updates).mean_delta.tolist() != [2.5, 7.5]


def test_the_trimmed_mean_leaves_out_as_many_as_it_says_at_either_end():
    updates = {i: (torch.tensor([float(value)]), 1) for i, value in enumerate([100, 1, 2, 3, -50])}
    assert (
        aggregate_by(Rule("trimmed_mean", trim_fraction=0.2), updates).mean_delta.item() == 2.0
    )  # (1 + 2 + 3) / 3
    assert aggregate_by(Rule("trimmed_mean", trim_fraction=0.4), updates).mean_delta.item() == 2.0  # the median
    updates[1] = (torch.tensor([0.0]), 1)
    assert aggregate_by(Rule("trimmed_mean", trim_fraction=0.2), updates).mean_delta.item() == pytest.approx(5 / 3)
    assert aggregate_by(Rule("trimmed_mean", trim_fraction=0.4), updates).mean_delta.item() == 2.0


def test_krum_chooses_the_update_that_its_neighbours_are_nearest_to():
    # 0, 1, 1.5 and 10, 10.1: with f = 1 everyone has two neighbours: sums of squares
    # 0: 1 + 2.25; 1: 0.25 + 1; 1.5: 0.25 + 2.25; 10: 0.01 + 72.25 …
    points = {i: [torch.tensor([value])] for i, value in enumerate([0.0, 1.0, 1.5, 10.0, 10.1])}
    assert krum(points, 1) == 1
    # with f = 2 everyone has one: the pair of attackers is the closest; krum withstands fewer than (M − 2) / 2
    assert krum(points, 2) == 3
    chosen = aggregate_by(Rule("krum", assumed_attackers=1), {i: (parts[0], 1) for i, parts in points.items()})
    assert chosen.mean_delta.item() == 1.0


def test_clipping_bounds_what_one_update_can_do_and_leaves_short_ones_as_they_are():
    updates = {0: (torch.tensor([3.0, 4.0]), 1), 1: (torch.tensor([0.0, 1.0]), 1)}
    assert clip_factor([updates[0][0]], 1.0) == 0.2
    clipped = aggregate_by(Rule(clip_norm=1.0), updates).mean_delta
    assert torch.allclose(clipped, torch.tensor([0.3, 0.9]))
    assert torch.equal(aggregate_by(Rule(clip_norm=5.0), updates).mean_delta, average(updates).mean_delta)


@pytest.mark.parametrize("factor", [-1.0, -4.0, 50.0], ids=["sign flip", "flip and scale", "scale"])
@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_two_of_ten_attackers_move_the_mean_and_no_robust_rule(name: str, factor: float):
    clean = honest(10)
    reference = average(clean).mean_delta
    attacked = with_attackers(clean, factor, 2, 9)
    rule = Rule(name, trim_fraction=0.2, assumed_attackers=2)
    assert distance(rule, attacked, reference) < 0.2
    assert distance(Rule(), attacked, reference) > 0.4


def test_an_update_of_any_length_cannot_switch_the_overlay_off():
    clean = honest(5)
    attacked = with_attackers(clean, 1e4, 0)
    for name in ("median", "trimmed_mean", "krum"):
        assert aggregate_by(Rule(name), attacked).rho == pytest.approx(
            aggregate_by(Rule(name), clean).rho, abs=0.05
        )
    assert average(attacked).rho < 0.1 < average(clean).rho - 0.5
    nobody = {i: (torch.zeros(4), 1) for i in range(3)}
    assert aggregate_by(Rule("median"), nobody).rho == 1.0


@pytest.mark.parametrize(
    "rule",
    [Rule("median"), Rule("trimmed_mean"), Rule("krum"), Rule(clip_norm=20.0), Rule("median", clip_norm=20.0)],
    ids=lambda rule: f"{rule.name}, clip {rule.clip_norm}",
)
def test_a_block_that_comes_in_parts_has_bitwise_the_aggregate_of_the_whole(rule: Rule):
    size = 5 * PIECE + 77
    updates = honest(5, size, spread=1.0)
    whole = aggregate_by(rule, updates)
    round_ = RoundAggregation(rule)
    cuts = [slice(0, 2 * PIECE), slice(2 * PIECE, 3 * PIECE), slice(3 * PIECE, size)]
    assert round_.needs_whole == (rule.name == "krum" or rule.clip_norm is not None)
    if round_.needs_whole:
        round_.look_at({i: [delta[cut] for cut in cuts] for i, (delta, _) in updates.items()})
    parts = [round_.fold({i: (delta[cut], n) for i, (delta, n) in updates.items()}) for cut in cuts]
    assert torch.equal(torch.cat(parts), whole.mean_delta)
    assert (round_.aggregate().rho, round_.aggregate().squared_delta) == (whole.rho, whole.squared_delta)
    assert not torch.equal(whole.mean_delta, average(updates).mean_delta)


@pytest.mark.parametrize("rule", [Rule(), Rule("median"), Rule(clip_norm=20.0)], ids=str)
def test_each_kind_of_parameters_has_the_rho_that_it_has_alone_however_the_group_is_cut(rule: Rule):
    lengths = (PIECE - 5, 7, 3 * PIECE, 11)
    agreeing, strangers = honest(4, sum(lengths), spread=0.1), honest(4, sum(lengths), spread=3.0)
    is_second = Kinds(lengths, 2).spread([0.0, 1.0]).bool()
    assert int(is_second.sum()) == 7 + 11
    updates = {i: (torch.where(is_second, strangers[i][0], agreeing[i][0]), i + 1) for i in agreeing}
    whole = aggregate_by(rule, updates, kinds=Kinds(lengths, 2))
    if rule.clip_norm is None:
        of_each = [{i: (delta[mask], n) for i, (delta, n) in updates.items()} for mask in (~is_second, is_second)]
        assert whole.rho == pytest.approx(tuple(aggregate_by(rule, each).rho for each in of_each))
    assert isinstance(whole.rho, tuple) and whole.rho[0] > 0.9 > 0.5 > whole.rho[1]
    one = aggregate_by(rule, updates)
    assert torch.equal(one.mean_delta, whole.mean_delta) and one.squared_delta == whole.squared_delta
    cut, total = RoundAggregation(rule, kinds=Kinds(lengths, 2)), sum(lengths)
    if rule.needs_whole:
        cut.look_at({i: [delta] for i, (delta, _) in updates.items()})
    for part in (slice(0, 2 * PIECE), slice(2 * PIECE, 3 * PIECE), slice(3 * PIECE, total)):
        cut.fold({i: (delta[part], n) for i, (delta, n) in updates.items()})
    assert cut.aggregate().rho == whole.rho


def test_the_plain_rule_is_the_plain_mean_bitwise():
    updates = honest(4)
    plain, ruled = average(updates), aggregate_by(Rule(), updates)
    assert torch.equal(plain.mean_delta, ruled.mean_delta)
    assert (plain.rho, plain.squared_delta) == (ruled.rho, ruled.squared_delta)


def test_the_order_of_arrival_does_not_matter_to_any_rule():
    updates = honest(6)
    for rule in (Rule("median"), Rule("trimmed_mean"), Rule("krum"), Rule(clip_norm=1.0)):
        backwards = aggregate_by(rule, dict(reversed(updates.items())))
        assert torch.equal(aggregate_by(rule, updates).mean_delta, backwards.mean_delta)
