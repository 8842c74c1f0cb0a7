"""Cut a client's examples into batches, as a function of (seed, client, step) and of nothing else.

A client's stream is epoch after epoch, each a permutation of its own drawn for (seed, client_id, epoch).
Step k of the client's life takes the positions k·n … (k+1)·n − 1 of the stream, n examples to a step, across
the borders of epochs. So there is no position to remember between rounds and none to restore after a crash.

Shapes: B examples of a micro-batch, T tokens of the longest of them.
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
    """A micro-batch, padded on the right; all three are int64 on the CPU.

    Args:
        input_ids_BT: Token ids.
        attention_mask_BT: 1 for a token, 0 for padding.
        labels_BT: Token ids, or `IGNORED_LABEL` where the loss leaves a token out; never shifted.
    """

    input_ids_BT: torch.Tensor  # noqa: N815
    attention_mask_BT: torch.Tensor  # noqa: N815
    labels_BT: torch.Tensor  # noqa: N815


def collate(examples: Sequence[Example], *, pad_token_id: int) -> Batch:
    """Pad examples to the longest of them.

    Args:
        examples: At least one.
        pad_token_id: The id that fills `input_ids_BT`; masked out, so its value does not matter to the loss.

    Returns:
        One batch with a row for each example, in the given order.
    """
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
    """Make the batches of one client's round.

    Args:
        examples: The client's examples, in the same order in every round.
        seed: The run's seed.
        client_id: Whose stream it is.
        first_step: How many local steps precede this round: round_index × num_local_steps where that is fixed.
        num_local_steps: K, the number of optimizer steps.
        per_device_train_batch_size: Examples of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        pad_token_id: See `collate`.

    Returns:
        For each local step, its micro-batches. A client with fewer examples than a step takes sees some twice.

    Raises:
        DataError: The client has no examples.
    """
    if not examples:
        raise DataError(
            f"Client {client_id} has no examples to train on.",
            cause="It was given no rows, or all of them were skipped because nothing in them is trained on.",
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
    """Give the indices at positions start … start + count − 1 of a client's endless stream."""
    first_epoch, offset = divmod(start, num_examples)
    last_epoch = (start + count - 1) // num_examples
    indices: list[int] = []
    for epoch in range(first_epoch, last_epoch + 1):
        indices += generator_for(seed, "batches", client_id, epoch).permutation(num_examples).tolist()
    return indices[offset : offset + count]
