"""What other methods would take on the same data, link and device, and which one to choose.

A plan knows bytes, seconds and memory, and not how much there is to learn. So the recommendation is a rule of thumb
from measured runs (docs/plan.md), with what would change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config, tree_of_method
from parablock.config.methods import METHODS
from parablock.errors import InputError
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

OF_A_FORMAT = ("wire.density", "wire.rounding", "wire.error_feedback", "wire.residual_decay")
"""Keys that go with a `wire.format`."""


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
    return [each for name in names for each in _with_each_delay(name, given.config, make, slower)]


def _with_each_delay(
    name: str, config: RunConfig, make: Callable[[RunConfig], Scenario], slower: float
) -> Iterator[Alternative]:
    delays = (0, 1) if METHODS[name].may_lag else (0,)
    try:
        scenario = make(parse_config(_tree(name, config), source=f"method {name}"))
    except InputError as error:
        problem = getattr(error, "problems", (error.what,))[0]
        yield from (Alternative(name, delay, problem=problem) for delay in delays)
        return
    blocks, wire_format = scenario.blocks, scenario.config.wire.format
    scenario.compute = _times(scenario.compute, slower)
    partition = scenario.partition(scenario.layers_per_block)
    for delay in delays:
        federation = scenario.config.federation.model_copy(update={"delay": delay})
        delayed = scenario.config.model_copy(update={"federation": federation})
        memory = memory_per_client(scenario.outline, partition, delayed)[WAYS[METHODS[name].trains]]
        timing = scenario.time(blocks, wire_format=wire_format, link=scenario.link, delay=delay)
        moved = total_bytes(scenario.walk(len(blocks), delay), scenario.sizes(blocks, wire_format))
        yield Alternative(
            name,
            delay,
            bytes_per_client_round=moved.bytes_per_client_round,
            round_s=timing.round_s,
            hours=timing.wall_s / 3600,
            memory_bytes=memory.total,
            never_visited=len(scenario.never_visited(blocks)),
        )


def _tree(name: str, config: RunConfig) -> dict[str, Any]:
    """Write the configuration for another method, without what the method refuses."""
    tree = tree_of_method(config, name, 1 if METHODS[name].may_lag else 0)
    refused = [*METHODS[name].refuses]
    for key in [*refused, *(OF_A_FORMAT if "wire.format" in refused else ())]:
        section, _, last = key.partition(".")
        tree.get(section, {}).pop(last, None)
    return tree


def _times(compute: Compute, factor: float) -> Compute:
    return Compute(partial(_longer, compute.round_s, factor), compute.source, compute.assumption)


def _longer(round_s: Callable[..., float], factor: float, *place: Any) -> float:
    return factor * round_s(*place)


def equal_rank(scenario: Scenario) -> float:
    """Return the rank of adapters A and B that have as many elements as what a round of this run sends."""
    elements = [block.num_parameters for block in scenario.blocks]
    return sum(elements) / len(elements) / adapter_elements(scenario.outline, scenario.config)


def recommended_method(found: Sequence[Alternative], config: RunConfig, num_layers: int) -> dict[str, Any]:
    """Choose a method and a delay; return them with `reason` and `unless`, in words."""
    usable = {(each.method, each.delay): each for each in found if not each.problem}
    both = [
        name for name, method in METHODS.items() if method.matrices and method.may_lag and method.trains_one_group
    ]
    name = next((name for name in both if (name, 0) in usable), None)
    if name is None:
        return {"method": config.federation.method, "delay": config.federation.delay, "reason": "", "unless": ""}
    serial, overlapped = usable[name, 0], usable[name, 1]
    saved = 1 - overlapped.round_s / serial.round_s
    if config.link.upload_mbps is None and config.link.download_mbps is None and not config.link.latency_s:
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
    unless = "there is more to learn than adapters hold: a new language or domain, much data, further pre-training"
    if blocks is not None and blocks.memory_bytes < MUCH_LESS * chosen.memory_bytes:
        unless += (
            f"; or memory is short ({lagging} takes {format_bytes(blocks.memory_bytes)}, {name} "
            f"{format_bytes(chosen.memory_bytes)})"
        )
    if blocks is not None:
        unless += f": then {lagging}, whose round takes {format_duration(blocks.round_s)}"
    return {"method": name, "delay": chosen.delay, "reason": reason, "unless": unless}
