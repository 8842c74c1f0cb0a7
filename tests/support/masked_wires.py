"""Secure aggregation in one thread: the couriers of all clients and the server's collector, joined by lists."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from parablock.clock import RealClock
from parablock.errors import StallError
from parablock.privacy.identities import Identity
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.masking import Cohorts
from parablock.storage.release_ledger import ReleaseLedger
from parablock.wire.sealing import Reveal, pack_bytes
from parablock.wire.transport import Parcel


class MaskedWires:
    """Everybody in one thread: what the server waits for is what the couriers have answered by then.

    `identities` and `contexts` are those of the clients, and the server's.

    Attributes:
        silent: The clients that no message reaches any more.
        seen: What the server has taken.
        sent: What it has sent.
        told: What the couriers have refused.
        refused: What the server has refused: client, reason, words.
        to_compute: What the couriers have handed on to the compute threads.
        wire_bytes: Of all messages, up and down.
    """

    def __init__(
        self,
        num_clients: int,
        cohorts: dict[int, tuple[int, ...]],
        *,
        identities: Sequence[Identity | None] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> None:
        known = Cohorts(num_clients, cohorts)
        self.told: list[str] = []
        signing, said = identities or [None] * (num_clients + 1), contexts or [""] * (num_clients + 1)
        self.couriers = [
            MaskedClient(i, known, ReleaseLedger(), identity=signing[i], context=said[i], tell=self.told.append)
            for i in range(num_clients)
        ]
        self.refused: list[tuple[int, str, str]] = []
        self.silent: set[int] = set()
        self.seen: list[bytes] = []
        self.sent: list[bytes] = []
        self.to_compute: list[bytes] = []
        self.wire_bytes = 0
        self._up = deque[tuple[int, bytes]]()
        self.collector = MaskedServer(
            self,
            known,
            ReleaseLedger(),
            RealClock(),
            stall_timeout_s=1.0,
            most_kept_bytes=1 << 20,
            identity=signing[-1],
            context=said[-1],
        )
        self.collector.on_refusal = lambda *refusal: self.refused.append(refusal)
        for client_id, courier in enumerate(self.couriers):
            self._take(client_id, courier.opening())

    def upload(self, client_id: int, message: bytes, round_index: int = 0) -> None:
        self._take(client_id, self.couriers[client_id].outgoing(Parcel(message, round_index)))

    def asking(self, round_index: int, clients: tuple[int, ...]) -> Reveal:
        """Return what a server asks that wants a sum, with what these clients have said of their partners."""
        said = [self.couriers[i]._partners.get(round_index) for i in clients if i < len(self.couriers)]
        left_out = tuple(each.left_out if each else () for each in said)
        return Reveal(round_index, clients, left_out, (0,) * len(said), pack_bytes(b""))

    def send(self, client_id: int, parcel: Parcel) -> None:
        self.wire_bytes += len(parcel.message)
        self.sent.append(parcel.message)
        if client_id in self.silent:
            return
        answers = self.couriers[client_id].incoming(parcel)
        if answers is None:
            self.to_compute.append(parcel.message)
        else:
            self._take(client_id, answers)

    def receive(self, timeout_s: float, waiting_for: str, *_: object) -> tuple[int, bytes]:
        if not self._up:
            raise StallError(waiting_for)
        client_id, raw = self._up.popleft()
        self.seen.append(raw)
        return client_id, raw

    def receive_until(self, *_: object) -> tuple[int, bytes] | None:
        return self.receive(0.0, "") if self._up else None

    def _take(self, client_id: int, parcels: Sequence[Parcel]) -> None:
        self.wire_bytes += sum(len(parcel.message) for parcel in parcels)
        self._up.extend((client_id, parcel.message) for parcel in parcels)
