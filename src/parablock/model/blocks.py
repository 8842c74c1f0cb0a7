"""The partition of a model into ordered, disjoint blocks: the only file that knows parameter names.

A block is a group of neighbouring decoder layers, or one half of each of them: the attention, or the MLP.
The embeddings, and the final norm with the head, are blocks only on request; otherwise they stay frozen. Tied
embeddings are one parameter of one block: the embeddings if they are a block, else the head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from parablock.errors import ModelError

ATTENTION_SIDE = ("attn", "attention", "input_layernorm", "ln_1", "norm_1")
"""Parts of parameter names in the attention half of a layer, norms included; all others belong to the MLP."""

SPLITS = ("layer", "attention_mlp")
HALVES = ("attention", "mlp")
"""The halves of a layer, from its input to its output."""

INPUT_SIDE = ("embed", "wte", "wpe", "project_in")
"""Parts of parameter names that come before the first layer."""


@dataclass(frozen=True)
class Block:
    """A group of parameters that is trained and sent together.

    Attributes:
        index: Position in the ordered partition.
        name: A readable name: `layers.3`, `layers.4-5`, `layers.3.mlp`, `embeddings` or `head`.
        layers: Indices of its decoder layers, ascending; empty for embeddings and head.
        parameter_names: Its parameters, in the order of their elements in the block's flat vector.
        num_parameters: Number of their elements.
        lowest_layer: The first decoder layer that backpropagation reaches when this block is trained; the number
            of layers if it reaches none.
        layers_path: Dotted path of the model's decoder layers.
        half: attention | mlp; None if the block has both halves of its layers.
    """

    index: int
    name: str
    layers: tuple[int, ...]
    parameter_names: tuple[str, ...]
    num_parameters: int
    lowest_layer: int = 0
    layers_path: str | None = None
    half: str | None = None

    def are_hidden_matrices(self, parameters: Sequence[Tensor]) -> list[bool]:
        """Return of each of the block's parameters whether it is a matrix of a decoder layer."""
        named = zip(self.parameter_names, parameters, strict=True)
        return [each.ndim == 2 and name.startswith(f"{self.layers_path}.") for name, each in named]


def partition_blocks(
    model: PreTrainedModel,
    *,
    layers_per_block: int,
    split: str = "layer",
    include_embeddings: bool = False,
    include_head: bool = False,
    layers_path: str | None = None,
) -> tuple[Block, ...]:
    """Split a causal language model into blocks, from its input to its output.

    Args:
        model: Any Hugging Face causal language model.
        layers_per_block: Decoder layers in a block; the last block may have fewer.
        split: `layer`, or `attention_mlp`: two blocks for each group of layers, their attention and their MLPs.
        include_embeddings: Whether token and position embeddings are the first block.
        include_head: Whether the final norm and the head are the last block.
        layers_path: As in `find_layers`.

    Raises:
        ModelError: The layers are not found, `layers_per_block` does not fit their number, the split is unknown, or
            a block would have no parameter.
    """
    path, layers = find_layers(model, layers_path)
    count = len(layers)
    if not 1 <= layers_per_block <= count:
        raise ModelError(
            f"blocks.layers_per_block is {layers_per_block}, and the model has {count} decoder layers",
            remedy=f"Choose a number from 1 to {count}.",
        )
    if split not in SPLITS:
        raise ModelError(f"blocks.split is {split!r}", remedy=f"Choose one of {', '.join(SPLITS)}.")
    embeddings, head = _names_outside(model, path)
    tied = set(embeddings) & set(head)
    sizes, inside = _parameters_of(model, path)
    blocks: list[Block] = []

    def add(
        name: str, group: tuple[int, ...], names: Sequence[str], lowest_layer: int, half: str | None = None
    ) -> None:
        size = sum(sizes[parameter] for parameter in names)
        blocks.append(Block(len(blocks), name, group, tuple(names), size, lowest_layer, path, half))

    if include_embeddings:
        add("embeddings", (), embeddings, 0)
        head = [name for name in head if name not in tied]
    for first in range(0, count, layers_per_block):
        group = tuple(range(first, min(first + layers_per_block, count)))
        names = [name for layer in group for name in inside[layer]]
        if split == "layer":
            add(_layers_name(group), group, names, first)
            continue
        belongs = halves_of(names, path)
        for half in HALVES:
            of_half = [name for name in names if belongs[name] == half]
            add(f"{_layers_name(group)}.{half}", group, of_half, first, half)
    if include_head:
        add("head", (), head, 0 if tied & set(head) else count)
    for block in blocks:
        if not block.num_parameters:
            raise ModelError(
                f"Block {block.index} ({block.name}) would have no parameters",
                cause="They are shared with another block, or this model has none there.",
                remedy="Leave this block out, or choose larger blocks, or blocks.split: layer.",
            )
    return tuple(blocks)


def halves_of(names: Sequence[str], layers_path: str) -> dict[str, str]:
    """Return the half of its layer, attention | mlp, for each of all parameters of some layers.

    A norm is in the half that it is named after. The exception is `post_attention_layernorm` as the only norm
    between the two halves, where it feeds the MLP.
    """
    sandwiched = any("feedforward" in name for name in names)
    halves = {}
    for name in names:
        inside = name.removeprefix(layers_path)
        feeds_mlp = "post_attention_layernorm" in inside and not sandwiched
        of_attention = any(word in inside for word in ATTENTION_SIDE) and not feeds_mlp
        halves[name] = "attention" if of_attention else "mlp"
    return halves


def whole_model(model: PreTrainedModel, layers_path: str | None = None) -> tuple[Block]:
    """Return one block of all parameters, embeddings and head included, as FedAvg trains and sends them."""
    parts = partition_blocks(
        model, layers_per_block=1, include_embeddings=True, include_head=True, layers_path=layers_path
    )
    layers = tuple(layer for part in parts for layer in part.layers)
    names = tuple(name for part in parts for name in part.parameter_names)
    size = sum(part.num_parameters for part in parts)
    return (Block(0, "all parameters", layers, names, size, layers_path=parts[0].layers_path),)


def find_layers(model: PreTrainedModel, layers_path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Return the dotted path and the list of a model's decoder layers.

    The list is the one `ModuleList` of the decoder that has an entry for each layer of the configuration and lies
    in no other `ModuleList`. For a model in which this rule does not find it, `layers_path` is its dotted path.

    Raises:
        ModelError: There is no such list, or more than one.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if layers_path is not None:
        if not len(lists.get(layers_path, ())):
            raise _layers_not_found(f"blocks.layers_path is {layers_path!r}, which names no ModuleList", lists)
        return layers_path, lists[layers_path]
    wanted = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    in_decoder = set(model.get_decoder().modules())
    found = [
        name
        for name, module in lists.items()
        if len(module) == wanted
        and module in in_decoder
        and not any(name.startswith(f"{other}.") for other in lists)
    ]
    if len(found) != 1:
        architecture = type(model).__name__
        raise _layers_not_found(f"The decoder layers of {architecture} ({wanted} of them) were not found", lists)
    return found[0], lists[found[0]]


def _layers_not_found(what: str, lists: Mapping[str, nn.ModuleList]) -> ModelError:
    listed = ", ".join(f"{name} ({len(module)} entries)" for name, module in lists.items()) or "none"
    return ModelError(
        what,
        cause=f"Lists of modules in this model: {listed}.",
        remedy="Name the list of its decoder layers in the configuration, as in blocks.layers_path: model.layers",
    )


def _parameters_of(model: PreTrainedModel, path: str) -> tuple[dict[str, int], dict[int, list[str]]]:
    """Return the elements of each parameter, and the names of those of each layer."""
    sizes, inside = (
        {name: each.numel() for name, each in model.named_parameters()},
        defaultdict[int, list[str]](list),
    )
    for name in sizes:
        if name.startswith(f"{path}."):
            inside[int(name.removeprefix(f"{path}.").partition(".")[0])].append(name)
    return sizes, inside


def _names_outside(model: PreTrainedModel, path: str) -> tuple[list[str], list[str]]:
    """Return the parameters before the layers and those after them; tied embeddings are in both."""
    read_in = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    output = model.get_output_embeddings()
    read_out = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    embeddings, head = [], []
    for name, parameter in model.named_parameters():
        if name.startswith(f"{path}."):
            continue
        named_input = any(word in name for word in INPUT_SIDE)
        if id(parameter) in read_in or (named_input and id(parameter) not in read_out):
            embeddings.append(name)
        if id(parameter) in read_out or not (id(parameter) in read_in or named_input):
            head.append(name)
    return embeddings, head


def _layers_name(group: Sequence[int]) -> str:
    return f"layers.{group[0]}" if len(group) == 1 else f"layers.{group[0]}-{group[-1]}"
