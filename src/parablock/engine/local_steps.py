"""The number of local steps of a round: fixed, or as many as fill the wait for the link and the slowest client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Protocol

from parablock.config.keys import RunConfig
from parablock.wire.transport import Link

ROUNDING = 1e-9
"""Tolerance, in steps, for quotients that rounding puts below a whole number."""


class LocalSteps(Protocol):
    """Chooses K at the start of a round."""

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Return K for each client, or one number for all.

        Args:
            step_s: Seconds of a local step, as last measured, of each client that can be asked.
            num_clients: Number of clients of the run.
            payload_bytes: Bytes of the round's block, one way.
            streamed: Whether both directions of the exchange run at the same time.
        """


@dataclass(frozen=True)
class FixedSteps:
    """The same K for all clients in every round."""

    num_local_steps: int

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Return K."""
        del step_s, num_clients, payload_bytes, streamed
        return (self.num_local_steps,)


@dataclass(frozen=True)
class FillTheWait:
    """As many steps for each client as fit into the round.

    A round lasts until every client has computed for as long as an exchange takes; a slow client may need longer
    for its last step, or for `least` steps. A faster one takes as many steps as fit into that time.

    Attributes:
        link: Every client's link.
        least: Lower bound of K, and the K of clients that have not been measured.
        most: Upper bound of K.
        alike: Whether all clients take the K with which the fastest computes for as long as an exchange takes.
    """

    link: Link
    least: int
    most: int
    alike: bool = field(default=False, kw_only=True)

    def of_round(
        self, step_s: Mapping[int, float], num_clients: int, payload_bytes: int, *, streamed: bool
    ) -> tuple[int, ...]:
        """Return K from each client's step time and the link."""
        if not step_s or min(step_s.values()) <= 0:
            return (self.least,)
        waiting_s = exchange_s(self.link, payload_bytes, streamed=streamed)
        covering = {i: ceil(self._bounded(waiting_s / each_s)) for i, each_s in step_s.items()}
        if self.alike:
            return (max(covering.values()),)
        round_s = max(covering[i] * each_s for i, each_s in step_s.items())
        filling = {i: floor(self._bounded(round_s / each_s + ROUNDING)) for i, each_s in step_s.items()}
        return tuple(filling.get(client_id, self.least) for client_id in range(num_clients))

    def _bounded(self, steps: float) -> float:  # before it is rounded: a site may say that a step takes no time
        return min(self.most, max(self.least, steps))


def local_steps_of(config: RunConfig) -> LocalSteps:
    """Return the rule of a configuration; masked sums and stacks cannot weigh clients, so there K is alike."""
    train = config.train
    if train.num_local_steps != "auto":
        return FixedSteps(train.num_local_steps)
    alike = config.privacy.secure_aggregation != "none" or config.federation.traits.combines == "stack"
    link = Link(**config.link.model_dump())
    return FillTheWait(link, train.min_local_steps, train.max_local_steps, alike=alike)


def exchange_s(link: Link, payload_bytes: int, *, streamed: bool) -> float:
    """Return the seconds of a block's exchange, with `payload_bytes` each way, at the same time if streamed."""
    up_s, down_s = link.upload_s(payload_bytes), link.download_s(payload_bytes)
    return max(up_s, down_s) if streamed else up_s + down_s
