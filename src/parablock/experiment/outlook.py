"""What a run will take on this machine, from the time that scoring its base model took."""

from __future__ import annotations

from statistics import fmean

from parablock.config.methods import cohort_size
from parablock.data.batches import collate, round_batches
from parablock.engine.local_steps import exchange_s
from parablock.experiment.engines import encoding_of
from parablock.experiment.fit_blocks import flops_of
from parablock.methods.base import RunInputs
from parablock.report.units import format_duration
from parablock.training.flops import Tokens
from parablock.training.step_time import slowdown
from parablock.wire.transport import Link

MAX_CLIENTS = 16
"""Clients whose first batches are counted; more of them are taken to be like these."""


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
    rounds = (
        f"{num_rounds} rounds with {scorings} scorings" if scorings > 1 else f"{num_rounds} rounds with a scoring"
    )
    seen = steps * config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    seen = round(seen * num_rounds * cohort / config.federation.num_clients)
    epochs = seen / fmean(len(part) for part in clients)
    return (
        f"a round takes about {format_duration(round_s)} here, and {rounds} of {format_duration(scoring_s)} about "
        f"{format_duration(total_s)} (by the speed of scoring the base model); "
        f"a client learns from {seen:,} examples, {epochs:.2g} times those that it has"
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
