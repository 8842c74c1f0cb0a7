"""Privacy and robustness as configured: aggregation rule, clipping, noise, secure aggregation."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.robust import Normals, Rule
from parablock.algorithm.schedule import cohort
from parablock.config.keys import RunConfig
from parablock.config.methods import cohort_size
from parablock.engine.update_form import NoiseOfRound
from parablock.errors import ConfigError
from parablock.privacy.protection import Integers, Protection, summed_multiplier, threshold_of
from parablock.storage.audit_log import AuditLog
from parablock.storage.release_ledger import ACCOUNT, SET, ReleaseLedger

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
    return Rule(
        federation.aggregation,
        federation.trim_fraction,
        federation.assumed_attackers,
        None if privacy.mode == "local" else privacy.clip_norm,
        privacy.noise_multiplier if privacy.mode == "central" else 0.0,
    )


def grid_of(config: RunConfig) -> FixedPointGrid | None:
    """Return the grid of fixed-point words; None if updates travel in the wire's format."""
    if not is_secure(config):
        return None
    privacy, size = config.privacy, cohort_size(config.federation.model_dump())
    assert privacy.clip_norm is not None
    if privacy.mode != "distributed":
        return FixedPointGrid(privacy.clip_norm, size)
    return FixedPointGrid(privacy.clip_norm, size, privacy.noise_multiplier, threshold_of(size))


def counted_noise(config: RunConfig) -> float:
    """Return z, less what the sum of discrete Gaussians is short of a Gaussian, which is next to nothing."""
    grid = grid_of(config)
    if config.privacy.mode != "distributed" or grid is None:
        return config.privacy.noise_multiplier
    return summed_multiplier(grid.noise_multiplier, grid.num_clients, grid.noise_variance)


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

    def normals(round_index: int, clients: tuple[int, ...], content: str) -> Normals:
        # the same noise on two sums would reveal their difference
        return Keystream(derive(secret, "server", round_index, *clients, content)).normals

    return normals


def protections(config: RunConfig, secret: bytes | None) -> Callable[[int], Protection | None]:
    """Return a function client_id → clipping and noise of its updates."""
    privacy = config.privacy
    grid = grid_of(config) if adds_noise(config) and privacy.mode == "distributed" else None
    gaussian = None
    if grid is not None:
        from parablock.privacy.discrete_gaussian import DiscreteGaussian

        gaussian = DiscreteGaussian(grid.noise_variance)  # its table takes a while; it serves all clients

    def of_client(client_id: int) -> Protection | None:
        if privacy.clip_norm is None:
            return None
        if not adds_noise(config) or privacy.mode == "central":
            return Protection(privacy.clip_norm)
        from parablock.privacy.keystream import Keystream, derive

        assert secret is not None
        own = derive(secret, "client", client_id)
        if gaussian is not None:

            def integers(round_index: int, content: str) -> Integers:
                return partial(gaussian.draw, Keystream(derive(own, "words", round_index, content)))

            return Protection(privacy.clip_norm, integers=integers)

        def normals(round_index: int, content: str) -> Normals:
            return Keystream(derive(own, "noise", round_index, content)).normals

        return Protection(privacy.clip_norm, privacy.noise_multiplier, normals)

    return of_client


def releases_of(config: RunConfig, log: AuditLog | None, run: str = "", *, lost_through: int = -1) -> ReleaseLedger:
    """Return the ledger of what a client or the server releases; strict where noise or masks hide updates."""
    is_masked = config.privacy.secure_aggregation == "masked"
    is_strict = adds_noise(config) or is_masked
    return ReleaseLedger(log, run, is_strict=is_strict, is_masked=is_masked, lost_through=lost_through)


def privacy_spent(config: RunConfig, releases: ReleaseLedger, through: int | None = None) -> dict[str, Any]:
    """Return ε and δ of the client with the most releases up to a round; empty without noise."""
    kind = SET if config.privacy.mode == "distributed" else ACCOUNT
    return _epsilon(config, releases.releases_by_client(through, kind))


def privacy_planned(config: RunConfig) -> dict[str, Any]:
    """Return ε and δ after all rounds, if each client that is drawn releases one update; empty without noise."""
    federation = config.federation
    cohorts = (
        cohort(t, num_clients=federation.num_clients, participation=federation.participation, seed=config.seed)
        for t in range(federation.num_rounds)
    )
    return _epsilon(config, Counter(client_id for drawn in cohorts for client_id in drawn))


def _epsilon(config: RunConfig, releases: Counter[int]) -> dict[str, Any]:
    privacy = config.privacy
    if not adds_noise(config):
        return {}
    from parablock.privacy.accounting import Accountant

    most = max(releases.values(), default=0)
    return {
        "epsilon": Accountant(counted_noise(config), privacy.mode, privacy.delta).epsilon(most),
        "delta": privacy.delta,
    }
