"""Privacy accounting: ε for a δ, from Google's dp-accounting.

The unit of protection is the client: two runs are neighbours if the updates of one client are replaced by zeros. A
client releases one update, of whatever block, in every round in which it takes part.

`central`: the server adds noise of standard deviation z·C to the sum of updates no longer than C. This is a
Gaussian mechanism with multiplier z. It protects against everybody who sees the model, but not against the server.

`local`: each client adds noise of standard deviation z·C itself. Two updates differ by up to 2·C, so the multiplier
counts half. It also protects against the server.

Cohorts have a fixed size and are drawn from the run's seed, which is not secret. So a smaller participation counts
as fewer rounds of a client, without amplification by sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

LOCAL_DISTANCE = 2.0
"""Largest distance of two updates, in clip norms."""


@dataclass(frozen=True)
class Accountant:
    """The privacy accountant of a run: z (the noise's deviation over the clip norm), central | local, and δ."""

    noise_multiplier: float
    mode: str
    delta: float

    def epsilon(self, num_releases: int) -> float:
        """Return ε after `num_releases` updates of a client.

        Source: Rényi accounting, Mironov 2017, with the conversion of Canonne, Kamath and Steinke 2020.
        """
        if num_releases == 0:
            return 0.0
        multiplier = self.noise_multiplier / (LOCAL_DISTANCE if self.mode == "local" else 1.0)
        accountant = RdpAccountant()
        accountant.compose(GaussianDpEvent(multiplier), num_releases)
        return float(accountant.get_epsilon(self.delta))
