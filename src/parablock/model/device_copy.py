"""What leaves the model's device for the CPU: by a stream of its own, through pinned memory, part by part.

    device, main stream     ── K local steps ──► y^b ──────────────── goes on
    device, side stream                          └─ part 0 ─ part 1 ─ part 2 ─►
    CPU, compute thread                                     └─ Δ, encoding of part 0 ─ of part 1 ─ …

So a part is worked on while the next one is on its way.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

PART = 1 << 22
"""Elements that are waited for at a time."""


class ArrivingVector(Protocol):
    """A flat vector of which parts are taken, on the CPU: a tensor, or one that is on its way."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """Give some of the elements; `[:]` gives all."""


def copy_to_cpu(flat: Tensor) -> ArrivingVector:
    """Take a vector as it is now to the CPU.

    Args:
        flat: 1-D. On another device than the CPU it must stay as it is until its last part has been taken.
    """
    return flat.clone() if flat.device.type == "cpu" else _DeviceCopy(flat)


class _DeviceCopy:
    """A vector on its way; it is waited for as far as it is looked at."""

    def __init__(self, flat: Tensor) -> None:
        made, stream = torch.Event(flat.device), torch.Stream(flat.device)
        made.record(torch.accelerator.current_stream(flat.device))
        stream.wait_event(made)
        self._here = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._source: Tensor | None = flat  # torch would give its memory to others
        self._arrivals: deque[tuple[int, torch.Event]] = deque()
        self._arrived = 0
        with stream:
            for begin in range(0, flat.numel(), PART):
                end = min(begin + PART, flat.numel())
                self._here[begin:end].copy_(flat[begin:end], non_blocking=True)
                arrival = torch.Event(flat.device)
                arrival.record(stream)
                self._arrivals.append((end, arrival))

    def __getitem__(self, part: slice, /) -> Tensor:
        _, end, _ = part.indices(self._here.numel())
        while self._arrived < end:
            self._arrived, arrival = self._arrivals.popleft()
            arrival.synchronize()
        if not self._arrivals:
            self._source = None
        return self._here[part]
