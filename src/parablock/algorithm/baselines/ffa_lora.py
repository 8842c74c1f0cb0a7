"""FFA-LoRA: LoRA whose A is frozen as it was drawn; only B is trained, sent and averaged.

With one A for all, the mean of the products is the product with the mean of the B, and half of the bytes
are saved.

Source: Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024 (arXiv 2403.12313).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from parablock.config.load import RunConfig
from parablock.methods.adapters import with_adapters
from parablock.model.adapters import adapter_block
from parablock.model.blocks import Block


def trained(model: PreTrainedModel, config: RunConfig) -> tuple[Block]:
    """Train and send B of every adapter."""
    with_adapters(model, config)
    return (adapter_block(model, matrices=("B",), layers_path=config.blocks.layers_path),)
