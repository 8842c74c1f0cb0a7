"""The blocks of each method: the parts of the model that it trains and sends."""

from __future__ import annotations

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.model.adapters import adapted_layers, adapter_block, add_adapters, check_rank
from parablock.model.blocks import Block, partition_blocks, whole_model
from parablock.model.pretrained import outline_model


def trained_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    """Return the blocks of the configured method, which puts adapters into a model without any if it trains some.

    Raises:
        ModelError: The model has no such blocks, or cannot have adapters.
    """
    match config.federation.traits.trains:
        case "blocks":
            return layer_blocks(model, config)
        case "everything":
            return whole_model(model, config.blocks.layers_path)
        case "adapters":
            return _adapter_blocks(model, config)


def check_adapters(config: RunConfig) -> None:
    """Refuse adapters that the model cannot have, with a `ModelError`, before its weights are read."""
    if config.federation.traits.trains == "adapters":
        check_rank(
            outline_model(config.model.name_or_path, dtype=config.model.dtype),
            rank=config.lora.rank,
            target_modules=config.lora.target_modules,
            layers_path=config.blocks.layers_path,
        )


def layer_blocks(
    model: PreTrainedModel, config: RunConfig, layers_per_block: int | None = None
) -> tuple[Block, ...]:
    """Cut a model, or its outline, into blocks of layers; `layers_per_block` replaces the configured number."""
    section = config.blocks
    size = section.layers_per_block if layers_per_block is None else layers_per_block
    assert isinstance(size, int)
    return partition_blocks(
        model,
        layers_per_block=size,
        split=section.split,
        include_embeddings=section.include_embeddings,
        include_head=section.include_head,
        layers_path=section.layers_path,
    )


def _adapter_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    path = config.blocks.layers_path
    if not any(adapted_layers(model)):
        add_adapters(model, **config.lora.model_dump(), layers_path=path, seed=config.seed)
    return tuple(
        adapter_block(model, index=index, matrices=group, layers_path=path)
        for index, group in enumerate(config.federation.traits.matrices)
    )
