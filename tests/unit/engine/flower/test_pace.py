"""How fast Flower moves the objects of a message."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import push_objects

from parablock.engine.flower.courier import pack
from parablock.engine.flower.exchange import (
    Reply,
)
from parablock.engine.flower.pace import READ_ELEMENTS, push_a_few_at_a_time
from parablock.engine.flower.stream import START, Outbox


def test_what_a_message_carries_is_copied_a_few_objects_at_a_time(monkeypatch: pytest.MonkeyPatch):
    copy, copied, most_ready = ArrayChunk.deflate, list[ArrayChunk](), dict[str, int]()
    monkeypatch.setattr(ArrayChunk, "deflate", lambda chunk: (copied.append(chunk), copy(chunk))[1])

    def push_with(module: SimpleNamespace, name: str) -> dict[str, bytes]:
        sender = Outbox()
        sender.put(bytes(range(256)) * 400, 0)
        record = pack(Reply(0, frames=tuple(sender.after(START, 1 << 20, 1000))), 1000)
        with no_object_id_recompute():
            objects = get_all_nested_objects(record)
            copied.clear()
            pushed = dict[str, bytes]()

            def push(object_id: str, content: bytes) -> None:
                time.sleep(0.002)  # as one that takes longer than a copy
                most_ready[name] = max(most_ready.get(name, 0), len(copied) - len(pushed))
                pushed[object_id] = content

            left_out = next(iter(objects))
            module.push_objects(objects, push, object_ids_to_push=set(objects) - {left_out})
        assert left_out not in pushed
        return pushed

    flowers = SimpleNamespace(push_objects=push_objects)
    ours = SimpleNamespace(push_objects=push_objects)
    for _ in range(2):  # once for each run in a process
        push_a_few_at_a_time(ours)
    everything = push_with(flowers, "Flower's")
    assert push_with(ours, "ours") == everything
    assert len(everything) > 150
    assert most_ready["ours"] <= READ_ELEMENTS
    assert most_ready["Flower's"] > 2 * READ_ELEMENTS
