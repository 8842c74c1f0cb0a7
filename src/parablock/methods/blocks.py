"""What each method trains and sends: its blocks."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.methods.adapters import fedit_blocks, ffa_lora_blocks
from parablock.model.blocks import Block, partition_blocks, whole_model


def trained_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    """Give what the configured method trains and sends; methods of adapters put them into the model.

    Raises:
        ModelError: The model has no such blocks, or adapters cannot be made.
    """
    return _BLOCKS.get(config.federation.method, layer_blocks)(model, config)


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


def _everything(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    return whole_model(model, config.blocks.layers_path)


_BLOCKS: dict[str, Callable[[PreTrainedModel, RunConfig], tuple[Block, ...]]] = {
    **dict.fromkeys(("fedavg", "fedprox", "local", "central"), _everything),
    "fedit": fedit_blocks,
    "ffa_lora": ffa_lora_blocks,
    "flora": fedit_blocks,
}
