"""A site's policy at work: it guards the trainer, round by round, with a record of its own on the site's disk."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from parablock.config.keys import RunConfig
from parablock.deploy.policy import Breach, Policy, breaches, own_noise, refusal, steps_breaches
from parablock.engine.remote.frames import Opening
from parablock.errors import ConfigError, LedgerError, PolicyError, TrainingError
from parablock.experiment.protections import counted_noise
from parablock.privacy.protection import effective_multiplier
from parablock.storage.audit_log import AuditEntry, AuditLog
from parablock.storage.release_ledger import LOST, ReleaseLedger
from parablock.training.trainer import Trained, Trainer

LOGGER = logging.getLogger("parablock")
ROUND = "round"
"""The kind of an entry before a round is trained."""
REFUSAL = "refusal"
"""The kind of an entry where the policy refuses a run or a round."""


class SitePolicy:
    """The policy of a site in one run, with what its log remembers of this run and of others.

    Args:
        policy: The site's policy.
        log: The site's audit log.
        run: The run.
        config: The run's configuration, as it would be at this site.
        lost_through: The last round of the run that a lost log may have held; these rounds count as trained.
    """

    def __init__(
        self, policy: Policy, log: AuditLog, run: str, config: RunConfig, *, lost_through: int = -1
    ) -> None:
        self._policy, self._log, self._run, self._config = policy, log, run, config
        noise = own_noise(config) if policy.noise == "own" else counted_noise(config)
        # what a site counts on alone hides its update as local noise does
        is_alone = config.privacy.mode == "local" or policy.noise == "own"
        self._multiplier = effective_multiplier(noise, is_local=is_alone)
        lost = min(lost_through, config.federation.num_rounds - 1)  # a run has no more rounds than it has
        self._lost: dict[str, Any] = {"run": run, "through": lost, "noise_multiplier": self._multiplier}
        self._entries = log.entries()
        self._rounds = _rounds_of(self._entries, self._lost)

    def record_lost(self) -> None:
        """Record what a lost log may have held, unless it stands there: it counts for every run from now on."""
        if self._lost["through"] >= 0 and all(
            entry.facts != self._lost for entry in self._entries if entry.kind == LOST
        ):
            self._log.append(LOST, **self._lost)

    def check_run(self, base_sha256: str) -> None:
        """Check what the run asks for; `base_sha256` is the base model that the server names.

        Raises:
            PolicyError: The policy forbids it.
        """
        self._raise(self.found_in_run(base_sha256), "this run")

    def found_in_run(self, base_sha256: str | None) -> list[Breach]:
        """Return what the run asks for that the policy forbids; None: the base model is not known yet."""
        return [*breaches(self._policy, self._config, base_sha256), *self._epsilon_breaches()]

    def check_rows(self, num_rows: int, left_out: Sequence[str] = ()) -> None:
        """Check whether this site has enough rows that can be learnt; `left_out` says why others cannot.

        Raises:
            PolicyError: It has fewer than an update needs.
        """
        least = self._policy.min_examples_per_round
        found = f"this site has {num_rows} rows, not at least {least}" + "".join(f"; {why}" for why in left_out[:1])
        self._raise([Breach("min_examples_per_round", found)] if num_rows < least else [], "this run")

    def begin_round(self, round_index: int, block_index: int, num_local_steps: int, num_rows: int) -> None:
        """Check a round and record that it is trained.

        Raises:
            RoundRefusedError: The policy forbids this round.
            PolicyError: The policy allows no further round.
        """
        place = self._run, round_index
        ahead = {**self._rounds, place: min(self._multiplier, self._rounds.get(place, self._multiplier))}
        self._raise([*self._budget_breaches(Counter(ahead.values()), round_index)], f"round {round_index + 1}")
        found = [*steps_breaches(self._policy, self._config, num_local_steps, num_local_steps, num_rows)]
        try:
            self._raise(found, f"round {round_index + 1}")
        except PolicyError as error:
            LOGGER.error("%s", error.what)
            raise RoundRefusedError(error.told) from None
        self._log.append(
            ROUND,
            run=self._run,
            round=round_index,
            block=block_index,
            num_local_steps=num_local_steps,
            noise_multiplier=self._multiplier,
        )
        self._rounds = ahead

    def _epsilon_breaches(self) -> Iterator[Breach]:
        """Yield whether all rounds of the run would take more ε than the policy has left."""
        if self._policy.max_epsilon is None:
            return
        num_rounds = self._config.federation.num_rounds  # the server's number: nothing is made for each round
        known = sum(run == self._run and 0 <= t < num_rounds for run, t in self._rounds)
        ahead = Counter(self._rounds.values()) + Counter({self._multiplier: num_rounds - known})
        yield from self._too_large(ahead, "after its last round")

    def _budget_breaches(self, ahead: Counter[float], round_index: int) -> Iterator[Breach]:
        last = self._config.federation.num_rounds - 1
        if not 0 <= round_index <= last:
            yield Breach("max_rounds", f"the run's last round is {last + 1}")
        yield from self._too_large(ahead, "after it")

    def _too_large(self, releases: Counter[float], when: str) -> Iterator[Breach]:
        largest = self._policy.max_epsilon
        if largest is None:
            return
        spent = epsilon_of(releases, self._policy.delta)
        if spent > largest:
            yield Breach("max_epsilon", f"ε would be {spent:.4g} {when}, not at most {largest:g}")

    def _raise(self, found: Sequence[Breach], what: str) -> None:
        if not found:
            return
        error = refusal(found, what)
        self._log.append(REFUSAL, run=self._run, keys=list(error.keys), words=error.what)
        raise error


def check_ledger(releases: ReleaseLedger, opening: Opening) -> None:
    """Check that a site's ledger holds all of its updates that the server has on record, as the server has them.

    Of rounds that are lost nothing is compared. Of those after them it is whether a line is there, and what it says
    from the next multiple of `SPAN` rounds on.

    Raises:
        LedgerError: It does not, and the site's file does not say that it is lost.
    """
    lacking, differing = releases.compare(opening.history)
    if not lacking and not differing:
        return
    own, last, run = releases.last_release, opening.history.last, opening.run
    if own < last:
        what = (
            f"the ledger of this site ends with {f'round {own + 1}' if own >= 0 else 'nothing'} in run {run}, "
            f"and the server has its update of round {last + 1}"
        )
    elif lacking:
        which = f"round {lacking[0] + 1}" + (f" and {len(lacking) - 1} others" if lacking[1:] else "")
        what = f"the ledger of this site lacks {which} in run {run}, of which the server has its updates"
    else:
        first, until = differing[0]
        what = f"the ledger of this site and the server's differ in rounds {first + 1} to {until + 1} of run {run}"
    lost = json.dumps({run: max(last, opening.asked)})
    raise LedgerError(
        what,
        cause="The state_dir was lost, or put back from an older or another copy. What the site would send of "
        "these rounds would be other updates, under other noise. If it was not lost, the server is wrong.",
        remedy="Put back the newest state_dir; if nothing was lost, ask the server's operator, and write nothing. "
        f"If it is lost for good, write `lost_ledgers: {lost}` into the site's file: it then takes part in later "
        "rounds alone, and all up to that one count as released, for good. Lower `policy.max_epsilon` by what the "
        "site has spent in other runs.",
    )


class RoundRefusedError(TrainingError):
    """The policy forbids a round; its only words are the ones that the server may know."""


class GuardedTrainer:
    """Trains as another trainer does, where the site's policy allows the round; see `Trainer`."""

    def __init__(self, trainer: Trainer, guard: SitePolicy, *, tells_loss: bool) -> None:
        self._trainer, self._guard, self._tells_loss = trainer, guard, tells_loss
        self.num_examples, self.step_time_s = trainer.num_examples, trainer.step_time_s

    def train(
        self, round_index: int, block_index: int, num_local_steps: int, steps_before: int, working: Sequence[Tensor]
    ) -> Trained:
        """Take the local steps of a round that the policy allows."""
        self._guard.begin_round(round_index, block_index, num_local_steps, self.num_examples)
        result = self._trainer.train(round_index, block_index, num_local_steps, steps_before, working)
        return Trained(result.trained, result.train_loss if self._tells_loss else None)

    def memory(self) -> dict[str, Tensor]:
        """Return the tensors that have to survive a restart."""
        return self._trainer.memory()

    def remember(self, memory: dict[str, Tensor]) -> None:
        """Restore what `memory` returned."""
        self._trainer.remember(memory)


def epsilon_of(releases: Counter[float], delta: float) -> float:
    """Return ε of releases under noise of these effective multipliers.

    Raises:
        ConfigError: The extra `privacy` is missing.
    """
    try:
        from parablock.privacy.accounting import composed_epsilon
    except ImportError:
        raise ConfigError(
            ["policy.max_epsilon: install its accountant: pip install 'parablock[privacy]'"]
        ) from None
    return composed_epsilon(releases, delta)


def _rounds_of(entries: Sequence[AuditEntry], lost: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Return the rounds that a log remembers, and those that are lost: (run, round) → effective noise multiplier.

    It is the least of all lines of a round: what a lost log held is what one of them says, and nobody knows which.
    """
    rounds: dict[tuple[str, int], float] = {}
    for facts in (*(entry.facts for entry in entries if entry.kind in (ROUND, LOST)), lost):
        of_rounds = range(facts["through"] + 1) if "through" in facts else [int(facts["round"])]
        multiplier = float(facts["noise_multiplier"])
        for place in ((str(facts["run"]), t) for t in of_rounds):
            rounds[place] = min(multiplier, rounds.get(place, multiplier))
    return rounds
