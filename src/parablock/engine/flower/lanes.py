"""A client seen from the server: its two streams, and the SuperNodes that carry them.

A SuperNode does one thing at a time: it downloads a message, has it dealt with, uploads the reply. So a site may
have two of them, one for each direction. Then an update goes up while the aggregate of an earlier one, or of its
own first part, comes down. A site with one SuperNode has one lane for both.

A SuperNode that finds no message sleeps for three seconds. So where an update is large, a lane has two exchanges:
the first takes most of it, and the second, which is there when the SuperNode is done with that, takes the rest.
Meanwhile the server folds what came with the first, and has the next one there before the SuperNode looks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from parablock.engine.flower.exchange import BOTH, DOWN, UP, Reply, Request
from parablock.engine.flower.stream import PART_BYTES, START, Frame, Inbox, Outbox, Place

WAIT_S = 60.0
"""How long a site may wait for its trainer before it replies that there is nothing yet."""
LEAST_BYTES, MOST_BYTES = 8 << 20, 50 << 20
"""What an exchange may carry each way; the server has it in memory up to three times."""
TOGETHER_BYTES = 100 << 20
"""What the replies of all sites may carry that the server takes in at once, which is one of each."""
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
AT_ONCE = 2
"""How many exchanges a lane has under way."""
FIRST_SHARE = 0.6
"""Of an update, what the first exchange takes; the rest takes longer than the server needs for that."""
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
        """Return how much may go at once."""
        return int(max(LEAST_BYTES, min(self.most_bytes, self.bytes_per_s * seconds)))

    @property
    def frame_bytes(self) -> int:
        """How long a frame should be."""
        return int(max(LEAST_FRAME_BYTES, min(PART_BYTES, self.bytes_per_s * FRAME_S)))

    def patience_s(self, size: int) -> float:
        """Return how long a transfer may take: three times what it should, so that one may break and go on."""
        return 3 * size / (self.bytes_per_s or LEAST_BYTES / PUSH_S)


@dataclass(frozen=True)
class UnderWay:
    """An exchange that has not been answered.

    Attributes:
        attempt: Its number.
        asked_bytes: What its reply may carry.
        asked_s: When it was asked for.
        patience_s: How long its SuperNode may take for it.
        takes: Whether its reply is to carry what the client has.
        waits: Whether the site waits for the trainer to have something.
        follows: The attempt before it, where that was still under way; else 0.
        until: Where what it and those before it bring to the site ends.
    """

    attempt: int
    asked_bytes: int
    asked_s: float
    patience_s: float
    takes: bool
    waits: bool
    follows: int
    until: Place


@dataclass
class Lane:
    """One SuperNode of a site, with `AT_ONCE` exchanges under way at most, which it deals with one by one.

    Attributes:
        carries: both | up | down.
        node_id: Flower's number of it.
        attempt: The number of the last exchange.
        under_way: The exchanges that have not been answered, the oldest first.
        is_broken: Whether one was lost before one that is still under way.
        silent: Whether the last exchange failed or is overdue.
        doubted: Whether it is overdue, or Flower has lost sight of the SuperNode: what it carries may still arrive.
        more: Whether it is to be asked again, whatever there is to carry.
        was_full: Whether the last reply carried all that it might.
        held_s: How long the site last waited for its trainer.
        free_s: When the last exchange ended.
    """

    carries: str
    node_id: int
    attempt: int = 0
    under_way: list[UnderWay] = field(default_factory=list)
    is_broken: bool = False
    offline: bool = False
    silent: bool = False
    doubted: bool = False
    more: bool = False
    was_full: bool = False
    held_s: float = inf
    free_s: float = 0.0

    def is_before(self, exchange: UnderWay) -> bool:
        """Return whether another one is under way that its SuperNode deals with first."""
        return any(other.attempt < exchange.attempt for other in tuple(self.under_way))

    def end(self, exchange: UnderWay, *, is_lost: bool) -> None:
        """Take an exchange from those under way; one that was given up before changes nothing."""
        if exchange in self.under_way:
            self.under_way.remove(exchange)
            self.is_broken = bool(self.under_way) and (self.is_broken or is_lost)

    def give_up(self) -> None:
        """Wait no longer for anything that is under way."""
        self.under_way.clear()
        self.is_broken, self.more, self.silent, self.doubted = False, True, True, True

    @property
    def overdue_s(self) -> float:
        """When what is under way is given up: the oldest may take its time from when its SuperNode came to it."""
        if not self.under_way:
            return inf
        oldest = self.under_way[0]
        return max(oldest.asked_s, self.free_s) + oldest.patience_s

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
    _round_index: int = -1
    _before_bytes: int = 0
    _came_bytes: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether SuperNodes for both directions have come."""
        return BOTH in self.lanes or {UP, DOWN} <= set(self.lanes)

    @property
    def is_answering(self) -> bool:
        """Whether all its SuperNodes are there and have answered the last time in their time."""
        return not any(lane.offline or lane.silent for lane in self.lanes.values())

    @property
    def update_bytes(self) -> int:
        """What an update takes, as far as the last two tell; 0: none has come."""
        return max(self._before_bytes, self._came_bytes)

    @property
    def is_asked(self) -> bool:
        """Whether an answer is outstanding."""
        return any(lane.under_way for lane in self.lanes.values())

    def take_lane(self, carries: str, node_id: int) -> bool:
        """Take a SuperNode that has come; False where one that is online carries the same already."""
        rivals = [lane for name, lane in self.lanes.items() if BOTH in (name, carries) or name == carries]
        if not all(lane.offline for lane in rivals):
            return False
        for rival in rivals:
            del self.lanes[rival.carries]
        self.lanes[carries] = Lane(carries, node_id, max((rival.attempt for rival in rivals), default=0))
        return True

    def is_due(self, lane: Lane, *, is_missed: bool) -> bool:
        """Return whether a lane has something to carry."""
        if lane.offline or lane.is_broken or len(lane.under_way) == AT_ONCE:
            return False
        if not lane.under_way:
            brings = lane.carries != UP and not self.out.is_empty
            return lane.more or brings or (lane.carries != DOWN and is_missed)
        (before,) = lane.under_way
        if lane.doubted or before.attempt != lane.attempt:
            return False  # what this one carries is missing, where the one after it was sooner
        is_worth = lane.carries != UP and self.out.bytes_after(before.until) >= LEAST_BYTES
        return self._leaves_some(before) or (is_worth and not before.waits)

    def _leaves_some(self, before: UnderWay) -> bool:
        """Return whether the reply to an exchange will most likely not be all of an update."""
        left = self.update_bytes - (0 if before.waits else self._came_bytes)
        return before.takes and before.asked_bytes < left

    def ask(self, lane: Lane, opening: Request, now_s: float) -> Request:
        """Begin an exchange, whose request says of the run what `opening` does.

        One that is made again although the other may still arrive carries a frame each way, so that no more than
        that is sent twice.
        """
        before = lane.under_way[0] if lane.under_way else None
        bring_bytes, asked_bytes = (
            speed.frame_bytes if lane.doubted else speed.budget_bytes(lane.part_s) for speed in (self.down, self.up)
        )
        goes_on = before is not None and before.takes
        if self.update_bytes and not goes_on:
            asked_bytes = min(asked_bytes, max(LEAST_BYTES, int(FIRST_SHARE * self.update_bytes)))
        takes = lane.carries != DOWN and (before is None or not goes_on or self._leaves_some(before))
        frames = [] if lane.carries == UP else self._next_frames(before, bring_bytes)
        lane.attempt, lane.more = lane.attempt + 1, False
        exchange = UnderWay(
            attempt=lane.attempt,
            asked_bytes=asked_bytes,
            asked_s=now_s,
            patience_s=0.0,
            takes=takes,
            waits=takes and not goes_on,
            follows=before.attempt if before else 0,
            until=frames[-1].next_place if frames else before.until if before else self.out.wanted,
        )
        patience_s = self._patience_s(lane, exchange, sum(len(frame.content) for frame in frames))
        lane.under_way.append(replace(exchange, patience_s=patience_s))
        return replace(
            opening,
            carries=lane.carries if takes else DOWN,
            attempt=lane.attempt,
            follows=exchange.follows,
            wanted=self.inbox.wanted,
            ahead=self.inbox.ahead,
            budget_bytes=asked_bytes,
            frame_bytes=self.up.frame_bytes,
            wait_s=WAIT_S if exchange.waits else 0.0,
            frames=tuple(frames),
        )

    def _next_frames(self, before: UnderWay | None, budget_bytes: int) -> list[Frame]:
        if before is None:
            return self.out.unconfirmed(budget_bytes, self.down.frame_bytes)
        return self.out.after(before.until, budget_bytes, self.down.frame_bytes)

    def _patience_s(self, lane: Lane, exchange: UnderWay, size: int) -> float:
        """How long an exchange may take: what earlier ones took, or all that it may carry where more may come."""
        held_s = min(WAIT_S, 1.5 * lane.held_s + 10.0) if exchange.waits else 0.0
        back = exchange.asked_bytes if lane.was_full else self.up.largest or LEAST_BYTES
        up_s = self.up.patience_s(back) if exchange.takes else 0.0
        return held_s + SLACK_S + self.down.patience_s(size) + up_s

    def note(
        self, lane: Lane, exchange: UnderWay, reply: Reply, fresh: list[Frame], times: tuple[float, ...]
    ) -> None:
        """Learn from an exchange how fast the link is and how long the site waits for its trainer.

        Nothing of the link from one that was made again: what Flower has of the first is not sent twice. The times
        are those when the SuperNode could take it, when it was at the site, left it, and was back.
        """
        begun, arrived, left, ended = times
        brought = sum(len(frame.content) for frame in self.brought(lane, reply))
        came = sum(len(frame.content) for frame in fresh)
        if brought and not lane.silent:
            self.down.note(brought, max((arrived - begun) / 4, arrived - begun - FIXED_S))
        if exchange.takes:
            if not lane.silent:
                self.up.note(came, ended - left)
            if not lane.doubted:
                lane.was_full = came + PART_BYTES > exchange.asked_bytes
        if exchange.waits:
            lane.held_s = left - arrived
        for frame in fresh:
            if frame.round_index > self._round_index:
                self._before_bytes, self._round_index, self._came_bytes = self._came_bytes, frame.round_index, 0
            self._came_bytes += len(frame.content)

    def brought(self, lane: Lane, reply: Reply) -> list[Frame]:
        """Return the frames that an exchange has brought to the site, and none before it."""
        return [] if lane.carries == UP else self.out.between(self.sent_before, reply.wanted)


def site_among(num_sites: int) -> Site:
    """Make one of so many sites, whose replies share what the server can take in at once."""
    return Site(up=Speed(most_bytes=min(MOST_BYTES, TOGETHER_BYTES // num_sites)))
