"""What a server shows of its sites, and what its operator asks of it: files in the run directory, for him alone.

DIR/deployment/status.json    written every second while the server runs
DIR/deployment/control/       empty files: stop, pause, removed-3
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.box import SIMPLE
from rich.table import Table

from parablock.clock import RealClock
from parablock.errors import InputError, unread
from parablock.report.units import format_bytes, format_duration
from parablock.storage.files import write_atomically
from parablock.trace import Trace

if TYPE_CHECKING:  # who only reads a status does not wait for torch
    from parablock.engine.remote.listener import Listener
    from parablock.engine.remote.remote_transport import RemoteTransport

LOOK_S = 1.0
WARN_DAYS = 30
"""How many days before the end of a certificate both ends warn of it."""
STALE_S = 10.0
"""A status that is older than this is of a server that has ended."""


@dataclass(frozen=True)
class Control:
    """What an operator asks of a running server."""

    folder: Path

    @property
    def is_stopping(self) -> bool:
        """Whether it is to save and stop at the next round."""
        return (self.folder / "stop").exists()

    @property
    def is_paused(self) -> bool:
        """Whether it is to begin no round."""
        return (self.folder / "pause").exists()

    @property
    def removed(self) -> set[int]:
        """The clients that are not to take part any more."""
        return {int(path.name.removeprefix("removed-")) for path in self.folder.glob("removed-*")}

    def ask(self, what: str, *, undo: bool = False) -> None:
        """Ask for something, or ask no more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if undo:
            (self.folder / what).unlink(missing_ok=True)
        else:
            (self.folder / what).touch()

    def clear(self) -> None:
        """Forget that a server before was asked to stop."""
        (self.folder / "stop").unlink(missing_ok=True)


def control_of(output_dir: Path) -> Control:
    """Return the control of the server of a run directory."""
    return Control(output_dir / "deployment" / "control")


class StatusBoard:
    """Writes the status of a session while the context lasts, and carries out what the operator asks."""

    def __init__(self, output_dir: Path, trace: Trace, listener: Listener) -> None:
        self._output_dir, self._trace, self._listener = output_dir, trace, listener
        self._control = control_of(output_dir)
        self._clock = RealClock()
        self._is_over = False
        self._transport: RemoteTransport | None = None
        self._bytes_before: dict[int, tuple[int, int]] = {}
        self._began = datetime.now(UTC)

    def __enter__(self) -> StatusBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._clock.threads:
            thread.join()
        with suppress(InputError):
            self.look()

    def watch(self, transport: RemoteTransport) -> None:
        """Begin."""
        from parablock.engine.pipeline import start_thread

        self._transport = transport
        self.look()
        start_thread(self._clock, self._run, "status")

    def _run(self) -> None:
        next_s = 0.0
        while not self._is_over:
            if self._clock.now() >= next_s:
                next_s = self._clock.now() + LOOK_S
                with suppress(InputError):  # a full disk is told by what has to be written
                    self.look()
            self._clock.sleep(0.05)

    def look(self) -> None:
        """Carry out what is asked, and write the status."""
        if self._transport is None:
            return
        self._listener.look()
        for client_id, place in self._transport.places.items():
            if client_id in self._control.removed:
                self._transport.remove(client_id)
            elif place.is_removed:
                self._transport.readmit(client_id)
        write_atomically(self._output_dir / "deployment" / "status.json", json.dumps(self.status(), indent=1))

    def status(self) -> dict[str, Any]:
        """Return what is known of the server and of each site, as plain values."""
        assert self._transport is not None
        sites = []
        for client_id, place in self._transport.places.items():
            up, down = self._bytes_before.get(client_id, (place.up_bytes, place.down_bytes))
            self._bytes_before[client_id] = place.up_bytes, place.down_bytes
            sites.append(
                {
                    "client_id": client_id,
                    "state": _state(self._transport, client_id),
                    "since": _time(place.since_s),
                    "last_round": place.last_round,
                    "up_bytes": place.up_bytes,
                    "down_bytes": place.down_bytes,
                    "waiting_bytes": place.stream.waiting_bytes,
                    "up_bytes_per_s": int((place.up_bytes - up) / LOOK_S),
                    "down_bytes_per_s": int((place.down_bytes - down) / LOOK_S),
                    "sent_again_bytes": place.stream.sent_again_bytes,
                    "certificate": _certificate(self._listener.certificates.get(client_id, b"")),
                }
            )
        return {
            "pid": os.getpid(),
            "port": self._listener.port,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "since": self._began.isoformat(timespec="seconds"),
            "session": self._transport.opening.session,
            "restored_round": self._transport.opening.restored,
            "paused": self._control.is_paused,
            "refused_calls": self._listener.refused,
            "free_disk_bytes": psutil.disk_usage(str(self._output_dir)).free,
            "waiting_for": self._transport.waiting_for,
            "sites": sites,
        }


def _state(transport: RemoteTransport, client_id: int) -> str:
    place = transport.places[client_id]
    if place.is_removed:
        return "removed"
    if transport.is_there(client_id):
        return "connected"
    return "left" if place.must_rejoin and place.incarnation else "cut" if place.incarnation else "not seen"


@lru_cache(maxsize=1024)
def _certificate(pem: bytes) -> dict[str, str] | None:
    """Return the fingerprint and the end of a site's certificate."""
    if not pem:
        return None
    from parablock.deploy.certificates import key_and_end

    fingerprint, not_after = key_and_end(pem)
    return {"key": fingerprint, "not_after": not_after.isoformat(timespec="seconds")}


def read_status(output_dir: Path) -> dict[str, Any]:
    """Read the status of the server of a run directory.

    `running` says whether there is a server now, `completed` whether the run has come to its end.

    Raises:
        InputError: No server has run there.
    """
    path = output_dir / "deployment" / "status.json"
    try:
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise unread(path, error) from None
    except (OSError, ValueError):
        raise InputError(
            f"no server has shown its sites in {output_dir}",
            remedy="Give the --output-dir of `parablock deploy server`; sites show once it listens.",
        ) from None
    age_s = (datetime.now(UTC) - datetime.fromisoformat(status["time"])).total_seconds()
    status["running"] = psutil.pid_exists(status["pid"]) and age_s < STALE_S
    status["completed"] = not status["running"] and _is_completed(output_dir)
    return status


def _is_completed(output_dir: Path) -> bool:
    with suppress(OSError, ValueError):
        summary: dict[str, Any] = json.loads((output_dir / "summary.json").read_text(encoding="utf-8"))
        return summary.get("status") == "completed"
    return False


def status_table(status: dict[str, Any]) -> Table:
    """Return a status as a table for the terminal."""
    now = datetime.now(UTC)
    is_running = status["running"]
    head = f"server (process {status['pid']}) at port {status['port']}"
    if not is_running:
        head += f", ended; last seen {status['time']}"
    if status["completed"]:
        head = f"the run is complete; its server ended {status['time']}"
    elif is_running and status["paused"]:
        head += ", paused"
    awaited = status["waiting_for"] if is_running and not status["paused"] else ""
    table = Table(
        title=head, caption=awaited and f"waits for {awaited}", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in ("client", "state", "for", "rounds", "up", "down", "now", "on its way", "valid for"):
        is_word = column == "state"
        table.add_column(column, justify="left" if is_word else "right", no_wrap=is_word, overflow="fold")
    for site in status["sites"]:
        since = (now - datetime.fromisoformat(site["since"])).total_seconds() if site["since"] else None
        table.add_row(
            str(site["client_id"]),
            site["state"] if is_running else "",
            "" if since is None or not is_running else format_duration(since),
            "" if site["last_round"] < 0 else str(site["last_round"] + 1),
            *(format_bytes(site[key]) for key in ("up_bytes", "down_bytes")),
            f"{format_bytes(site['up_bytes_per_s'] + site['down_bytes_per_s'])}/s" if is_running else "",
            format_bytes(site["waiting_bytes"]) if is_running else "",
            _days(site["certificate"], now),
        )
    return table


def _days(certificate: dict[str, str] | None, now: datetime) -> str:
    if certificate is None:
        return ""
    days = (datetime.fromisoformat(certificate["not_after"]) - now).days
    return f"{days} days" if days > WARN_DAYS else f"[red]{days} days[/red]"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if seconds else ""


def watch(output_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the status every second."""
    clock = RealClock()
    while True:
        yield read_status(output_dir)
        clock.sleep(LOOK_S)
