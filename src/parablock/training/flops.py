"""Floating-point operations (FLOPs) of a local step on one block, from the shapes of a model.

| symbol | meaning |
|---|---|
| N | positions of a batch, padding included: examples × length |
| L | positions that predict a label token |
| W_l | elements of the weight matrices of decoder layer l |
| A | width of the attention: heads × head dimension |
| H | elements of the head |

    forward                2 N W_l + 4 N·length·A     every layer;  2 L H for the head
    gradient of the input  2 N W_l + 10 N·length·A    layers from the block's lowest one up;  2 L H
    gradient of weights    2 N W_l                    layers of the block;  2 L H when the head is trained

For a block of MLPs alone, the backward pass ends before the attention of its lowest layer, whose two terms are
left out. The backward pass of the attention recomputes its scores, hence 10 and not 8. Norms, activation functions
and the optimizer are not counted: they are few operations, except on a small model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedModel

from parablock.data.batches import Batch
from parablock.model.blocks import Block, find_layers, halves_of
from parablock.model.loss import count_label_tokens


@dataclass(frozen=True)
class Tokens:
    """Tokens of one or several batches, as the operations count them.

    Attributes:
        positions: Σ N.
        pairs: Σ N·length, for the attention.
        labels: Σ L.
    """

    positions: int = 0
    pairs: int = 0
    labels: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.positions + other.positions, self.pairs + other.pairs, self.labels + other.labels)

    @staticmethod
    def of(batch: Batch) -> Tokens:
        """Count the tokens of a batch."""
        examples, length = batch.input_ids_BT.shape
        return Tokens(examples * length, examples * length * length, count_label_tokens(batch.labels_BT))

    @staticmethod
    def at_most(*, num_examples: int, max_length: int) -> Tokens:
        """Count the tokens of the longest possible examples, with a label at every position."""
        positions = num_examples * max_length
        return Tokens(positions, positions * max_length, positions)


class FlopModel:
    """Counts the operations of a step on a block of one model.

    Args:
        model: The model or its outline.
        layers_path: Path of the decoder layers; None to search for them.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
    """

    def __init__(
        self, model: PreTrainedModel, *, layers_path: str | None = None, gradient_checkpointing: bool = False
    ) -> None:
        self._path, layers = find_layers(model, layers_path)
        self.matrices = tuple(sum(p.numel() for p in layer.parameters() if p.ndim > 1) for layer in layers)
        self._sizes: dict[str, int] = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
        self._from_layer = (*accumulate(reversed(self.matrices), initial=0),)[::-1]  # Σ W over layers ≥ l
        self.attention_width = attention_width(model)
        head = model.get_output_embeddings()
        self.head = 0 if head is None else head.weight.numel()
        self._head_names = _names_of(model, head)
        self._checkpointing = gradient_checkpointing

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.matrices)

    def step(self, block: Block, tokens: Tokens) -> float:
        """Count the operations of the forward and backward pass that train `block` on `tokens`."""
        reached = self.num_layers - block.lowest_layer - (block.half == "mlp")
        head = 2 * tokens.labels * self.head
        forward = self.forward(tokens)
        backward = self._matrices(block.lowest_layer, tokens) + 10 * reached * tokens.pairs * self.attention_width
        if block.half == "mlp":
            backward -= 2 * tokens.positions * self._attention_matrices(block.lowest_layer)
        inside = (name for name in block.parameter_names if name.startswith(f"{self._path}."))
        weights = 2 * tokens.positions * sum(self._sizes.get(name, 0) for name in inside)
        weights += head * (not self._head_names.isdisjoint(block.parameter_names))
        again = self._layers(block.lowest_layer, tokens) if self._checkpointing else 0
        return forward + backward + head + weights + again

    def forward(self, tokens: Tokens) -> float:
        """Count the operations of a forward pass on `tokens`."""
        return self._layers(0, tokens) + 2 * tokens.labels * self.head

    def _layers(self, lowest: int, tokens: Tokens) -> int:
        return self._matrices(lowest, tokens) + 4 * (self.num_layers - lowest) * tokens.pairs * self.attention_width

    def _attention_matrices(self, layer: int) -> int:
        prefix = f"{self._path}.{layer}."
        halves = halves_of([name for name in self._sizes if name.startswith(prefix)], self._path)
        return sum(self._sizes[name] for name, half in halves.items() if half == "attention")

    def _matrices(self, lowest: int, tokens: Tokens) -> int:
        return 2 * tokens.positions * self._from_layer[lowest]


def attention_width(model: PreTrainedModel) -> int:
    """Return heads × head dimension of a model's decoder."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(heads * head_size)


def _names_of(model: PreTrainedModel, head: object) -> frozenset[str]:
    weight = getattr(head, "weight", None)
    return frozenset(name for name, parameter in model.named_parameters() if parameter is weight)
