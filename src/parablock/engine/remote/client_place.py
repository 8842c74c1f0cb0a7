"""What the server knows of one client of a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Condition

from parablock.engine.remote.numbered_stream import NumberedStream
from parablock.engine.remote.site_spans import SPANS_KEPT
from parablock.storage.release_history import History


@dataclass
class ClientPlace:
    """A client's place in the session.

    Attributes:
        stream: The streams between it and the server.
        incarnation: The word of the process that takes part; None: none has yet.
        rejoins: Whether an earlier process took part.
        lives: Its new processes since it was asked for a round.
        has_sent: Whether the process has sent a message, those of secure aggregation aside.
        must_rejoin: Whether it does not take part, until a new process joins.
        is_removed: Whether the operator has removed it.
        told: What it was told last of its own history; None: nothing.
        lacks_ledger: Whether the process has left because its ledger is lost.
        is_garbled: Whether it has sent a record that cannot be read.
        knows_end: Whether it knows that the session has ended.
        since_s: Since when it is connected, or is not; seconds since 1970.
        moved_s: When something of it came last, or it was asked for something; seconds of the run.
        up_bytes: Bytes of its messages so far.
        down_bytes: Bytes of messages to it that it has confirmed.
        last_round: The newest round that it has sent something of.
        asked_round: The newest round that it has been sent something of.
        waiting_bytes: Bytes of its messages that wait for the server.
        held_bytes: Bytes of those that have come since nothing more is confirmed to it, over all of its streams.
        spans_left: How many more spans of it are kept until its next round.
        up_free_s: When its last upload ended.
        down_free_s: When its last download ended.
    """

    stream: NumberedStream
    incarnation: str | None = None
    rejoins: bool = False
    lives: int = 0
    has_sent: bool = False
    must_rejoin: bool = False
    is_removed: bool = False
    told: History | None = None
    lacks_ledger: bool = False
    is_garbled: bool = False
    knows_end: bool = False
    since_s: float = 0.0
    moved_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    last_round: int = -1
    waiting_bytes: int = 0
    held_bytes: int = 0
    asked_round: int = -1
    spans_left: int = SPANS_KEPT
    up_free_s: float = 0.0
    down_free_s: float = 0.0
    room: Condition = field(default_factory=Condition)
