"""What one exchange through Flower says: a request of the server to a client, and its reply.

Both are a line of JSON and any number of frames. The same form crosses Flower (a ConfigRecord, and Arrays with the
frames one after another) and the socket between a site's ClientApp and its trainer. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from parablock.engine.flower.stream import PART_BYTES, START, Frame, Place
from parablock.errors import CodecError, InputError, ParaBlockError

T = TypeVar("T", "Request", "Reply")

PROTOCOL = 4
HEADER_BYTES = 4 << 20
"""Bytes of a header at most."""

READ_STRICTLY = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""How pydantic reads the fields of a header: only what this release writes."""

BOTH, UP, DOWN = DIRECTIONS = ("both", "up", "down")
"""What a SuperNode carries: to the server is up."""


@dataclass(frozen=True)
class Request:
    """The server's part of an exchange.

    Attributes:
        run_key: Which run; the same before and after a resume.
        session: Which Flower run.
        restore: The round whose snapshot the session starts from; None: from the base model.
        config: What the clients have to know of the configuration, as YAML.
        base_sha256: Of the base model that all have to share.
        attempt: Its number among those of the client's SuperNode; 0: it has none.
        follows: The attempt that was still under way, and what this one carries comes after what that did; 0: none.
        wanted: What the server wants next of the client.
        ahead: Where what it has of it ahead of that begins; None: it has nothing.
        carries: Whether frames may come with the request, go with the reply, or both: down | up | both.
        budget_bytes: How much the reply may carry.
        frame_bytes: How long its frames may be.
        wait_s: How long the client may wait for something to reply with.
        hello: Only say who you are and which snapshots you keep.
        frames: For the client.
    """

    __pydantic_config__ = READ_STRICTLY

    run_key: str
    session: str
    restore: int | None
    config: str
    base_sha256: str
    carries: str = BOTH
    attempt: int = 0
    follows: int = 0
    wanted: Place = START
    ahead: Place | None = None
    budget_bytes: int = 0
    frame_bytes: int = PART_BYTES
    wait_s: float = 0.0
    hello: bool = False
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The client's part of an exchange.

    Attributes:
        client_id: Who.
        wanted: What the client wants next of the server; all before that is on its disk.
        ahead: Where what it has of it ahead of that begins, which is not on its disk; None: it has nothing.
        arrived_s: When the request was there, seconds since 1970 by the client's clock.
        left_s: When the reply was ready, likewise.
        idle: Whether the client has nothing to do until more is sent to it.
        finished: Whether it has taken the last message of the run.
        held_rounds: The rounds whose snapshots it keeps.
        carries: What its SuperNode is for, likewise; in the answer to a greeting.
        spans: What it did since the last reply, as `Span` fields with times since 1970.
        error: Why it has given up, as `word_of` says it; empty: it has not.
        frames: For the server.
    """

    __pydantic_config__ = READ_STRICTLY

    client_id: int
    wanted: Place = START
    ahead: Place | None = None
    arrived_s: float = 0.0
    left_s: float = 0.0
    idle: bool = False
    finished: bool = False
    held_rounds: tuple[int, ...] = ()
    carries: str = BOTH
    spans: tuple[tuple[str, str, float, float, dict[str, Any]], ...] = ()
    error: tuple[str, str, str, int] | tuple[()] = ()
    frames: tuple[Frame, ...] = ()


_READERS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in (Request, Reply)}


def word_of(error: BaseException) -> tuple[str, str, str, int]:
    """Return what an error says, as plain values: what, cause, remedy, exit code."""
    if not isinstance(error, ParaBlockError):
        return _encodable(repr(error)), "", "", 1
    return _encodable(error.what), _encodable(error.cause), _encodable(error.remedy), error.exit_code


def _encodable(text: str) -> str:
    """Return a text with escapes in place of lone surrogates, which rows and file names may hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_of(who: str, word: Sequence[Any]) -> ParaBlockError:
    """Return the error that a site has ended with, in its own words."""
    what, cause, remedy, exit_code = word
    kind = InputError if exit_code == InputError.exit_code else ParaBlockError
    return kind(f"{who}: {what}", cause=cause, remedy=remedy)


def header_of(said: Request | Reply) -> str:
    """Write all but the frames' contents as a line of JSON."""
    fields = {name: value for name, value in vars(said).items() if name != "frames"}
    places = [[f.message, f.offset, f.size, f.checksum, f.round_index, len(f.content)] for f in said.frames]
    return json.dumps({"protocol": PROTOCOL, "kind": type(said).__name__, **fields, "frames": places})


def frame_lengths(header: str) -> list[int]:
    """Return the lengths of the frames that a header announces, before any of them is read.

    Raises:
        CodecError: It is not a header of this protocol.
    """
    return [place[-1] for place in _fields(header)["frames"]]


def request_of(header: str, contents: Sequence[bytes]) -> Request:
    """Read a request; see `frame_lengths` for errors."""
    return _read(Request, header, contents)


def reply_of(header: str, contents: Sequence[bytes]) -> Reply:
    """Read a reply; see `frame_lengths` for errors."""
    return _read(Reply, header, contents)


def _read(kind: type[T], header: str, contents: Sequence[bytes]) -> T:
    fields = _fields(header)
    del fields["protocol"]
    if fields.pop("kind", None) != kind.__name__:
        raise _foreign(f"it is not a {kind.__name__}")
    places = fields.pop("frames")
    if [place[-1] for place in places] != [len(content) for content in contents]:
        raise _foreign("its frames are not of the lengths that it says")
    try:
        said: T = _READERS[kind.__name__].validate_json(json.dumps(fields))
    except ValidationError as error:
        wrong = dict.fromkeys(str(next(iter(problem["loc"]), "header")) for problem in error.errors())
        raise _foreign(f"its {', '.join(wrong)} cannot be") from None
    frames = tuple(
        Frame(message, offset, size, checksum, round_index, content)
        for (message, offset, size, checksum, round_index, _), content in zip(places, contents, strict=True)
    )
    return replace(said, frames=frames)


def _is_frame(message: Any, offset: Any, size: Any, checksum: Any, round_index: Any, length: Any) -> bool:
    """Return whether a frame can be as its header says."""
    if any(type(value) is not int for value in (message, offset, size, checksum, round_index, length)):
        return False
    is_somewhere = min(message, offset, checksum) >= 0 and length <= min(PART_BYTES, size - offset)
    return is_somewhere and bool(length > 0 or length == size == 0)


def _fields(header: str) -> dict[str, Any]:
    try:
        fields = json.loads(header)
        if fields["protocol"] != PROTOCOL:
            raise _foreign(f"it speaks protocol {fields['protocol']}, and this release {PROTOCOL}")
        for place in fields["frames"]:
            if not _is_frame(*place):
                raise _foreign(f"it announces a frame {place}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(f"its header is broken: {error!r}") from None
    assert isinstance(fields, dict)
    return fields


def _foreign(what: str) -> CodecError:
    return CodecError(
        f"an exchange cannot be read: {what}",
        cause="The other side is not ParaBlock, or of another release.",
        remedy="Install the same release of ParaBlock on the server and on every site.",
    )
