"""Streams of frames: whatever is lost or comes twice, every message arrives once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frames import frame
from parablock.engine.flower.stream import START, Inbox, Outbox, Place
from parablock.errors import CodecError


@given(
    messages=st.lists(st.binary(max_size=40), max_size=8),
    exchanges=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 9), st.sampled_from(["carry", "lose", "twice", "late"])),
        max_size=60,
    ),
)
@settings(max_examples=100, deadline=None)
def test_every_message_arrives_once_and_in_order_whatever_is_lost(messages, exchanges):
    out, inbox, received, late = Outbox(), Inbox(), [], []
    for message in messages:
        out.put(message, 0)
    for budget, longest, fate in [*exchanges, *[(1 << 20, 1 << 20, "carry")] * 2]:
        out.acknowledge(inbox.wanted)
        frames = out.after(inbox.wanted, budget, longest)
        assert frames == out.unconfirmed(budget, longest)
        assert all(len(frame.content) <= longest for frame in frames)
        before, brought = inbox.wanted, len(received)
        for _ in range({"lose": 0, "late": 0, "carry": 1, "twice": 2}[fate]):
            received += [message for message, _ in inbox.take(frames)]
        between = out.between(before, inbox.wanted)
        assert b"".join(f.content for f in between) == b"".join(
            f.content for f in frames if fate in ("carry", "twice")
        )
        assert len(received) - brought == sum(f.next_place.offset == 0 for f in between)
        received += [message for message, _ in inbox.take(late)]  # overtaken by a request of another cut
        late = frames if fate == "late" else []
    out.acknowledge(inbox.wanted)
    assert received == messages
    assert out.is_empty


def test_a_missing_frame_is_an_error_and_a_known_one_is_not():
    inbox = Inbox()
    first, second = frame(0, b"a"), frame(1, b"bcd")
    assert inbox.take([first, first]) == [(b"a", first)]
    with pytest.raises(CodecError, match="byte 0 of message 2 came where byte 0 of message 1"):
        inbox.take([frame(2, b"b")])
    with pytest.raises(CodecError, match="byte 2 of message 1 came where byte 0 of message 1"):
        inbox.take([frame(1, b"d", offset=2)])
    assert inbox.take([frame(1, b"bc", size=3)]) == []
    assert inbox.fresh([second]) == [frame(1, b"d", offset=2)]
    assert inbox.take([second]) == [(b"bcd", frame(1, b"d", offset=2))]


def test_a_message_that_was_made_again_is_taken_from_its_beginning():
    """The sender died in the middle of it, and a measured time stands in it."""
    out, inbox = Outbox(), Inbox()
    out.put(b"1 s, and a delta", 0)
    inbox.take(out.after(inbox.wanted, 6, 6))
    assert inbox.wanted[:2] == (0, 6)
    same, other = Outbox(), Outbox()
    same.put(b"1 s, and a delta", 0)
    other.put(b"2 s, and a delta", 0)
    assert [f.offset for f in same.after(inbox.wanted, 100, 100)] == [6]
    assert [f.offset for f in other.after(inbox.wanted, 100, 100)] == [0]
    inbox.take(other.after(inbox.wanted, 4, 4))
    same.put(b"the next", 1)
    late = same.after(Place(0, 6, same.after(START, 1)[0].checksum), 100)
    assert [(f.message, f.offset) for f in late] == [(0, 6), (1, 0)]
    assert inbox.take(late) == []  # of the one that has died, overtaken: nothing of it is wanted any more
    assert inbox.wanted[:2] == (0, 4)
    assert [message for message, _ in inbox.take(other.after(inbox.wanted, 100))] == [b"2 s, and a delta"]
