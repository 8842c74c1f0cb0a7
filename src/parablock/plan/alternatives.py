"""What other methods would take on the same data, link and device, and which one to choose.

A plan knows bytes, seconds and memory, and not how much there is to learn. So the recommendation is a rule of thumb
from measured runs (docs/plan.md), with what would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from parablock.config.keys import RunConfig
from parablock.config.methods import METHODS, with_delay
from parablock.errors import InputError
from parablock.plan.allowed import with_method
from parablock.plan.traffic import total_bytes
from parablock.report.units import format_bytes, format_duration
from parablock.training.memory import WAYS, adapter_elements, memory_per_client
from parablock.training.step_time import Compute

if TYPE_CHECKING:
    from parablock.plan.scenario import Scenario

WORTH_A_DELAY = 0.05
"""The part of a round that overlap has to save, since at equal rounds it costs some of the loss."""
MUCH_LESS = 0.8
"""The part of the memory of adapters that is worth another method."""


@dataclass(frozen=True)
class Alternative:
    """A method with a delay, in place of the configured one.

    Attributes:
        method: Its name.
        delay: d.
        bytes_per_client_round: Up and down of one client in one round.
        round_s: Seconds of a round, the mean over all rounds.
        hours: The whole run, without evaluation.
        memory_bytes: One client.
        never_visited: Blocks that the rounds would not train.
        problem: Why there are no figures: the first setting that the method cannot have; empty if there are.
    """

    method: str
    delay: int
    bytes_per_client_round: int = 0
    round_s: float = 0.0
    hours: float = 0.0
    memory_bytes: int = 0
    never_visited: int = 0
    problem: str = ""


def alternatives(given: Scenario, make: Callable[[RunConfig], Scenario], slower: float) -> list[Alternative]:
    """Plan every method in which a cohort sends updates, with delay 0 and, if it can have one, 1.

    Args:
        given: The configured run.
        make: Makes the scenario of another configuration.
        slower: Seconds of this run's computation over those that its scenario would have without a probe.
    """
    without = {method.without_delay for method in METHODS.values()}
    names = [name for name, method in METHODS.items() if method.gathers and name not in without]
    each = [(name, delay) for name in names for delay in ((0, 1) if METHODS[name].may_lag else (0,))]
    return [_alternative(name, delay, given.config, make, slower) for name, delay in each]


def _alternative(
    name: str, delay: int, config: RunConfig, make: Callable[[RunConfig], Scenario], slower: float
) -> Alternative:
    try:
        scenario = make(with_method(config, name, delay))
    except InputError as error:
        return Alternative(name, delay, problem=getattr(error, "problems", (error.what,))[0])
    blocks, wire_format = scenario.blocks, scenario.config.wire.format
    scenario.compute = _times(scenario.compute, slower)
    partition = scenario.partition(scenario.layers_per_block)
    memory = memory_per_client(scenario.outline, partition, scenario.config)[WAYS[METHODS[name].trains]]
    timing = scenario.time(blocks, wire_format=wire_format, link=scenario.link, delay=delay)
    moved = total_bytes(scenario.walk(len(blocks), delay), scenario.sizes(blocks, wire_format))
    return Alternative(
        name,
        delay,
        bytes_per_client_round=moved.bytes_per_client_round,
        round_s=timing.round_s,
        hours=timing.wall_s / 3600,
        memory_bytes=memory.total,
        never_visited=len(scenario.never_visited(blocks)),
    )


def why_no_delay(found: Sequence[Alternative], config: RunConfig) -> str:
    """Return why the configured method cannot have a delay here; empty if it can."""
    name = with_delay(config.federation.method)
    if name is None:
        return f"{config.federation.method} {config.federation.traits.no_delay}"
    return next(each.problem for each in found if (each.method, each.delay) == (name, 1))


def _times(compute: Compute, factor: float) -> Compute:
    return Compute(partial(_longer, compute.round_s, factor), compute.source, compute.assumption)


def _longer(round_s: Callable[..., float], factor: float, *place: Any) -> float:
    return factor * round_s(*place)


def equal_rank(scenario: Scenario) -> float:
    """Return the rank of adapters A and B that have as many elements as a round of this run moves, up and down."""
    blocks, itinerary = scenario.blocks, scenario.walk(len(scenario.blocks), scenario.config.federation.delay)
    sizes = scenario.sizes(blocks, scenario.config.wire.format)
    mean = sum(block.num_parameters for block in blocks) / len(blocks)
    down = mean
    if scenario.stacked is not None:  # what comes down is not what went up
        told = [sizes.num_elements(news) for start in (*itinerary.news, itinerary.drain) for news in start.values()]
        down = sum(told) / sum(map(len, itinerary.news))
    return (mean + down) / 2 / adapter_elements(scenario.outline, scenario.config)


def recommended_method(found: Sequence[Alternative], config: RunConfig, num_layers: int) -> dict[str, Any]:
    """Choose a method and a delay; return them with `reason` and `unless`, in words."""
    usable = {(each.method, each.delay): each for each in found if not each.problem}
    both = [
        name for name, method in METHODS.items() if method.matrices and method.may_lag and method.trains_one_group
    ]
    name = next((name for name in both if (name, 0) in usable), None)
    if name is None:
        return {"method": config.federation.method, "delay": config.federation.delay, "reason": "", "unless": ""}
    serial, overlapped = usable[name, 0], usable.get((name, 1))
    saved = 1 - overlapped.round_s / serial.round_s if overlapped else 0.0
    if overlapped is None:
        chosen, overlap = serial, "these settings allow it no delay"
    elif config.link.upload_mbps is None and config.link.download_mbps is None and not config.link.latency_s:
        chosen = usable.get((name, config.federation.delay), serial)
        overlap = "whether a delay saves time depends on the link, which is not given"
    elif saved >= WORTH_A_DELAY:
        chosen, overlap = overlapped, f"with delay 1 a round takes {saved:.0%} less time"
    else:
        chosen = serial
        overlap = f"a delay would save {saved:.0%} of a round, and costs some loss at equal rounds"
    reason = (
        f"adapters train all {num_layers} layers in every round and send "
        f"{format_bytes(chosen.bytes_per_client_round)} for it; {overlap}"
    )
    lagging = next(each for each in METHODS if METHODS[each].without_delay)
    blocks = usable.get((lagging, chosen.delay))
    unless = "there is more to learn than adapters hold: much data, long further pre-training"
    if blocks is not None and blocks.memory_bytes < MUCH_LESS * chosen.memory_bytes:
        unless += (
            f"; or memory is short ({lagging} takes {format_bytes(blocks.memory_bytes)}, {name} "
            f"{format_bytes(chosen.memory_bytes)})"
        )
    if blocks is not None:
        unless += f": then {lagging}, whose round takes {format_duration(blocks.round_s)}"
    return {"method": name, "delay": chosen.delay, "reason": reason, "unless": unless}
