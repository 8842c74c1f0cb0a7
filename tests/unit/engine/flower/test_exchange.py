"""Headers of exchanges: they give back what was written, and broken ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frames import REQUEST
from parablock.engine.flower.exchange import (
    Reply,
    error_of,
    frame_lengths,
    header_of,
    reply_of,
    request_of,
    word_of,
)
from parablock.engine.flower.stream import Frame, Place
from parablock.errors import CodecError, InputError, StorageError


def test_headers_say_all_and_give_it_back():
    frames = (Frame(4, 3, 5, 99, 2, b"xy"), Frame(5, 0, 0, 1, 2, b""))
    request = replace(REQUEST, frames=frames, wanted=Place(7, 2, 9), restore=3)
    assert frame_lengths(header_of(request)) == [2, 0]
    assert request_of(header_of(request), [b"xy", b""]) == request
    reply = Reply(
        1, wanted=Place(2, 0, 0), held_rounds=(1, 2), spans=(("compute", "computing", 0.5, 1.0, {"a": 1}),)
    )
    assert reply_of(header_of(reply), []) == reply
    with pytest.raises(CodecError, match="not a Reply"):
        reply_of(header_of(request), [b"xy", b""])
    with pytest.raises(CodecError, match="lengths"):
        request_of(header_of(request), [b"x", b""])


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        '{"protocol": 99, "frames": []}',
        '{"protocol": 3, "frames": [[0, 0, 99999999999, 1, 0, 99999999999]]}',
        '{"protocol": 3, "frames": [[-1, 0, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, true, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, 1, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, 1, 1, 1, 0, 0]]}',
        '{"protocol": 3, "frames": [[0, 0, 1, 1, 0, -1]]}',
        '{"protocol": 3, "frames": [[0, 0, 1, 1, 1]]}',
        '{"protocol": 3, "kind": "Request", "frames": [], "surprise": 1}',
    ],
)
def test_a_broken_header_is_refused_before_anything_is_allocated(broken: str):
    with pytest.raises(CodecError, match="cannot be read"):
        request_of(broken, [])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(vars(Reply(0)))), value=ANYTHING)
@settings(max_examples=300, deadline=None)
def test_whatever_a_site_says_is_taken_as_it_is_meant_or_refused(name: str, value: object):
    said = json.loads(header_of(Reply(0, error=("what", "", "", 2))))
    said[name] = value
    try:
        reply = reply_of(json.dumps(said), [])
    except CodecError:
        return
    assert len(reply.wanted) == 3 and all(type(number) is int for number in reply.wanted)
    assert all(len(span) == 5 for span in reply.spans)
    assert len(reply.error) in (0, 4)


def test_a_sites_error_keeps_its_words_and_its_fault():
    told = reply_of(header_of(Reply(1, error=word_of(StorageError("full", cause="c", remedy="r")))), [])
    error = error_of("client 1", told.error)
    assert isinstance(error, InputError)
    assert (error.what, error.cause, error.remedy) == ("client 1: full", "c", "r")
    assert error_of("client 1", word_of(KeyError("x"))).exit_code == 1


def test_a_sites_error_arrives_also_with_text_that_is_no_text():
    told = reply_of(header_of(Reply(1, error=word_of(StorageError("no \udcff here")))), [])
    assert told.error[0] == "no \\udcff here"


@pytest.mark.parametrize("place", [[1], [0, 0], {"message": 0, "offset": 0}, [0, 0, 0, 0]])
def test_a_place_is_three_numbers(place: object):
    said = json.loads(header_of(Reply(0)))
    assert reply_of(json.dumps({**said, "wanted": [0, 0, 0]}), []).wanted == (0, 0, 0)
    with pytest.raises(CodecError, match="wanted"):
        reply_of(json.dumps({**said, "wanted": place}), [])
