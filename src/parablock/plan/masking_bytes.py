"""Messages of secure aggregation: their bytes, for timing and traffic.

`wire.sealing` says which there are. Clients are taken to have no certificates, as in one process; with them each
signature takes some hundred bytes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from parablock.algorithm.schedule import cohort
from parablock.config.keys import RunConfig
from parablock.errors import ConfigError
from parablock.experiment.protections import check_privacy_extra
from parablock.privacy.protection import threshold_of
from parablock.wire import sealing
from parablock.wire.messages import to_bytes
from parablock.wire.quantize import Vector


@dataclass(frozen=True)
class KeyExchange:
    """Bytes of the four messages of a client before the first round, in order: up, down, up, down."""

    advertise: int
    roster: int
    shares: int
    letters: int


@dataclass(frozen=True)
class MaskingBytes:
    """Bytes of the messages by which clients and server agree on masks.

    Attributes:
        openings: Those of each client before the first round.
    """

    openings: tuple[KeyExchange, ...]

    @property
    def partners(self) -> int:
        """What goes up before each update."""
        return _bytes_of(sealing.Partners(99, 9, (), _hollow(0)))

    def reveal(self, drawn: Sequence[int]) -> int:
        """The question that goes down to each client of a cohort when all its updates have come."""
        nothing = _hollow(0)
        return _bytes_of(sealing.Reveal(99, tuple(drawn), ((),) * len(drawn), (0,) * len(drawn), nothing))

    def revealed(self, drawn: Sequence[int]) -> int:
        """The answer, which goes up."""
        from parablock.privacy.masking import SHARE_BYTES

        return _bytes_of(sealing.Revealed(99, 9, _hollow(0)), SHARE_BYTES * len(drawn))

    @staticmethod
    def enough(drawn: Sequence[int]) -> int:
        """The answers of a cohort that the server waits for."""
        return threshold_of(len(drawn))


def masking_of(config: RunConfig) -> MaskingBytes | None:
    """Return the messages of a run; None without masks, or where the extra `privacy` is not installed."""
    if config.privacy.secure_aggregation != "masked":
        return None
    try:
        check_privacy_extra(config)
    except ConfigError:
        return None
    from parablock.privacy.keystream import KEY_BYTES
    from parablock.privacy.masked_server import TAG_BYTES
    from parablock.privacy.masking import COMMITMENT_BYTES, SHARE_BYTES

    federation = config.federation
    n, participation, seed = federation.num_clients, federation.participation, config.seed
    rounds, met = [0] * n, [0] * n  # of each client: its rounds, and the others whom it meets in them
    for t in range(federation.num_rounds):
        drawn = cohort(t, num_clients=n, participation=participation, seed=seed)
        for i in drawn:
            rounds[i] += 1
            met[i] += len(drawn) - 1
    key_bytes = tuple(KEY_BYTES * (1 + each) for each in rounds)
    nothing = _hollow(0)
    roster = _bytes_of(sealing.Roster(tuple(range(n)), key_bytes, (0,) * n, nothing, nothing), sum(key_bytes))

    @cache
    def opening(own_rounds: int, others: int) -> KeyExchange:
        letters = 2 * SHARE_BYTES * others + TAG_BYTES * (n - 1)
        each = (letters // (n - 1),) * (n - 1)
        shares, sent = sealing.Shares(9, each, nothing, nothing), 3 * own_rounds + 2 * others
        to_it = sealing.Letters(tuple(range(n - 1)), each, nothing, nothing)
        return KeyExchange(
            _bytes_of(sealing.Advertise(9, nothing, nothing), KEY_BYTES * (1 + own_rounds)),
            roster,
            _bytes_of(shares, letters + COMMITMENT_BYTES * sent),
            _bytes_of(to_it, letters + COMMITMENT_BYTES * 2 * others),
        )

    return MaskingBytes(tuple(opening(*each) for each in zip(rounds, met, strict=True)))


def _hollow(num_bytes: int) -> Vector:
    return Vector("bytes", num_bytes, torch.empty(0, dtype=torch.uint8))


def _bytes_of(message: sealing.Sealing, payload: int = 0) -> int:
    """Return the bytes of a message, whose one vector with content has this length."""
    return len(to_bytes(message)) + payload + len(str(payload)) - 1
