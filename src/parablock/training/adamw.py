"""AdamW on one block, whose weights and moments are flat fp32 vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """AdamW's state of one block between visits.

    Attributes:
        exp_avg: First moment: flat, fp32, on the model's device.
        exp_avg_sq: Second moment, likewise.
        step: Number of optimizer steps so far.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


class BlockAdamW:
    """AdamW on parameters that are views into one flat vector; a context that collects gradients while it is open.

    An fp32 block is stepped in place, any other one in a master copy that is rounded into the block after each
    step. Each gradient moves, in fp32, to the stepped weights as soon as autograd has made it. Only matrices
    decay, not norms and biases.

    Args:
        parameters: The block's parameters, in the order of its flat vector.
        block: The flat vector that they are views of.
        moments: State to start from, not changed; None: a fresh start.
        betas: Decay of the first and of the second moment.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Bound of the norm of the block's gradient; 0 switches clipping off.
        gradient_terms: Names of `GRADIENT_TERMS`, each with its weight.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        block: Tensor,
        moments: Moments | None,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        gradient_terms: Mapping[str, float],
    ) -> None:
        self._block = block
        self._weights = block if block.dtype == torch.float32 else block.float()
        self._exp_avg = _copy_or_zeros(moments.exp_avg if moments else None, self._weights)
        self._exp_avg_sq = _copy_or_zeros(moments.exp_avg_sq if moments else None, self._weights)
        self._steps = moments.step if moments else 0
        self._max_grad_norm = max_grad_norm
        self._views = _views(self._weights, parameters)
        self._terms = [(GRADIENT_TERMS[name], weight) for name, weight in gradient_terms.items()]
        self._anchors = _views(self._weights.clone(), parameters) if self._terms else []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, view))  # type: ignore[no-untyped-call]
            for parameter, view in zip(parameters, self._views, strict=True)
        ]
        matrices = {"params": [view for view in self._views if view.ndim > 1], "weight_decay": weight_decay}
        vectors = {"params": [view for view in self._views if view.ndim <= 1], "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW([matrices, vectors], betas=betas, eps=eps, fused=True)
        averages = _views(self._exp_avg, parameters), _views(self._exp_avg_sq, parameters)
        for view, exp_avg, exp_avg_sq in zip(self._views, *averages, strict=True):
            count = torch.tensor(float(self._steps), device=view.device)
            self._optimizer.state[view] = {"step": count, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients accumulated since the last one, and free them."""
        for add_gradient, weight in self._terms:
            add_gradient(self._views, self._anchors, weight)
        if self._max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._views, self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._steps += 1
        self._optimizer.zero_grad()
        if self._weights is not self._block:
            self._block.copy_(self._weights)

    @property
    def weights(self) -> Tensor:
        """The stepped weights: flat, fp32, on the model's device."""
        return self._weights

    def moments(self) -> Moments:
        """Return the state; the optimizer must not be stepped afterwards."""
        return Moments(self._exp_avg, self._exp_avg_sq, self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [piece.view(parameter.shape) for parameter, piece in zip(parameters, pieces, strict=True)]


def _copy_or_zeros(flat: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if flat is None else flat.to(like.device, copy=True)


def _move_gradient(view: Tensor, parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    if view.grad is None:
        view.grad = gradient.float()
    else:
        view.grad.add_(gradient)


def add_proximal_gradient(weights: Sequence[Tensor], anchors: Sequence[Tensor], mu: float) -> None:
    """Add μ (w − w_t) to the gradient of each weight, in place.

    Args:
        weights: w, with their gradients; a weight without a gradient is skipped.
        anchors: w_t, of the same shapes.
        mu: μ.
    """
    for weight, anchor in zip(weights, anchors, strict=True):
        if weight.grad is not None:
            weight.grad.add_(weight.detach() - anchor, alpha=mu)


GRADIENT_TERMS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], float], None]] = {
    "proximal_mu": add_proximal_gradient,
}
"""The terms that a method can add to the gradient, by the key of `federation` that holds the weight.

Each function takes the weights with their gradients, the weights at the start of the round, and that weight.
"""
