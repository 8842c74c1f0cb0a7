"""Frames, which cross a connection, and the greeting of its two sides.

A connection begins with two greetings, of a JSON object each:

    site ── Hello: who am I, of which release, in which session, and which part do I want next ──► server
    server ── Reception: the session, and which part the server wants next ──► site

Then each side sends frames at any time:

    offset  bytes  what
    0       1      kind: PART, CONFIRM or BYE
    1       8      number: of the part; or of the part that its receiver wants next; little endian, as all below
    9       4      round that the message's bytes count for
    13      8      length of the whole message; or, of a CONFIRM, bytes a second at which parts come to its sender
    21      8      seconds since 1970 by the server's clock when the message's first part left, as a double
    29      …      a part of the message, PART_BYTES at most; only the last part of a message is shorter

Every length is checked before anything is allocated for it. Nothing here imports torch or grpc.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from parablock import __version__
from parablock.errors import CodecError
from parablock.storage.release_history import History

PROTOCOL = 1
"""Version of the greetings and frames."""

HEAD = struct.Struct("<BQiQd")
PART, CONFIRM, BYE, NOTE = range(4)
"""Kinds of frames. A NOTE is a part of a message for the record of the run, not for its engine."""

PART_BYTES = 1 << 20
MAX_HELLO_BYTES = 4 << 10
MAX_WELCOME_BYTES = 1 << 20
MAX_NOTE_BYTES = 1 << 20

_READ_STRICTLY = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Word = Annotated[str, Field(max_length=64, pattern=r"^([0-9A-Za-z][0-9A-Za-z.+_-]*)?$")]
_Name = Annotated[_Word, Field(min_length=1)]
"""What a folder or a file may be named after: it is neither empty nor begins with a dot."""


@dataclass(frozen=True)
class Hello:
    """A site's greeting.

    Attributes:
        client_id: Who it is; its certificate or its token has to say the same.
        session: The session that it takes part in; empty: it asks for one.
        incarnation: A random word of the process that takes part in the session.
        wanted: The part that it wants next.
        sent_s: When it was sent, by the site's clock: seconds since 1970.
        protocol: `PROTOCOL` of its release.
        release: Its release of ParaBlock.
    """

    __pydantic_config__ = _READ_STRICTLY

    client_id: _Count
    session: _Word
    incarnation: _Word
    wanted: _Count
    sent_s: float
    protocol: _Count = PROTOCOL
    release: _Word = __version__


@dataclass(frozen=True)
class Opening:
    """A session of a run, as a site has to know it.

    Attributes:
        run: The run; the same before and after a restart of the server.
        session: The session: a run from the beginning, or from a checkpoint.
        config: The configuration of all clients, as YAML.
        base_sha256: Hash of the base model that all share.
        base_parts: Hashes of what it consists of, so that a site can say what differs.
        restored: The round of the checkpoint that the session goes on from; -1: from the base model.
        sessions: Earlier session → the first of its rounds that do not count any more.
        history: What the server has on record of this site, where noise or masks hide updates.
        asked: The last round whose noisy update the server may have got from this site.
    """

    __pydantic_config__ = _READ_STRICTLY

    run: _Name
    session: _Name
    config: str
    base_sha256: _Word
    restored: int = -1
    base_parts: dict[_Word, _Word] = field(default_factory=dict)
    sessions: dict[_Word, _Count] = field(default_factory=dict)
    history: History = History()  # noqa: RUF009  (it is frozen)
    asked: int = -1

    @property
    def context(self) -> str:
        """What a signature of a site is for: this session of this run."""
        return f"{self.run} {self.session}"

    def session_of(self, round_index: int) -> str:
        """Return the session that a state of the rounds before this one is of.

        What came before the checkpoint that this session went on from stays of the session that it was of, however
        often it is trained again.
        """
        return next((before for before, end in self.sessions.items() if round_index <= end), self.session)


@dataclass(frozen=True)
class Reception:
    """The server's greeting.

    Attributes:
        wanted: The part that the server wants next.
        rejoins: Whether an earlier process of this site took part in the session.
        now_s: The server's clock: seconds since 1970.
        opening: The session, where the site is in another one; None: it goes on.
        is_over: Whether the run has ended.
    """

    __pydantic_config__ = _READ_STRICTLY

    wanted: _Count
    rejoins: bool
    now_s: float
    opening: Opening | None = None
    is_over: bool = False


Greeting = TypeVar("Greeting", Hello, Reception)


def greeting_to_bytes(greeting: Hello | Reception) -> bytes:
    """Encode a greeting."""
    return json.dumps(asdict(greeting)).encode()


def greeting_from_bytes(kind: type[Greeting], raw: bytes) -> Greeting:
    """Decode a greeting.

    Raises:
        CodecError: It is too long, no greeting, or of another protocol or release, which are named.
    """
    limit = MAX_HELLO_BYTES if kind is Hello else MAX_WELCOME_BYTES
    try:
        if len(raw) > limit:
            raise ValueError(f"{len(raw)} bytes, not at most {limit}")
        fields = json.loads(raw)
        if kind is Hello and isinstance(fields, dict):
            _check_release(fields.get("protocol"), fields.get("release"))
        return TypeAdapter(kind).validate_json(raw)
    except (ValidationError, ValueError, RecursionError) as error:
        raise CodecError(
            f"a greeting cannot be read: {' '.join(str(error).split()):.200}",
            cause="Another program talks to this port, or another release of ParaBlock.",
        ) from None


def utc_s() -> float:
    """Return what this machine's clock says: seconds since 1970."""
    return datetime.now(UTC).timestamp()


def _check_release(protocol: object, release: object) -> None:
    if (protocol, release) != (PROTOCOL, __version__):
        raise CodecError(
            f"the site runs ParaBlock {_shown(release)} (protocol {_shown(protocol)}), "
            f"the server {__version__} (protocol {PROTOCOL})",
            cause="Client and server run different releases of ParaBlock.",
            remedy="Install the same release on both sides.",
        )


def _shown(claimed: object) -> str:
    return f"{claimed:.40}" if isinstance(claimed, str) and claimed.isprintable() else f"{claimed!r:.40}"
