"""Recommend settings that hide the communication under the computation.

With delay 1 an exchange is hidden if a round computes for at least as long. With delay 2 it may take two rounds, if
no direction of the link is busy for longer than one. Settings are tried in this order, the cheapest first, and the
first ones that hide the exchange are recommended:

1. the configured blocks and steps, and the wire format from the configured one down to int8, of those that the
   other settings allow;
2. the narrowest of these, and the fewest local steps up to `train.max_local_steps`;
3. the same with int4;
4. steps 1 to 3 with one decoder layer fewer in a block, down to one.

If the rounds would visit the configured blocks less often than `layers_per_block: auto` asks for, the search
starts with the blocks that it would choose for that. If nothing hides the exchange, the last settings tried are
recommended and the link stays the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from parablock.config.keys import RunConfig
from parablock.config.methods import with_delay
from parablock.plan.allowed import WIRE_FORMATS
from parablock.plan.timing import Timing
from parablock.report.units import format_duration
from parablock.wire.quantize import SPARSE, bytes_per_element

NARROWEST_BEFORE_STEPS = "int8"
"""The narrowest format to try before more local steps."""


@dataclass(frozen=True)
class Case:
    """A block size, its mean seconds of a local step, and allowed format → seconds that hide the exchange."""

    layers_per_block: int
    step_s: float
    cover_s: Mapping[str, float]


@dataclass(frozen=True)
class Advice:
    """Settings that hide the exchange, or come closest to hiding it."""

    layers_per_block: int
    num_local_steps: int
    format: str
    hides: bool


def recommend(cases: Iterable[Case], *, num_local_steps: int, max_local_steps: int, wire_format: str) -> Advice:
    """Apply the rule of this module to one or more block sizes, the preferred one first.

    The configured K is the fewest steps to recommend, the configured format the widest. `max_local_steps` is the
    most steps, unless more are configured.
    """
    most = max(num_local_steps, max_local_steps)
    for case in cases:
        allowed = [name for name in WIRE_FORMATS if name in case.cover_s and _width(name) > _width(wire_format)]
        narrower = [wire_format, *allowed]
        gentle = [name for name in narrower if _width(name) <= _width(NARROWEST_BEFORE_STEPS)]
        resorts = [name for name in narrower if _width(name) >= _width(NARROWEST_BEFORE_STEPS)] or [narrower[-1]]
        for name in gentle:
            if case.cover_s[name] <= num_local_steps * case.step_s:
                return Advice(case.layers_per_block, num_local_steps, name, hides=True)
        for name in resorts:
            steps = max(num_local_steps, ceil(case.cover_s[name] / case.step_s))
            if steps <= most:
                return Advice(case.layers_per_block, steps, name, hides=True)
        last = Advice(case.layers_per_block, most, resorts[-1], hides=False)
    return last


def verdict(
    config: RunConfig,
    timing: Timing,
    serial: Timing,
    advice: Advice,
    *,
    num_local_steps: int,
    no_delay: str = "",
    lagging: Sequence[str] = (),
) -> str:
    """Return one sentence: whether overlap hides the communication, and what to change.

    Args:
        config: The run.
        timing: Its times.
        serial: Those with delay 0.
        advice: What to recommend, where a delay is possible.
        num_local_steps: K, as configured or as the run chooses it.
        no_delay: The reason why the settings allow no delay; empty if they do.
        lagging: The methods that may have a delay with these settings.
    """
    link = config.link
    if link.upload_mbps is None and link.download_mbps is None and not link.latency_s:
        return (
            "No link speed is given, so communication takes no time here: "
            "give --upload-mbps and --download-mbps, or the section `link`."
        )
    exchange, compute = format_duration(timing.exchange_s), format_duration(timing.compute_s)
    facts = f"an exchange takes {exchange} and a round computes for {compute}"
    if no_delay:
        others = f"; methods that may have a delay with these settings: {', '.join(lagging)}" if lagging else ""
        return f"Nothing is hidden: {facts}, one after the other, and no delay is possible: {no_delay}{others}."
    changes = _changes(config, advice, num_local_steps)
    if config.federation.delay == 0:
        lags = config.federation.traits.may_lag
        method = [] if lags else [f"federation.method: {with_delay(config.federation.method)}"]
        aim = "to hide the exchange" if advice.hides else "to hide what can be hidden of the exchange"
        changes = [*method, "federation.delay: 1", *changes]
        return f"With delay 0 nothing is hidden: {facts}, one after the other; {aim} set {', '.join(changes)}."
    if timing.cover_s <= timing.compute_s:
        after, before = format_duration(timing.round_s), format_duration(serial.round_s)
        better = f"; to train each block more often set {', '.join(changes)}" if changes else ""
        return f"Overlap hides the communication: {facts}, so a round takes {after} instead of {before}{better}."
    if advice.hides:
        return (
            f"Overlap hides only a part of the communication: {facts}; to hide all of it set {', '.join(changes)}."
        )
    best = f"even with {', '.join(changes)} " if changes else ""
    return f"The link is the bottleneck: {facts}; {best}overlap hides only a part of it."


def _changes(config: RunConfig, advice: Advice, num_local_steps: int) -> list[str]:
    """List the recommended changes, as lines of a configuration."""
    pairs = [
        ("blocks.layers_per_block", config.blocks.layers_per_block, advice.layers_per_block),
        ("train.num_local_steps", num_local_steps, advice.num_local_steps),
        ("wire.format", config.wire.format, advice.format),
    ]
    return [f"{key}: {recommended}" for key, configured, recommended in pairs if configured != recommended]


def _width(wire_format: str) -> int:
    """Return how many of `WIRE_FORMATS` are wider."""
    if wire_format == SPARSE:
        return len(WIRE_FORMATS)
    return sum(bytes_per_element(name) > bytes_per_element(wire_format) for name in WIRE_FORMATS)
