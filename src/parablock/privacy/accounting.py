"""Privacy accounting: ε for a δ, from Google's dp-accounting.

The unit of protection is the client: two runs are neighbours if the updates of one client are replaced by zeros. A
client releases one update, of whatever block, in every round in which it takes part.

`central`: the server adds noise of standard deviation z·C to the sum of updates no longer than C. This is a
Gaussian mechanism with multiplier z. It protects against everybody who sees the model, but not against the server.

`local`: each client adds noise of standard deviation z·C itself. Two updates differ by up to 2·C, so the multiplier
counts half. It also protects against the server.

`distributed`: the clients together do what the server does with `central` (`summed_multiplier` in `protection.py`).
A release is a sum. It also protects against the server.

Cohorts have a fixed size and are drawn from the run's seed, which is not secret. So a smaller participation counts
as fewer rounds of a client, without amplification by sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

from parablock.privacy.protection import effective_multiplier


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
        multiplier = effective_multiplier(self.noise_multiplier, is_local=self.mode == "local")
        return composed_epsilon({multiplier: num_releases}, self.delta)


def composed_epsilon(releases: Mapping[float, int], delta: float) -> float:
    """Return ε of updates that went through Gaussian mechanisms: effective multiplier → number of updates."""
    if releases.get(0.0, 0):
        return inf
    accountant = RdpAccountant()
    for multiplier, count in releases.items():
        accountant.compose(GaussianDpEvent(multiplier), count)
    return float(accountant.get_epsilon(delta))
