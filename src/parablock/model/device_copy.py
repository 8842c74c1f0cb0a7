"""Asynchronous device-to-CPU copy: a flat vector, part by part, on a side stream into pinned memory.

    device, main stream     ── K local steps ──► y^b ──────────────── goes on
    device, side stream                          └─ part 0 ─ part 1 ─ part 2 ─►
    CPU, compute thread                                     └─ Δ, encoding of part 0 ─ of part 1 ─ …

So the CPU works on a part while the next one is being copied.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

PART = 1 << 22
"""Elements that are copied at a time."""


class ArrivingVector(Protocol):
    """A flat vector on the CPU that may still be arriving, such as a tensor."""

    def __getitem__(self, part: slice, /) -> Tensor:
        """Wait for some of the elements and return them; `[:]` returns all."""


def copy_to_cpu(flat: Tensor) -> ArrivingVector:
    """Start a copy of a 1-D vector to the CPU; on another device it must not change until all has been read."""
    return flat.clone() if flat.device.type == "cpu" else _DeviceCopy(flat)


class _DeviceCopy:
    """A vector that is being copied; reading a part waits only for that part."""

    def __init__(self, flat: Tensor) -> None:
        made, stream = torch.Event(flat.device), torch.Stream(flat.device)
        made.record(torch.accelerator.current_stream(flat.device))
        stream.wait_event(made)
        self._here = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._source: Tensor | None = flat  # without a reference, torch would reuse its memory
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
