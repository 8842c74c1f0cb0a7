"""`blocks.layers_per_block: auto`: choose blocks that are visited often enough, or more where the link allows it.

A model of many layers has many blocks, and one that a run visits once or twice learns little. So blocks are as
large as it takes for `VISITS` rounds each. Larger blocks train more of the model in a round, and are chosen as far
as a round's computation hides their exchange over the configured link. The time of a step is `engine.step_time_s`,
or that of an ordinary device. No choice leaves fewer than `MIN_BLOCKS` blocks, because fewer are not worth the
staleness, and none leaves a block that the rounds would never train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from transformers import PreTrainedModel

from parablock.algorithm.schedule import blocks_never_visited
from parablock.config.keys import RunConfig
from parablock.engine.local_steps import exchange_s
from parablock.experiment.engines import encoding_of
from parablock.methods.trained_blocks import layer_blocks
from parablock.model.blocks import Block, find_layers
from parablock.training.flops import FlopModel
from parablock.training.step_time import Compute, assumed_compute, stated_compute
from parablock.wire.transport import Link

MIN_BLOCKS = 4
VISITS = 4
"""The rounds that each block should have."""


def never_visited(config: RunConfig, num_blocks: int) -> tuple[int, ...]:
    """List the blocks that the configured rounds would not train."""
    rounds, delay = config.federation.num_rounds, config.federation.delay
    return tuple(
        blocks_never_visited(
            config.schedule, num_rounds=rounds, num_blocks=num_blocks, delay=delay, seed=config.seed
        )
    )


def estimated_compute(config: RunConfig, flops: FlopModel) -> Compute:
    """Return the stated time of a step, or else that of an ordinary device."""
    if config.engine.step_time_s is not None:
        return stated_compute(config.engine.step_time_s)
    return assumed_compute(config, flops)


def flops_of(config: RunConfig, model: PreTrainedModel) -> FlopModel:
    """Return the operations of a model as the run trains it."""
    again = config.train.gradient_checkpointing
    return FlopModel(model, layers_path=config.blocks.layers_path, gradient_checkpointing=again)


def fit_blocks(config: RunConfig, model: PreTrainedModel) -> RunConfig:
    """Replace `blocks.layers_per_block: auto` by a number; return any other configuration unchanged.

    Args:
        config: The run; with `auto`, its number of local steps is a number.
        model: The model or its outline.
    """
    if config.blocks.layers_per_block != "auto":
        return config
    blocks = config.blocks.model_copy(update={"layers_per_block": _chosen_size(config, model)})
    return config.model_copy(update={"blocks": blocks})


def size_for_visits(config: RunConfig, partitions: Mapping[int, Sequence[Block]]) -> int:
    """Return the fewest layers of a block with which the rounds visit each block often enough.

    Where no size does so, it is that of the fewest blocks that are enough.

    Args:
        config: The run.
        partitions: Layers of a block → blocks.
    """
    visited = [size for size, blocks in partitions.items() if not never_visited(config, len(blocks))]
    allowed = visited or [*partitions]
    enough = [size for size in allowed if len(partitions[size]) >= MIN_BLOCKS] or [min(allowed)]
    often = [size for size in enough if VISITS * len(partitions[size]) <= config.federation.num_rounds]
    return min(often, default=min(enough, key=lambda size: (len(partitions[size]), size)))


def _chosen_size(config: RunConfig, model: PreTrainedModel) -> int:
    _, layers = find_layers(model, config.blocks.layers_path)
    partitions = {size: layer_blocks(model, config, size) for size in range(1, len(layers) + 1)}
    least = size_for_visits(config, partitions)
    if config.link.upload_mbps is None and config.link.download_mbps is None:
        return least
    compute = estimated_compute(config, flops_of(config, model))
    larger = [size for size, blocks in partitions.items() if size > least and len(blocks) >= MIN_BLOCKS]
    return max((size for size in larger if _hides(config, compute, partitions[size])), default=least)


def _hides(config: RunConfig, compute: Compute, blocks: tuple[Block, ...]) -> bool:
    """Return whether a mean round computes for as long as the exchange of the largest block takes."""
    steps, encoding = config.train.num_local_steps, encoding_of(config)
    assert isinstance(steps, int)
    largest = max(block.num_parameters for block in blocks)
    link = Link(**config.link.model_dump())
    streamed = len(encoding.cut(largest)) > 1
    exchanging_s = exchange_s(link, encoding.payload_bytes(largest), streamed=streamed)
    return exchanging_s <= fmean(compute.round_s(block, 0, 0, steps) for block in blocks)
