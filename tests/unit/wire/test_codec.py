from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch

from parablock.errors import CodecError
from parablock.wire.codec import PROTOCOL_VERSION, encode
from parablock.wire.messages import (
    Chunk,
    Finish,
    Mark,
    NewValue,
    RoundStart,
    Update,
    from_bytes,
    new_block_value,
    to_bytes,
)
from parablock.wire.quantize import Vector, pack, payload_bytes
from parablock.wire.sealing import (
    Advertise,
    LeaveOut,
    Letters,
    Partners,
    Reveal,
    Revealed,
    Roster,
    Shares,
    pack_bytes,
)
from sealed_messages import forged, sealed

VALUES = torch.tensor([1.0, -0.1, 3.0e-8, 65504.0])


def update(values: torch.Tensor = VALUES, payload_format: str = "float32") -> Update:
    return Update(5, 2, 3, 120, 4, 1.25, 8, 0.5, 1, 3, pack(values, payload_format))


MESSAGES = [
    update(),
    RoundStart(5, 2, 8, 40, 3, (NewValue(1, 3, 0.5, "value", pack(VALUES, "float32")),)),
    RoundStart(0, 0, 8, 0, -1, ()),
    Finish(7, (NewValue(0, 7, 1.0, "difference", pack(VALUES, "bfloat16")),)),
    Finish(7, (NewValue(0, 7, (1.0, 0.25), "value", pack(VALUES, "float32")),)),
    Mark(8, stop=True),
    Chunk(2, 7, "difference", pack(VALUES, "int4")),
    update(torch.tensor([2**31 - 1, -(2**31), 0], dtype=torch.int32), "word32"),
    Advertise(3, pack_bytes(b"keys"), pack_bytes(b"proof")),
    Roster((0, 3), (8, 4), (0, 5), pack_bytes(b"all the keys"), pack_bytes(b"proof")),
    Shares(3, (4, 0), pack_bytes(b"each"), pack_bytes(b"hash")),
    Letters((0, 4), (1, 3), pack_bytes(b"each"), pack_bytes(b"hash")),
    Partners(5, 3, (1, 2), pack_bytes(b"proof")),
    LeaveOut(3),
    Reveal(5, (0, 3), ((), (1, 2)), (5, 6), pack_bytes(b"the proofs,")),
    Revealed(5, 3, pack_bytes(b"shares")),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_its_bytes(message):
    assert _plain(from_bytes(to_bytes(message))) == _plain(message)
    other = MESSAGES[(MESSAGES.index(message) + 1) % len(MESSAGES)]
    assert _plain(from_bytes(to_bytes(message))) != _plain(other)


def test_float32_is_exact_and_bfloat16_rounds_to_nearest():
    assert torch.equal(from_bytes(to_bytes(update())).delta.values, VALUES)
    seen = from_bytes(to_bytes(update(payload_format="bfloat16"))).delta.values.float()
    assert torch.equal(seen, VALUES.bfloat16().float())
    assert not torch.equal(seen, VALUES)
    # −0.1 in bfloat16 is −0.10009765625, the nearest of 8 significant bits
    assert seen[1].item() == -0.10009765625


@pytest.mark.parametrize(("payload_format", "per_element"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_follow_the_documented_formula(payload_format, per_element):
    sizes = [len(to_bytes(update(torch.zeros(n), payload_format))) for n in (1000, 3000)]
    assert sizes[1] - sizes[0] == 2000 * per_element
    assert payload_bytes(3000, payload_format) == 3000 * per_element
    raw = to_bytes(update(torch.zeros(3000), payload_format))
    header_bytes = struct.unpack_from("<I", raw, 6)[0]
    assert len(raw) == 18 + header_bytes + 3000 * per_element + 4


def test_the_bytes_of_an_update_do_not_depend_on_how_long_it_was_computed():
    measured = (0.0, 0.5, 0.1, 1 / 3, 12.625, 86399.99999999999, 7e-07)
    raw = {seconds: to_bytes(replace(update(), compute_s=seconds)) for seconds in measured}
    assert len({len(message) for message in raw.values()}) == 1
    for seconds, message in raw.items():
        assert _plain(from_bytes(message)) == _plain(replace(update(), compute_s=seconds))
    assert len(to_bytes(replace(update(), round_index=12345))) > len(
        raw[0.5]
    )  # other fields have a width of their own


def test_every_flipped_bit_is_found():
    raw = to_bytes(update())
    from_bytes(raw)
    for position in range(len(raw) * 8):
        altered = bytearray(raw)
        altered[position // 8] ^= 1 << (position % 8)
        with pytest.raises(CodecError):
            from_bytes(bytes(altered))


def test_every_truncation_is_found():
    raw = to_bytes(update())
    for length in range(len(raw)):
        with pytest.raises(CodecError):
            from_bytes(raw[:length])
    with pytest.raises(CodecError, match="arrived with"):
        from_bytes(raw + b"x")


def test_another_protocol_version_says_which():
    raw = bytearray(to_bytes(update())[:-4])
    struct.pack_into("<H", raw, 4, PROTOCOL_VERSION + 1)
    with pytest.raises(
        CodecError, match=rf"version {PROTOCOL_VERSION + 1} .* version {PROTOCOL_VERSION}"
    ) as caught:
        from_bytes(sealed(bytes(raw)))
    assert "same release" in caught.value.remedy


VECTORS = [{"format": "float32", "shape": [1]}]
UPDATE_FIELDS = json.loads(
    '{"kind": "Update", "round_index": 0, "block_index": 0, "client_id": 0, "num_examples": 1, "committed": -1,'
    ' "train_loss": 0.5, "num_local_steps": 1, "compute_s": "5.0e-01", "chunk_index": 0, "num_chunks": 1}'
)


def test_the_forged_update_without_a_fault_is_read():
    message = from_bytes(forged({**UPDATE_FIELDS, "vectors": VECTORS}, b"\0" * 4))
    assert isinstance(message, Update)
    assert message.delta.values.tolist() == [0.0]


@pytest.mark.parametrize(
    "raw",
    [
        forged(b"{not json"),
        forged(b"\xff\xfe"),
        forged([1, 2]),
        forged({"kind": "Update"}),
        forged({"kind": "Nonsense", "vectors": []}),
        forged({"kind": "Mark", "vectors": [], "round_index": "5", "stop": True}),
        forged({"kind": "Mark", "vectors": VECTORS, "round_index": 5, "stop": True}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "vectors": []}),
        forged({**UPDATE_FIELDS, "vectors": VECTORS}, b"\0" * 8),
        forged({**UPDATE_FIELDS, "vectors": [{"format": "float32", "shape": [2**60]}]}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "vectors": [{"format": "float32", "shape": [-1]}]}),
        forged({**UPDATE_FIELDS, "vectors": [{"format": "float64", "shape": [1]}]}, b"\0" * 8),
        forged({**UPDATE_FIELDS, "vectors": [{"format": "float32", "shape": [True]}]}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "vectors": [{"format": ["float32"], "shape": [1]}]}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "num_examples": 1.5, "vectors": VECTORS}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "compute_s": 0.5, "vectors": VECTORS}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "compute_s": "inf", "vectors": VECTORS}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "compute_s": "-1", "vectors": VECTORS}, b"\0" * 4),
        forged({**UPDATE_FIELDS, "compute_s": "soon", "vectors": VECTORS}, b"\0" * 4),
        forged({"kind": "Finish", "committed": 1, "news": [[0, 1, 1.0, "exec"]], "vectors": VECTORS}, b"\0" * 4),
        forged({"kind": "Finish", "committed": 1, "news": [[0, 1]], "vectors": VECTORS}, b"\0" * 4),
        forged(
            {"kind": "Chunk", "block_index": 0, "version": 1, "kind_of_value": "exec", "vectors": VECTORS},
            b"\0" * 4,
        ),
        forged({"kind": "Chunk", "block_index": 0, "version": 1, "vectors": VECTORS}, b"\0" * 4),
        forged({"kind": "Mark"}, payload_length=2**62),
    ],
)
def test_a_message_with_a_right_checksum_and_a_wrong_header_is_a_codec_error(raw):
    with pytest.raises(CodecError):
        from_bytes(raw)


def test_new_values_replace_exactly_or_add_a_difference_whole_or_in_chunks():
    held = torch.tensor([1.0, 2.0])
    value, difference = pack(torch.tensor([0.1, 0.2]), "float32"), pack(torch.tensor([0.5, 0.5]), "bfloat16")
    assert torch.equal(new_block_value(held, 0, "value", [value]), torch.tensor([0.1, 0.2]))
    assert new_block_value(held, 0, "difference", [difference]).tolist() == [1.5, 2.5]
    halves = [pack(torch.tensor([0.1]), "float32"), pack(torch.tensor([0.2]), "float32")]
    assert torch.equal(new_block_value(held, 0, "value", halves), torch.tensor([0.1, 0.2]))
    assert not torch.equal(new_block_value(held, 0, "value", halves[::-1]), torch.tensor([0.1, 0.2]))
    with pytest.raises(CodecError, match=r"3 parameters .* 2"):
        new_block_value(torch.zeros(3), 0, "value", [value])
    with pytest.raises(CodecError, match=r"2 parameters .* 1"):
        new_block_value(held, 0, "value", halves[:1])


def test_encode_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        encode({"train_loss": float("nan")})


def _plain(message: object) -> object:
    if isinstance(message, Vector):
        return message.format, message.num_elements, message.raw.tolist()
    if isinstance(message, tuple):
        return tuple(_plain(part) for part in message)
    if hasattr(message, "__dict__"):
        return type(message).__name__, {name: _plain(value) for name, value in vars(message).items()}
    return message
