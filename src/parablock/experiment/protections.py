"""Privacy and robustness as configured: aggregation rule, clipping, noise, secure aggregation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.robust import Normals, Rule
from parablock.algorithm.schedule import cohort
from parablock.config.keys import RunConfig
from parablock.config.methods import cohort_size
from parablock.engine.update_form import NoiseOfRound
from parablock.errors import ConfigError
from parablock.privacy.protection import Protection, threshold_of

if TYPE_CHECKING:
    from parablock.privacy.secure_aggregation import SecureAggregation

EXTRA = ("cryptography", "dp_accounting")


def is_secure(config: RunConfig) -> bool:
    """Return whether updates travel as fixed-point words, masked or not."""
    return config.privacy.secure_aggregation != "none"


def adds_noise(config: RunConfig) -> bool:
    """Return whether updates or their mean are noisy, which takes a secret key."""
    return config.privacy.noise_multiplier > 0


def check_privacy_extra(config: RunConfig) -> None:
    """Raise a ConfigError if the run needs the extra `privacy` and the extra is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing and (adds_noise(config) or config.privacy.secure_aggregation == "masked"):
        raise ConfigError(
            [f"privacy: needs {', '.join(missing)}; install it with: pip install 'parablock[privacy]'"]
        )


def new_secret() -> bytes:
    """Draw the key of a run's noise."""
    from parablock.privacy.keystream import new_key

    return new_key()


def aggregation_rule(config: RunConfig) -> Rule:
    """Return the rule that makes one update of a round's updates."""
    federation, privacy = config.federation, config.privacy
    is_central = privacy.mode == "central"
    return Rule(
        federation.aggregation,
        federation.trim_fraction,
        federation.assumed_attackers,
        privacy.clip_norm if is_central else None,
        privacy.noise_multiplier if is_central else 0.0,
    )


def grid_of(config: RunConfig) -> FixedPointGrid | None:
    """Return the grid of fixed-point words; None if updates travel in the wire's format."""
    if not is_secure(config):
        return None
    assert config.privacy.clip_norm is not None
    return FixedPointGrid(config.privacy.clip_norm, cohort_size(config.federation.model_dump()))


def fewest_updates(config: RunConfig) -> int:
    """Return how many updates a commit needs; with secret sharing, all but a third of the cohort."""
    fewest = config.federation.min_updates
    return max(fewest, threshold_of(cohort_size(config.federation.model_dump()))) if is_secure(config) else fewest


def masking_of(config: RunConfig) -> SecureAggregation | None:
    """Return the masking of updates; None if the server sees single ones."""
    if config.privacy.secure_aggregation != "masked":
        return None
    from parablock.privacy.secure_aggregation import SecureAggregation

    federation = config.federation
    return SecureAggregation(
        federation.num_clients,
        federation.num_rounds,
        federation.participation,
        config.seed,
        federation.stall_timeout_s,
    )


def noise_of_the_server(config: RunConfig, secret: bytes | None) -> NoiseOfRound | None:
    """Return a function (round, clients) → noise; None if the server adds none."""
    if not adds_noise(config) or config.privacy.mode != "central":
        return None
    from parablock.privacy.keystream import Keystream, derive

    assert secret is not None

    def normals(round_index: int, clients: tuple[int, ...]) -> Normals:
        # the same noise on the sums of two sets of clients would reveal their difference
        return Keystream(derive(secret, "server", round_index, *clients)).normals

    return normals


def protections(config: RunConfig, secret: bytes | None) -> Callable[[int], Protection | None]:
    """Return a function client_id → clipping and noise of its updates."""
    privacy = config.privacy

    def of_client(client_id: int) -> Protection | None:
        if privacy.clip_norm is None:
            return None
        if not adds_noise(config) or privacy.mode == "central":
            return Protection(privacy.clip_norm)
        from parablock.privacy.keystream import Keystream, derive

        assert secret is not None
        own = derive(secret, "client", client_id)
        return Protection(
            privacy.clip_norm, privacy.noise_multiplier, lambda t: Keystream(derive(own, "noise", t)).normals
        )

    return of_client


def privacy_spent(config: RunConfig, num_rounds: int) -> dict[str, Any]:
    """Return ε and δ of the client that was asked most often in these rounds; empty without noise."""
    privacy, federation = config.privacy, config.federation
    if not adds_noise(config):
        return {}
    from parablock.privacy.accounting import Accountant

    asked = [0] * federation.num_clients
    for t in range(num_rounds):
        for client_id in cohort(
            t, num_clients=federation.num_clients, participation=federation.participation, seed=config.seed
        ):
            asked[client_id] += 1
    accountant = Accountant(privacy.noise_multiplier, privacy.mode, privacy.delta)
    return {"epsilon": accountant.epsilon(max(asked)), "delta": privacy.delta}
