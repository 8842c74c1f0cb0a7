"""Greetings: what a stranger or another release says is refused in one printable line, and names no folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parablock import __version__
from parablock.engine.remote.frames import (
    MAX_HELLO_BYTES,
    PROTOCOL,
    Hello,
    Opening,
    Reception,
    greeting_from_bytes,
    greeting_to_bytes,
)
from parablock.errors import CodecError

HELLO = Hello(3, "session", "process", 7, 1.5)
OPENING = Opening("run", "session", "train: {}", "abc", 4, {"weights": "abd"}, {"before": 4})
WELCOME = Reception(9, rejoins=True, now_s=2.5, opening=OPENING)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def hello(**changes: object) -> bytes:
    return json.dumps({**json.loads(greeting_to_bytes(HELLO)), **changes}).encode()


def refusal(raw: bytes, kind: type = Hello) -> str:
    with pytest.raises(CodecError) as caught:
        greeting_from_bytes(kind, raw)
    assert caught.value.what.isprintable()
    assert len(caught.value.what) < 400
    return caught.value.what


def test_greetings_come_back_as_they_were():
    assert greeting_from_bytes(Hello, greeting_to_bytes(HELLO)) == HELLO
    assert greeting_from_bytes(Reception, greeting_to_bytes(WELCOME)) == WELCOME
    assert greeting_from_bytes(Reception, greeting_to_bytes(Reception(9, rejoins=True, now_s=2.5))) != WELCOME


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"release": "9.9"}, "9.9"), ({"protocol": PROTOCOL + 1}, str(PROTOCOL + 1)), ({"release": None}, "None")],
)
def test_another_release_or_protocol_is_refused_with_both_named(changes: dict, named: str):
    text = refusal(hello(**changes))
    assert named in text
    assert f"{__version__} (protocol {PROTOCOL})" in text


@pytest.mark.parametrize("release", ["\x1b[2J\nall is well", "\u202eabc", "x" * 5000, ["a"] * 500, {"a": 1}])
def test_a_claimed_release_cannot_write_into_the_log(release: object):
    refusal(hello(release=release)[:MAX_HELLO_BYTES])
    refusal(hello(release=release if not isinstance(release, str) else release[:3000]))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b"[" * 4000,
        hello(client_id="3"),
        hello(client_id=True),
        hello(client_id=-1),
        hello(client_id=1 << 63),
        hello(client_id=10**4000)[:4096],
        hello(wanted=-1),
        hello(sent_s="now"),
        hello(sent_s=float("nan")),
        hello(sent_s=float("inf")),
        hello(session="../../etc"),
        hello(session="a/b"),
        hello(session=".."),
        hello(session="x" * 65),
        hello(incarnation="a b"),
        hello(incarnation="a\n"),
        hello(more=1),
    ],
)
def test_what_is_no_greeting_is_refused(raw: bytes):
    refusal(raw)


def test_a_greeting_is_read_up_to_its_limit_and_no_further():
    padded = hello().ljust(MAX_HELLO_BYTES)
    assert greeting_from_bytes(Hello, padded) == HELLO
    assert "4097 bytes" in refusal(padded + b" ")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "-x", "a\x00"])
@pytest.mark.parametrize("field", ["run", "session"])
def test_a_session_cannot_name_another_folder(field: str, name: str):
    fields = json.loads(greeting_to_bytes(WELCOME))
    fields["opening"][field] = name
    refusal(json.dumps(fields).encode(), Reception)
    fields["opening"][field] = "r-1.2_x"
    assert getattr(greeting_from_bytes(Reception, json.dumps(fields).encode()).opening, field) == "r-1.2_x"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(json.loads(greeting_to_bytes(HELLO)))), JSON)
def test_whatever_a_field_holds_the_only_errors_are_our_own(field: str, value: object):
    try:
        greeting_from_bytes(Hello, hello(**{field: value}))
    except CodecError as error:
        assert error.what.isprintable()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_bytes_come_the_only_errors_are_our_own(raw: bytes):
    with pytest.raises(CodecError):
        greeting_from_bytes(Hello, raw)
