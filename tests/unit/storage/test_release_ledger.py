"""The ledger of releases: what it counts, by hand, and what stays after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parablock.errors import CheckpointError, StorageError
from parablock.privacy.accounting import Accountant
from parablock.storage.audit_log import AuditLog
from parablock.storage.release_ledger import ACCOUNT, ASKED, RELEASE, SET, ReleaseLedger, fingerprint
from parablock.wire.quantize import pack


def test_a_round_has_one_set_also_for_the_process_after_it(tmp_path: Path):
    ledger = ReleaseLedger(AuditLog(tmp_path / "a.jsonl"))
    assert ledger.fix(SET, 3, (0, 1, 2)) == (0, 1, 2)
    again = ReleaseLedger(AuditLog(tmp_path / "a.jsonl"))
    assert again.fix(SET, 3, (0, 2)) == (0, 1, 2)
    assert again.fix(SET, 4, (0, 2)) == (0, 2)
    assert ReleaseLedger().fix(SET, 3, (0, 2)) == (0, 2), "it was the log"


def test_a_round_of_a_client_has_one_update_where_something_hides_it(tmp_path: Path):
    log = AuditLog(tmp_path / "a.jsonl")
    ReleaseLedger(log, "run").record(RELEASE, 0, sha256="aa")
    strict, loose = ReleaseLedger(log, "run"), ReleaseLedger(log, "run", is_strict=False)
    assert strict.may_release(0, "aa") and not strict.may_release(0, "bb") and strict.may_release(1, "bb")
    assert loose.may_release(0, "bb")
    assert ReleaseLedger(log, "another run").may_release(0, "bb")


def life(path: Path) -> ReleaseLedger:
    return ReleaseLedger(AuditLog(path))


def test_epsilon_is_that_of_what_was_released_through_five_crashes(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    # round 0: clients 0, 1; round 1: 1 and a stand-in, 2; round 2 is void, and 0 has sent half of its update
    for t, client_id, hash_ in ((0, 0, "a"), (0, 1, "b"), (1, 1, "c"), (1, 2, "d"), (2, 0, "half")):
        life(path).record(ACCOUNT, t, clients=(client_id,), sha256=hash_)  # a process for each: five crashes
    ledger = life(path)
    ledger.record(ACCOUNT, 1, clients=(1,), sha256="c")  # the same bytes again are no release
    assert ledger.releases_by_client() == {0: 2, 1: 2, 2: 1}
    ledger.record(ACCOUNT, 1, clients=(1,), sha256="c trained again")
    assert ledger.releases_by_client() == life(path).releases_by_client() == {0: 2, 1: 3, 2: 1}
    assert ledger.releases_by_client(through=0) == {0: 1, 1: 1}
    account = Accountant(2.0, "local", 1e-5)
    assert account.epsilon(max(ledger.releases_by_client().values())) == account.epsilon(3) > account.epsilon(2)


def test_what_was_asked_for_before_a_crash_counts_unless_it_is_known(tmp_path: Path):
    ledger = life(tmp_path / "a.jsonl")
    ledger.record(ASKED, 0, clients=(0, 1, 2))
    ledger.record(ACCOUNT, 0, clients=(1,), sha256="b")
    assert ledger.releases_by_client() == {1: 1}, "the others may still answer that they have nothing"
    after = life(tmp_path / "a.jsonl")
    assert after.releases_by_client() == {0: 1, 1: 1, 2: 1}
    after.record(ACCOUNT, 0, clients=(0,), sha256="a")
    assert after.releases_by_client() == {0: 1, 1: 1, 2: 1}
    assert after.releases_by_client(through=-1) == {}


def test_a_noisy_mean_is_a_release_of_everybody_in_it():
    ledger = ReleaseLedger()
    ledger.record(ACCOUNT, 0, clients=(0, 1, 2), sha256="m")
    ledger.record(ACCOUNT, 0, clients=(0, 1), sha256="m without 2")  # after a crash
    assert ledger.releases_by_client() == {0: 2, 1: 2, 2: 1}


def test_a_log_that_is_older_than_the_checkpoint_is_refused(tmp_path: Path):
    ledger = life(tmp_path / "a.jsonl")
    ledger.record(ACCOUNT, 0, clients=(0,), sha256="a")
    newest = ledger.newest
    ledger.record(ACCOUNT, 1, clients=(0,), sha256="b")
    life(tmp_path / "a.jsonl").check_holds(newest)
    with pytest.raises(CheckpointError, match="does not hold what the checkpoint says"):
        life(tmp_path / "b.jsonl").check_holds(newest)
    ReleaseLedger().check_holds("")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(StorageError, match="line 1"):
        life(tmp_path / "a.jsonl")


def test_a_fingerprint_is_that_of_the_bytes():
    one, other = (pack(torch.tensor(values), "float32") for values in ([1.0, 2.0], [1.0, 2.0000002]))
    assert fingerprint([one]) == fingerprint([one.part(slice(0, 2))]) != fingerprint([other])
