"""How many local steps a round has: a fixed number, or as many as fill the wait for the link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from parablock.wire.link import Link


class LocalSteps(Protocol):
    """Chooses K at the start of a round, from what has been committed."""

    def of_round(self, step_s: Mapping[int, float], payload_bytes: int, *, streamed: bool) -> int:
        """Choose K.

        Args:
            step_s: For each client the seconds of a local step, as last measured; empty at the start.
            payload_bytes: Of the round's block, one way.
            streamed: Whether both directions of the exchange run at the same time.
        """


@dataclass(frozen=True)
class FixedSteps:
    """The same K in every round."""

    num_local_steps: int

    def of_round(self, step_s: Mapping[int, float], payload_bytes: int, *, streamed: bool) -> int:
        """Give K."""
        del step_s, payload_bytes, streamed
        return self.num_local_steps


@dataclass(frozen=True)
class FillTheWait:
    """The smallest K with which the fastest client computes for as long as an exchange takes.

    Attributes:
        link: Every client's link.
        least: Lower bound of K, and K until a step has been measured.
        most: Upper bound of K.
    """

    link: Link
    least: int
    most: int

    def of_round(self, step_s: Mapping[int, float], payload_bytes: int, *, streamed: bool) -> int:
        """Choose K from the fastest client's step and the link."""
        if not step_s or min(step_s.values()) <= 0:
            return self.least
        waiting_s = exchange_s(self.link, payload_bytes, streamed=streamed)
        return min(self.most, max(self.least, ceil(waiting_s / min(step_s.values()))))


def exchange_s(link: Link, payload_bytes: int, *, streamed: bool) -> float:
    """Tell how long a block takes up and down, each of so many bytes.

    Args:
        link: The client's link.
        payload_bytes: One way.
        streamed: Whether both directions run at the same time.
    """
    up_s, down_s = link.upload_s(payload_bytes), link.download_s(payload_bytes)
    return max(up_s, down_s) if streamed else up_s + down_s
