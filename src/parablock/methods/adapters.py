"""FedIT: FedAvg of LoRA adapters, A and B averaged apart.

The mean of the products is not the product of the means, so what the server adds to the model is not the
mean of what the clients learned; FFA-LoRA and FLoRA are two answers to that.

Source: Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning, 2023 (arXiv 2305.05644).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.model.adapters import adapter_block, add_adapters
from parablock.model.blocks import Block


def with_adapters(model: PreTrainedModel, config: RunConfig) -> None:
    """Put the configured adapters into the model."""
    add_adapters(model, **config.lora.model_dump(), layers_path=config.blocks.layers_path, seed=config.seed)


def fedit_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block]:
    """Train and send A and B of every adapter."""
    with_adapters(model, config)
    return (adapter_block(model, layers_path=config.blocks.layers_path),)


def ffa_lora_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block]:
    """Train and send B of every adapter."""
    with_adapters(model, config)
    return (adapter_block(model, matrices=("B",), layers_path=config.blocks.layers_path),)
