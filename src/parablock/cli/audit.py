"""`parablock audit`: verify the logs of sites and servers, and say what they record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from parablock.cli.output import say
from parablock.errors import InputError


def audit(
    logs: Annotated[list[Path], typer.Argument(help="Audit logs: `audit.jsonl` of a site or a server.")],
) -> None:
    """Verify audit logs line by line, and show what they record. Exit code 1: a log has been changed.

    Example: parablock audit site/state/audit.jsonl
    """
    is_sound = True
    for log in logs:
        if not log.is_file():
            raise InputError(f"there is no log {log}", remedy="A site has its log in its state_dir: audit.jsonl.")
        for is_good, line in _lines(log):
            is_sound = is_sound and is_good
            say(line)
    if not is_sound:
        raise typer.Exit(1)


def _lines(log: Path) -> Iterator[tuple[bool, str]]:
    """Yield lines of text about a log, and whether each of them is as it should be."""
    from parablock.storage.audit_log import verify

    found = verify(log)
    entries = found.entries
    if found.bad_line is None:
        yield True, f"✓ {log}: {len(entries)} lines, none changed, removed or moved"
    else:
        yield False, f"✗ {log}, line {found.bad_line}: {found.problem}"
        yield True, f"  what follows is about the {len(entries)} lines before it"
    if not entries:
        return
    yield True, f"  from {entries[0].time} to {entries[-1].time}; the last hash is {entries[-1].hash}"
    for kind, count in Counter(entry.kind for entry in entries).most_common():
        yield True, f"  {kind}: {count}"
    runs = {entry.facts["run"]: None for entry in entries if "run" in entry.facts}
    for run in runs:
        kinds = Counter(entry.kind for entry in entries if entry.facts.get("run") == run)
        yield True, f"  run {run}: " + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    for entry in entries:
        if entry.kind == "refusal":
            yield True, f"  refused at {entry.time}: {entry.facts.get('words', '')}"
