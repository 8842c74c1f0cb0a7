"""What each method trains and sends: its blocks."""

from __future__ import annotations

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.methods.adapters import adapter_blocks
from parablock.model.blocks import Block, partition_blocks, whole_model


def trained_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    """Return what the configured method trains and sends; methods of adapters put them into the model.

    Raises:
        ModelError: The model has no such blocks, or adapters cannot be made.
    """
    match config.federation.traits.trains:
        case "blocks":
            return layer_blocks(model, config)
        case "everything":
            return whole_model(model, config.blocks.layers_path)
        case "adapters":
            return adapter_blocks(model, config)


def layer_blocks(
    model: PreTrainedModel, config: RunConfig, layers_per_block: int | None = None
) -> tuple[Block, ...]:
    """Cut a model as the block methods do.

    Args:
        model: The model or its outline.
        config: The run.
        layers_per_block: Instead of the configured number, which must be one otherwise.
    """
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
