"""A site's memory of a run on its disk, so that its trainer can die at any moment and lose no update.

    RUN/
      finished                there once the run has ended
      latest.json             after its newest local training, before that update left
      mark-000008.json        at the start of round 8, where the server wrote a checkpoint, or a process began
      block-003-S-000012 …    tensors that these files name: new values of blocks, residuals, moments
      update-S-000012-…       the messages of an update, as they were sent, each behind its length

S is the session. A tensor that has not changed is not written again, so a round costs its block and its update.
A JSON file comes last. Each file takes its name when it is whole and on the disk, and a state counts once the names
are too; what no JSON file names is removed. Tensors carry a checksum, and so do messages and JSON files: a damaged
state is passed over.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parablock.algorithm.parablock import NEVER, ClientState
from parablock.errors import CodecError
from parablock.storage.checkpoint import ClientSnapshot, read_rho
from parablock.storage.files import storage, sync, write_atomically, write_beside
from parablock.wire.messages import Update, from_bytes

LATEST, FINISHED = "latest", "finished"
FORMAT_VERSION = 1
_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError),
    *(SafetensorError, CodecError),
)
"""What reading a damaged state may raise."""


@dataclass(frozen=True)
class StoredClient:
    """A client as it was stored.

    Attributes:
        round_index: It holds nothing of this round or a later one.
        session: The session that it is of.
        snapshot: Its versions, updates, residuals and memory.
        blocks: The values of the blocks that have been committed: block → value.
    """

    round_index: int
    session: str
    snapshot: ClientSnapshot
    blocks: dict[int, Tensor]


class SiteStore:
    """The files of one run at one site, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[str, tuple[ref[Tensor], str]] = {}
        self._updates: set[str] = set()
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)

    def save_latest(self, session: str, round_index: int, state: ClientState, snapshot: ClientSnapshot) -> None:
        """Store the client after a round, in the place of the round before."""
        self._save(LATEST, session, round_index, state, snapshot)

    def save_mark(
        self, session: str, round_index: int, state: ClientState, snapshot: ClientSnapshot, *, keep: int
    ) -> None:
        """Store the client at the start of a round; only the newest `keep` marks stay."""
        self._save(f"mark-{round_index:06d}", session, round_index, state, snapshot)
        with storage(self.folder):
            for old in sorted(self.folder.glob("mark-*.json"))[:-keep]:
                old.unlink()
            self._sweep()

    def begin_with(self, stored: StoredClient) -> None:
        """Keep the state that a process begins with, for a server that may go back to a checkpoint of that time."""
        latest, mark = self.folder / f"{LATEST}.json", self.folder / f"mark-{stored.round_index:06d}.json"
        with suppress(*_DAMAGE):  # then the state is not that one
            if _read_entry(latest)["round_index"] == stored.round_index:
                write_atomically(mark, latest.read_text(encoding="utf-8"))

    def finish(self) -> None:
        """Note that the run has ended: its files go with `free_finished`."""
        write_atomically(self.folder / FINISHED, "")

    def free_finished(self) -> None:
        """Remove what is stored of other runs that have ended."""
        for path in self.folder.parent.glob(f"*/{FINISHED}"):
            if path.parent != self.folder:
                shutil.rmtree(path.parent, ignore_errors=True)

    def newest(self, sessions: Mapping[str, int]) -> tuple[StoredClient | None, list[str]]:
        """Return the newest undamaged state of these sessions, and why others were passed over.

        Args:
            sessions: Session → the first of its rounds that do not count any more.
        """
        found, passed_over = [], []
        for path in self.folder.glob("*.json"):
            try:
                entry = _read_entry(path)
                if entry["round_index"] <= sessions.get(entry["session"], -1):
                    found.append((entry["round_index"], path.name, entry))
            except _DAMAGE as error:
                passed_over.append(f"{path.name}: {error}")
        for _, name, entry in sorted(found, key=lambda each: each[:2], reverse=True):
            try:
                return self._load(entry), passed_over
            except _DAMAGE as error:
                passed_over.append(f"{name}: {error}")
        return None, passed_over

    def forget_newer(self, sessions: Mapping[str, int]) -> None:
        """Remove states that the run has gone back behind, or that are of no session of it; damaged ones stay."""
        with storage(self.folder):
            for path in self.folder.glob("*.json"):
                with suppress(*_DAMAGE):
                    entry = _read_entry(path)
                    if entry["round_index"] > sessions.get(entry["session"], -1):
                        path.unlink()
            self._sweep()

    # ── files ───────────────────────────────────────────────────────────────────────────────────────

    def _save(
        self, name: str, session: str, round_index: int, state: ClientState, snapshot: ClientSnapshot
    ) -> None:
        tensors = {f"block-{b:03d}": state.base[b] for b, v in enumerate(state.versions) if v != NEVER}
        tensors |= {f"residual-{b:03d}": value for b, value in snapshot.residuals.items()}
        tensors |= {f"memory-{_safe(key)}": value for key, value in snapshot.memory.items()}
        with storage(self.folder):
            entry = {
                "format_version": FORMAT_VERSION,
                "session": session,
                "round_index": round_index,
                "client_id": snapshot.client_id,
                "versions": state.versions,
                "rho": state.rho,
                "memory": sorted(snapshot.memory),
                "tensors": {key: self._put(key, value, session, round_index) for key, value in tensors.items()},
                "updates": {t: self._put_update(session, t, sent) for t, sent in snapshot.sent.items()},
            }
        text = json.dumps(entry)
        write_atomically(self.folder / f"{name}.json", f"{text}\n{zlib.crc32(text.encode())}")
        with storage(self.folder):
            sync(self.folder)
            self._sweep()

    def _put(self, key: str, value: Tensor, session: str, round_index: int) -> str:
        before = self._written.get(key)
        if before is not None and before[0]() is value:
            return before[1]
        name = f"{key}-{session}-{round_index:06d}"
        stored = value.detach().contiguous().cpu()
        with write_beside(self.folder / name) as beside:
            save_file({"value": stored}, beside, metadata={"crc32": str(_crc(stored))})
        self._written[key] = (ref(value), name)
        return name

    def _put_update(self, session: str, round_index: int, messages: Sequence[bytes]) -> str:
        checksums = b"".join(message[-4:] for message in messages)
        name = f"update-{session}-{round_index:06d}-{zlib.crc32(checksums):08x}"
        if name not in self._updates:  # a file of that name that another process wrote may be damaged
            with write_beside(self.folder / name) as beside, beside.open("wb") as file:
                for message in messages:
                    file.write(len(message).to_bytes(8, "little"))
                    file.write(message)
            self._updates.add(name)
        return name

    def _sweep(self) -> None:
        """Remove what no state names."""
        named = set()
        for path in self.folder.glob("*.json"):
            with suppress(*_DAMAGE):  # nobody will read what a damaged one names
                entry = _read_entry(path)
                named |= {*entry["tensors"].values(), *entry["updates"].values()}
        for path in self.folder.iterdir():
            if re.match(r"\.?(block|residual|memory|update)-", path.name) and path.name not in named:
                path.unlink(missing_ok=True)
        self._written = {key: kept for key, kept in self._written.items() if kept[1] in named}
        self._updates &= named

    def _load(self, entry: Mapping[str, Any]) -> StoredClient:
        values = {key: self._read(name) for key, name in entry["tensors"].items()}
        of_kind = {
            kind: {int(key[len(kind) + 1 :]): value for key, value in values.items() if key.startswith(f"{kind}-")}
            for kind in ("block", "residual")
        }
        versions = tuple(entry["versions"])
        if set(of_kind["block"]) != {b for b, version in enumerate(versions) if version != NEVER}:
            raise ValueError("it lacks the value of a block")
        snapshot = ClientSnapshot(
            entry["client_id"],
            versions,
            read_rho(entry["rho"]),
            {int(t): _read_update(self.folder / name) for t, name in entry["updates"].items()},
            {key: values[f"memory-{_safe(key)}"] for key in entry["memory"]},
            of_kind["residual"],
        )
        return StoredClient(entry["round_index"], entry["session"], snapshot, of_kind["block"])

    def _read(self, name: str) -> Tensor:
        with safe_open(self.folder / name, framework="pt") as file:
            value: Tensor = file.get_tensor("value")
            if file.metadata()["crc32"] != str(_crc(value)):
                raise ValueError(f"{name} has changed since it was written")
        return value


def _read_entry(path: Path) -> dict[str, Any]:
    text, _, checksum = path.read_text(encoding="utf-8").rpartition("\n")
    if checksum != str(zlib.crc32(text.encode())):
        raise ValueError("it has changed since it was written")
    entry: dict[str, Any] = json.loads(text)
    if entry["format_version"] != FORMAT_VERSION:
        raise ValueError(f"it is of format {entry['format_version']}, not {FORMAT_VERSION}")
    return entry


def _read_update(path: Path) -> list[bytes]:
    messages, content, at = [], path.read_bytes(), 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], "little")
        messages.append(content[at + 8 : at + 8 + size])
        if len(messages[-1]) != size:
            raise ValueError(f"{path.name} is cut short")
        at += 8 + size
    updates = [from_bytes(message) for message in messages]
    if not updates or any(
        not isinstance(update, Update) or (update.chunk_index, update.num_chunks) != (index, len(updates))
        for index, update in enumerate(updates)
    ):
        raise ValueError(f"{path.name} is not a whole update")
    return messages


def _crc(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b"")


def _safe(key: str) -> str:
    return key.encode().hex() if not re.fullmatch(r"[A-Za-z0-9_.]+", key) else key
