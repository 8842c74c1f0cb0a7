"""The gradient that pulls weights towards the start of the round, as FedProx does."""

from __future__ import annotations

import torch

from parablock.training.adamw import add_proximal_gradient


def test_the_proximal_gradient_pulls_towards_the_start() -> None:
    weight, anchor = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])
    weight.grad = torch.tensor([10.0, 20.0])
    add_proximal_gradient([weight], [anchor], 0.5)
    assert weight.grad.tolist() == [10 + 0.5 * (1 - 3), 20.0]


def test_a_weight_without_a_gradient_is_not_pulled() -> None:
    weight = torch.ones(2)
    add_proximal_gradient([weight], [torch.zeros(2)], 0.5)
    assert weight.grad is None
