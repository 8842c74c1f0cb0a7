from __future__ import annotations

import pytest
import torch

from parablock.algorithm.aggregate import (
    ADAM_BETA2,
    ADAM_EPSILON,
    PIECE,
    SLICE,
    ServerOptimizer,
    apply_update,
    average,
    fold,
    join,
)


def test_the_mean_is_weighted_by_examples():
    # (1·[4, 0] + 3·[0, 8]) / 4 = [1, 6]
    aggregate = average({0: (torch.tensor([4.0, 0.0]), 1), 1: (torch.tensor([0.0, 8.0]), 3)})
    assert aggregate.mean_delta.tolist() == [1.0, 6.0]
    # ‖Δ̄‖² = 37; Σ w‖Δ‖² = ¼·16 + ¾·64 = 52; mean square 37/2
    assert aggregate.rho == pytest.approx(37 / 52)
    assert aggregate.squared_delta == pytest.approx(18.5)


def test_the_order_of_arrival_does_not_matter_and_a_single_update_is_itself():
    generator = torch.Generator().manual_seed(0)
    updates = {i: (torch.randn(100, generator=generator), i + 1) for i in range(5)}
    backwards = dict(reversed(list(updates.items())))
    assert torch.equal(average(updates).mean_delta, average(backwards).mean_delta)
    alone = average({3: updates[3]})
    assert torch.equal(alone.mean_delta, updates[3][0])
    assert alone.rho == 1.0
    swapped = {4 - i: update for i, update in updates.items()}  # the control: another client order, other rounding
    assert not torch.equal(average(swapped).mean_delta, average(updates).mean_delta)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_where_a_block_is_cut_and_how_many_threads_fold_it_changes_no_bit(num_threads):
    length = 2 * SLICE + 3 * PIECE + 4321
    generator = torch.Generator().manual_seed(1)
    updates = {i: (torch.randn(length, generator=generator), i + 1) for i in range(3)}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = average(updates)
        torch.set_num_threads(num_threads)
        for size in (PIECE, 3 * PIECE, SLICE, length):
            cuts = [slice(first, first + size) for first in range(0, length, size)]
            parts = join([fold({i: (delta[cut], n) for i, (delta, n) in updates.items()}) for cut in cuts])
            assert torch.equal(parts.mean_delta, whole.mean_delta)
            assert (parts.rho, parts.squared_delta) == (whole.rho, whole.squared_delta)
    finally:
        torch.set_num_threads(before)
    assert average({i: (delta, 1) for i, (delta, _) in updates.items()}).rho != whole.rho  # the control


def test_folding_does_not_change_an_update():
    delta = torch.ones(3)
    average({0: (delta, 1), 1: (torch.zeros(3), 1)})
    assert delta.tolist() == [1.0, 1.0, 1.0]


def test_rho_is_1_where_clients_agree_0_where_they_cancel_and_1_where_nobody_moves():
    one = torch.tensor([3.0, -4.0])
    assert average({0: (one, 2), 1: (one, 5)}).rho == pytest.approx(1.0)
    assert average({0: (one, 1), 1: (-one, 1)}).rho == 0.0
    assert average({0: (0 * one, 1)}).rho == 1.0


def test_no_update_has_no_mean():
    with pytest.raises(ValueError, match="0 updates"):
        average({})


def test_server_optimizers_do_what_their_equations_say():
    x, delta = torch.tensor([1.0]), torch.tensor([0.5])
    assert apply_update(x, delta, (), ServerOptimizer())[0].item() == 1.5

    momentum = ServerOptimizer("momentum", learning_rate=0.1, momentum=0.5)
    first, state = apply_update(x, delta, (), momentum)
    assert first.item() == pytest.approx(1.05)  # 1 + 0.1·0.5
    assert apply_update(first, delta, state, momentum)[0].item() == pytest.approx(1.125)  # + 0.1·(0.25 + 0.5)

    adam = ServerOptimizer("adam", learning_rate=0.1, momentum=0.9)
    m, v = 0.1 * 0.5, (1 - ADAM_BETA2) * 0.25
    assert apply_update(x, delta, (), adam)[0].item() == pytest.approx(1 + 0.1 * m / (v**0.5 + ADAM_EPSILON))


def test_the_update_is_summed_in_fp32_and_rounded_once():
    x, delta = torch.ones(1, dtype=torch.bfloat16), torch.tensor([0.006])
    # bfloat16 has 8 significant bits: 1 + 0.006 rounds to 1.0078125; rounding delta first gives the same here,
    # but two deltas of 0.003 added one after the other in bfloat16 are both lost
    assert apply_update(x, delta, (), ServerOptimizer())[0].item() == 1.0078125
    assert apply_update(x, delta / 2, (), ServerOptimizer())[0].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_takes_the_memory_that_it_is_given_and_is_the_same(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    value, mean = torch.randn(1000, generator=generator).to(dtype), torch.randn(1000, generator=generator)
    before, (expected, _) = mean.clone(), apply_update(value, mean, (), ServerOptimizer())
    assert torch.equal(mean, before)
    found, _ = apply_update(value, mean, (), ServerOptimizer(), into=mean)
    assert torch.equal(found, expected)
    assert torch.equal(mean, value.float() + before)
    assert (found.data_ptr() == mean.data_ptr()) == (dtype == torch.float32)
    assert expected.data_ptr() != mean.data_ptr()


def test_a_server_optimizer_of_another_name_is_refused_and_not_taken_for_adam():
    with pytest.raises(ValueError, match="'adagrad' is none of none, momentum, adam"):
        apply_update(torch.zeros(2), torch.ones(2), (), ServerOptimizer("adagrad"))
