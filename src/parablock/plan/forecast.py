"""Predict a run from its configuration: partition, bytes, time, memory, advice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from transformers import PreTrainedModel

from parablock.config.keys import RunConfig
from parablock.config.methods import METHODS, cohort_size
from parablock.errors import ConfigError
from parablock.experiment.engines import encoding_of
from parablock.experiment.fit_blocks import (
    estimated_compute,
    size_for_visits,
)
from parablock.experiment.outlook import memory_here
from parablock.experiment.protections import check_privacy_extra, privacy_planned
from parablock.model.blocks import Block
from parablock.model.pretrained import outline_model
from parablock.plan.advice import Advice, Case, recommend, verdict
from parablock.plan.allowed import allowed_formats
from parablock.plan.alternatives import alternatives, equal_rank, recommended_method, why_no_delay
from parablock.plan.scenario import Scenario
from parablock.plan.traffic import total_bytes
from parablock.training.memory import WAYS, memory_per_client
from parablock.wire.quantize import payload_bytes
from parablock.wire.transport import Link

MAX_CLIENT_ROUNDS = 100_000
"""Rounds times clients that a plan follows one by one, several times over: about a quarter of a minute."""
SHOWN_MBPS = (4.0, 10.0, 30.0, 100.0)
ASSUMPTIONS = (
    "all clients have the same link; aggregation, evaluation and checkpoints take no time",
    "activations are estimated for the longest examples that data.max_length allows",
)


@dataclass(frozen=True)
class Plan:
    """The prediction of a run. Times are in seconds; those of a round are means over all rounds.

    Attributes:
        num_blocks: B; all parameters are one block with fedavg, and all adapters with LoRA.
        blocks: For each block: index, name, layers, parameters, and bytes of an update's payload.
        bytes_per_client_round: For each allowed wire format, up and down of one client in one round.
        total_bytes: All clients, whole run, in the configured format.
        compute_s: Computation of the slowest client.
        communication_s: Both directions of the client whose link is busy longest.
        round_s: A round of this run, with overlap.
        sequential_s: A round with computation and communication one after the other.
        exchange_s: Time from the end of a computation to its aggregate's arrival; it is hidden if it is at most
            `compute_s`.
        serial_s: A round with delay 0, in which chunks may go up and down at the same time.
        hours: The whole run without evaluation.
        memory_bytes: One client, for block training, LoRA and full fine-tuning.
        never_visited: Blocks that these rounds would not train.
        recommended: layers_per_block, num_local_steps, format.
        traffic: For each of these formats, uplink and downlink bytes of the whole run, all clients.
        links: At several speeds: exchange, round without and with overlap, and the time saved.
        learning_rate: Peak rate, as configured or the method's own.
        memory_parts: The parts of `memory_bytes`.
        process_memory_bytes: The run with all its clients in one process: `host` and `device`, which is 0 without a
            GPU; None for a run whose clients are at sites.
        compute_source: stated | assumed | probed.
        assumptions: The basis of the figures.
        methods: For each method and delay: method, delay, bytes_per_client_round, round_s, hours, memory_bytes, and
            the problem of one that these settings do not allow.
        equal_rank: The rank of adapters A and B that take the bytes of a round of this run, up and down.
        recommended_method: method, delay, and in words reason and unless.
        verdict: Whether overlap hides the communication, and what to change, in one sentence.
    """

    num_blocks: int
    blocks: list[dict[str, Any]]
    bytes_per_client_round: dict[str, int]
    total_bytes: int
    compute_s: float
    communication_s: float
    round_s: float
    sequential_s: float
    exchange_s: float
    serial_s: float
    hours: float
    learning_rate: float
    memory_bytes: dict[str, int]
    never_visited: list[int]
    recommended: dict[str, Any]
    traffic: dict[str, dict[str, int]]
    links: list[dict[str, float | None]]
    memory_parts: dict[str, dict[str, int]]
    process_memory_bytes: dict[str, int] | None
    compute_source: str
    assumptions: list[str]
    methods: list[dict[str, Any]]
    equal_rank: float
    recommended_method: dict[str, Any]
    verdict: str


def make_plan(config: RunConfig, *, probe: bool = False) -> Plan:
    """Predict a run from its configuration and the model's config.json.

    With `probe`, load the model and the data, and time real steps on this machine.

    Raises:
        InputError: The method cannot be planned, or an input of the run that is read is wrong.
    """
    if not config.federation.traits.gathers:  # the walk follows rounds in which a cohort sends
        names = ", ".join(name for name, method in METHODS.items() if method.gathers)
        raise ConfigError([f"federation.method: plans are made for {names}, not for {config.federation.method}"])
    rounds, clients = config.federation.num_rounds, config.federation.num_clients
    cohort = cohort_size(config.federation.model_dump())
    followed = rounds * cohort + clients
    if followed > MAX_CLIENT_ROUNDS:
        problem = (
            f"federation.num_rounds: {rounds} rounds of {clients} clients (federation.num_clients), {cohort} asked "
            f"in each, are with one more for the speed of each client {followed:,} rounds of a client, more than "
            f"{MAX_CLIENT_ROUNDS:,}, which a plan follows one by one; plan fewer rounds or clients, say with "
            "--set, and multiply: a round takes the same"
        )
        raise ConfigError([problem])

    @cache
    def outline_for(lora: str) -> PreTrainedModel:
        del lora
        return outline_model(config.model.name_or_path, dtype=config.model.dtype)

    make = partial(Scenario, outline_for=outline_for)
    scenario = make(config, probe=probe)
    config, blocks, delay = scenario.config, scenario.blocks, scenario.config.federation.delay
    wire_format = config.wire.format
    itinerary = scenario.walk(len(blocks), delay)
    formats = allowed_formats(config)
    traffic = {name: total_bytes(itinerary, scenario.sizes(blocks, name)) for name in formats}
    timing, serial = (
        scenario.time(blocks, wire_format=wire_format, link=scenario.link, delay=d) for d in (delay, 0)
    )
    settled, settled_serial = (
        scenario.time(blocks, wire_format=wire_format, link=scenario.link, delay=d, settled=True)
        for d in (delay, 0)
    )
    memory = memory_per_client(scenario.outline, scenario.partition(scenario.layers_per_block), config)
    is_local, of_a_client = config.engine.name == "inprocess", memory[WAYS[config.federation.traits.trains]]
    place = memory_here(scenario.outline, of_a_client, config) if is_local else None
    others = alternatives(scenario, partial(make, probe=False, outline=scenario.outline), _slower(scenario))
    no_delay = why_no_delay(others, config)
    advice = Advice(scenario.layers_per_block, scenario.num_local_steps, wire_format, hides=False)
    if not no_delay:
        advice = recommend(
            _cases(scenario, formats),
            num_local_steps=scenario.num_local_steps,
            max_local_steps=config.train.max_local_steps,
            wire_format=wire_format,
        )
    return Plan(
        num_blocks=len(blocks),
        blocks=[_describe(block, encoding_of(config).format) for block in blocks],
        bytes_per_client_round={name: each.bytes_per_client_round for name, each in traffic.items()},
        total_bytes=traffic[wire_format].uplink_bytes + traffic[wire_format].downlink_bytes,
        compute_s=timing.compute_s,
        communication_s=timing.communication_s,
        round_s=timing.round_s,
        sequential_s=timing.sequential_s,
        exchange_s=timing.exchange_s,
        serial_s=serial.round_s,
        hours=timing.wall_s / 3600,
        learning_rate=config.train.learning_rate,
        memory_bytes={name: each.total for name, each in memory.items()},
        never_visited=list(scenario.never_visited(blocks)),
        recommended={name: getattr(advice, name) for name in ("layers_per_block", "num_local_steps", "format")},
        traffic={
            name: {key: getattr(each, key) for key in ("uplink_bytes", "downlink_bytes")}
            for name, each in traffic.items()
        },
        links=_at_several_speeds(scenario, overlaps=not no_delay),
        memory_parts={name: dict(vars(each)) for name, each in memory.items()},
        process_memory_bytes=dict(vars(place)) if place else None,
        compute_source=scenario.compute.source,
        assumptions=[
            f"computation is {scenario.compute.assumption}",
            *ASSUMPTIONS,
            *scenario.notes,
            *_privacy(config),
        ],
        methods=[asdict(each) for each in others],
        equal_rank=equal_rank(scenario),
        recommended_method=recommended_method(others, config, scenario.flops.num_layers),
        verdict=verdict(
            *(config, settled, settled_serial, advice),
            num_local_steps=scenario.num_local_steps,
            no_delay=no_delay,
            lagging=[each.method for each in others if each.delay and not each.problem],
        ),
    )


def _privacy(config: RunConfig) -> list[str]:
    """Say how private the run will be, or what is needed to know it."""
    try:
        check_privacy_extra(config)
    except ConfigError as error:
        masked = config.privacy.secure_aggregation == "masked"
        uncounted = ["without it the messages that agree on masks are not counted"] if masked else []
        return [*error.problems, *uncounted]
    if not (planned := privacy_planned(config)):
        return []
    told = "after the last round, if every client that is drawn releases one update"
    return [f"ε is {planned['epsilon']:.3g} for δ = {planned['delta']:g} {told}"]


def _slower(scenario: Scenario) -> float:
    """Return the seconds of a step of this run over those without a probe."""
    block, estimated = scenario.blocks[0], estimated_compute(scenario.config, scenario.flops)
    return scenario.compute.round_s(block, 0, 0, 1) / estimated.round_s(block, 0, 0, 1)


def _describe(block: Block, wire_format: str) -> dict[str, Any]:
    return {
        "index": block.index,
        "name": block.name,
        "layers": list(block.layers),
        "parameters": block.num_parameters,
        "bytes": payload_bytes(block.num_parameters, wire_format),
    }


def _at_several_speeds(scenario: Scenario, *, overlaps: bool) -> list[dict[str, float | None]]:
    """Compare rounds with and without overlap, on the configured link if it has a speed, and on other links."""
    blocks, own = scenario.blocks, scenario.link
    speeds: list[tuple[float | None, float | None]] = [(mbps, mbps) for mbps in SHOWN_MBPS]
    if (own.upload_mbps, own.download_mbps) not in [(None, None), *speeds]:
        speeds.insert(0, (own.upload_mbps, own.download_mbps))
    overlapping = max(1, scenario.config.federation.delay) if overlaps else 0
    rows: list[dict[str, float | None]] = []
    for upload_mbps, download_mbps in speeds:
        link = Link(upload_mbps, download_mbps, own.latency_s)
        serial, overlapped = (
            scenario.time(blocks, wire_format=scenario.config.wire.format, link=link, delay=delay)
            for delay in (0, overlapping)
        )
        rows.append(
            {
                "upload_mbps": upload_mbps,
                "download_mbps": download_mbps,
                "exchange_s": overlapped.exchange_s,
                "serial_s": serial.round_s,
                "overlapped_s": overlapped.round_s,
                "saving": 1 - overlapped.round_s / serial.round_s,
            }
        )
    return rows


def _cases(scenario: Scenario, formats: Sequence[str]) -> Iterator[Case]:
    """Yield block sizes and their costs, from the configured size, or one that is visited often enough, down.

    A method without blocks has the costs of what it trains.
    """
    partitions = {size: scenario.partition(size) for size in range(1, scenario.flops.num_layers + 1)}
    start = max(scenario.layers_per_block, size_for_visits(scenario.config, partitions))
    delay = max(1, scenario.config.federation.delay)
    has_blocks = scenario.config.federation.traits.trains == "blocks"
    for size in range(start, 0, -1) if has_blocks else (scenario.layers_per_block,):
        blocks = partitions[size] if has_blocks else scenario.blocks
        if size != start and has_blocks and scenario.never_visited(blocks):
            return
        timings = {
            name: scenario.time(blocks, wire_format=name, link=scenario.link, delay=delay, settled=True)
            for name in formats
        }
        step_s = timings[formats[0]].compute_s / scenario.num_local_steps
        yield Case(size, step_s, {name: timing.cover_s for name, timing in timings.items()})
