"""What a server has on record of a client, in few bytes for many rounds; the client compares its ledger with it.

A bit a round says of which rounds there is something. Where the client's own line of a round is known too (the hash
of its update, or the set of a sum that it gave shares for), another bit says so, and a sum over each `SPAN` rounds
holds what these lines are. 100,000 rounds take 75 kB, and a line more takes no longer than the first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any

from pydantic import ConfigDict, Field

SPAN, SUM_BYTES = 32, 4
"""Rounds that have a sum of their own, and its length."""
MOST_ROUNDS = 1 << 19
"""Rounds that are compared; of later ones it is the last alone."""
_Hex = Annotated[str, Field(max_length=MOST_ROUNDS // 4, pattern=r"^([0-9a-f]{2})*$")]


@dataclass(frozen=True)
class History:
    """A client's history, as the server has it.

    Attributes:
        last: The last round of which there is something; −1: of none.
        rounds: Bit t, least first, of these bytes: whether there is something of round t.
        known: Bit t: whether the client's line of round t is known.
        sums: `SUM_BYTES` for each `SPAN` rounds, of the lines that are known.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    last: Annotated[int, Field(ge=-1, lt=1 << 63)] = -1
    rounds: _Hex = ""
    known: _Hex = ""
    sums: _Hex = ""

    def lacking(self, own: Collection[int], after: int) -> list[int]:
        """Return the rounds after one of which there is something here, and which are not among a ledger's own."""
        return [t for t in sorted({*_bits(self.rounds), self.last}) if t > after and t not in own]

    def differing(self, lines: Mapping[int, Mapping[str, Any]], after: int) -> list[tuple[int, int]]:
        """Return the spans of rounds, first and last, in which a client's own lines are not those here.

        A line after round `after` that is known here and is not there differs, whatever the sum. Sums of spans that
        begin at that round or before are not compared.
        """
        own, missing = HistoryIndex(), set[int]()
        for t in _bits(self.known):
            if t in lines:
                own.add_line(t, lines[t])
            elif t > after:
                missing.add(t // SPAN * SPAN)
        size = 2 * SUM_BYTES
        length = max(len(self.sums), len(own.history.sums))
        here, there = self.sums.ljust(length, "0"), own.history.sums.ljust(length, "0")
        spans = (k // size * SPAN for k in range(0, length, size) if here[k : k + size] != there[k : k + size])
        return [(first, first + SPAN - 1) for first in sorted(missing.union(s for s in spans if s > after))]


class HistoryIndex:
    """The history of one client as it grows: of each round the first line is taken in, in any order of rounds."""

    def __init__(self) -> None:
        self._last, self._rounds, self._known, self._sums = -1, bytearray(), bytearray(), bytearray()

    def add_round(self, t: int) -> None:
        """Note that there is something of a round."""
        self._last = max(self._last, t)
        _set(self._rounds, t)

    def add_line(self, t: int, line: Mapping[str, Any]) -> None:
        """Note a line of the client's own ledger, without its kind and round."""
        if not _set(self._known, t):
            return
        first = t // SPAN * SUM_BYTES
        self._sums.extend(bytes(max(0, first + SUM_BYTES - len(self._sums))))
        text = f"{t} {json.dumps(line, sort_keys=True)}"
        number = int.from_bytes(self._sums[first : first + SUM_BYTES], "little")
        number += int.from_bytes(sha256(text.encode()).digest()[:SUM_BYTES], "little")
        self._sums[first : first + SUM_BYTES] = (number % (1 << 8 * SUM_BYTES)).to_bytes(SUM_BYTES, "little")

    @property
    def history(self) -> History:
        """What a client gets to compare with."""
        return History(self._last, self._rounds.hex(), self._known.hex(), self._sums.hex())


def _set(bits: bytearray, t: int) -> bool:
    """Set the bit of a round, if it is one that is compared; return whether it was not set before."""
    if not 0 <= t < MOST_ROUNDS:
        return False
    bits.extend(bytes(max(0, t // 8 + 1 - len(bits))))
    is_new = not bits[t // 8] >> t % 8 & 1
    bits[t // 8] |= 1 << t % 8
    return is_new


def _bits(bits: str) -> Iterator[int]:
    """Yield the rounds whose bits are set."""
    return (8 * k + bit for k, byte in enumerate(bytes.fromhex(bits)) for bit in range(8) if byte >> bit & 1)
