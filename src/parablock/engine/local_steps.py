"""How many local steps a round has: a fixed number, or as many as fill the wait for the link and for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Protocol

from parablock.config.keys import RunConfig
from parablock.wire.transport import Link

ROUNDING = 1e-9
"""Of a step: what rounding may take from a quotient that is a whole number."""


class LocalSteps(Protocol):
    """Chooses K at the start of a round, from what has been committed."""

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Choose K.

        Args:
            step_s: For each client that can be asked the seconds of a local step, as last measured.
            num_clients: How many clients the run has.
            payload_bytes: Of the round's block, one way.
            streamed: Whether both directions of the exchange run at the same time.

        Returns:
            For each client, or one number for all.
        """


@dataclass(frozen=True)
class FixedSteps:
    """The same K for everybody in every round."""

    num_local_steps: int

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Give K."""
        del step_s, num_clients, payload_bytes, streamed
        return (self.num_local_steps,)


@dataclass(frozen=True)
class FillTheWait:
    """For each client the steps that it can take while the round lasts anyway.

    A round lasts until every client has computed for as long as an exchange takes; a slow one may need longer for
    its last step, or for `least` of them. Whoever is faster takes as many steps as fit into that time.

    Attributes:
        link: Every client's link.
        least: Lower bound of K, and K of a client until a step of its has been measured.
        most: Upper bound of K.
        alike: All take as many as the fastest needs to compute through an exchange.
    """

    link: Link
    least: int
    most: int
    alike: bool = field(default=False, kw_only=True)

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Choose K from each client's step and the link."""
        if not step_s or min(step_s.values()) <= 0:
            return (self.least,)
        waiting_s = exchange_s(self.link, payload_bytes, streamed=streamed)
        covering = {i: self._bounded(ceil(waiting_s / each_s)) for i, each_s in step_s.items()}
        if self.alike:
            return (max(covering.values()),)
        round_s = max(covering[i] * each_s for i, each_s in step_s.items())
        filling = {i: self._bounded(floor(round_s / each_s + ROUNDING)) for i, each_s in step_s.items()}
        return tuple(filling.get(client_id, self.least) for client_id in range(num_clients))

    def _bounded(self, steps: int) -> int:
        return min(self.most, max(self.least, steps))


def local_steps_of(config: RunConfig) -> LocalSteps:
    """Give the rule of a configuration.

    A masked sum cannot be evened out update by update, and a stack of adapters is no mean: there all clients take
    as many steps.
    """
    train = config.train
    if train.num_local_steps != "auto":
        return FixedSteps(train.num_local_steps)
    alike = config.privacy.secure_aggregation != "none" or config.federation.traits.combines == "stack"
    link = Link(**config.link.model_dump())
    return FillTheWait(link, train.min_local_steps, train.max_local_steps, alike=alike)


def exchange_s(link: Link, payload_bytes: int, *, streamed: bool) -> float:
    """Tell how long a block takes up and down, each of so many bytes.

    Args:
        link: The client's link.
        payload_bytes: One way.
        streamed: Whether both directions run at the same time.
    """
    up_s, down_s = link.upload_s(payload_bytes), link.download_s(payload_bytes)
    return max(up_s, down_s) if streamed else up_s + down_s
