"""How much noise protects a client: ε for a δ, from Google's dp-accounting.

The unit is the client: two runs are neighbours when they differ in all that one client has, its updates being
replaced by zeros. Every round in which a client is asked releases its update once, whichever block it is of.

`central`: the server adds noise of standard deviation z·C to the sum of updates no longer than C, so that one
client's update is hidden among as much noise as a Gaussian mechanism of multiplier z has. The protection is against
those who see the model, not against the server.

`local`: each client adds noise of that deviation itself. Here two inputs are any two updates, which are up to 2·C
apart, so that the multiplier counts half. The protection is against the server too.

Cohorts are drawn from the run's seed, which everybody knows, and by number, not each client by itself. So a smaller
participation counts as fewer rounds of a client, and nothing is claimed for the secrecy of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from dp_accounting import GaussianDpEvent
from dp_accounting.rdp import RdpAccountant

LOCAL_DISTANCE = 2.0
"""How many clip norms two updates can be apart."""


@dataclass(frozen=True)
class Accountant:
    """What noise is worth.

    Attributes:
        noise_multiplier: z: the noise's standard deviation over the clip norm.
        mode: central | local.
        delta: δ.
    """

    noise_multiplier: float
    mode: str
    delta: float

    def epsilon(self, num_releases: int) -> float:
        """Give ε after a client's update has been released so many times.

        Source: Rényi accounting, Mironov 2017, with the conversion of Canonne, Kamath and Steinke 2020.
        """
        if num_releases == 0:
            return 0.0
        multiplier = self.noise_multiplier / (LOCAL_DISTANCE if self.mode == "local" else 1.0)
        accountant = RdpAccountant()
        accountant.compose(GaussianDpEvent(multiplier), num_releases)
        return float(accountant.get_epsilon(self.delta))
