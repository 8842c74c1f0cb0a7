"""The local optimizer of one block, AdamW or Muon, whose weights and moments are flat fp32 vectors.

Muon makes the momentum of a matrix orthogonal and has no second moment. Its steps are as long as those of an AdamW
that has run for long (`match_rms_adamw`), so that one learning rate serves the matrices and the parameters that
AdamW steps beside them; an AdamW whose moments are new takes longer ones, and wants a lower rate.

Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024; the length of its steps:
Liu et al., Muon is Scalable for LLM Training, 2025 (arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """The optimizer's state of one block between visits.

    Attributes:
        exp_avg: First moment of AdamW, or Muon's momentum: flat, fp32, on the model's device.
        exp_avg_sq: Second moment of the parameters that AdamW steps, likewise.
        step: Number of optimizer steps so far.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int


class BlockOptimizer:
    """Steps parameters that are views into one flat vector; a context that collects gradients while it is open.

    An fp32 block is stepped in place, any other one in a master copy that is rounded into the block after each
    step. Each gradient moves, in fp32, to the stepped weights as soon as autograd has made it. Only matrices
    decay, not norms and biases.

    Args:
        parameters: The block's parameters, in the order of its flat vector.
        block: The flat vector that they are views of.
        by_muon: Of each parameter, whether Muon steps it, which is then a matrix; AdamW steps the others.
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
        by_muon: Sequence[bool],
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
        by_adamw = [parameter for parameter, muon in zip(parameters, by_muon, strict=True) if not muon]
        num_squares = sum(parameter.numel() for parameter in by_adamw)
        self._exp_avg = _copy_or_zeros(moments.exp_avg if moments else None, self._weights)
        self._exp_avg_sq = _copy_or_zeros(moments.exp_avg_sq if moments else None, self._weights[:num_squares])
        self._steps = moments.step if moments else 0
        self._max_grad_norm = max_grad_norm
        self._views = _views(self._weights, parameters)
        self._terms = [(GRADIENT_TERMS[name], weight) for name, weight in gradient_terms.items()]
        self._anchors = _views(self._weights.clone(), parameters) if self._terms else []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(_move_gradient, view))  # type: ignore[no-untyped-call]
            for parameter, view in zip(parameters, self._views, strict=True)
        ]
        matrices, vectors, hidden = list[Tensor](), list[Tensor](), list[Tensor]()
        adamw_state, muon_state = dict[Tensor, Any](), dict[Tensor, Any]()
        squares = iter(_views(self._exp_avg_sq, by_adamw))
        for view, exp_avg, muon in zip(self._views, _views(self._exp_avg, parameters), by_muon, strict=True):
            if muon:
                hidden.append(view)
                muon_state[view] = {"momentum_buffer": exp_avg}
                continue
            (matrices if view.ndim > 1 else vectors).append(view)
            count = torch.tensor(float(self._steps), device=view.device)
            adamw_state[view] = {"step": count, "exp_avg": exp_avg, "exp_avg_sq": next(squares)}
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices or vectors:
            groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            adamw = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
            adamw.state.update(adamw_state)
            self._optimizers.append(adamw)
        if hidden:
            muon_ = torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            muon_.state.update(muon_state)
            self._optimizers.append(muon_)

    def step(self, learning_rate: float) -> None:
        """Take one step with the gradients accumulated since the last one, and free them."""
        for add_gradient, weight in self._terms:
            add_gradient(self._views, self._anchors, weight)
        if self._max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._views, self._max_grad_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
        self._steps += 1
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
