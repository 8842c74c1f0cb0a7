"""Faults on purpose: what goes wrong, with whom and when, so that tests and users can see what a run survives.

| kind | at | what happens |
|---|---|---|
| delay | train, upload, download, commit | it takes `value` seconds longer |
| kill | train, upload, download, commit | its machine dies; after `value` seconds it is back (null: never) |
| drop | train | the client gives the round up before it trains |
| drop | upload | the link is cut in the middle for `value` seconds; null: the client gives the update up |
| drop | download | the link is cut in the middle for `value` seconds |
| corrupt | upload, download | a bit of a chunk flips on its way |
| nan, sign_flip, scale | train, upload | the update leaves the client as NaN, as −Δ, as `value` · Δ |

Each fault happens once. Faults of the way up and down are in `FaultyEnd`, between a client's communication
thread and its transport; the client asks for the others itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parablock.clock import Clock
from parablock.config.section import POISONS
from parablock.errors import CodecError, LinkError
from parablock.wire.codec import decode
from parablock.wire.messages import Skip, Update, from_bytes, to_bytes
from parablock.wire.quantize import pack
from parablock.wire.transport import MemoryTransport, Parcel


@dataclass(frozen=True)
class Fault:
    """One fault; see the module's table.

    Attributes:
        client_id: Whose.
        round_index: When.
        at: train | upload | download | commit.
        kind: A key of the table.
        value: Seconds, or the factor of `scale`; None where the kind says what that means.
    """

    client_id: int
    round_index: int
    at: str
    kind: str
    value: float | None = None


class Killed(Exception):  # noqa: N818  (it is no error: it is the machine's end)
    """The client's machine is gone.

    Args:
        back_s: When it comes back, on the run's clock; None: never.
    """

    def __init__(self, back_s: float | None) -> None:
        self.back_s = back_s
        super().__init__()


class Faults:
    """The faults of a run.

    Args:
        faults: What goes wrong.
        happened: Those that have happened already, before an interruption, by their place in `faults`.
    """

    def __init__(self, faults: Iterable[Fault] = (), *, happened: Iterable[int] = ()) -> None:
        self._faults = tuple(faults)
        self.happened = set(happened)

    def __bool__(self) -> bool:
        return bool(self._faults)

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind has happened."""
        return dict(Counter(self._faults[place].kind for place in sorted(self.happened)))

    def happened_before(self, round_index: int, committed: int) -> list[int]:
        """Give the faults that a run which goes on from a checkpoint does not meet again."""
        past = {"train": round_index - 1, "commit": round_index - 1}
        return [
            place
            for place in sorted(self.happened)
            if self._faults[place].round_index <= past.get(self._faults[place].at, committed)
        ]

    def are_left(self, client_id: int, round_index: int) -> bool:
        """Tell whether something is still to happen to a client in a round."""
        return any(
            (fault.client_id, fault.round_index) == (client_id, round_index) and place not in self.happened
            for place, fault in enumerate(self._faults)
        )

    def take(
        self,
        client_id: int,
        round_index: int,
        at: Sequence[str],
        kinds: Sequence[str],
        *,
        with_value: bool = False,
    ) -> Fault | None:
        """Let the next such fault happen, if there is one; `with_value`: only one that has a value."""
        for place, fault in enumerate(self._faults):
            if (
                place not in self.happened
                and (fault.client_id, fault.round_index) == (client_id, round_index)
                and fault.at in at
                and fault.kind in kinds
                and not (with_value and fault.value is None)
            ):
                self.happened.add(place)
                return fault
        return None

    def strike(self, client_id: int, round_index: int, at: str, clock: Clock) -> str:
        """Let the machine die, or wait, if it is to; give the kind of another fault that the caller has to do."""
        kind = ""
        while (fault := self.take(client_id, round_index, (at,), ("kill", "delay", "drop"))) is not None:
            if fault.kind == "kill":
                raise Killed(_back_s(fault, clock))
            if fault.kind == "delay":
                clock.sleep(fault.value or 0.0)
            else:
                kind = fault.kind
        return kind


NO_FAULTS = Faults()


class FaultyEnd:
    """A client's end of a transport on whose way faults happen.

    Args:
        client_id: Whose.
        inner: The transport.
        faults: What goes wrong.
        clock: The run's.
    """

    def __init__(self, client_id: int, inner: MemoryTransport, faults: Faults, clock: Clock) -> None:
        self._client_id, self._inner, self._faults, self._clock = client_id, inner, faults, clock
        self._cut_s: dict[str, float] = {}
        self._back_s: dict[str, float] = {}
        self._given_up: set[int] = set()
        self._poisons: dict[int, Fault] = {}

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Say who takes what arrives."""
        self._inner.attach(client_id, deliver)

    def upload_s(self, parcel: Parcel) -> float:
        """Tell how long a message takes up, or until it is cut."""
        if parcel.round_index in self._given_up:
            return 0.0
        self._check_up("upload")
        seconds = self._inner.upload_s(parcel)
        return self._seconds("upload", parcel, seconds) if self._is_in_the_middle(parcel) else seconds

    def download_s(self, parcel: Parcel) -> float:
        """Tell how long a message takes down, or until it is cut."""
        self._check_up("download")
        return self._seconds("download", parcel, self._inner.download_s(parcel))

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Give the server what arrives of a message."""
        t, sent = parcel.round_index, parcel
        if "upload" in self._cut_s:
            self._inner.ledger.count_up(_half(parcel), client_id, seconds)
            self._go_down("upload")
        if t in self._given_up:
            return
        if self._is_in_the_middle(parcel):
            if self._faults.take(client_id, t, ("upload",), ("corrupt",)):
                self._inner.finish_upload(client_id, replace(parcel, message=_one_bit_off(parcel.message)), seconds)
                raise LinkError(f"a bit of what client {client_id} sent flipped on its way")
            if self._faults.take(client_id, t, ("upload",), ("drop",)):
                self._given_up.add(t)
                sent = Parcel(to_bytes(Skip(t)), t)
        self._inner.finish_upload(client_id, self._poisoned(sent), seconds)

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message, unless it did not arrive as it was sent."""
        if "download" in self._cut_s:
            self._inner.ledger.count_down(_half(parcel), client_id, seconds)
            self._go_down("download")
        self._inner.finish_download(client_id, parcel, seconds)
        if self._faults.take(client_id, parcel.round_index, ("download",), ("corrupt",)):
            try:
                decode(_one_bit_off(parcel.message))
            except CodecError as error:
                raise LinkError(error.what) from None

    def _go_down(self, way: str) -> None:
        self._back_s[way] = self._clock.now() + self._cut_s.pop(way)
        self._check_up(way)
        raise LinkError(f"client {self._client_id}'s link was cut")

    def _check_up(self, way: str) -> None:
        if (left_s := self._back_s.get(way, 0.0) - self._clock.now()) > 0:
            raise LinkError(f"client {self._client_id}'s link was cut", retry_after_s=left_s)

    def _seconds(self, at: str, parcel: Parcel, seconds: float) -> float:
        """Let what is due on this way happen; give how long the transfer takes then."""
        t = parcel.round_index
        if (kill := self._faults.take(self._client_id, t, (at,), ("kill",))) is not None:
            raise Killed(_back_s(kill, self._clock))
        while (delay := self._faults.take(self._client_id, t, (at,), ("delay",))) is not None:
            seconds += delay.value or 0.0
        if (cut := self._faults.take(self._client_id, t, (at,), ("drop",), with_value=True)) is not None:
            self._cut_s[at] = cut.value or 0.0
            return seconds / 2
        return seconds

    def _is_in_the_middle(self, parcel: Parcel) -> bool:
        """Tell whether this is the middle chunk of an update with which something is still to happen."""
        if not self._faults.are_left(self._client_id, parcel.round_index):
            return False
        message = from_bytes(parcel.message)
        return isinstance(message, Update) and message.chunk_index == message.num_chunks // 2

    def _poisoned(self, parcel: Parcel) -> Parcel:
        t = parcel.round_index
        if (poison := self._faults.take(self._client_id, t, ("train", "upload"), POISONS)) is not None:
            self._poisons[t] = poison
        message = from_bytes(parcel.message) if t in self._poisons else None
        if not isinstance(message, Update):
            return parcel
        delta = _poisoned(message.delta.values.float(), self._poisons[t])
        return replace(parcel, message=to_bytes(replace(message, delta=pack(delta, message.delta.format))))


def _poisoned(delta: Tensor, poison: Fault) -> Tensor:
    if poison.kind == "nan":
        return torch.full_like(delta, torch.nan)
    return -delta if poison.kind == "sign_flip" else delta * (1.0 if poison.value is None else poison.value)


def _back_s(kill: Fault, clock: Clock) -> float | None:
    return None if kill.value is None else clock.now() + kill.value


def _half(parcel: Parcel) -> Parcel:
    return replace(parcel, message=parcel.message[: len(parcel.message) // 2])


def _one_bit_off(message: bytes) -> bytes:
    middle = len(message) // 2
    return message[:middle] + bytes([message[middle] ^ 1]) + message[middle + 1 :]
