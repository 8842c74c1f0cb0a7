"""Secure aggregation of a run: its cohorts, and the sides of client and server for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parablock.algorithm.schedule import cohort
from parablock.clock import Clock
from parablock.privacy.identities import Identity
from parablock.privacy.masked_client import Fixed, MaskedClient
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

    def client_side(
        self,
        client_id: int,
        first_round: int,
        revealed: Fixed,
        *,
        identity: Identity | None = None,
        context: str = "",
        tell: Callable[[str], None] = lambda _: None,
    ) -> MaskedClient:
        """Make a client's side, with fresh secrets; see `MaskedClient`."""
        cohorts = self._cohorts(first_round)
        return MaskedClient(client_id, cohorts, revealed, identity=identity, context=context, tell=tell)

    def server_side(
        self,
        inner: ServerTransport,
        first_round: int,
        fixed: Fixed,
        clock: Clock,
        *,
        most_kept_bytes: int,
        identity: Identity | None = None,
        context: str = "",
    ) -> MaskedServer:
        """Make the server's side, around a transport; see `MaskedServer`."""
        return MaskedServer(
            inner,
            self._cohorts(first_round),
            fixed,
            clock,
            stall_timeout_s=self.stall_timeout_s,
            most_kept_bytes=most_kept_bytes,
            identity=identity,
            context=context,
        )

    def _cohorts(self, first_round: int) -> Cohorts:
        return Cohorts(
            self.num_clients,
            {
                t: cohort(t, num_clients=self.num_clients, participation=self.participation, seed=self.seed)
                for t in range(first_round, self.num_rounds)
            },
        )
