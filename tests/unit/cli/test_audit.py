"""`parablock audit`: what it says of a sound log and of one that was changed."""

from __future__ import annotations

from pathlib import Path

from parablock.storage.audit_log import AuditLog
from tiny_runs import command


def test_a_log_is_verified_and_told(tmp_path: Path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("join", run="first")
    for t in range(3):
        log.append("round", run="first", round=t)
    last = log.append("refusal", run="second", keys=["min_cohort"], words="too few: 1, not at least 2")
    outcome = command("audit", str(path))
    assert outcome.code == 0, outcome.stderr
    for words in ("5 lines, none changed", last, "run first: join 1, round 3", "too few: 1, not at least 2"):
        assert words in outcome.stdout


def test_a_changed_log_is_named_with_its_line_and_ends_with_1(tmp_path: Path):
    good, bad = (tmp_path / name for name in ("good.jsonl", "bad.jsonl"))
    for path in (good, bad):
        for t in range(3):
            AuditLog(path).append("round", run="first", round=t)
    bad.write_text(bad.read_text().replace('"round":1', '"round":8'))
    outcome = command("audit", str(good), str(bad))
    assert outcome.code == 1
    assert f"✓ {good}" in outcome.stdout and f"✗ {bad}, line 2" in outcome.stdout
    assert command("audit", str(tmp_path / "none")).code == 2
