"""All messages between server and clients, and their encoding as bytes.

    server ── RoundStart(t): the block of round t, and the commits that the client lacks ──► client
    client ── Update(t): Δ of round t, in one or more chunks ──► server
    server ── Chunk: a part of a new value, ahead of the RoundStart or Finish that announces it ──► client
    server ── Mark(t): hand in your state as of the start of round t (and stop, if it says so) ──► client
    server ── Finish: the last commits; nothing more to train ──► client
    client ── Skip(t): I will send no update of round t ──► server
    client ── Leave: I take part no more, until I join again ──► server
    client ── Join: I am back, and hold these versions ──► server
    server ── Welcome: later messages fit these versions, earlier ones are void; send these updates again ──► client

The new value of a block is of one of these kinds:

| kind | content of the vector |
|---|---|
| value | the new value, exactly, in the run's dtype |
| difference | the new value minus the one that the client holds; the server keeps the rounding error |
| stack | stacked adapters, whose product the client adds to the value that it holds (FLoRA) |
| streamed | nothing, because the value has already come in chunks |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

import torch
from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, StrictBool, StrictInt, TypeAdapter
from torch import Tensor

from parablock.errors import CodecError
from parablock.wire.codec import decode, encode, header_of
from parablock.wire.quantize import Vector
from parablock.wire.sealing import Sealing

MAX_PROBLEM_CHARACTERS = 1000
"""Longest `Skip.problem`, in characters."""


def _read_seconds(text: object) -> float:
    if not isinstance(text, str) or not 0 <= (seconds := float(text)) < math.inf:
        raise ValueError(f"{text!r} is no number of seconds, 0 or more")
    return seconds


def _check_problem(text: str) -> str:
    if len(text) > MAX_PROBLEM_CHARACTERS or not text.isprintable():
        raise ValueError(f"{len(text)} characters, not at most {MAX_PROBLEM_CHARACTERS} on one line")
    return text


StrictFloat = InstanceOf[float]
Part = Annotated[StrictFloat, Field(ge=0, le=1)]
Whole = Annotated[StrictInt, Field(gt=-(1 << 62), lt=1 << 62)]
Seconds = Annotated[float, BeforeValidator(_read_seconds)]
Kind = Annotated[str, Field(pattern="^(value|difference|stack|streamed)$")]


@dataclass(frozen=True)
class NewValue:
    """The new value of one block, on its way to a client, and ρ of the aggregate of round `version`.

    ρ is one number, or one for each kind of the block's parameters.
    """

    block_index: Whole
    version: Whole
    rho: Part | tuple[Part, ...]
    kind: Kind
    vector: InstanceOf[Vector]


@dataclass(frozen=True)
class Chunk:
    """The next elements of one block's new value, of any kind but `streamed`; the parts come in order."""

    block_index: Whole
    version: Whole
    kind: Kind
    vector: InstanceOf[Vector]


@dataclass(frozen=True)
class RoundStart:
    """Round t begins: train `block_index` after taking over `news`, which ends with round `committed`.

    The round has `num_local_steps` steps; all rounds before it had `steps_before` steps together.
    """

    round_index: Whole
    block_index: Whole
    num_local_steps: Whole
    steps_before: Whole
    committed: Whole
    news: tuple[NewValue, ...]


@dataclass(frozen=True)
class Finish:
    """The drain: the last commits; there is nothing more to train."""

    committed: Whole
    news: tuple[NewValue, ...]


@dataclass(frozen=True)
class Mark:
    """A checkpoint: hand in the state as of the start of round t, and leave if `stop` is true."""

    round_index: Whole
    stop: StrictBool


@dataclass(frozen=True)
class Update:
    """A client's Δ of one round, or one of its chunks 0 … num_chunks − 1, which are sent in order.

    `num_examples` is the client's weight w_i, `committed` the newest commit that its training started from,
    `train_loss` the mean over the K = `num_local_steps` local steps (None: the client does not tell it), and
    `compute_s` the seconds that they took.
    """

    round_index: Whole
    block_index: Whole
    client_id: Whole
    num_examples: Whole
    committed: Whole
    train_loss: StrictFloat | None
    num_local_steps: Whole
    compute_s: Seconds
    chunk_index: Whole
    num_chunks: Whole
    delta: InstanceOf[Vector]


@dataclass(frozen=True)
class Skip:
    """A client gives round t up: its update will not come; `problem` says why if training failed."""

    round_index: Whole
    problem: Annotated[str, AfterValidator(_check_problem)] = ""


@dataclass(frozen=True)
class Leave:
    """A client takes part no more, until it joins again; `problem` says why if it cannot."""

    problem: Annotated[str, AfterValidator(_check_problem)] = ""


@dataclass(frozen=True)
class Join:
    """A client is back, and holds these versions of the blocks.

    `sent` are the rounds whose updates it still has, because it does not know whether they arrived.
    """

    versions: tuple[Whole, ...]
    sent: tuple[Whole, ...]


@dataclass(frozen=True)
class Welcome:
    """The answer to `Join`: later messages fit the versions that the client holds.

    `lacking` are the pairs (round, chunk): from that chunk on, the server has not got the client's update.
    """

    lacking: tuple[tuple[Whole, Whole], ...] = ()


Message = RoundStart | Finish | Mark | Update | Chunk | Skip | Leave | Join | Welcome | Sealing
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


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
            fields[name] = f"{value:.16e}"  # exact, and of fixed width: byte counts must not depend on times
        else:
            fields["kind_of_value" if name == "kind" else name] = value
    return encode(fields, vectors)


def from_bytes(raw: bytes) -> Message:
    """Decode any message.

    Raises:
        CodecError: As `decode`, or the kind is unknown, or a field is missing or of the wrong type.
    """
    fields, vectors = decode(raw)
    kind = str(fields.get("kind"))
    if kind not in _KINDS:
        raise CodecError(
            f"a message is of kind {fields.get('kind')!r:.40}; there are {', '.join(_KINDS)}",
            cause="The sender is not ParaBlock, or a newer release.",
        )
    try:
        return _read(kind, fields, vectors)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise CodecError(
            f"a {kind} message lacks or misstates a field: {' '.join(repr(error).split()):.300}",
            cause="The sender is not ParaBlock.",
        ) from None


def kind_of(raw: bytes) -> str:
    """Return the kind of a message without decoding it; empty if it cannot be seen."""
    return str(header_of(raw).get("kind", ""))


def describe(raw: bytes) -> str:
    """Describe a message for people: its kind, round, block and chunk."""
    try:
        message = from_bytes(raw)
    except CodecError:
        return "a message"
    t, b = (getattr(message, name, None) for name in ("round_index", "block_index"))
    words = ([] if t is None else [f"round {t + 1}"]) + ([] if b is None else [f"block {b}"])
    if isinstance(message, Update):
        words.append(f"chunk {message.chunk_index + 1} of {message.num_chunks}")
    return f"its {type(message).__name__} ({', '.join(words)})" if words else f"its {type(message).__name__}"


def _read(kind: str, fields: Mapping[str, Any], vectors: list[Vector]) -> Message:
    validate, hints = _reader(kind)
    values: dict[str, Any] = {}
    unread = iter(vectors)
    for name, hint in hints.items():
        if hint is Vector:
            values[name] = next(unread, None)
        elif name == "news":
            if not isinstance(fields[name], list):
                raise TypeError(f"news is {fields[name]!r}, not a list")
            names = ("block_index", "version", "rho", "kind")
            values[name] = tuple(
                {**dict(zip(names, entry, strict=True)), "vector": next(unread, None)} for entry in fields[name]
            )
        else:
            values[name] = fields["kind_of_value" if name == "kind" else name]
    if surplus := len(list(unread)):
        raise ValueError(f"it carries {surplus} vectors too many")
    message: Message = validate(values)
    return message


@cache
def _reader(kind: str) -> tuple[Any, dict[str, Any]]:
    """Return the validator of a kind of message, and the types of its fields."""
    return TypeAdapter(_KINDS[kind]).validator.validate_python, get_type_hints(_KINDS[kind])


def new_block_value(held: Tensor, block_index: int, kind: str, vectors: Sequence[Vector]) -> Tensor:
    """Return a client's new value of a block, in the dtype of the value that it holds.

    The vectors are the new value or the difference, by `kind`, whole or in chunks.

    Raises:
        CodecError: The vectors together are not as long as the block.
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
