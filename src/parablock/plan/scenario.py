"""A configured run whose link, delay, block size and wire format can be varied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from statistics import fmean

from transformers import PreTrainedModel

from parablock.algorithm.parablock import steps_of
from parablock.config.keys import RunConfig
from parablock.config.methods import cohort_size
from parablock.engine.local_steps import local_steps_of
from parablock.experiment.engines import encoding_of
from parablock.experiment.fit_blocks import estimated_compute, fit_blocks, flops_of, never_visited
from parablock.methods.trained_blocks import layer_blocks, trained_blocks
from parablock.model.adapters import matrices_block
from parablock.model.blocks import Block
from parablock.model.positions import check_length
from parablock.model.pretrained import outline_model
from parablock.plan.itinerary import Itinerary, walk
from parablock.plan.masking_bytes import masking_of
from parablock.plan.probe import probed_compute
from parablock.plan.timing import Timing, time_rounds
from parablock.plan.traffic import Sizes, Stacked
from parablock.wire.quantize import payload_format
from parablock.wire.transport import Link


class Scenario:
    """A configured run whose link, delay, block size and wire format can be varied.

    Args:
        config: The run.
        probe: Whether to measure the computation on this machine.
        outline: The model without values, and without adapters, where it was read before.
        outline_for: Returns the model without values that has, or gets, the adapters of a section `lora`.

    Attributes:
        config: The configuration, with a number for `blocks.layers_per_block`.
        outline: The model without values, and without adapters.
        notes: Choices that the configuration leaves to the plan, in words.
        blocks: The blocks that the method trains and sends; all parameters or all adapters count as one block.
        local_steps: K of each client, or one K for all; with `auto`, the choice for a block of mean size, once
            the speed of every client is known.
        num_local_steps: The smallest K, that of the slowest client.
        stacked: The sizes of a method that stacks updates; None for the others.
        walk: (number of blocks, delay) → itinerary.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        probe: bool,
        outline: PreTrainedModel | None = None,
        outline_for: Callable[[str], PreTrainedModel] | None = None,
    ) -> None:
        outlined = partial(outline_model, config.model.name_or_path, dtype=config.model.dtype)
        self.outline = outline or outlined()
        asked, self.config = config.blocks.layers_per_block, fit_blocks(config, self.outline)
        config = self.config
        assert isinstance(config.blocks.layers_per_block, int)
        self.layers_per_block = config.blocks.layers_per_block
        self.notes = check_length(self.outline, config.data.max_length)
        if asked == "auto":
            self.notes.append(f"blocks.layers_per_block: auto is {self.layers_per_block} here")
        method = config.federation.traits
        own = self.outline  # methods of adapters put them into the model
        if method.trains == "adapters":
            own = outline_for(repr(config.lora)) if outline_for else outlined()
        self.blocks: tuple[Block, ...] = trained_blocks(own, config)
        self._dtype = str(own.get_parameter(self.blocks[0].parameter_names[0]).dtype).removeprefix("torch.")
        self.stacked: Stacked | None = None
        if method.combines == "stack":
            matrices = matrices_block(own, layers_path=config.blocks.layers_path)
            size = cohort_size(config.federation.model_dump())
            self.stacked = Stacked(matrices.num_parameters, size)
        self._masking = masking_of(config)
        self.flops = flops_of(config, own)
        self.compute = probed_compute(config) if probe else estimated_compute(config, self.flops)
        self.link = Link(**config.link.model_dump())
        self.local_steps = self._local_steps()
        self.num_local_steps = min(self.local_steps)
        if config.train.num_local_steps == "auto":
            least, most = config.train.min_local_steps, max(self.local_steps)
            range_ = f"{self.num_local_steps} to {most}" if most > self.num_local_steps else f"{most}"
            self.notes.append(
                f"train.num_local_steps: auto is {range_} here, and {least} until a client's first update has come"
            )
        self.walk = cache(partial(walk, config))

    def partition(self, layers_per_block: int) -> tuple[Block, ...]:
        """Cut the model as the block methods do."""
        return layer_blocks(self.outline, self.config, layers_per_block)

    def never_visited(self, blocks: tuple[Block, ...]) -> tuple[int, ...]:
        """List the blocks that the configured rounds would not train."""
        return never_visited(self.config, len(blocks))

    def sizes(self, blocks: tuple[Block, ...], wire_format: str) -> Sizes:
        """Return the bytes of all messages."""
        own = blocks is self.blocks
        return Sizes(
            [block.num_parameters for block in blocks],
            dtype=self._dtype if own and self.stacked is None else self.config.model.dtype,
            wire_format=payload_format(wire_format, self.config.wire.density),
            chunk_bytes=encoding_of(self.config).chunk_bytes,
            stacked=self.stacked if own else None,
            masking=self._masking,
        )

    def time(
        self, blocks: tuple[Block, ...], *, wire_format: str, link: Link, delay: int, settled: bool = False
    ) -> Timing:
        """Return the times of the rounds; `settled`: as if the speed of every client were known from the first."""
        itinerary = self.walk(len(blocks), delay)
        chosen = [self.local_steps] * len(itinerary.blocks)
        if self.config.train.num_local_steps == "auto" and not settled:
            chosen = self._chosen_steps(blocks, itinerary, delay)

        def compute_s(b: int, round_index: int, client_id: int) -> float:
            steps = steps_of(chosen[round_index], client_id)
            return self.compute.round_s(blocks[b], round_index, client_id, steps)

        return time_rounds(itinerary, self.sizes(blocks, wire_format), compute_s, link, delay=delay)

    def _chosen_steps(self, blocks: tuple[Block, ...], itinerary: Itinerary, delay: int) -> list[tuple[int, ...]]:
        """Return K of each round as the server chooses it, from the updates that it has committed by then."""
        chosen: list[tuple[int, ...]] = []
        step_s: dict[int, float] = {}
        for t, asked in enumerate(itinerary.news):
            if (s := t - 1 - delay) >= 0:
                b, steps = itinerary.blocks[s], {i: steps_of(chosen[s], i) for i in itinerary.news[s]}
                step_s |= {i: self.compute.round_s(blocks[b], s, i, k) / k for i, k in steps.items()}
            known = {i: step_s[i] for i in asked if i in step_s}
            chosen.append(self._steps_for(known, blocks[itinerary.blocks[t]].num_parameters))
        return chosen

    def _local_steps(self) -> tuple[int, ...]:
        step_s = {
            client_id: fmean(self.compute.round_s(block, 0, client_id, 1) for block in self.blocks)
            for client_id in range(self.config.federation.num_clients)
        }
        return self._steps_for(step_s, round(fmean(block.num_parameters for block in self.blocks)))

    def _steps_for(self, step_s: Mapping[int, float], num_elements: int) -> tuple[int, ...]:
        encoding, num_clients = encoding_of(self.config), self.config.federation.num_clients
        payload_bytes, streamed = encoding.payload_bytes(num_elements), len(encoding.cut(num_elements)) > 1
        return local_steps_of(self.config).of_round(step_s, num_clients, payload_bytes, streamed=streamed)
