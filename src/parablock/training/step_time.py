"""Seconds of local training: as stated in the configuration, or assumed for an ordinary device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from parablock.config.keys import RunConfig
from parablock.model.blocks import Block
from parablock.training.flops import FlopModel, Tokens

ASSUMED_FLOPS = {
    ("cpu", "float32"): 3e10,
    ("cpu", "bfloat16"): 3e10,
    ("cuda", "float32"): 1e13,
    ("cuda", "bfloat16"): 5e13,
}
"""Operations per second that an ordinary CPU core or GPU reaches on a language model."""


@dataclass(frozen=True)
class Compute:
    """The computation time of clients.

    Attributes:
        round_s: (block, round_index, client_id, num_local_steps) → seconds; any block of the model will do.
        source: stated | assumed | probed.
        assumption: The basis of these times, in words.
    """

    round_s: Callable[[Block, int, int, int], float]
    source: str
    assumption: str


def stated_compute(step_time_s: float) -> Compute:
    """Return `engine.step_time_s` for every step on every block."""
    return Compute(
        lambda _block, _round, _client, num_local_steps: num_local_steps * step_time_s,
        "stated",
        f"stated: a local step takes {step_time_s:g} s (engine.step_time_s)",
    )


def assumed_compute(config: RunConfig, flops: FlopModel) -> Compute:
    """Assume an ordinary device, and examples of the maximum length."""
    train = config.train
    size = train.per_device_train_batch_size * train.gradient_accumulation_steps
    tokens = Tokens.at_most(num_examples=size, max_length=config.data.max_length)
    on, threads = device(config), num_threads(config)
    speed = ASSUMED_FLOPS[on, config.model.dtype] * (threads if on == "cpu" else 1)
    factor, note = slowdown(config, threads)

    @cache
    def seconds(block: Block) -> float:
        return factor * flops.step(block, tokens) / speed

    return Compute(
        lambda block, _round, _client, num_local_steps: num_local_steps * seconds(block),
        "assumed",
        f"assumed: {format_flops(speed)} on the {on} of a client, {config.data.max_length} tokens in every "
        f"example (--probe measures both; engine.step_time_s states the time of a step){note}",
    )


def num_threads(config: RunConfig) -> int:
    """Return the torch threads of a client: as configured, or a fair share of this machine's cores."""
    cores = os.cpu_count() or 1
    return config.engine.num_threads or max(1, cores // min(cores, config.federation.num_clients))


def device(config: RunConfig) -> str:
    """Return the device of local training, cpu or cuda."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return found if config.model.device == "auto" else config.model.device


def slowdown(config: RunConfig, threads: int) -> tuple[float, str]:
    """Return how much slower clients are because they share this machine, and a note on it."""
    if config.engine.name != "inprocess" or config.engine.clock == "virtual":
        return 1.0, ""
    on_cpu = device(config) == "cpu"
    asked = max(1, round(config.federation.participation * config.federation.num_clients))
    cores = os.cpu_count() or 1
    factor = max(1.0, asked * threads / cores) if on_cpu else float(asked)
    shared = f"{cores} cores" if on_cpu else "one GPU"
    note = f"; {asked} clients share {shared}: {factor:.3g} times as long (not with engine.clock: virtual)"
    return factor, note if factor > 1 else ""


def format_flops(flops_per_s: float) -> str:
    """Format a speed."""
    return f"{flops_per_s / 1e12:.3g} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.3g} GFLOP/s"
