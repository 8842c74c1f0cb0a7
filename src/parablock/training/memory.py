"""Memory of one client for three ways of fine-tuning: blocks, LoRA, and all parameters; and of all in one process.

Parameters, gradients, optimizer state and copies are counted from shapes. Activations are estimated as a multiple
of the outputs of a layer's weight matrices. The multiple is smaller for a frozen layer, because autograd does not
keep the inputs of its matrices. Both are measured on Llama, Qwen, Gemma and Phi layers; GPT-2 keeps more, OPT
less.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from torch import nn
from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.config.methods import cohort_size
from parablock.model.blocks import Block, find_layers, whole_model

WAYS = {"blocks": "block", "adapters": "lora", "everything": "full"}
"""The way of fine-tuning of a method, by what it trains."""
LORA_RANK = 16
"""Rank of the adapters in the comparison, for runs without LoRA."""
FROZEN_LAYER, TRAINED_LAYER = 1.5, 2.4
"""Bytes of activations that autograd keeps of a layer, per byte of its matrices' outputs."""
FP32 = 4
PROCESS_BYTES = 450_000_000
"""Python, torch and Transformers, before a model is loaded."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one client.

    Attributes:
        parameters: The model, with its adapters.
        gradients: Gradients of the trained parameters, fp32.
        optimizer_state: Both moments of AdamW, or one of Muon, fp32.
        fp32_copies: Master copies, if the model is not fp32.
        base_copy: The last committed values of the exchanged parameters.
        updates: The trained copy and the updates in flight, fp32.
        activations: An estimate, for a micro-batch of the longest examples.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    fp32_copies: int
    base_copy: int
    updates: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())


def memory_per_client(model: PreTrainedModel, blocks: tuple[Block, ...], config: RunConfig) -> dict[str, Memory]:
    """Return the memory of a client, for `block`, `lora` and `full`.

    The model, or its outline, has the run's precision; `blocks` is its partition.
    """
    itemsize = model.dtype.itemsize
    activations = _Activations(model, config)
    layers = range(len(activations.layer_bytes))
    all_trained = activations.kept(0, layers)
    parameters, rank = model.num_parameters(), adapter_rank(config)
    adapters = rank * adapter_elements(model, config)
    groups = config.federation.traits.matrices or (("A", "B"),)
    trained_adapters = rank * max(adapter_elements(model, config, group) for group in groups)
    in_blocks = sum(block.num_parameters for block in blocks)

    def memory(trained: int, by_muon: int, *, base_copy: int, item: int, extra: int = 0, kept: int) -> Memory:
        return Memory(
            parameters=parameters * itemsize + extra,
            gradients=trained * FP32,
            optimizer_state=(2 * trained - (by_muon if config.train.optimizer == "muon" else 0)) * FP32,
            fp32_copies=trained * FP32 if item != FP32 else 0,
            base_copy=base_copy,
            updates=(1 + config.federation.delay) * trained * FP32,
            activations=kept,
        )

    def of_block(block: Block) -> Memory:
        kept = activations.kept(block.lowest_layer, block.layers)
        by_muon = _hidden(model, block)
        return memory(block.num_parameters, by_muon, base_copy=in_blocks * itemsize, item=itemsize, kept=kept)

    (whole,) = whole_model(model, config.blocks.layers_path)
    base_of_adapters = _base_of_adapters(model, config, adapters)
    return {
        "block": max(map(of_block, blocks), key=lambda memory: memory.total),
        "lora": memory(
            *(trained_adapters, trained_adapters),
            base_copy=base_of_adapters,
            item=FP32,
            extra=adapters * FP32,
            kept=all_trained,
        ),
        "full": memory(
            *(parameters, _hidden(model, whole)),
            base_copy=parameters * itemsize,
            item=itemsize,
            kept=all_trained,
        ),
    }


@dataclass(frozen=True)
class Place:
    """Bytes of a run whose clients are all in one process.

    Attributes:
        host: In the memory of the machine.
        device: In that of the GPU; 0 where the CPU trains.
    """

    host: int
    device: int = 0


class FreedMemory:
    """The memory that threads have freed, which glibc keeps for each of them: as much as a visit, for each client.

    Args:
        most_bytes: How much may be kept before it is given back.
    """

    def __init__(self, most_bytes: int = 1 << 28) -> None:
        self._process, self._most_bytes = psutil.Process(), most_bytes
        self._held = self._process.memory_info().rss
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def give_back(self) -> None:
        """Give it back to the machine if it has become much; other C libraries keep what they will."""
        if self._trim is not None and self._process.memory_info().rss - self._held > self._most_bytes:
            self._trim(0)
            self._held = self._process.memory_info().rss


def memory_in_one_process(
    model: PreTrainedModel, memory: Memory, config: RunConfig, *, on_gpu: bool = False
) -> Place:
    """Return the memory of a run in one process, with all clients and the server.

    Under the real clock the server and each client have a model of their own, and the server scores while clients
    compute. Under the virtual clock they share one, and one of them computes at a time; what the server freed after
    scoring is still held then. Committed values and updates in flight are each client's own in any case, and so are
    moments that outlive a round.

    Args:
        model: The model, or its outline, without adapters.
        memory: One client, as the run trains it; see `memory_per_client`.
        config: The run.
        on_gpu: Whether models are on a GPU, and committed values and updates on the host.
    """
    federation = config.federation
    clients = 1 if federation.traits.pools_data else federation.num_clients
    moments = _kept_moments(memory, config, model.dtype.itemsize)
    of_a_visit = memory.gradients + memory.optimizer_state + memory.fp32_copies + memory.activations
    scoring = _Activations(model, config).scoring_bytes
    if config.engine.clock == "virtual" or clients == 1:
        models, at_work = 1, of_a_visit + scoring
    else:
        asked = min(clients, (1 + federation.delay) * cohort_size(federation.model_dump()))
        models, at_work = clients + 1, asked * of_a_visit + scoring
    computing = models * memory.parameters + at_work + clients * moments
    waiting = (clients + 1) * (memory.base_copy + memory.updates)  # the server holds as much as a client
    if on_gpu:
        return Place(PROCESS_BYTES + waiting, computing)
    return Place(PROCESS_BYTES + waiting + computing)


def _kept_moments(memory: Memory, config: RunConfig, itemsize: int) -> int:
    """Return the bytes of a client's moments between rounds: of all that it ever trains, or none."""
    traits, kept = config.federation.traits, config.train.optimizer_state
    if kept == "keep":
        exchanged = memory.base_copy // (FP32 if traits.trains == "adapters" else itemsize)
        return memory.optimizer_state * exchanged * FP32 // memory.gradients
    return memory.optimizer_state if kept == "auto" and _trains_the_same(config) else 0


def _trains_the_same(config: RunConfig) -> bool:
    """Return whether every round trains the same parameters."""
    traits = config.federation.traits
    return traits.trains == "everything" or (traits.trains == "adapters" and len(traits.matrices) == 1)


def adapter_rank(config: RunConfig) -> int:
    """Return the rank of the run's adapters, or of those that a run without any is compared with."""
    return config.lora.rank if config.federation.traits.trains == "adapters" else LORA_RANK


def _hidden(model: PreTrainedModel, block: Block) -> int:
    """Count the elements of a block's matrices in decoder layers, which Muon can step."""
    parameters = [model.get_parameter(name) for name in block.parameter_names]
    return sum(
        each.numel()
        for each, hidden in zip(parameters, block.are_hidden_matrices(parameters), strict=True)
        if hidden
    )


class _Activations:
    """Bytes that autograd keeps of a micro-batch of the longest examples."""

    def __init__(self, model: PreTrainedModel, config: RunConfig) -> None:
        train = config.train
        positions = train.per_device_train_batch_size * config.data.max_length
        text = model.config.get_text_config(decoder=True)
        itemsize = model.dtype.itemsize
        _, layers = find_layers(model, config.blocks.layers_path)
        self.layer_bytes = [int(positions * itemsize * _outputs(layer)) for layer in layers]
        self._boundary_bytes = int(positions * itemsize * text.hidden_size)
        # the logits, their fp32 copy if they are not fp32, their softmax, and its gradient
        self._logit_bytes = int(positions * text.vocab_size * (3 * FP32 + (itemsize if itemsize != FP32 else 0)))
        self._checkpointing = train.gradient_checkpointing
        evaluation = config.evaluation
        scored = min(evaluation.per_device_eval_batch_size, evaluation.max_examples) * config.data.max_length
        # without gradients a layer is gone before the next; the logits, the labelled ones of them, their softmax
        self.scoring_bytes = int(
            scored * itemsize * max(map(_outputs, layers)) + scored * text.vocab_size * 3 * FP32
        )

    def kept(self, lowest: int, trained: Any) -> int:
        """Return the bytes when backpropagation goes down to layer `lowest` and some layers are trained."""
        kept = [
            (TRAINED_LAYER if layer in trained else FROZEN_LAYER) * size
            for layer, size in enumerate(self.layer_bytes)
            if layer >= lowest
        ]
        if self._checkpointing and kept:
            kept = [max(kept), self._boundary_bytes * len(kept)]
        return round(sum(kept)) + self._logit_bytes


def _outputs(layer: nn.Module) -> int:
    """Add up the outputs of a layer's weight matrices, per position."""
    return sum(_shape(module)[1] for module in layer.modules())


def adapter_elements(model: PreTrainedModel, config: RunConfig, matrices: Sequence[str] = ("A", "B")) -> int:
    """Count the elements of adapters of rank 1, or of their A or B alone, on the matrices of the decoder layers.

    A has a row of inputs, B a column of outputs; `lora.target_modules` says which matrices have an adapter.
    """
    path, layers = find_layers(model, config.blocks.layers_path)
    wanted = config.lora.target_modules
    shapes = [
        _shape(module)
        for name, module in layers.named_modules(prefix=path)
        if not wanted or any(name.endswith(f".{end}") for end in wanted)
    ]
    return sum(size for shape in shapes for letter, size in zip("AB", shape, strict=True) if letter in matrices)


def _base_of_adapters(model: PreTrainedModel, config: RunConfig, adapters: int) -> int:
    """Return the bytes of the last committed values: the adapters, or the matrices that a stack is added to."""
    if config.federation.traits.combines != "stack":
        return adapters * FP32
    _, layers = find_layers(model, config.blocks.layers_path)
    elements = sum(math.prod(_shape(module)) for module in layers.modules())
    return int(model.dtype.itemsize * elements)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) of a module with a weight matrix, and zeros for any other module."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return 0, 0
    # Conv1D of GPT-2 stores its matrix transposed
    rows, columns = map(int, weight.shape)
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
