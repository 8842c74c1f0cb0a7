"""What a server follows: the configuration of a run as the engine needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from parablock.algorithm.aggregate import ServerOptimizer
from parablock.algorithm.fixed_point import EXTRA_WORDS, FixedPointAggregation, FixedPointGrid
from parablock.algorithm.robust import Normals, RoundAggregation, Rule
from parablock.algorithm.schedule import client_in_turn, cohort
from parablock.algorithm.stacking import Factors, StackAggregation
from parablock.engine.local_steps import LocalSteps
from parablock.wire.quantize import Encoding


@dataclass(frozen=True)
class ServerPlan:
    """What the server follows; names as in the configuration.

    Attributes:
        rule: How a round's updates become one.
        in_turn: One client a round, as FedCyBGD has it, in place of a drawn cohort.
        aggregation_s: Simulated seconds of folding a chunk; None: as measured.
        min_updates: Fewest updates that a commit needs.
        deadline_factor: A round waits so many times the median answer time; None: for all.
        waits_for_return: Whether clients that are gone may come back from outside; then a round that lacks
            updates waits for them, however long.
        normals: (round_index, clients) → the noise that the rule adds; None: it adds none.
        grid: Updates travel on this grid; None: in the wire's format.
        factors: Updates are adapters, which are stacked; None: they are differences, of which a mean is made.
        folder: Where updates of open rounds are kept that memory is not to hold; None: with temporary files.
    """

    num_clients: int
    num_rounds: int
    delay: int
    schedule: str
    participation: float
    seed: int
    encoding: Encoding
    local_steps: LocalSteps
    stall_timeout_s: float
    checkpoint_every: int
    server_optimizer: ServerOptimizer = field(default_factory=ServerOptimizer)
    aggregation_s: float | None = None
    rule: Rule = field(default_factory=Rule)
    in_turn: bool = False
    min_updates: int = 1
    deadline_factor: float | None = None
    waits_for_return: bool = False
    normals: Callable[[int, tuple[int, ...]], Normals] | None = None
    grid: FixedPointGrid | None = None
    factors: Factors | None = None
    folder: Path | None = None

    def aggregation_of(self, round_index: int) -> RoundAggregation:
        """Give what makes one of a round's updates."""
        normals = self.normals and partial(self.normals, round_index)
        if self.grid is not None:
            return FixedPointAggregation(self.grid, self.rule, normals)
        if self.factors is not None:
            return StackAggregation(self.factors)
        return RoundAggregation(self.rule, normals)

    def cuts(self, num_parameters: int) -> list[slice]:
        """Cut an update into the chunks that it travels in; on the grid it is one, with what it says beside Δ."""
        if self.grid is not None:
            return [slice(0, num_parameters + EXTRA_WORDS)]
        return self.encoding.cut(self.sent_elements(num_parameters))

    def sent_elements(self, num_parameters: int) -> int:
        """Tell how many elements an update of a block has."""
        return num_parameters if self.factors is None else self.factors.num_elements

    def local_steps_for(self, step_s: Mapping[int, float], num_parameters: int) -> tuple[int, ...]:
        """Choose K for a block of so many parameters; see `LocalSteps.of_round`."""
        size = self.sent_elements(num_parameters)
        payload_bytes, streamed = self.encoding.payload_bytes(size), len(self.encoding.cut(size)) > 1
        return self.local_steps.of_round(step_s, self.num_clients, payload_bytes, streamed=streamed)

    def cohort_of(self, round_index: int, history: Sequence[int], num_blocks: int) -> tuple[int, ...]:
        """Give who is drawn for a round; where clients take turns, nobody before the round's block is known."""
        if self.in_turn and round_index >= len(history):
            return ()
        if self.in_turn:
            return (client_in_turn(history, round_index, num_clients=self.num_clients, num_blocks=num_blocks),)
        return cohort(round_index, num_clients=self.num_clients, participation=self.participation, seed=self.seed)
