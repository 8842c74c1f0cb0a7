"""TODO parablock.methods.choose."""

from __future__ import annotations

from collections.abc import Sequence

from parablock.config.methods import APART_METHODS
from parablock.methods.base import Fleet, Job
from parablock.methods.flora import StackedFleet
from parablock.methods.solo import ApartFleet


def make_fleet(job: Job, clients: Sequence[int] | None = None) -> Fleet:
    """Make the fleet that the configured method asks for; see `Fleet`."""
    method = job.config.federation.method
    if method in APART_METHODS:
        return ApartFleet(job)
    return StackedFleet(job, clients) if method == "flora" else Fleet(job, clients)
