"""A trainer's side of secure aggregation over Flower: what it sends is masked, and the protocol is answered here.

It stands between the client and its mailbox, in the compute thread, so that the stream to the server has one order.
What the server asks for while the client trains is answered when it asks for its next message.
"""

from __future__ import annotations

from types import TracebackType

from parablock.engine.flower.mailbox import TrainerMailbox
from parablock.engine.pipeline import Interceptor
from parablock.wire.transport import Parcel


class MaskedMailbox:
    """A mailbox that runs already, whose updates leave masked by the client's secrets, `courier`."""

    def __init__(self, mailbox: TrainerMailbox, courier: Interceptor) -> None:
        self._mailbox, self._courier = mailbox, courier

    def __enter__(self) -> MaskedMailbox:
        self._send(self._courier.opening())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Leave the mailbox as it is: whoever has entered it leaves it."""

    def send(self, message: bytes, round_index: int) -> None:
        """Have an update ready, as soon as there are the keys to mask it with."""
        self._send(self._courier.outgoing(Parcel(message, round_index)))

    def receive(self) -> bytes:
        """Wait for the next message that is not of the protocol."""
        while (answers := self._courier.incoming(Parcel(message := self._mailbox.receive(), 0))) is not None:
            self._send(answers)
        return message

    def _send(self, parcels: list[Parcel]) -> None:
        for parcel in parcels:
            self._mailbox.send(parcel.message, parcel.round_index)
