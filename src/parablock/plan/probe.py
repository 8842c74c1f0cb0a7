"""Measure on this machine how long each client computes in each round.

A probe loads the model and the data, and runs the trainer on real batches of a few blocks. It learns how many
seconds an operation takes when such a block is trained. The batches of all rounds follow from the seed; their sizes
give the seconds of each client in each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch

from parablock.algorithm.parablock import delta_of
from parablock.config.keys import RunConfig
from parablock.data.batches import round_batches
from parablock.errors import ConfigError
from parablock.experiment.fit_blocks import flops_of
from parablock.experiment.inputs import read_inputs
from parablock.methods.base import RunInputs
from parablock.model.blocks import Block
from parablock.model.params import Replica
from parablock.printable import counted
from parablock.seeding import seed_for
from parablock.training.flops import FlopModel, Tokens
from parablock.training.step_time import Compute, device, format_flops, slowdown
from parablock.training.trainer import LocalTrainer, local_arguments
from parablock.wire.quantize import pack

PROBED_BLOCKS = 4
PROBE_STEPS = 4
PROBE_REPEATS = 5
PROBE_BUDGET_S = 30.0
SIZED_BATCHES = 8192
"""Most batches whose sizes are counted; further rounds are assumed to repeat them."""


def probed_compute(config: RunConfig) -> Compute:
    """Measure real steps on this machine.

    Raises:
        InputError: The model or the data cannot be read, or `engine.step_time_s` is set.
    """
    if config.engine.step_time_s is not None:
        raise ConfigError(
            [
                f"engine.step_time_s: it states that a step takes {config.engine.step_time_s:g} s, "
                "and --probe measures it; leave one of them out"
            ]
        )
    unvisited = config.blocks.model_copy(update={"allow_unvisited": True})
    job = read_inputs(config.model_copy(update={"blocks": unvisited}))
    flops = flops_of(config, job.loaded.model)
    speed = _measure(job, flops)
    tokens = _round_tokens(job)
    factor, crowd = slowdown(config, torch.get_num_threads())

    def round_s(block: Block, round_index: int, client_id: int, num_local_steps: int) -> float:
        operations = flops.step(block, tokens(round_index, client_id, num_local_steps))
        deviation = speed.deviations[seed_for(0, "probe", round_index, client_id) % len(speed.deviations)]
        return factor * deviation * speed.seconds_per_flop(block.lowest_layer) * operations

    return Compute(
        round_s,
        "probed",
        f"measured: {format_flops(1 / speed.seconds_per_flop(0))} on the {device(config)} of this machine, "
        f"in {counted(len(speed.deviations), 'visit')} of {counted(len(speed.depths), 'block')} with the run's own "
        f"batches{crowd}",
    )


@dataclass(frozen=True)
class _Speed:
    """The result of a probe.

    Attributes:
        depths: The lowest layers of the probed blocks, ascending.
        medians: For each depth, the median seconds per operation.
        deviations: For each visit, its seconds over that median. A round of a client draws one of them, because
            a round lasts as long as its slowest client.
    """

    depths: tuple[int, ...]
    medians: tuple[float, ...]
    deviations: tuple[float, ...]

    def seconds_per_flop(self, lowest_layer: int) -> float:
        """Return the seconds per operation when backpropagation goes down to a layer."""
        return float(np.interp(lowest_layer, self.depths, self.medians))


def _measure(job: RunInputs, flops: FlopModel) -> _Speed:
    """Time visits of a few blocks in turn, so that a slow moment of the machine affects all of them."""
    replica = Replica(job.loaded.model, job.blocks)
    working = tuple(replica.read(block.index) for block in job.blocks)
    trainers = _trainers(job, replica)
    chosen = sorted({round(k) for k in np.linspace(0, len(job.blocks) - 1, PROBED_BLOCKS)})
    measured: dict[int, list[float]] = {job.blocks[b].lowest_layer: [] for b in chosen}
    steps = _num_local_steps(job)
    trainers[0].train(0, chosen[-1], steps, 0, working)  # warms up caches and allocators
    began, visits = time.perf_counter(), 0
    for repeat in range(PROBE_REPEATS):
        for b in chosen:
            if repeat and time.perf_counter() - began > PROBE_BUDGET_S:
                break
            client_id, first_step = visits % len(trainers), repeat * steps
            started = time.perf_counter()
            result = trainers[client_id].train(repeat, b, steps, first_step, working)
            delta = delta_of(result.trained[:], working[b])
            pack(delta, job.config.wire.format)
            seconds = time.perf_counter() - started
            operations = flops.step(job.blocks[b], _tokens(job, client_id, first_step, steps))
            measured[job.blocks[b].lowest_layer].append(seconds / operations)
            visits += 1
    medians = {depth: statistics.median(measured[depth]) for depth in sorted(measured)}
    deviations = (value / medians[depth] for depth in medians for value in measured[depth])
    return _Speed(tuple(medians), tuple(medians.values()), tuple(deviations))


def _num_local_steps(job: RunInputs) -> int:
    """Return the configured steps of a round, or a few where these are many."""
    configured = job.config.train.num_local_steps
    return min(PROBE_STEPS, configured) if isinstance(configured, int) else PROBE_STEPS


def _trainers(job: RunInputs, replica: Replica) -> list[LocalTrainer]:
    return [
        LocalTrainer(
            client_id,
            examples,
            replica,
            train=job.config.train.model_copy(update={"optimizer_state": "reset"}),
            arguments=local_arguments(job.config),
            num_rounds=PROBE_REPEATS,
            seed=job.config.seed,
            pad_token_id=job.loaded.tokenizer.pad_token_id,
            step_time_s=None,
        )
        for client_id, examples in enumerate(job.train)
    ]


def _round_tokens(job: RunInputs) -> Callable[[int, int, int], Tokens]:
    """Return a function (round, client, steps) → tokens; the sizes repeat after `SIZED_BATCHES` batches."""
    batches = job.config.train.gradient_accumulation_steps * len(job.train)

    tokens = cache(partial(_tokens, job))

    def of_round(round_index: int, client_id: int, steps: int) -> Tokens:
        distinct = max(1, min(job.config.federation.num_rounds, SIZED_BATCHES // (batches * steps)))
        return tokens(client_id, round_index % distinct * steps, steps)

    return of_round


def _tokens(job: RunInputs, client_id: int, first_step: int, num_local_steps: int) -> Tokens:
    """Count the tokens of a client's batches, from a step on."""
    train = job.config.train
    steps = round_batches(
        job.train[client_id],
        seed=job.config.seed,
        client_id=client_id,
        first_step=first_step,
        num_local_steps=num_local_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        pad_token_id=job.loaded.tokenizer.pad_token_id,
    )
    return sum((Tokens.of(batch) for micro_batches in steps for batch in micro_batches), Tokens())
