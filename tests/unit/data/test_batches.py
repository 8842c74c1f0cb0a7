"""Claims about batches as a function of (seed, client, step)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from parablock.data.batches import Batch, collate, round_batches
from parablock.data.prompts import IGNORED_LABEL, Example
from parablock.data.sources import Row
from parablock.errors import DataError

PAD = 1


def example_of(number: int, length: int = 3) -> Example:
    """An example that is told by its first id, so that a batch shows whom it holds."""
    ids = (100 + number, *range(2, length + 1))
    labels = (IGNORED_LABEL, *ids[1:])
    return Example(ids, labels, ids[:1], "", Row({}, "a.jsonl", number + 1), False)


def batches_of(num_examples: int, **changes: Any) -> list[list[Batch]]:
    arguments = {
        "seed": 0,
        "client_id": 0,
        "first_step": 0,
        "num_local_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "pad_token_id": PAD,
    }
    return round_batches([example_of(n) for n in range(num_examples)], **{**arguments, **changes})


def members(steps: list[list[Batch]]) -> list[list[int]]:
    """The numbers of the examples of each local step."""
    return [[int(first) - 100 for batch in step for first in batch.input_ids_BT[:, 0]] for step in steps]


def stream(num_examples: int, **changes: Any) -> list[int]:
    return [number for step in members(batches_of(num_examples, **changes)) for number in step]


def test_a_batch_is_padded_on_the_right_to_its_longest_example():
    batch = collate([example_of(0, length=2), example_of(1, length=4)], pad_token_id=PAD)
    assert batch.input_ids_BT.tolist() == [[100, 2, PAD, PAD], [101, 2, 3, 4]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [[-100, 2, -100, -100], [-100, 2, 3, 4]]
    assert {tensor.dtype for tensor in (batch.input_ids_BT, batch.attention_mask_BT, batch.labels_BT)} == {
        torch.int64
    }


def test_every_example_comes_once_in_an_epoch():
    """Ten examples, two to a step: steps 0–4 are the first epoch, steps 5–9 the second."""
    first, second = stream(10, num_local_steps=5), stream(10, num_local_steps=5, first_step=5)
    assert sorted(first) == list(range(10))
    assert sorted(second) == list(range(10))
    assert first != second


def test_a_step_runs_over_the_border_of_epochs():
    """Seven examples, fourteen steps of two: 28 positions are four epochs, though no step ends with the first."""
    seen = stream(7, num_local_steps=14)
    assert [sorted(seen[at : at + 7]) for at in range(0, 28, 7)] == [list(range(7))] * 4


def test_rounds_continue_where_the_one_before_stopped():
    at_once = members(batches_of(7, num_local_steps=12))
    in_rounds = [step for start in (0, 4, 8) for step in members(batches_of(7, first_step=start))]
    assert in_rounds == at_once
    assert members(batches_of(7, first_step=4)) != members(batches_of(7, first_step=3))


def test_the_same_arguments_give_the_same_batches_and_others_do_not():
    base = stream(50)
    assert stream(50) == base
    for change in ({"seed": 1}, {"client_id": 1}, {"first_step": 4}):
        assert stream(50, **change) != base, change


def test_accumulation_splits_the_examples_of_one_large_batch():
    large = batches_of(11, per_device_train_batch_size=6)
    split = batches_of(11, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert members(split) == members(large)
    assert [len(step) for step in large] == [1] * 4
    assert [len(step) for step in split] == [3] * 4
    assert {len(batch.input_ids_BT) for step in split for batch in step} == {2}
    assert members(batches_of(11, per_device_train_batch_size=3)) != members(large)


def test_a_client_with_fewer_examples_than_a_batch_repeats_them():
    steps = members(batches_of(3, per_device_train_batch_size=6, num_local_steps=2))
    assert [Counter(step) for step in steps] == [Counter({0: 2, 1: 2, 2: 2})] * 2
    assert members(batches_of(1, num_local_steps=2)) == [[0, 0], [0, 0]]


def test_a_client_without_examples_is_an_error():
    with pytest.raises(DataError, match="Client 5 has no examples"):
        batches_of(0, client_id=5)
