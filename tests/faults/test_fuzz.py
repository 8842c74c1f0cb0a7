"""Whatever bytes or settings come in, the only errors are our own; `benchmarks/survival.py fuzz` tries more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from parablock.config.load import load_config, parse_config
from parablock.errors import CodecError, ConfigError
from parablock.wire.codec import encode
from parablock.wire.messages import from_bytes
from sealed_messages import every_message, forged, parts_of

MESSAGES = list(every_message(70))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(max_examples=300, deadline=None)


def decode_or_refuse(raw: bytes) -> bool:
    """Decode; tell whether it was a message."""
    try:
        from_bytes(raw)
    except CodecError:
        return False
    return True


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw: bytes):
    assert not decode_or_refuse(raw)
    assert not decode_or_refuse(b"PBLK" + raw)


@FUZZ
@given(st.sampled_from(MESSAGES), st.data())
def test_no_changed_byte_goes_unnoticed(raw: bytes, data: st.DataObject):
    assert decode_or_refuse(raw)
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    assert decode_or_refuse(bytes(changed)) == (bytes(changed) == raw)
    assert not decode_or_refuse(raw[: data.draw(st.integers(0, len(raw) - 1))])


@FUZZ
@given(st.sampled_from(MESSAGES), st.data())
@example(MESSAGES[0], None)
def test_a_header_that_lies_under_a_right_checksum_is_refused_or_makes_a_message(raw: bytes, data):
    header, payload = parts_of(raw)
    if data is not None:
        for _ in range(data.draw(st.integers(1, 3))):
            header[data.draw(st.sampled_from([*header, "another"]))] = data.draw(JSON)
    decode_or_refuse(forged(header, payload))


LIES = {
    "more elements than a float can count": {"vectors": [{"format": "int4", "shape": [10**400]}]},
    "a number of too many digits": {"round_index": 10**4000},
    "a nest": {"vectors": json.loads("[" * 400 + "]" * 400)},
}


@pytest.mark.parametrize("case", LIES)
def test_lies_that_have_brought_decoders_down_are_refused(case: str):
    header, payload = parts_of(MESSAGES[0])
    assert decode_or_refuse(forged(header, payload))
    if case == "a number of too many digits":  # json.dumps would not write it either
        text = json.dumps(header).replace('"round_index": 5', f'"round_index": {"9" * 5000}')
        assert not decode_or_refuse(forged(text.encode(), payload))
        return
    assert not decode_or_refuse(forged(header | LIES[case], payload))


def test_a_header_nested_without_end_is_refused():
    assert not decode_or_refuse(forged(b'{"kind":' + b"[" * 200_000))
    assert decode_or_refuse(encode({"kind": "Skip", "round_index": 3, "problem": "the loss is not finite"}))
    for said in ("x" * 1001, "two\nlines", 3):
        assert not decode_or_refuse(encode({"kind": "Skip", "round_index": 3, "problem": said}))


# -- configurations -------------------------------------------------------------------------------------------

REQUIRED = {"model": {"name_or_path": "m"}, "data": {"train": ["a.jsonl"]}}
SECTIONS = list(parse_config(REQUIRED).model_dump())
NAMES = st.sampled_from([*SECTIONS, "client", "num_clients", "delay", "format", "value"]) | st.text(max_size=6)
TEXTS = [
    "seed: 2020-13-45",
    "seed: !!bool maybe",
    "seed: !!timestamp never",
    "seed: !!int x",
    "seed: !!python/object/apply:os.system [ls]",
    f"seed: {'9' * 5000}",
    "seed: " + "[" * 5000,
    "? [a, b]\n: c",
    "a: &a [*a]\nmodel: *a",
    "model: &m {name_or_path: m}\ndata: {<<: *m, train: [a]}",
    "\x00",
    "- 1",
    f"{'x' * 100_000}: 1",
]


def parse_or_refuse(tree: object) -> bool:
    try:
        parse_config(tree)  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


@FUZZ
@given(st.dictionaries(NAMES, st.dictionaries(NAMES, JSON, max_size=3) | JSON, max_size=4))
def test_any_tree_is_a_configuration_or_refused_as_one(tree: dict[str, object]):
    assert parse_or_refuse(REQUIRED)
    parse_or_refuse(tree)
    parse_or_refuse(REQUIRED | tree)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:24]))
def test_yaml_that_has_brought_parsers_down_is_refused(text: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
    path.write_text("model: {name_or_path: m}\ndata: {train: [a.jsonl]}\n")
    load_config(path, ["seed=3"])
    with pytest.raises(ConfigError):
        load_config(path, [text.replace(": ", "=", 1)])
