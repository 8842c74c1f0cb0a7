"""Steps of a block against those of torch, and the gradient that pulls weights towards the start, as in FedProx."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parablock.training.block_optimizer import BlockOptimizer, Moments, add_proximal_gradient


def test_the_proximal_gradient_pulls_towards_the_start() -> None:
    weight, anchor = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])
    weight.grad = torch.tensor([10.0, 20.0])
    add_proximal_gradient([weight], [anchor], 0.5)
    assert weight.grad.tolist() == [10 + 0.5 * (1 - 3), 20.0]


def test_a_weight_without_a_gradient_is_not_pulled() -> None:
    weight = torch.ones(2)
    add_proximal_gradient([weight], [torch.zeros(2)], 0.5)
    assert weight.grad is None


SHAPES = ((6, 4), (4,), (4, 4), (4, 10))
IS_MUON = (True, False, True, False)


def parameters() -> tuple[list[nn.Parameter], Tensor]:
    """Make parameters of these shapes, as views of one vector."""
    drawn = torch.randn(
        sum(torch.Size(shape).numel() for shape in SHAPES), generator=torch.Generator().manual_seed(5)
    )
    pieces = torch.split(drawn, [torch.Size(shape).numel() for shape in SHAPES])
    return [nn.Parameter(piece.view(shape)) for piece, shape in zip(pieces, SHAPES, strict=True)], drawn


def loss(weights: list[nn.Parameter]) -> Tensor:
    first, bias, second, third = weights
    return (torch.tanh(first + bias) @ second @ third).square().sum()


def stepped(
    by_muon: tuple[bool, ...], num_steps: int, moments: Moments | None = None
) -> tuple[list[Tensor], Moments, Tensor]:
    """Take steps by the block's optimizer from the same weights."""
    weights, flat = parameters()
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0, "gradient_terms": {}}
    with BlockOptimizer(weights, flat, by_muon, moments, **options) as optimizer:
        for step in range(num_steps):
            loss(weights).backward()
            optimizer.step(0.01 / (1 + step))
        return [weight.detach().clone() for weight in weights], optimizer.moments(), flat


def test_muon_steps_the_matrices_and_adamw_the_rest_as_torch_does() -> None:
    ours, moments, _ = stepped(IS_MUON, 5)
    weights, _ = parameters()
    muon = torch.optim.Muon([weights[0], weights[2]], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [weights[3]], "weight_decay": 0.1}, {"params": [weights[1]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-6, fused=True)
    for step in range(5):
        loss(weights).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, weights, strict=True))
    plain, both, _ = stepped((False,) * 4, 5)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    # one moment of the matrices that Muon steps, two of the rest
    assert (moments.exp_avg.numel(), moments.exp_avg_sq.numel()) == (24 + 4 + 16 + 40, 4 + 40)
    assert both.exp_avg_sq.numel() == both.exp_avg.numel()


@pytest.mark.parametrize("by_muon", [IS_MUON, (False,) * 4, (True, False, True, True)])
def test_kept_moments_go_on_where_they_were(by_muon: tuple[bool, ...]) -> None:
    _, kept, _ = stepped(by_muon, 3)
    before = kept.exp_avg.clone()
    once, _, _ = stepped(by_muon, 2)
    again, newer, _ = stepped(by_muon, 2, kept)
    assert kept.step == 3 and newer.step == 5 and torch.equal(kept.exp_avg, before), "the kept ones do not change"
    assert not any(torch.equal(one, other) for one, other in zip(once, again, strict=True))
