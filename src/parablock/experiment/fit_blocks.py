"""`blocks.layers_per_block: auto`: choose the largest blocks whose exchange a round's computation hides.

Larger blocks train more of the model in a round, until their exchange takes longer than the computation beside it.
The time of a step is `engine.step_time_s`, or that of an ordinary device. No choice leaves fewer than `MIN_BLOCKS`
blocks, because fewer are not worth the staleness, and none leaves a block that the rounds would never train.
"""

from __future__ import annotations

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
        config: The run; with `auto`, its link has a speed and its number of local steps is a number.
        model: The model or its outline.
    """
    if config.blocks.layers_per_block != "auto":
        return config
    blocks = config.blocks.model_copy(update={"layers_per_block": _largest_that_fits(config, model)})
    return config.model_copy(update={"blocks": blocks})


def _largest_that_fits(config: RunConfig, model: PreTrainedModel) -> int:
    _, layers = find_layers(model, config.blocks.layers_path)
    compute = estimated_compute(config, flops_of(config, model))
    partitions = {size: layer_blocks(model, config, size) for size in range(1, len(layers) + 1)}
    visited = {size: blocks for size, blocks in partitions.items() if not never_visited(config, len(blocks))}
    allowed = visited or partitions
    fitting = [
        size for size, blocks in allowed.items() if len(blocks) >= MIN_BLOCKS and _hides(config, compute, blocks)
    ]
    return max(fitting, default=min(allowed))


def _hides(config: RunConfig, compute: Compute, blocks: tuple[Block, ...]) -> bool:
    """Return whether a mean round computes for as long as the exchange of the largest block takes."""
    steps, encoding = config.train.num_local_steps, encoding_of(config)
    assert isinstance(steps, int)
    largest = max(block.num_parameters for block in blocks)
    link = Link(**config.link.model_dump())
    streamed = len(encoding.cut(largest)) > 1
    exchanging_s = exchange_s(link, encoding.payload_bytes(largest), streamed=streamed)
    return exchanging_s <= fmean(compute.round_s(block, 0, 0, steps) for block in blocks)
