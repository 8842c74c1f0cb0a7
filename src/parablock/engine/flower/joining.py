"""A site's end of a run in a Flower federation: it takes an invitation, and answers when it has no more to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from parablock.engine.flower.run_certificate import NAME
from parablock.engine.remote.site_channel import ServerEnd

INVITATION, ANSWER = "join", "left"
"""The names of both records; Flower's type of an invitation is `train.join`."""

OVER, REFUSED, UNREACHABLE, FAILED, SIMULATED = "over", "refused", "unreachable", "failed", "simulated"
"""What a site answers. Its own words of a failure stay in its log."""


@dataclass(frozen=True)
class Invitation:
    """What a node is told.

    Attributes:
        port: Where the server listens for sites.
        certificate: The server's, PEM; there is no other that counts.
        token: Lets this node in; a secret.
        epoch: The number of the invitation.
    """

    port: int
    certificate: str
    token: str = field(repr=False)
    epoch: int

    def server(self, client_id: int, host: str) -> ServerEnd:
        """Return how a client reaches the server at a host."""
        pem, address = self.certificate.encode(), f"[{host}]" if ":" in host else host
        return ServerEnd(
            f"{address}:{self.port}",
            lambda: grpc.ssl_channel_credentials(root_certificates=pem),
            token=f"{client_id}:{self.token}",
            options=(("grpc.ssl_target_name_override", NAME),),
        )


def client_app(join: Callable[[Invitation, Context], str]) -> ClientApp:
    """Make the ClientApp that calls `join` for an invitation, and answers with its word."""
    app = ClientApp()

    @app.train(INVITATION)
    def take(message: Message, context: Context) -> Message:
        told = message.content[INVITATION]
        invitation = Invitation(
            int(str(told["port"])), str(told["certificate"]), str(told["token"]), int(str(told["epoch"]))
        )
        why = join(invitation, context)
        return Message(RecordDict({ANSWER: ConfigRecord({"why": why})}), reply_to=message)

    return app
