"""What a run will take on this machine: memory by its shapes, time by that of scoring its base model."""

from __future__ import annotations

from statistics import fmean

import psutil
import torch
from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.config.methods import cohort_size
from parablock.data.batches import collate, round_batches
from parablock.engine.local_steps import exchange_s
from parablock.experiment.engines import encoding_of
from parablock.experiment.fit_blocks import flops_of
from parablock.methods.base import RunInputs
from parablock.methods.trained_blocks import layer_blocks
from parablock.model.pretrained import outline_model
from parablock.printable import counted
from parablock.report.units import format_bytes, format_duration
from parablock.training.flops import Tokens
from parablock.training.memory import WAYS, Memory, Place, memory_in_one_process, memory_per_client
from parablock.training.step_time import slowdown
from parablock.wire.transport import Link

MAX_CLIENTS = 16
"""Clients whose first batches are counted; more of them are taken to be like these."""


def memory_here(outline: PreTrainedModel, of_a_client: Memory, config: RunConfig) -> Place:
    """Return the memory of a run in one process, with its models where `model.device` puts them here."""
    device = config.model.device
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return memory_in_one_process(outline, of_a_client, config, on_gpu=on_gpu)


def warn_of_little_memory(place: Place, config: RunConfig) -> str:
    """Say that this machine cannot hold a run in one process; "" if it can, or has no GPU to compare with."""
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else place.device
    machine = psutil.virtual_memory().total
    short = [
        f"{format_bytes(needed)} of {name}, which has {format_bytes(there)}"
        for name, needed, there in (("this machine", place.host, machine), ("the GPU", place.device, gpu))
        if needed > there
    ]
    if not short:
        return ""
    shared = "" if config.engine.clock == "virtual" else "engine.clock: virtual, with which clients share a model, "
    return (
        f"warning: all clients in one process may take {' and '.join(short)}; try {shared}a smaller "
        "data.max_length, train.per_device_train_batch_size or evaluation.per_device_eval_batch_size, or "
        "train.gradient_checkpointing: true"
    )


def warn_of_this_run(config: RunConfig) -> str:
    """Say that this machine cannot hold the run in one process, as `warn_of_little_memory`."""
    outline = outline_model(config.model.name_or_path, dtype=config.model.dtype)
    memory = memory_per_client(outline, layer_blocks(outline, config), config)
    of_a_client = memory[WAYS[config.federation.traits.trains]]
    return warn_of_little_memory(memory_here(outline, of_a_client, config), config)


def foresee(inputs: RunInputs, scoring_s: float, answering_s: float) -> str:
    """Say in a sentence how long a round and the whole run will take; "" where the configuration leaves it open.

    Args:
        inputs: The run.
        scoring_s: The seconds that scoring the test examples took.
        answering_s: The seconds in which the base model has answered test prompts, as the tuned one will.
    """
    config = inputs.config
    steps, clients = config.train.num_local_steps, [part for part in inputs.train if part]
    if not isinstance(steps, int) or not clients or config.engine.name != "inprocess":
        return ""
    flops = flops_of(config, inputs.loaded.model)
    speed = flops.forward(_scored(inputs)) / max(scoring_s, 1e-6)
    training_s = [
        fmean(flops.step(block, tokens) for block in inputs.blocks) / speed
        for tokens in (_first_round(inputs, i, steps) for i in range(min(MAX_CLIENTS, len(clients))))
    ]
    num_rounds, cohort = config.federation.num_rounds, cohort_size(config.federation.model_dump())
    if config.engine.clock == "virtual":  # one client computes after the other
        round_s = cohort * fmean(training_s)
    else:
        computing_s = max(training_s) * slowdown(config, config.engine.num_threads or 1)[0]
        sending_s = _exchange_s(inputs)
        round_s = max(computing_s, sending_s) if config.federation.delay else computing_s + sending_s
    every = config.evaluation.every_rounds
    scorings = -(-num_rounds // (every or num_rounds))  # the last round is scored in any case
    total_s = num_rounds * round_s + scorings * scoring_s + answering_s
    scored = f"{scorings} scorings" if scorings > 1 else "a scoring"
    rounds = f"{counted(num_rounds, 'round')} with {scored}"
    seen = steps * config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    seen = round(seen * num_rounds * cohort / config.federation.num_clients)
    epochs = seen / fmean(len(part) for part in clients)
    return (
        f"a round takes about {format_duration(round_s)} here, and {rounds} of {format_duration(scoring_s)} about "
        f"{format_duration(total_s)} (by the speed of scoring the base model); "
        f"a client learns from {counted(seen, 'example')}, {epochs:.2g} times those that it has"
    )


def _scored(inputs: RunInputs) -> Tokens:
    examples = sorted(inputs.test, key=lambda example: len(example.input_ids))
    size = inputs.config.evaluation.per_device_eval_batch_size
    batches = (examples[at : at + size] for at in range(0, len(examples), size))
    pad_token_id = inputs.loaded.tokenizer.pad_token_id
    return sum((Tokens.of(collate(batch, pad_token_id=pad_token_id)) for batch in batches), Tokens())


def _first_round(inputs: RunInputs, client_id: int, num_local_steps: int) -> Tokens:
    train = inputs.config.train
    steps = round_batches(
        [part for part in inputs.train if part][client_id],
        seed=inputs.config.seed,
        client_id=client_id,
        first_step=0,
        num_local_steps=num_local_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        pad_token_id=inputs.loaded.tokenizer.pad_token_id,
    )
    return sum((Tokens.of(batch) for micro_batches in steps for batch in micro_batches), Tokens())


def _exchange_s(inputs: RunInputs) -> float:
    """Return the seconds in which a block of mean size goes up and comes down."""
    config = inputs.config
    if not config.federation.traits.gathers:
        return 0.0
    size, encoding = round(fmean(block.num_parameters for block in inputs.blocks)), encoding_of(config)
    streamed = len(encoding.cut(size)) > 1
    return exchange_s(Link(**config.link.model_dump()), encoding.payload_bytes(size), streamed=streamed)
