"""What a site keeps on its disk, so that its trainer can die at any moment and find its place again.

    STATE/
      key                         the secret of the local socket, for this user alone
      RUN/snapshots/round-000008  the client at the start of a round, as `storage/checkpoint.py` writes it
      RUN/session-ID/session.json   the request that opened the session: configuration, where to start
      RUN/session-ID/position.json  the newest snapshot of the session and its places in both streams
      RUN/session-ID/frames/17-4096 what was received after that snapshot: of message 17, from byte 4096 on
      RUN/session-ID/finished       how far the server's stream came, when the run is over
      RUN/session-ID/masked         there where updates are masked, with secrets that no file holds

A frame is on the disk before it is confirmed. A trainer that starts again reads the newest snapshot, takes the
frames that came after it once more, and so repeats what it did. Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from parablock.engine.flower.exchange import Request, header_of, request_of
from parablock.engine.flower.stream import Frame
from parablock.errors import ParaBlockError, StorageError
from parablock.storage.files import write_beside


@dataclass(frozen=True)
class Position:
    """The round of a session's newest snapshot, or None for the base model, and its places in both streams.

    `wanted` is the next message of the server, `first_sent` the first message of the updates in flight.
    """

    round_index: int | None
    wanted: int = 0
    first_sent: int = 0


class SessionFolder:
    """The files of one session of one run at a site."""

    def __init__(self, state_dir: Path, run_key: str, session: str) -> None:
        self.session, run = session, state_dir / _safe(run_key)
        self.snapshots, self.path = run / "snapshots", run / f"session-{_safe(session)}"
        self._frames, self._position = self.path / "frames", self.path / "position.json"

    def open(self, request: Request) -> None:
        """Write down what the session is; opening it again changes nothing."""
        if (self.path / "session.json").exists():
            return
        newer = [t for t in self.held_rounds() if request.restore is None or t > request.restore]
        outdated = [*self.path.parent.glob("session-*"), *(self.snapshots / f"round-{t:06d}" for t in newer)]
        for old in outdated:  # they belong to a past that the server has gone back behind
            shutil.rmtree(old, ignore_errors=True)
        self._frames.mkdir(parents=True, mode=0o700)
        self.move_to(Position(request.restore))
        header = header_of(Request(**{**vars(request), "frames": ()}))
        _write(self.path / "session.json", header.encode())

    def opened_by(self) -> Request:
        """Read the request that opened the session."""
        return request_of((self.path / "session.json").read_text(encoding="utf-8"), ())

    @property
    def position(self) -> Position:
        """Where the session is."""
        return Position(**json.loads(self._position.read_text(encoding="utf-8")))

    def move_to(self, position: Position) -> None:
        """Take a snapshot's place: the frames before it are not needed any more."""
        _write(self._position, json.dumps(asdict(position)).encode())
        for (message, _), path in self._kept():
            if message < position.wanted:
                path.unlink(missing_ok=True)

    def keep(self, frames: Iterable[Frame]) -> None:
        """Put received frames on the disk."""
        for frame in frames:
            label = json.dumps({name: value for name, value in vars(frame).items() if name != "content"}).encode()
            _write(self._frames / f"{frame.message}-{frame.offset}", label + b"\n" + frame.content)

    def kept(self) -> list[Frame]:
        """Read the frames that came after the newest snapshot, in order."""
        first = self.position.wanted
        return [_read(path) for (message, _), path in self._kept() if message >= first]

    def _kept(self) -> list[tuple[tuple[int, int], Path]]:
        """List message, offset and file of what is kept, in order."""
        found = [(re.fullmatch(r"(\d+)-(\d+)", path.name), path) for path in self._frames.iterdir()]
        return sorted(((int(match[1]), int(match[2])), path) for match, path in found if match)

    def finish(self, wanted: int) -> None:
        """Write down that the run is over for this site, and how far the server's stream came."""
        _write(self.path / "finished", json.dumps(wanted).encode())

    @property
    def finished(self) -> int | None:
        """The message after the last of the server's, if the run is over."""
        try:
            return int(json.loads((self.path / "finished").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def secret(self, make: Callable[[], bytes]) -> bytes:
        """Read the key of this site's noise in this run, or make it; it never leaves the site."""
        path = self.snapshots.parent / "noise_key"
        if not path.exists():
            _write(path, make())
            path.chmod(0o600)
        return path.read_bytes()

    def begin_secrets(self) -> None:
        """Note that this trainer is about to make secrets of the session, which it keeps to itself.

        Raises:
            ParaBlockError: An earlier trainer had made some: what it sent cannot be unmasked by those of another.
        """
        if (self.path / "masked").exists():
            raise ParaBlockError(
                "the trainer of this site ended while updates were masked, and its secrets with it",
                cause="Secrets are in memory alone; most often its memory ran out, or the machine was restarted.",
                remedy="Go on from the last checkpoint, with new secrets for everybody: parablock resume.",
            )
        _write(self.path / "masked", b"")

    def held_rounds(self) -> tuple[int, ...]:
        """List the rounds whose snapshots are there."""
        found = self.snapshots.glob("round-*")
        return tuple(sorted(int(match[1]) for path in found if (match := re.fullmatch(r"round-(\d+)", path.name))))


def _read(path: Path) -> Frame:
    label, _, content = path.read_bytes().partition(b"\n")
    return Frame(**json.loads(label), content=content)


def _write(path: Path, content: bytes) -> None:
    try:
        with write_beside(path) as beside:
            beside.write_bytes(content)
    except StorageError as error:
        raise StorageError(
            error.what,
            cause="The disk of this site is full, or its state folder is not writable any more.",
            remedy="Make room there, and go on with the run: parablock resume, or `flwr run` again.",
        ) from None


def _safe(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", name):
        raise ValueError(f"{name!r} is not the name of a run")
    return name
