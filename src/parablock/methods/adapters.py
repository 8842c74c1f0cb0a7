"""The blocks of the methods that train LoRA adapters: one for each group of matrices."""

from __future__ import annotations

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.model.adapters import adapter_block, add_adapters
from parablock.model.blocks import Block


def adapter_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    """Put the configured adapters into a model, and return what of them the method trains and sends."""
    path = config.blocks.layers_path
    add_adapters(model, **config.lora.model_dump(), layers_path=path, seed=config.seed)
    return tuple(
        adapter_block(model, index=index, matrices=group, layers_path=path)
        for index, group in enumerate(config.federation.traits.matrices)
    )
