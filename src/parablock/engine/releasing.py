"""What the server gives away of a round, and the account of it: sums without masks, means with noise.

A masked round has one set of clients, which is on the disk before shares are asked for. After a crash it has that
set again, or is void: two sums of one round over different sets would differ by single updates.
"""

from __future__ import annotations

from typing import Any

from parablock.engine.participation import Participation
from parablock.engine.refusals import Refusal, Refusals
from parablock.engine.round_fold import RoundFold
from parablock.errors import MaskingError
from parablock.storage.release_ledger import ACCOUNT, ASKED, ReleaseLedger, fingerprint
from parablock.wire.messages import Update
from parablock.wire.transport import MaskedTransport


class Releasing:
    """The releases of a server.

    Args:
        account: What is counted; see `ServerPlan`.
        ledger: What has been released so far.
        masked: Unmasks sums; None: updates carry no masks.
        refusals: Counts what clients are refused.
        participation: Learns of clients whose shares are false.
    """

    def __init__(
        self,
        account: str,
        ledger: ReleaseLedger,
        masked: MaskedTransport | None,
        refusals: Refusals,
        participation: Participation,
    ) -> None:
        self._account, self._ledger, self._masked = account, ledger, masked
        self._refusals, self._participation = refusals, participation
        if masked is not None:
            masked.on_refusal = refusals.of_masking

    def can_mask(self, client_id: int) -> bool:
        """Return whether a client has what it takes to send updates in this session."""
        return self._masked is None or client_id in self._masked.members

    def unmask(self, fold: RoundFold) -> dict[int, Refusal]:
        """Get the masks of a round's sum; return the clients to take out instead, all if it is lost."""
        if self._masked is None:
            return {}
        try:
            lost = fold.unmask(self._masked)
            for client_id, refusal in lost.items():
                if refusal.reason == "unmasked":
                    self._refusals.count(client_id, refusal)
            return lost
        except MaskingError as error:
            self._refusals.tell(f"round {fold.round_index + 1} is void: {error.what}. {error.cause}".strip())
            if error.client_id is not None:
                self._masked.leave_out(error.client_id)
                false = Refusal("false_share", f"shares that do not unmask round {fold.round_index + 1}")
                self._refusals.count(error.client_id, false)
                self._participation.leaves(error.client_id)
            return dict.fromkeys(fold.expected, Refusal("unmasked", "an update whose mask cannot be taken off"))

    def count_asked(self, round_index: int, clients: tuple[int, ...]) -> None:
        """Note whose updates may come, before they are asked for: after a crash they count as if they had."""
        if self._account == "updates":
            self._ledger.record(ASKED, round_index, clients=clients)

    def count_mean(self, fold: RoundFold, part: slice) -> None:
        """Count a noisy mean with its first part, before it leaves."""
        if self._account == "means" and part.start == 0 and not fold.absurd:
            clients = tuple(fold.expected)
            self._ledger.record(ACCOUNT, fold.round_index, clients=clients, sha256=fold.content)

    def count_update(self, fold: RoundFold, client_id: int) -> None:
        """Count an update that hides behind noise of its client alone, or the part of it that has come."""
        self._count(client_id, fold.round_index, fold.release_of(client_id))

    def forget(self, fold: RoundFold, client_id: int) -> None:
        """Drop what has come of an update that a client does not know any more; it counts, and the next one too."""
        self.count_update(fold, client_id)
        fold.forget(client_id)

    def count_late(self, client_id: int, update: Update) -> None:
        """Count an update that came when its round had ended."""
        if not self._ledger.has_account_of(client_id, update.round_index):
            whole = {"whole": True} if update.num_chunks == 1 else {}
            self._count(client_id, update.round_index, {"sha256": fingerprint([update.delta]), **whole})

    def _count(self, client_id: int, round_index: int, release: dict[str, Any]) -> None:
        if self._account == "updates" and release:
            self._ledger.record(ACCOUNT, round_index, clients=(client_id,), **release)
