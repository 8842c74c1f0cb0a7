"""Batches of a client's examples, as a pure function of (seed, client, step).

A client's stream is a sequence of epochs, each a permutation drawn for (seed, client_id, epoch). With n examples a
step, step k of the client takes the positions k·n … (k+1)·n − 1 of the stream, across epochs. So no position has to
be remembered between rounds or restored after a crash.

Shapes: B examples of a micro-batch, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parablock.data.prompts import IGNORED_LABEL, Example
from parablock.errors import DataError
from parablock.seeding import generator_for


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A micro-batch, padded on the right; all tensors are int64 on the CPU.

    The mask is 1 for a token and 0 for padding. The labels are not shifted; the loss ignores `IGNORED_LABEL`.
    """

    input_ids_BT: torch.Tensor  # noqa: N815
    attention_mask_BT: torch.Tensor  # noqa: N815
    labels_BT: torch.Tensor  # noqa: N815


def collate(examples: Sequence[Example], *, pad_token_id: int) -> Batch:
    """Pad at least one example to the longest one; return a batch with a row for each, in the given order."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.full(shape, pad_token_id, dtype=torch.long)
    attention_mask_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED_LABEL, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids_BT[row, :length] = torch.tensor(example.input_ids)
        attention_mask_BT[row, :length] = 1
        labels_BT[row, :length] = torch.tensor(example.labels)
    return Batch(input_ids_BT, attention_mask_BT, labels_BT)


def round_batches(
    examples: Sequence[Example],
    *,
    seed: int,
    client_id: int,
    first_step: int,
    num_local_steps: int,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    pad_token_id: int,
) -> list[list[Batch]]:
    """Return the micro-batches of each local step of one client's round.

    The examples have the same order in every round, and `first_step` counts the local steps of all rounds before.
    If a step takes more examples than there are, some repeat.

    Raises:
        DataError: The client has no examples.
    """
    if not examples:
        raise DataError(
            f"Client {client_id} has no examples to train on.",
            cause="It has no rows, or all its rows were skipped because they have no token to train on.",
            remedy="Look at the histogram and the list of skipped rows; raise data.max_length or leave it out.",
        )
    size = per_device_train_batch_size
    per_step = size * gradient_accumulation_steps
    order = _stream(len(examples), seed, client_id, start=first_step * per_step, count=num_local_steps * per_step)
    micro_batches = [
        collate([examples[index] for index in order[at : at + size]], pad_token_id=pad_token_id)
        for at in range(0, len(order), size)
    ]
    return [
        micro_batches[at : at + gradient_accumulation_steps]
        for at in range(0, len(micro_batches), gradient_accumulation_steps)
    ]


def _stream(num_examples: int, seed: int, client_id: int, *, start: int, count: int) -> list[int]:
    """Return the indices at positions start … start + count − 1 of a client's endless stream."""
    first_epoch, offset = divmod(start, num_examples)
    last_epoch = (start + count - 1) // num_examples
    indices: list[int] = []
    for epoch in range(first_epoch, last_epoch + 1):
        indices += generator_for(seed, "batches", client_id, epoch).permutation(num_examples).tolist()
    return indices[offset : offset + count]
