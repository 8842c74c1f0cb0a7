"""The audit log of a server: which sessions there were, who was let in and refused, and whose updates counted.

Callers without a certificate are not in it: it never ends, and anybody could fill it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from parablock.algorithm.parablock import ServerState
from parablock.engine.contract import EngineInput
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_engine import RunFacts
from parablock.storage.audit_log import FILE_NAME, AuditLog
from parablock.wire.messages import Update
from parablock.wire.transport import Traffic


def server_log_of(output_dir: Path) -> AuditLog:
    """Return the audit log of the server of a run directory.

    Raises:
        StorageError: It has been damaged.
    """
    return AuditLog(output_dir / "deployment" / FILE_NAME)


def audited(given: EngineInput, log: AuditLog, facts: RunFacts) -> EngineInput:
    """Return the input of an engine whose hooks write into the log too, before they do anything else."""
    hooks, resumed = given.hooks, given.resumed
    log.append(
        "session",
        run=facts.run,
        config_sha256=sha256(facts.config.encode()).hexdigest(),
        base_sha256=facts.base_sha256,
        first_round=0 if resumed is None else resumed.round_index,
    )

    def on_commit(state: ServerState, updates: list[Update], traffic: Traffic) -> None:
        t = state.committed
        clients = [update.client_id for update in updates]
        log.append("commit", run=facts.run, round=t, block=state.history[t], clients=clients)
        hooks.on_commit(state, updates, traffic)

    def on_event(words: str) -> None:
        log.append("event", run=facts.run, words=words)
        hooks.on_event(words)

    return replace(given, hooks=replace(hooks, on_commit=on_commit, on_event=on_event))


def audit_door(listener: Listener, log: AuditLog, tell: Callable[[str], None]) -> None:
    """Let the log have what is told of the door, before it is told."""

    def tell_and_record(words: str) -> None:
        log.append("door", words=words)
        tell(words)

    listener.tell, listener.tell_of_unnamed = tell_and_record, tell
