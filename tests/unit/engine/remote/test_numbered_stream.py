"""The numbered streams as a state machine: every message once and in order, whatever the line does to frames."""

from __future__ import annotations

import threading
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, permutations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock.engine.remote import numbered_stream
from parablock.engine.remote.frames import BYE, CONFIRM, HEAD, MAX_NOTE_BYTES, NOTE, PART, PART_BYTES
from parablock.engine.remote.numbered_stream import Delivered, NumberedStream
from parablock.errors import CodecError

SIZE = 4
LIMIT = 1000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered_stream, "PART_BYTES", SIZE)


class End:
    """A side, what it got, and what it knows to have arrived."""

    def __init__(self, limit: int = LIMIT, now_s: Callable[[], float] = lambda: 1.0) -> None:
        self.got, self.confirmed = list[Delivered](), list[Delivered]()
        self.stream = NumberedStream(now_s, limit, self.confirmed.append)
        self.connection = 0

    def attach(self, other_wants: int) -> None:
        self.connection = self.stream.attach(other_wants)

    def take(self, frame: bytes, connection: int | None = None) -> bool:
        return self.stream.take(frame, self.connection if connection is None else connection, self.got.append)

    def ready(self) -> bytes | None:
        """The next frame, if there is one at once."""
        stream = self.stream
        has_part = stream._cursor < stream._next_out and stream._window.is_open
        if (stream._confirmed < stream._wanted and not stream._holds) or has_part:
            return stream._next_frame(self.connection)
        return None

    def drain(self) -> list[bytes]:
        return list(iter(self.ready, None))

    @property
    def contents(self) -> list[bytes]:
        return [each.content for each in self.got]


def pair() -> tuple[End, End]:
    one, other = End(), End()
    join(one, other)
    return one, other


def join(one: End, other: End) -> None:
    wants = one.stream.wanted, other.stream.wanted
    one.attach(wants[1])
    other.attach(wants[0])


def exchange(one: End, other: End) -> None:
    while frames := [(end, frame) for end in (one, other) for frame in end.drain()]:
        for end, frame in frames:
            (other if end is one else one).take(frame)


def part(number: int, content: bytes, size: int | None = None, kind: int = PART, t: int = 0) -> bytes:
    return HEAD.pack(kind, number, t, len(content) if size is None else size, 1.0) + content


MESSAGES = [b"", b"abc", b"abcd", b"abcde", b"x" * 12, b"y" * 13, b""]


def test_messages_of_every_length_arrive_whole_and_are_confirmed():
    one, other = pair()
    for t, message in enumerate(MESSAGES):
        one.stream.put(message, t, is_note=t % 2 == 1)
    exchange(one, other)
    assert [(each.content, each.round_index, each.is_note) for each in other.got] == [
        (message, t, t % 2 == 1) for t, message in enumerate(MESSAGES)
    ]
    assert [each.content for each in one.confirmed] == MESSAGES
    assert one.stream.waiting_bytes == 0 and one.stream.flush(0.0)
    assert one.got == other.confirmed == []


def test_every_frame_twice_is_every_message_once():
    one, other = pair()
    for message in MESSAGES:
        one.stream.put(message, 0)
    for frame in one.drain():
        other.take(frame)
        other.take(frame)
    assert other.contents == MESSAGES
    for frame in other.drain() * 2:
        one.take(frame)
    assert [each.content for each in one.confirmed] == MESSAGES


def test_frames_in_another_order_are_refused_and_none_is_taken_for_another():
    one, _ = pair()
    one.stream.put(b"abcdefghij", 0)
    frames = one.drain()
    assert len(frames) == 3
    for order in permutations(frames):
        _, other = pair()
        if list(order) == frames:
            for frame in order:
                other.take(frame)
            assert other.contents == [b"abcdefghij"]
            continue
        with pytest.raises(CodecError, match="was wanted"):
            for frame in order:
                other.take(frame)
        assert other.contents == []


def test_a_frame_of_an_older_connection_is_void():
    one, other = pair()
    one.stream.put(b"abcdefgh", 0)
    first, second = one.drain()
    other.take(first)
    before = other.connection
    join(one, other)
    for late in (second, part(77, b"x"), HEAD.pack(CONFIRM, 999, 0, 0, 0.0), HEAD.pack(BYE, 0, 0, 0, 0.0), b"?"):
        other.take(late, before)
    assert other.contents == [] and other.stream.wanted == 1
    (again,) = one.drain()
    assert again[HEAD.size :] == b"efgh", "what has arrived is not sent again"
    other.take(again)
    assert other.contents == [b"abcdefgh"]
    with pytest.raises(CodecError):
        other.take(part(77, b"x"))


def test_a_process_that_begins_anew_is_told_from_one_that_goes_on():
    one, other = pair()
    one.stream.put(b"abcde", 0)
    exchange(one, other)
    with pytest.raises(CodecError, match="is wanted"):
        one.stream.attach(0)
    assert one.stream.attach(2) == one.connection + 1


@pytest.mark.parametrize("wants", [3, 1 << 62])
def test_what_was_never_sent_cannot_be_wanted_or_confirmed(wants: int):
    one, _ = pair()
    one.stream.put(b"abcde", 0)
    with pytest.raises(CodecError, match="kept"):
        one.stream.attach(wants)
    with pytest.raises(CodecError, match="have been sent"):
        one.take(HEAD.pack(CONFIRM, 1, 0, 0, 0.0))
    one.drain()
    with pytest.raises(CodecError, match="have been sent"):
        one.take(HEAD.pack(CONFIRM, wants, 0, 0, 0.0))
    one.take(HEAD.pack(CONFIRM, 2, 0, 0, 0.0))
    one.take(HEAD.pack(CONFIRM, 1, 0, 0, 0.0))
    assert [each.content for each in one.confirmed] == [b"abcde"]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"x" * (HEAD.size - 1),
        part(0, b"x" * (SIZE + 1)),
        part(0, b"abc", 4),
        part(0, b"abcd", 3),
        part(0, b"abc", 9),
        part(0, b"", 1),
        part(0, b"a", 0),
        part(0, b"abcd", LIMIT + 1),
        part(0, b"abcd", (1 << 64) - 1),
        part(0, b"abcd", MAX_NOTE_BYTES + 1, NOTE),
        part(1, b"abc"),
        part((1 << 64) - 1, b"abc"),
        *(HEAD.pack(kind, 0, 0, 0, 0.0) for kind in (4, 77, 255)),
    ],
    ids=lambda frame: frame[:40].hex(),
)
def test_what_is_no_next_part_is_refused_and_changes_nothing(frame: bytes):
    _, other = pair()
    with pytest.raises(CodecError):
        other.take(frame)
    other.take(part(0, b"abc"))
    assert other.contents == [b"abc"]


@pytest.mark.parametrize(
    "second",
    [
        part(1, b"efgh", 7),
        part(1, b"efg", 8),
        part(1, b"efgh", 9),
        part(1, b"efgh", 8, NOTE),
        part(1, b"efgh", 8, t=1),
    ],
)
def test_a_part_of_another_message_is_refused(second: bytes):
    _, other = pair()
    other.take(part(0, b"abcd", 8))
    with pytest.raises(CodecError, match="not"):
        other.take(second)
    other.take(part(1, b"efgh", 8))
    assert other.contents == [b"abcdefgh"]


def test_a_huge_declared_length_allocates_nothing():
    _, other = pair()
    other.stream._max_message_bytes = 1 << 60
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        other.take(part(0, b"abcd", 1 << 50))
        grown = tracemalloc.get_traced_memory()[1] - before
        kept = bytes(1 << 20)
        seen = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown < 10_000
    assert seen >= len(kept), "what is allocated is seen"


def test_the_limit_is_the_longest_message():
    one, other = End(), End(limit=9)
    join(one, other)
    one.stream.put(b"x" * 9, 0)
    exchange(one, other)
    assert other.contents == [b"x" * 9]
    one.stream.put(b"x" * 10, 0)
    with pytest.raises(CodecError, match="the limit is 9"):
        exchange(one, other)


def test_who_holds_confirms_nothing_and_sends_on_and_the_other_one_stops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numbered_stream, "LEAST_AHEAD_BYTES", 2 * (HEAD.size + SIZE))
    one, other = End(), End()
    one.attach(0), other.attach(0)
    other.stream.hold(True)
    for k in range(9):
        one.stream.put(bytes([k]) * SIZE, 0)
        other.stream.put(b"back", 0)
    sent = one.drain()
    assert len(sent) == 3, "what its window lets go"
    for frame in sent:
        other.take(frame)
    back = other.drain()
    assert [HEAD.unpack_from(frame)[0] for frame in back] == [PART] * 3, "and no confirmation"
    for frame in back:
        one.take(frame)
    assert [HEAD.unpack_from(frame)[0] for frame in one.drain()] == [CONFIRM], "it has to wait"
    other.stream.hold(False)
    for frame in other.drain():
        one.take(frame)
    assert {HEAD.unpack_from(frame)[0] for frame in one.drain()} == {PART}, "it goes on"
    assert len(one.got) == len(other.got) == 3


def test_bye_comes_after_the_last_confirmation_and_ends_the_reader():
    one, other = pair()
    one.stream.put(b"abc", 0)
    said = threading.Thread(target=one.stream.say_bye, args=(5.0,))
    said.start()
    exchange(one, other)
    with pytest.raises(EOFError):
        other.take(one.stream._next_frame(one.connection))
    said.join(5)
    assert not said.is_alive()
    assert not End().stream.say_bye(0.0), "nobody is there to hear it"


def test_a_reader_that_waits_keeps_those_of_later_connections_in_order():
    """The line is cut while a message waits for room: the next one, over a new connection, waits behind it."""
    one, other = pair()
    one.stream.put(b"1st", 0)
    one.stream.put(b"2nd", 0)
    first, second = one.drain()
    is_waiting, may_go_on = threading.Event(), threading.Event()

    def slow(delivered: Delivered) -> None:
        is_waiting.set()
        assert may_go_on.wait(5)
        other.got.append(delivered)

    reader = threading.Thread(target=other.stream.take, args=(first, other.connection, slow))
    reader.start()
    assert is_waiting.wait(5)
    join(one, other)
    later = threading.Thread(target=other.take, args=(second,))
    later.start()
    later.join(0.05)
    assert later.is_alive() and other.contents == []
    may_go_on.set()
    reader.join(5)
    later.join(5)
    assert other.contents == [b"1st", b"2nd"]


class Line:
    """A connection that carries frames in order, and loses all that is on it when it is cut."""

    def __init__(self, one: End, other: End) -> None:
        self.ends, self.ways = (one, other), (deque[bytes](), deque[bytes]())
        self.sent_parts = [0, 0]

    def join(self) -> None:
        for way in self.ways:
            way.clear()
        join(*self.ends)

    def move(self, side: int) -> bool:
        """Put the next frame on the line; return whether there is one."""
        frame = self.ends[side].ready()
        if frame is not None:
            self.sent_parts[side] += frame[0] in (PART, NOTE)
            self.ways[side].append(frame)
        return frame is not None

    def arrive(self, side: int) -> None:
        if self.ways[side]:
            self.ends[1 - side].take(self.ways[side].popleft())

    def settle(self) -> None:
        while any([self.move(0), self.move(1), *self.ways]):
            self.arrive(0)
            self.arrive(1)


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "note", "move", "arrive", "cut"]), st.integers(0, 1), st.binary(max_size=13)),
    max_size=120,
)


@settings(max_examples=250, deadline=None)
@given(STEPS)
def test_over_a_line_that_is_cut_anywhere_every_message_comes_once_and_in_order(steps):
    one, other = End(), End()
    line, put = Line(one, other), ([], [])
    line.join()
    resent = [0, 0]
    for step, side, content in steps:
        if step in ("put", "note"):
            line.ends[side].stream.put(content, len(put[side]), is_note=step == "note")
            put[side].append((content, len(put[side]), step == "note"))
        elif step == "move":
            line.move(side)
        elif step == "arrive":
            line.arrive(side)
        else:
            for here in (0, 1):
                lost = line.ends[here].stream._cursor - line.ends[1 - here].stream.wanted
                assert lost == sum(frame[0] in (PART, NOTE) for frame in line.ways[here])
                resent[here] += lost
            line.join()
    line.settle()
    for side, messages in enumerate(put):
        got = [(each.content, each.round_index, each.is_note) for each in line.ends[1 - side].got]
        told = [(each.content, each.round_index, each.is_note) for each in line.ends[side].confirmed]
        assert got == told == messages
        parts = sum(max(1, -(-len(content) // SIZE)) for content, *_ in messages)
        assert line.sent_parts[side] == parts + resent[side], "only what was on the line is sent again"
        assert line.ends[side].stream.waiting_bytes == 0


def test_a_line_that_is_cut_without_what_is_lost_being_sent_again_would_be_seen():
    one, other = End(), End()
    line = Line(one, other)
    line.join()
    one.stream.put(b"abcdefgh", 0)
    line.move(0)
    line.ways[0].clear()  # lost, and nobody connects again
    with pytest.raises(CodecError, match="was wanted"):
        line.settle()


def test_sent_again_is_counted_in_bytes():
    one, other = pair()
    one.stream.put(b"abcdefghij", 0)
    one.drain()
    join(one, other)
    assert one.stream.sent_again_bytes == 0
    exchange(one, other)
    assert one.stream.sent_again_bytes == 10
    assert other.contents == [b"abcdefghij"]


MEGABIT = 1e6 / 8
CHUNKS = [bytes(4 * PART_BYTES + 141)] * 6
"""Messages as those of `wire.chunk_bytes`: four parts, and a short one."""


def carried(
    mbps: float, round_trip_s: float, cut_s: float = inf, back_s: float = 0.0, messages: list[bytes] = CHUNKS
) -> tuple[float, int]:
    """Carry messages over a line; return its seconds over those of the bytes alone, and what was sent again.

    The line takes all frames at once, as the buffers before a real one take many. A cut loses all that is on it.
    Confirmations wait for `back_s` behind other things.
    """
    now_s, free_s, order, events = 0.0, 0.0, count(), list[tuple[float, int, End, bytes]]()
    one, other = End(1 << 30, lambda: now_s), End(1 << 30, lambda: now_s)
    join(one, other)
    for message in messages:
        one.stream.put(message, 0)
    while True:
        for frame in one.drain():
            free_s = max(now_s, free_s) + len(frame) / (mbps * MEGABIT)
            heappush(events, (free_s + round_trip_s / 2, next(order), other, frame))
        for frame in other.drain():
            heappush(events, (now_s + back_s + round_trip_s / 2, next(order), one, frame))
        if not events:
            break
        now_s, _, end, frame = heappop(events)
        if now_s < cut_s:
            end.take(frame)
        else:
            free_s, cut_s = now_s, inf
            events.clear()
            join(one, other)
    assert other.contents == messages
    return now_s / (sum(map(len, messages)) / (mbps * MEGABIT)), one.stream.sent_again_bytes


@pytest.fixture
def parts_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered_stream, "PART_BYTES", PART_BYTES)


@pytest.mark.usefixtures("parts_of_full_length")
@pytest.mark.parametrize("cut_s", [0.0, 1.0, 4.5, 10.0, 11.1, 29.0, 40.0])
def test_what_a_cut_of_a_slow_line_loses_is_what_it_carries_in_three_seconds_and_one_part(cut_s: float):
    again = carried(4.0, 0.05, cut_s)[1]
    assert 0 < again <= 3 * 4.0 * MEGABIT + PART_BYTES < 2.5 * (1 << 20)


@pytest.mark.usefixtures("parts_of_full_length")
def test_without_that_bound_a_cut_loses_what_the_buffers_before_the_line_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(numbered_stream, "LEAST_AHEAD_BYTES", 1 << 30)
    assert carried(4.0, 0.05, 4.5)[1] > 20 * PART_BYTES


@pytest.mark.usefixtures("parts_of_full_length")
@pytest.mark.parametrize(
    ("mbps", "round_trip_s"), [(4.0, 0.05), (4.0, 1.0), (30.0, 0.3), (30.0, 1.0), (200.0, 0.01), (200.0, 0.4)]
)
def test_the_bound_holds_a_line_up_for_a_round_trip_at_most(mbps: float, round_trip_s: float):
    wires, again = carried(mbps, round_trip_s)
    wire_s = sum(map(len, CHUNKS)) / (mbps * MEGABIT)
    assert (wires - 1) * wire_s <= 2.1 * round_trip_s + 0.01 * wire_s and again == 0


@pytest.mark.usefixtures("parts_of_full_length")
def test_messages_that_are_shorter_than_a_part_have_a_pace_too(monkeypatch: pytest.MonkeyPatch):
    short = [bytes(PART_BYTES // 4)] * 96
    wire_s, round_trip_s = 24 * PART_BYTES / (200 * MEGABIT), 0.2
    assert (carried(200.0, round_trip_s, messages=short)[0] - 1) * wire_s <= 2.1 * round_trip_s
    monkeypatch.setattr(numbered_stream._Pace, "bytes_per_s", lambda _: 0)
    assert (carried(200.0, round_trip_s, messages=short)[0] - 1) * wire_s > 10 * round_trip_s


@pytest.mark.usefixtures("parts_of_full_length")
def test_a_fast_line_waits_once_or_twice_where_confirmations_wait_behind_what_goes_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
):
    """As behind a link that is slow in one direction: the sender would take late confirmations for a slow line."""
    assert carried(200.0, 0.01, back_s=0.6)[0] < 2.3
    assert carried(200.0, 0.01, back_s=4.5)[0] < 16.0
    monkeypatch.setattr(numbered_stream, "AHEAD_S", 0.0)
    assert carried(200.0, 0.01, back_s=4.5)[0] > 40.0


@pytest.mark.usefixtures("parts_of_full_length")
@pytest.mark.parametrize(("stretch_s", "fits"), [(numbered_stream.STRETCH_S, True), (1e-9, False)])
def test_parts_that_lay_ready_while_the_reader_was_busy_are_no_fast_line(
    monkeypatch: pytest.MonkeyPatch, stretch_s: float, fits: bool
):
    monkeypatch.setattr(numbered_stream, "STRETCH_S", stretch_s)
    times = count()
    one, other = End(1 << 30), End(1 << 30, lambda: next(times) / 1e6)
    join(one, other)
    one.stream.put(CHUNKS[0], 0)
    for frame in one.drain():
        other.take(frame)
    pace = HEAD.unpack(other.drain()[-1])[3]
    assert (0 < pace <= PART_BYTES / 0.2) is fits


@pytest.mark.usefixtures("parts_of_full_length")
@pytest.mark.parametrize("most_bytes", [numbered_stream.MOST_AHEAD_BYTES, 1 << 62])
def test_no_pace_lets_more_than_64_mib_and_a_part_be_on_their_way(monkeypatch: pytest.MonkeyPatch, most_bytes: int):
    monkeypatch.setattr(numbered_stream, "MOST_AHEAD_BYTES", most_bytes)
    one, _ = pair()
    for _ in range(20):
        one.stream.put(CHUNKS[0], 0)
    ahead = sum(map(len, one.drain()[1:]))
    one.take(HEAD.pack(CONFIRM, 1, 0, 1 << 60, 0.0))
    ahead += sum(map(len, one.drain()))
    assert (ahead > 79 << 20) if most_bytes > 64 << 20 else (64 << 20 < ahead < (65 << 20) + 4096)


def test_a_pace_that_nobody_could_have_harms_nothing():
    one, other = pair()
    one.stream.put(b"abcde", 0)
    for frame in one.drain():
        other.take(frame)
    one.take(HEAD.pack(CONFIRM, 1, 0, (1 << 64) - 1, float("nan")))
    one.take(HEAD.pack(CONFIRM, 2, 0, 0, float("inf")))
    assert [each.content for each in one.confirmed] == [b"abcde"]


def lines(stream: NumberedStream, connection: int) -> Iterator[bytes]:
    yield from stream.frames(connection)


def test_a_connection_that_ends_ends_its_frames():
    one, _ = pair()
    got = []
    sender = threading.Thread(target=lambda: got.extend(lines(one.stream, one.connection)))
    sender.start()
    one.stream.put(b"abc", 0)
    one.stream.detach(one.connection)
    sender.join(2)
    assert not sender.is_alive()
    one.stream.close()
    assert not one.stream.has_connection and list(one.stream.frames(one.connection)) == []


def test_only_parts_of_messages_and_what_is_newly_confirmed_move_a_run_on():
    """So that a site which sends other frames on and on does not keep a server waiting for its update."""
    one, other = pair()
    one.stream.put(b"12345", 0)
    one.stream.put(b"note", 0, is_note=True)
    parts = one.drain()
    assert [other.take(frame) for frame in parts] == [True, True, False]
    assert [other.take(frame) for frame in parts] == [False] * 3, "they have come before"
    (confirmed,) = other.drain()
    assert [one.take(confirmed) for _ in range(3)] == [True, False, False]
