"""What server and clients say to each other, and how each message becomes bytes.

    server ── RoundStart(t): the block of round t, and the commits that the client has not seen ──► client
    client ── Update(t): Δ of round t, in one or more chunks ──► server
    server ── Chunk: a part of a new value, ahead of the RoundStart or Finish that speaks of it ──► client
    server ── Mark(t): hand in your state as of the start of round t (and stop, if it says so) ──► client
    server ── Finish: the last commits; nothing more to train ──► client
    client ── Skip(t): there will be no update of round t from me ──► server
    client ── Join: I am back, and hold these versions ──► server
    server ── Welcome: what comes after this fits these versions; what came before is void ──► client

A new value of a block travels exactly, in the run's dtype (`value`), or, where the wire format is
narrower, as the difference from what the client holds (`difference`), whose rounding the server keeps. One
that has been streamed (`streamed`) is already there in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from parablock.errors import CodecError
from parablock.wire.codec import decode, encode, header_of
from parablock.wire.quantize import Vector
from parablock.wire.sealing import SEALING_READERS, Sealing

T = TypeVar("T")

MAX_PROBLEM_CHARACTERS = 1000
"""Longest problem that a client may tell, in characters."""


@dataclass(frozen=True)
class NewValue:
    """One block's new value on its way down.

    Attributes:
        block_index: The block.
        version: The round whose aggregate made it.
        rho: ρ of that aggregate.
        kind: value (replaces) | difference (added to what the client holds) | streamed (came in chunks).
        vector: The value or the difference; empty where streamed.
    """

    block_index: int
    version: int
    rho: float
    kind: str
    vector: Vector


@dataclass(frozen=True)
class Chunk:
    """A part of one block's new value; the parts come in order.

    Attributes:
        block_index: The block.
        version: The round whose aggregate makes it.
        kind: value | difference.
        vector: The next elements.
    """

    block_index: int
    version: int
    kind: str
    vector: Vector


@dataclass(frozen=True)
class RoundStart:
    """Round t begins: train `block_index` after taking over `news`, which ends with round `committed`.

    The round has `num_local_steps` steps; `steps_before` have been asked for in all rounds before it.
    """

    round_index: int
    block_index: int
    num_local_steps: int
    steps_before: int
    committed: int
    news: tuple[NewValue, ...]


@dataclass(frozen=True)
class Finish:
    """The drain: the last commits; there is nothing more to train."""

    committed: int
    news: tuple[NewValue, ...]


@dataclass(frozen=True)
class Mark:
    """A checkpoint: hand in the state as of the start of round t; `stop`: and leave."""

    round_index: int
    stop: bool


@dataclass(frozen=True)
class Update:
    """A client's Δ of one round, or one chunk of it.

    Attributes:
        round_index: t.
        block_index: b_t.
        client_id: Who.
        num_examples: Its weight w_i.
        committed: The newest commit that its training started from.
        train_loss: Mean loss over the local steps.
        num_local_steps: K.
        compute_s: Seconds of local training.
        chunk_index: 0 … num_chunks − 1; they are sent in order.
        num_chunks: How many there are.
        delta: Those elements of Δ.
    """

    round_index: int
    block_index: int
    client_id: int
    num_examples: int
    committed: int
    train_loss: float
    num_local_steps: int
    compute_s: float
    chunk_index: int
    num_chunks: int
    delta: Vector


@dataclass(frozen=True)
class Skip:
    """A client gives round t up: its update will not come; `problem` says why, where its training failed."""

    round_index: int
    problem: str = ""


@dataclass(frozen=True)
class Join:
    """A client is back after it was gone.

    Attributes:
        versions: The version that it holds of every block.
        sent: The rounds whose updates it sends again after this, because it does not know whether they arrived.
    """

    versions: tuple[int, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True)
class Welcome:
    """The answer to `Join`: what comes after this is meant for what the client holds now."""


Message = RoundStart | Finish | Mark | Update | Chunk | Skip | Join | Welcome | Sealing


def to_bytes(message: Message) -> bytes:
    """Encode any message."""
    fields: dict[str, Any] = {"kind": type(message).__name__}
    vectors: list[Vector] = []
    for name, value in vars(message).items():
        if isinstance(value, Vector):
            vectors.append(value)
        elif name == "news":
            fields["news"] = [[new.block_index, new.version, new.rho, new.kind] for new in value]
            vectors.extend(new.vector for new in value)
        elif name == "compute_s":
            fields[name] = f"{value:.16e}"  # exact, and of one width: a measured time must not move the byte counts
        else:
            fields["kind_of_value" if name == "kind" else name] = value
    return encode(fields, vectors)


def from_bytes(raw: bytes) -> Message:
    """Decode any message.

    Raises:
        CodecError: As `decode`, or an unknown kind, or a field that is missing or of the wrong type.
    """
    fields, vectors = decode(raw)
    reader = _READERS.get(str(fields.get("kind")))
    if reader is None:
        raise CodecError(
            f"a message is of kind {fields.get('kind')!r}; there are {', '.join(_READERS)}",
            cause="The sender is not ParaBlock, or a newer release.",
        )
    try:
        return reader(fields, vectors)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CodecError(
            f"a {fields['kind']} message lacks or misstates a field: {error!r}",
            cause="The sender is not ParaBlock.",
        ) from None


def kind_of(raw: bytes) -> str:
    """Say of which kind a message is, without decoding it; nothing where that cannot be seen."""
    return str(header_of(raw).get("kind", ""))


def describe(raw: bytes) -> str:
    """Say what a message is, for people: its kind, round, block and chunk."""
    try:
        message = from_bytes(raw)
    except CodecError:
        return "a message"
    facts = {name: getattr(message, name, None) for name in ("round_index", "block_index")}
    words = [f"{name.removesuffix('_index')} {value}" for name, value in facts.items() if value is not None]
    if isinstance(message, Update):
        words.append(f"chunk {message.chunk_index + 1} of {message.num_chunks}")
    return f"its {type(message).__name__} ({', '.join(words)})" if words else f"its {type(message).__name__}"


def _typed(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name} is {value!r}, not {kind.__name__}")
    return value


def _integers(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    return tuple(_typed({name: value}, name, int) for value in _typed(fields, name, list))


def _no_vectors(vectors: list[Vector]) -> None:
    if vectors:
        raise ValueError(f"it carries {len(vectors)} vectors")


def _news(fields: Mapping[str, Any], vectors: list[Vector]) -> tuple[NewValue, ...]:
    entries = _typed(fields, "news", list)
    return tuple(_new_value(entry, vector) for entry, vector in zip(entries, vectors, strict=True))


def _new_value(entry: Sequence[object], vector: Vector) -> NewValue:
    block_index, version, rho, kind = entry
    numbers = {"block_index": block_index, "version": version}
    alignment = _typed({"rho": rho}, "rho", float)
    if not 0 <= alignment <= 1:
        raise ValueError(f"rho is {alignment}, not in 0 … 1")
    block, made_by = (_typed(numbers, name, int) for name in numbers)
    return NewValue(block, made_by, alignment, _kind(kind), vector)


def _kind(kind: object) -> str:
    if kind not in ("value", "difference", "stack", "streamed"):
        raise ValueError(f"a new value is {kind!r}, not value, difference, stack or streamed")
    return str(kind)


def _read_update(fields: Mapping[str, Any], vectors: list[Vector]) -> Update:
    (delta,) = vectors
    names = (
        "round_index",
        "block_index",
        "client_id",
        "num_examples",
        "committed",
        "num_local_steps",
        "chunk_index",
        "num_chunks",
    )
    numbers = {name: _typed(fields, name, int) for name in names}
    return Update(
        **numbers,
        train_loss=_typed(fields, "train_loss", float),
        compute_s=_seconds(_typed(fields, "compute_s", str)),
        delta=delta,
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text} is no length of time")
    return value


def _read_round_start(fields: Mapping[str, Any], vectors: list[Vector]) -> RoundStart:
    names = ("round_index", "block_index", "num_local_steps", "steps_before", "committed")
    numbers = {name: _typed(fields, name, int) for name in names}
    return RoundStart(**numbers, news=_news(fields, vectors))


def _read_finish(fields: Mapping[str, Any], vectors: list[Vector]) -> Finish:
    return Finish(_typed(fields, "committed", int), _news(fields, vectors))


def _read_welcome(fields: Mapping[str, Any], vectors: list[Vector]) -> Welcome:
    del fields
    _no_vectors(vectors)
    return Welcome()


def _read_skip(fields: Mapping[str, Any], vectors: list[Vector]) -> Skip:
    _no_vectors(vectors)
    problem = _typed(fields, "problem", str)
    if len(problem) > MAX_PROBLEM_CHARACTERS or not problem.isprintable():
        raise ValueError(f"a problem in {len(problem)} characters, of at most {MAX_PROBLEM_CHARACTERS} on one line")
    return Skip(_typed(fields, "round_index", int), problem)


def _read_join(fields: Mapping[str, Any], vectors: list[Vector]) -> Join:
    _no_vectors(vectors)
    return Join(_integers(fields, "versions"), _integers(fields, "sent"))


def _read_chunk(fields: Mapping[str, Any], vectors: list[Vector]) -> Chunk:
    (vector,) = vectors
    return Chunk(
        _typed(fields, "block_index", int), _typed(fields, "version", int), _kind(fields["kind_of_value"]), vector
    )


def _read_mark(fields: Mapping[str, Any], vectors: list[Vector]) -> Mark:
    _no_vectors(vectors)
    return Mark(_typed(fields, "round_index", int), _typed(fields, "stop", bool))


_READERS: dict[str, Callable[[Mapping[str, Any], list[Vector]], Message]] = {
    "RoundStart": _read_round_start,
    "Finish": _read_finish,
    "Mark": _read_mark,
    "Update": _read_update,
    "Chunk": _read_chunk,
    "Skip": _read_skip,
    "Join": _read_join,
    "Welcome": _read_welcome,
    **SEALING_READERS,
}


def new_block_value(held: Tensor, block_index: int, kind: str, vectors: Sequence[Vector]) -> Tensor:
    """Give what a client holds of a block after a new value, in the dtype that it holds now.

    Args:
        held: What it holds now.
        block_index: The block, for the error.
        kind: value | difference.
        vectors: The new value or the difference, whole or in chunks.

    Raises:
        CodecError: When they are not of the block's length together.
    """
    size = sum(vector.num_elements for vector in vectors)
    if size != held.numel():
        raise CodecError(
            f"block {block_index} has {held.numel()} parameters and its new value {size}",
            cause="Client and server do not fine-tune the same model.",
            remedy="Compare `parablock blocks` on both sides.",
        )
    if kind == "value" and len(vectors) == 1:
        return vectors[0].values.to(held.dtype)
    value, end = torch.empty_like(held), 0
    for vector in vectors:
        part = slice(end, end := end + vector.num_elements)
        value[part] = vector.values if kind == "value" else held[part].float() + vector.values.float()
    return value
