"""The few names that every room of the house shares."""

from __future__ import annotations

from typing import NewType

ClientId = NewType("ClientId", int)
"""0 … num_clients − 1; aggregation runs in ascending order of it."""

BlockId = NewType("BlockId", int)
"""Index of a block in the ordered partition, 0 … num_blocks − 1."""

RoundIndex = NewType("RoundIndex", int)
"""0-based round."""
