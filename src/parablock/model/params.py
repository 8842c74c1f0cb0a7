"""A model replica whose parameters are views into flat buffers, one for each block.

Messages, commits and training all handle one block's flat vector; this file connects it with the model. Only the
block in training requires gradients.
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
    blocks stay as they are, frozen. Moving or casting the model afterwards would break the views.

    A replica belongs to one thread. Its model is in its final precision and on its device.

    Raises:
        ModelError: The parameters of a block differ in dtype or device.
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
        """Return the parameters of a block, in the order of its flat vector."""
        return self._parameters[block_index]

    def buffer(self, block_index: int) -> Tensor:
        """Return a block's own flat buffer: 1-D, on the model's device; call `invalidate` after writing to it."""
        return self._buffers[block_index]

    def read(self, block_index: int) -> Tensor:
        """Copy a block's parameters into a new flat vector: 1-D, CPU, the model's dtype."""
        return self._buffers[block_index].to("cpu", copy=True)

    def load(self, block_index: int, flat: Tensor) -> None:
        """Set a block's parameters; loading the same tensor object again costs nothing.

        `flat` is 1-D, `num_parameters` long, of the model's dtype, and must not be changed afterwards.

        Raises:
            ModelError: `flat` has another size or dtype than the block.
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
        """Set the parameters of all blocks from one flat vector for each, in order; see `load`."""
        for block, flat in zip(self.blocks, flats, strict=True):
            self.load(block.index, flat)

    def invalidate(self, block_index: int) -> None:
        """Note that a block's parameters were changed in place, so that the next `load` copies."""
        self._loaded[block_index] = None

    def activate(self, block_index: int, *, gradient_checkpointing: bool = False) -> None:
        """Let only one block require gradients, and set the model to training mode.

        With checkpointing the backward pass recomputes the activations of all layers that it reaches: from the
        block's lowest layer upwards.

        Raises:
            ModelError: The architecture's layers do not support gradient checkpointing.
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
    # Each layer of Transformers reads these flags; the model's own switch sets all layers or none.
    # Recomputation draws no random numbers, because every dropout is zero.
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
