"""A client seen from the server: its two streams, and the SuperNodes that carry them.

A SuperNode does one thing at a time: it downloads a message, has it dealt with, uploads the reply. So a site may
have two of them, one for each direction. Then an update goes up while the aggregate of an earlier one, or of its
own first part, comes down. A site with one SuperNode has one lane for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from parablock.engine.flower.exchange import BOTH, DOWN, UP, Reply, Request
from parablock.engine.flower.stream import PART_BYTES, START, Frame, Inbox, Outbox, Place

WAIT_S = 60.0
"""How long a site may wait for its trainer before it replies that there is nothing yet."""

LEAST_BYTES, MOST_BYTES = 8 << 20, 512 << 20
TOGETHER_BYTES = 2 << 30
"""What the replies of all sites may carry at once, so that memory does not grow with the sites."""

WORTH_MEASURING = 64 << 10
"""Bytes of a transfer from which on its time tells the speed of the link."""

PUSH_S = 60.0
"""How long the transfer of a part should take: a third of Flower's push session."""

STREAM_S = 30.0
"""The same where the other direction can go on with a part that is through; each part costs some seconds more."""

SLACK_S = 20.0
"""What an exchange may take beyond its bytes and its waiting before it is made again."""

FRAME_S = 0.5
"""How long a frame should be on its way: Flower moves two at once, and a link that breaks loses them."""

LEAST_FRAME_BYTES = 1 << 20
"""What each frame costs beside its bytes is not worth shorter ones."""

FIXED_S = 5.0
"""What an exchange takes on the way to a site whatever it carries: a poll, and the start of a process."""


@dataclass
class Speed:
    """What one direction of a site's link was seen to do.

    Attributes:
        bytes_per_s: Of the last transfer that was worth measuring; 0: none yet.
        largest: Bytes of the largest transfer.
        most_bytes: What may go at once however fast it is.
    """

    bytes_per_s: float = 0.0
    largest: int = 0
    most_bytes: int = MOST_BYTES

    def note(self, size: int, seconds: float) -> None:
        """Take a transfer as the measure of the next ones."""
        self.largest = max(self.largest, size)
        if size > WORTH_MEASURING and seconds > 0:
            self.bytes_per_s = size / seconds

    def budget_bytes(self, seconds: float) -> int:
        """Tell how much may go at once."""
        return int(max(LEAST_BYTES, min(self.most_bytes, self.bytes_per_s * seconds)))

    @property
    def frame_bytes(self) -> int:
        """How long a frame should be."""
        return int(max(LEAST_FRAME_BYTES, min(PART_BYTES, self.bytes_per_s * FRAME_S)))

    def patience_s(self, size: int) -> float:
        """Tell how long a transfer may take: three times what it should, so that one may break and go on."""
        return 3 * size / (self.bytes_per_s or LEAST_BYTES / PUSH_S)


@dataclass
class Lane:
    """One SuperNode of a site, with one exchange under way at most.

    Attributes:
        carries: both | up | down.
        node_id: Flower's number of it.
        silent: Whether the last exchange failed or is overdue.
        doubted: Whether it is overdue: what it carries may still be on its way.
    """

    carries: str
    node_id: int
    attempt: int = 0
    outstanding: bool = False
    offline: bool = False
    silent: bool = False
    doubted: bool = False
    overdue_s: float = 0.0
    more: bool = False
    asked_bytes: int = 0
    was_full: bool = False
    held_s: float = inf

    @property
    def part_s(self) -> float:
        """How long a part should be on its way."""
        return PUSH_S if self.carries == BOTH else STREAM_S


@dataclass
class Site:
    """One client.

    Attributes:
        out: What the server has for it.
        inbox: What came of it.
        lanes: Its SuperNodes, by what they carry.
        problem: Why an exchange with it failed at last.
        finished: Whether it has taken the last message of the run.
    """

    out: Outbox = field(default_factory=Outbox)
    inbox: Inbox = field(default_factory=Inbox)
    lanes: dict[str, Lane] = field(default_factory=dict)
    up: Speed = field(default_factory=Speed)
    down: Speed = field(default_factory=Speed)
    problem: str = ""
    finished: bool = False
    sent_before: Place = START

    @property
    def is_complete(self) -> bool:
        """Whether SuperNodes for both directions have come."""
        return BOTH in self.lanes or {UP, DOWN} <= set(self.lanes)

    @property
    def is_answering(self) -> bool:
        """Whether all its SuperNodes are there and have answered the last time in their time."""
        return not any(lane.offline or lane.silent for lane in self.lanes.values())

    @property
    def is_asked(self) -> bool:
        """Whether an answer is outstanding."""
        return any(lane.outstanding for lane in self.lanes.values())

    def take_lane(self, carries: str, node_id: int) -> bool:
        """Take a SuperNode that has come; False where one that is online carries the same already."""
        rivals = [lane for name, lane in self.lanes.items() if BOTH in (name, carries) or name == carries]
        if not all(lane.offline for lane in rivals):
            return False
        for rival in rivals:
            del self.lanes[rival.carries]
        self.lanes[carries] = Lane(carries, node_id)
        return True

    def is_due(self, lane: Lane, *, is_missed: bool) -> bool:
        """Tell whether a lane has something to carry."""
        if lane.outstanding or lane.offline:
            return False
        brings = lane.carries != UP and not self.out.is_empty
        return lane.more or brings or (lane.carries != DOWN and is_missed)

    def ask(self, lane: Lane, opening: Request, now_s: float) -> Request:
        """Begin an exchange, whose request says of the run what `opening` does.

        One that is made again although the other may still arrive carries a frame each way, so that no more than
        that is sent twice.
        """
        bring_bytes, lane.asked_bytes = (
            speed.frame_bytes if lane.doubted else speed.budget_bytes(lane.part_s) for speed in (self.down, self.up)
        )
        frames = () if lane.carries == UP else tuple(self.out.unconfirmed(bring_bytes, self.down.frame_bytes))
        lane.attempt += 1
        lane.outstanding, lane.more = True, False
        lane.overdue_s = now_s + self._patience_s(lane, sum(len(frame.content) for frame in frames))
        return replace(
            opening,
            carries=lane.carries,
            wanted=self.inbox.wanted,
            budget_bytes=lane.asked_bytes,
            frame_bytes=self.up.frame_bytes,
            wait_s=WAIT_S,
            frames=frames,
        )

    def _patience_s(self, lane: Lane, size: int) -> float:
        """How long an exchange may take: what earlier ones took, or all that it may carry where more may come."""
        held_s = min(WAIT_S, 1.5 * lane.held_s + 10.0)
        back = lane.asked_bytes if lane.was_full else self.up.largest or LEAST_BYTES
        up_s = 0.0 if lane.carries == DOWN else self.up.patience_s(back)
        return held_s + SLACK_S + self.down.patience_s(size) + up_s

    def note(self, lane: Lane, reply: Reply, fresh: list[Frame], times: tuple[float, float, float, float]) -> None:
        """Learn from an exchange how fast the link is and how long the site waits for its trainer.

        Nothing of the link from one that was made again: what Flower has of the first is not sent twice.

        Args:
            lane: Whose exchange.
            reply: How it ended.
            fresh: What it brought.
            times: When it was pushed, was at the site, left it, and was back.
        """
        pushed, arrived, left, ended = times
        brought = sum(len(frame.content) for frame in self.brought(lane, reply))
        came = sum(len(frame.content) for frame in fresh)
        if brought and not lane.silent:
            self.down.note(brought, max((arrived - pushed) / 4, arrived - pushed - FIXED_S))
        if lane.carries != DOWN:
            if not lane.silent:
                self.up.note(came, ended - left)
            if not lane.doubted:
                lane.was_full = came + PART_BYTES > lane.asked_bytes
        lane.held_s = left - arrived

    def brought(self, lane: Lane, reply: Reply) -> list[Frame]:
        """Give what an exchange has brought to the site, and none before it."""
        return [] if lane.carries == UP else self.out.between(self.sent_before, reply.wanted)


def site_among(num_sites: int) -> Site:
    """Make one of so many sites, whose replies share what the server can take in at once."""
    return Site(up=Speed(most_bytes=min(MOST_BYTES, TOGETHER_BYTES // num_sites)))
