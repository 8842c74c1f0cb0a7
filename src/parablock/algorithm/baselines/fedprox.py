"""FedProx: FedAvg whose clients minimise f_i(w) + (μ / 2) ‖w − w_t‖², with w_t where the round started.

Source: Li et al., Federated Optimization in Heterogeneous Networks, 2020 (arXiv 1812.06127).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def add_proximal_gradient(weights: Sequence[Tensor], anchors: Sequence[Tensor], mu: float) -> None:
    """Add μ (w − w_t) to the gradient of each weight, in place.

    Args:
        weights: w, with their gradients; one without a gradient stays without.
        anchors: w_t, of the same shapes.
        mu: μ.
    """
    for weight, anchor in zip(weights, anchors, strict=True):
        if weight.grad is not None:
            weight.grad.add_(weight.detach() - anchor, alpha=mu)
