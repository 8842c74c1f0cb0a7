"""What the server refuses of what clients send: counted by reason, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST_TOLD = 100  # refusals of a client


@dataclass(frozen=True)
class Refusal:
    """The refusal of an update: one word for counting, and the end of the sentence "client 3 sent …"."""

    reason: str
    text: str


class Refusals:
    """The refusals of a run.

    Args:
        before: Those before a resume.
        tell: Gets a line for each of them, as far as a client has no more than `MOST_TOLD`.

    Attributes:
        useless: Client → messages of it that moved no round, refused or not.
    """

    def __init__(self, before: Mapping[str, int], tell: Callable[[str], None]) -> None:
        self.counts, self._told, self.tell = Counter[str](before), Counter[int](), tell
        self.useless = Counter[int]()

    def count(self, client_id: int, refusal: Refusal) -> None:
        """Count a refusal, and tell of it."""
        self.counts[refusal.reason] += 1
        self._told[client_id] += 1
        self.useless[client_id] += 1
        if self._told[client_id] <= MOST_TOLD:
            self.tell(f"refused ({refusal.reason}): client {client_id} sent {refusal.text}")

    def of_masking(self, client_id: int, reason: str, text: str) -> None:
        """Count a refused message of secure aggregation; see `MaskedServer.on_refusal`."""
        self.count(client_id, Refusal(reason, text))
