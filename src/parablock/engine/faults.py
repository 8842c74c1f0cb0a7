"""Fault injection: faults of chosen clients in chosen rounds, to test what a run survives.

| kind | at | effect |
|---|---|---|
| delay | train, upload, download, commit | the step takes `value` seconds longer |
| kill | train, upload, download, commit | the machine dies; after `value` seconds it is back (null: never) |
| drop | train | the client skips the round |
| drop | upload | the link is cut in the middle for `value` seconds; null: the client drops the update |
| drop | download | the link is cut in the middle for `value` seconds |
| corrupt | upload, download | a bit of a chunk flips on its way |
| nan, sign_flip, scale | train, upload | the update leaves the client as NaN, as −Δ, as `value` · Δ |

Each fault happens once. `FaultyEnd`, between a client's communication thread and its transport, has those of
uploads and downloads; the client itself asks for the others.
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
    """One fault; see the module's table for `at`, `kind` and `value`."""

    client_id: int
    round_index: int
    at: str
    kind: str
    value: float | None = None


class Killed(Exception):  # noqa: N818  (no error of the program)
    """The client's machine is gone, until `back_s` on the run's clock; None: for good."""

    def __init__(self, back_s: float | None) -> None:
        self.back_s = back_s
        super().__init__()


class Faults:
    """The faults of a run.

    Args:
        faults: The faults.
        happened: The indices of the faults that happened before an interruption.
    """

    def __init__(self, faults: Iterable[Fault] = (), *, happened: Iterable[int] = ()) -> None:
        self._faults = tuple(faults)
        self.happened = set(happened)

    def __bool__(self) -> bool:
        return bool(self._faults)

    @property
    def counts(self) -> dict[str, int]:
        """Kind → number of faults that have happened."""
        return dict(Counter(self._faults[place].kind for place in sorted(self.happened)))

    def happened_before(self, round_index: int, committed: int) -> list[int]:
        """Return the indices of the faults that a run from a checkpoint does not meet again."""
        past = {"train": round_index - 1, "commit": round_index - 1}
        return [
            place
            for place in sorted(self.happened)
            if self._faults[place].round_index <= past.get(self._faults[place].at, committed)
        ]

    def are_left(self, client_id: int, round_index: int) -> bool:
        """Return whether a fault of a client in a round is left."""
        return any(
            (fault.client_id, fault.round_index) == (client_id, round_index) and place not in self.happened
            for place, fault in enumerate(self._faults)
        )

    def take(
        self, client_id: int, round_index: int, at: Sequence[str], kinds: Sequence[str], *, with_value: bool = False
    ) -> Fault | None:
        """Return the next such fault, which then has happened; `with_value` skips faults without one."""
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
        """Let the machine die or wait, if a fault says so; return the kind of a fault for the caller."""
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
    """A client's end of a transport, with faults on the way."""

    def __init__(self, client_id: int, inner: MemoryTransport, faults: Faults, clock: Clock) -> None:
        self._client_id, self._inner, self._faults, self._clock = client_id, inner, faults, clock
        self._cut_s: dict[str, float] = {}
        self._back_s: dict[str, float] = {}
        self._skipped: set[int] = set()
        self._poisons: dict[int, Fault] = {}

    def attach(self, client_id: int, deliver: Callable[[Parcel], None]) -> None:
        """Set the receiver of arriving messages."""
        self._inner.attach(client_id, deliver)

    def upload_s(self, parcel: Parcel) -> float:
        """Return the seconds of an upload, or until it is cut."""
        if parcel.round_index in self._skipped:
            return 0.0
        self._check_up("upload")
        seconds = self._inner.upload_s(parcel)
        return self._seconds("upload", parcel, seconds) if self._is_in_the_middle(parcel) else seconds

    def download_s(self, parcel: Parcel) -> float:
        """Return the seconds of a download, or until it is cut."""
        self._check_up("download")
        return self._seconds("download", parcel, self._inner.download_s(parcel))

    def finish_upload(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Deliver the part of a message that arrives."""
        t, sent = parcel.round_index, parcel
        if "upload" in self._cut_s:
            self._inner.ledger.count_up(_half(parcel), client_id, seconds)
            self._go_down("upload")
        if t in self._skipped:
            return
        if self._is_in_the_middle(parcel):
            if self._faults.take(client_id, t, ("upload",), ("corrupt",)):
                self._inner.finish_upload(client_id, replace(parcel, message=_one_bit_off(parcel.message)), seconds)
                raise LinkError(f"a bit of what client {client_id} sent flipped on its way")
            if self._faults.take(client_id, t, ("upload",), ("drop",)):
                self._skipped.add(t)
                sent = Parcel(to_bytes(Skip(t)), t)
        self._inner.finish_upload(client_id, self._poisoned(sent), seconds)

    def finish_download(self, client_id: int, parcel: Parcel, seconds: float) -> None:
        """Count a message that arrives undamaged."""
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
        """Apply the faults of this direction; return the seconds of the transfer."""
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
        """Return whether this is the middle chunk of an update for which a fault is left."""
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
