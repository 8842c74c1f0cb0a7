"""What each method trains and sends: its blocks."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from parablock.algorithm.baselines import fedit, ffa_lora
from parablock.config import RunConfig
from parablock.model.blocks import Block, partition_blocks, whole_model


def trained_blocks(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    """Give what the configured method trains and sends; methods of adapters put them into the model.

    Raises:
        ModelError: The model has no such blocks, or adapters cannot be made.
    """
    return _BLOCKS.get(config.federation.method, _layers)(model, config)


def _layers(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    section = config.blocks
    assert isinstance(section.layers_per_block, int)
    return partition_blocks(
        model,
        layers_per_block=section.layers_per_block,
        include_embeddings=section.include_embeddings,
        include_head=section.include_head,
        layers_path=section.layers_path,
    )


def _everything(model: PreTrainedModel, config: RunConfig) -> tuple[Block, ...]:
    return whole_model(model, config.blocks.layers_path)


_BLOCKS: dict[str, Callable[[PreTrainedModel, RunConfig], tuple[Block, ...]]] = {
    **dict.fromkeys(("fedavg", "fedprox", "local", "central"), _everything),
    "fedit": fedit.trained,
    "ffa_lora": ffa_lora.trained,
}
