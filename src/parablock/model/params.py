"""A client's copy of the model, whose parameters are views into one flat buffer for each block.

What travels, what is committed and what is trained is always one block's flat vector; here it meets the
model. Only the block that is being trained requires gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from parablock.errors import ModelError
from parablock.model.blocks import Block, find_layers


class Replica:
    """A model with one dense flat buffer for each block.

    The parameters of a block become views into its buffer, in the order of `Block.parameter_names` and
    without gaps: the buffer has exactly `num_parameters` elements, as on the wire. Parameters outside all
    blocks stay as they are, frozen. Moving or casting the model afterwards would cut the views.

    A replica belongs to one thread.

    Args:
        model: A causal language model, in its final precision and on its device.
        blocks: Its partition.

    Raises:
        ModelError: If the parameters of a block differ in dtype or device.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        self.model = model
        self.blocks = tuple(blocks)
        self._parameters = tuple(
            tuple(model.get_parameter(name) for name in block.parameter_names) for block in blocks
        )
        self._buffers = tuple(
            _flatten(block, parameters) for block, parameters in zip(blocks, self._parameters, strict=True)
        )
        self._loaded: list[ref[Tensor] | None] = [None] * len(self.blocks)
        self.deactivate()

    def parameters(self, block_index: int) -> tuple[nn.Parameter, ...]:
        """Give the parameters of a block, in the order of its flat vector."""
        return self._parameters[block_index]

    def buffer(self, block_index: int) -> Tensor:
        """Give the flat buffer of a block itself: 1-D, on the model's device; writing to it needs `invalidate`."""
        return self._buffers[block_index]

    def read(self, block_index: int) -> Tensor:
        """Copy a block's parameters into a new flat vector: 1-D, CPU, the model's dtype."""
        return self._buffers[block_index].to("cpu", copy=True)

    def load(self, block_index: int, flat: Tensor) -> None:
        """Set a block's parameters; loading the very same object again is free.

        Args:
            block_index: The block.
            flat: Its new values: 1-D, `num_parameters` long, the model's dtype. It is known again as long
                as somebody else keeps it, and must not be changed until then.

        Raises:
            ModelError: If its size or dtype is another.
        """
        loaded = self._loaded[block_index]
        if loaded is not None and loaded() is flat:
            return
        buffer = self._buffers[block_index]
        if flat.shape != buffer.shape or flat.dtype != buffer.dtype:
            block = self.blocks[block_index]
            raise ModelError(
                f"Block {block_index} ({block.name}) takes {tuple(buffer.shape)} {buffer.dtype},"
                f" not {tuple(flat.shape)} {flat.dtype}",
                cause="The vector belongs to another block, another partition, or a model of another precision.",
            )
        buffer.copy_(flat)
        self._loaded[block_index] = ref(flat)

    def load_all(self, flats: Sequence[Tensor]) -> None:
        """Set the parameters of all blocks, one flat vector for each, in order; see `load`."""
        for block, flat in zip(self.blocks, flats, strict=True):
            self.load(block.index, flat)

    def invalidate(self, block_index: int) -> None:
        """Say that a block's parameters were changed in place, so that the next `load` copies."""
        self._loaded[block_index] = None

    def activate(self, block_index: int, *, gradient_checkpointing: bool = False) -> None:
        """Make one block the only one that requires gradients, with the model in training mode.

        Args:
            block_index: The block to be trained.
            gradient_checkpointing: Recompute activations in the backward pass, without reentrance, in the
                layers that it reaches: from the block's lowest layer upwards.

        Raises:
            ModelError: If the architecture's layers cannot be checkpointed.
        """
        self.deactivate()
        if gradient_checkpointing:
            self._checkpoint_from(self.blocks[block_index].lowest_layer)
        for parameter in self._parameters[block_index]:
            parameter.requires_grad_(True)
        self.model.train()

    def deactivate(self) -> None:
        """Freeze everything, free all gradients, and leave training mode and checkpointing."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                _set_checkpointing(module, on=False)
        self.model.eval()

    def _checkpoint_from(self, lowest_layer: int) -> None:
        _, layers = find_layers(self.model, self.blocks[0].layers_path)
        if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
            raise ModelError(
                f"{type(layers[0]).__name__} does not support gradient checkpointing",
                remedy="Set train.gradient_checkpointing: false.",
            )
        for layer in list(layers)[lowest_layer:]:
            _set_checkpointing(layer, on=True)


def _set_checkpointing(module: Any, *, on: bool) -> None:
    # Flags that each layer of Transformers looks at; its own switch knows all layers or none.
    # The recomputation draws nothing at random, because every dropout is zero.
    module.gradient_checkpointing = on
    if on:
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _flatten(block: Block, parameters: Sequence[nn.Parameter]) -> Tensor:
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
    if len(kinds) != 1:
        listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ModelError(
            f"The parameters of block {block.index} ({block.name}) are not of one kind: {listed}",
            remedy="Load the model in one precision, with model.dtype: float32 or bfloat16, on one device.",
        )
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    pieces = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.view(parameter.shape)
    return flat
