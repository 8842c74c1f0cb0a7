"""What the server makes of a block's updates: the weighted mean, its alignment, one optimizer step.

Updates are always folded in ascending client_id and with weights that sum to one, so the result does not
depend on who arrived first, and the mean of a single update is that update bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ADAM_BETA2 = 0.99
ADAM_EPSILON = 1e-3
"""Decay of the second moment and the adaptivity of the server's Adam (FedAdam: Reddi et al. 2021, §5)."""


@dataclass(frozen=True)
class Aggregate:
    """The updates of one round, folded.

    Attributes:
        mean_delta: Δ̄ = Σ w_i Δ_i / Σ w_i, flat, fp32.
        rho: ‖Δ̄‖² / Σ w_i‖Δ_i‖² in [0, 1], with the w_i divided by their sum: 1 where the clients agree, 0
            where they cancel. 1 by definition where no client moved.
        squared_delta: Mean squared element of Δ̄.
    """

    mean_delta: Tensor
    rho: float
    squared_delta: float


@dataclass(frozen=True)
class ServerOptimizer:
    """How Δ̄ moves a block: `none` adds it; `momentum` and `adam` keep moments for each block.

    Attributes:
        name: none | momentum | adam.
        learning_rate: η of momentum and adam.
        momentum: Decay of the first moment.
    """

    name: str = "none"
    learning_rate: float = 1.0
    momentum: float = 0.9


def average(updates: Mapping[int, tuple[Tensor, int]]) -> Aggregate:
    """Fold one round's updates into their weighted mean.

    Args:
        updates: For each client_id its Δ (flat, fp32) and its number of training examples.

    Raises:
        ValueError: When there is no update, or no example behind them.
    """
    total = sum(num_examples for _, num_examples in updates.values())
    if total <= 0:
        raise ValueError(f"{len(updates)} updates with {total} examples have no mean")
    mean: Tensor | None = None
    squared_norms = 0.0
    for client_id in sorted(updates):
        delta, num_examples = updates[client_id]
        weight = num_examples / total
        squared_norms += weight * _squared_norm(delta)
        mean = delta * weight if mean is None else mean.add_(delta, alpha=weight)
    assert mean is not None
    squared_mean = _squared_norm(mean)
    rho = min(1.0, squared_mean / squared_norms) if squared_norms > 0 else 1.0
    return Aggregate(mean, rho, squared_mean / max(1, mean.numel()))


def apply_update(
    value: Tensor, mean_delta: Tensor, moments: tuple[Tensor, ...], optimizer: ServerOptimizer
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Move one block by its mean delta.

    Args:
        value: x^b, flat, in the run's dtype.
        mean_delta: Δ̄, flat, fp32.
        moments: The optimizer's state for this block; empty at its first visit.
        optimizer: What to do with Δ̄.

    Returns:
        The new x^b in the same dtype (summed in fp32, rounded once), and the new moments.

    Source: Reddi et al., Adaptive Federated Optimization, 2021 (without bias correction, as there).
    """
    if optimizer.name == "none":
        return (value.float() + mean_delta).to(value.dtype), ()
    beta = optimizer.momentum
    if optimizer.name == "momentum":
        velocity = mean_delta if not moments else beta * moments[0] + mean_delta
        return (value.float() + optimizer.learning_rate * velocity).to(value.dtype), (velocity,)
    first, second = moments or (torch.zeros_like(mean_delta), torch.zeros_like(mean_delta))
    first = beta * first + (1 - beta) * mean_delta
    second = ADAM_BETA2 * second + (1 - ADAM_BETA2) * mean_delta.square()
    step = first / (second.sqrt() + ADAM_EPSILON)
    return (value.float() + optimizer.learning_rate * step).to(value.dtype), (first, second)


def _squared_norm(vector: Tensor) -> float:
    return float(torch.dot(vector, vector))
