"""Who sums with whom: the cohorts of the rounds to come, which server and clients know alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


def threshold_of(num_clients: int) -> int:
    """Tell how many clients of a cohort have to stay: all but a third."""
    return num_clients - num_clients // 3


@dataclass(frozen=True)
class Cohorts:
    """The rounds that secrets are made for.

    Attributes:
        num_clients: How many there are.
        of_round: For each round to come its cohort, ascending.
    """

    num_clients: int
    of_round: Mapping[int, tuple[int, ...]]

    def rounds_of(self, *clients: int) -> list[int]:
        """Give the rounds in which all of these clients are asked."""
        return [t for t, cohort in self.of_round.items() if set(clients) <= set(cohort)]

    def place_of(self, client_id: int, round_index: int) -> int:
        """Give a client's place among its keys for that round: key 0 is for letters."""
        return 1 + self.rounds_of(client_id).index(round_index)
