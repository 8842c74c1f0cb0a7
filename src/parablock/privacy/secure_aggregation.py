"""Secure aggregation of a run: its cohorts, and the sides of client and server for them."""

from __future__ import annotations

from dataclasses import dataclass

from parablock.algorithm.schedule import cohort
from parablock.privacy.masked_client import MaskedClient
from parablock.privacy.masked_server import MaskedServer
from parablock.privacy.masking import Cohorts
from parablock.wire.transport import ServerTransport


@dataclass(frozen=True)
class SecureAggregation:
    """Secure aggregation as server and clients must agree on it; names as in the configuration."""

    num_clients: int
    num_rounds: int
    participation: float
    seed: int
    stall_timeout_s: float

    def client_side(self, client_id: int, first_round: int) -> MaskedClient:
        """Make a client's side, with fresh secrets."""
        return MaskedClient(client_id, self._cohorts(first_round))

    def server_side(self, inner: ServerTransport, first_round: int) -> MaskedServer:
        """Make the server's side, around a transport."""
        return MaskedServer(inner, self._cohorts(first_round), stall_timeout_s=self.stall_timeout_s)

    def _cohorts(self, first_round: int) -> Cohorts:
        return Cohorts(
            self.num_clients,
            {
                t: cohort(t, num_clients=self.num_clients, participation=self.participation, seed=self.seed)
                for t in range(first_round, self.num_rounds)
            },
        )
