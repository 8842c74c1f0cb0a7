"""Checkpoints: save and restore a run. The files below are the one list of its state.

    round-000008/
      state.json            the round, versions, ρ, history, progress of the records, hashes
      server.safetensors    x and view of every block, server-optimizer moments, values that were overwritten lately
      client-000.safetensors  its updates in flight, as they were sent; moments and residuals, if kept
      trace.json            the spans so far

Everything else follows from the configuration and the seed: data order, schedules, cohorts. A client's base
is the server's view, so it is not stored. A checkpoint is written beside its place and renamed into it. Every
file is verified when it is read; the checkpoint before stands in for a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from parablock.algorithm.aggregate import Rho
from parablock.algorithm.parablock import Commit, ServerState
from parablock.errors import CheckpointError, unread
from parablock.storage.files import write_folder_beside
from parablock.trace import Span

FORMAT_VERSION = 2
DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError),
    SafetensorError,
)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class ClientSnapshot:
    """A client at the start of a round.

    Attributes:
        versions: Its version of each block.
        rho: Its ρ of each block.
        sent: The messages of its updates in flight: round → messages, in order, as they were sent.
        memory: State that its trainer keeps between visits.
        residuals: With error feedback, the rounding error that is held back of each block.
    """

    client_id: int
    versions: tuple[int, ...]
    rho: tuple[Rho, ...]
    sent: dict[int, list[bytes]]
    memory: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """A run at the start of a round.

    Attributes:
        round_index: The next round.
        server: Its state before it starts that round.
        clients: Every client's snapshot.
        progress: State of the records, as plain values.
        spans: The trace so far.
        overwritten: (last round that may ask for it, a block's value from before a commit).
    """

    round_index: int
    server: ServerState
    clients: tuple[ClientSnapshot, ...]
    progress: dict[str, Any]
    spans: list[Span]
    overwritten: tuple[tuple[int, Commit], ...] = ()


def save_checkpoint(directory: Path, state: RunState, *, keep: int) -> Path:
    """Write `directory/round-NNNNNN`, then remove all but the newest `keep`.

    Raises:
        StorageError: The checkpoint cannot be written; earlier ones are untouched.
    """
    place = directory / f"round-{state.round_index:06d}"
    with write_folder_beside(place) as beside:
        _write_parts(beside, state)
    for old in _checkpoints(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def load_newest(directory: Path) -> tuple[RunState | None, list[str]]:
    """Read the newest undamaged checkpoint.

    Returns:
        The state, and why newer checkpoints were passed over. The state is None if none was ever finished.

    Raises:
        CheckpointError: All checkpoints are damaged, or one may not be read by this user.
    """
    passed_over: list[str] = []
    for place in _checkpoints(directory):
        try:
            return _read(place), passed_over
        except PermissionError as error:  # it is sound, and an older one would not be where the run is
            raise unread(place, error, CheckpointError) from None
        except DAMAGE as error:
            passed_over.append(f"{place.name}: {error}")
    if passed_over:
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged: {'; '.join(passed_over)}",
            cause="Files were changed, or the disk lost them.",
            remedy="Start the run anew in another folder.",
        )
    return None, passed_over


def checkpoints_of(directory: Path) -> list[int]:
    """Return the rounds of all checkpoints, newest first."""
    return [int(place.name.removeprefix("round-")) for place in _checkpoints(directory)]


def _checkpoints(directory: Path) -> list[Path]:
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"round-\d{6,}", path.name)), reverse=True)


def _write_parts(folder: Path, state: RunState) -> None:
    server = {f"params.{b}": value for b, value in enumerate(state.server.params)}
    for b, (seen, value) in enumerate(zip(state.server.view, state.server.params, strict=True)):
        if seen is not value:
            server[f"view.{b}"] = seen
        server |= {f"moments.{b}.{k}": moment for k, moment in enumerate(state.server.moments[b])}
    for n, (_, old) in enumerate(state.overwritten):
        server[f"overwritten.{n}"] = old.value
    save_file(server, folder / "server.safetensors")
    for client in state.clients:
        tensors = {
            f"sent.{t}.{k:06d}": torch.frombuffer(bytearray(message), dtype=torch.uint8)
            for t, messages in client.sent.items()
            for k, message in enumerate(messages)
        }
        tensors |= {f"memory.{name}": value.contiguous() for name, value in client.memory.items()}
        tensors |= {f"residual.{b}": value for b, value in client.residuals.items()}
        save_file(tensors, folder / _client_file(client.client_id))
    (folder / "trace.json").write_text(json.dumps([list(asdict(span).values()) for span in state.spans]))
    meta = {
        "format_version": FORMAT_VERSION,
        "round_index": state.round_index,
        "server": {
            name: getattr(state.server, name)
            for name in ("versions", "rho", "squared_delta", "committed", "history", "local_steps")
        },
        "clients": [{"versions": client.versions, "rho": client.rho} for client in state.clients],
        "progress": state.progress,
        "overwritten": [(t, old.block_index, old.version, old.rho) for t, old in state.overwritten],
        "sha256": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / "state.json").write_text(json.dumps({**meta, "own_sha256": _own_sha256(meta)}, indent=1))


def _read(place: Path) -> RunState:
    meta = json.loads((place / "state.json").read_text())
    if meta["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format is version {meta['format_version']}, this release reads {FORMAT_VERSION}")
    if meta.pop("own_sha256") != _own_sha256(meta):
        raise ValueError("state.json has changed since it was written")
    for name, declared in meta["sha256"].items():
        if _sha256(place / name) != declared:
            raise ValueError(f"{name} has changed since it was written")
    lacking = {"server.safetensors", "trace.json", *map(_client_file, range(len(meta["clients"])))} - set(
        meta["sha256"]
    )
    if lacking:
        raise ValueError(f"state.json has no hash of {', '.join(sorted(lacking))}")
    tensors = load_file(place / "server.safetensors")
    blocks = range(len(meta["server"]["versions"]))
    params = tuple(tensors[f"params.{b}"] for b in blocks)
    server = ServerState(
        params=params,
        view=tuple(tensors.get(f"view.{b}", params[b]) for b in blocks),
        moments=tuple(_read_numbered(tensors, f"moments.{b}.") for b in blocks),
        committed=meta["server"]["committed"],
        **{name: tuple(meta["server"][name]) for name in ("versions", "squared_delta", "history")},
        rho=read_rho(meta["server"]["rho"]),
        local_steps=tuple(map(tuple, meta["server"]["local_steps"])),
    )
    clients = tuple(_read_client(place, i, client) for i, client in enumerate(meta["clients"]))
    spans = [Span(*row) for row in json.loads((place / "trace.json").read_text())]
    overwritten = tuple(
        (t, Commit(b, version, tensors[f"overwritten.{n}"], *read_rho([rho])))
        for n, (t, b, version, rho) in enumerate(meta.get("overwritten", ()))
    )
    return RunState(meta["round_index"], server, clients, meta["progress"], spans, overwritten)


def _read_client(place: Path, client_id: int, meta: Mapping[str, Any]) -> ClientSnapshot:
    tensors = load_file(place / _client_file(client_id))
    parts: dict[str, dict[str, Tensor]] = {"sent": {}, "memory": {}, "residual": {}}
    for name, value in tensors.items():
        kind, key = name.split(".", 1)
        parts[kind][key] = value
    return ClientSnapshot(
        client_id,
        tuple(meta["versions"]),
        read_rho(meta["rho"]),
        _messages(parts["sent"]),
        parts["memory"],
        {int(b): value for b, value in parts["residual"].items()},
    )


def read_rho(saved: Sequence[float | list[float]]) -> tuple[Rho, ...]:
    """Read ρ of every block, which is a list where its kinds of parameters have one each."""
    return tuple(tuple(each) if isinstance(each, list) else each for each in saved)


def _client_file(client_id: int) -> str:
    return f"client-{client_id:03d}.safetensors"


def _messages(tensors: Mapping[str, Tensor]) -> dict[int, list[bytes]]:
    sent: dict[int, list[bytes]] = {}
    for key in sorted(tensors):
        sent.setdefault(int(key.split(".")[0]), []).append(tensors[key].numpy().tobytes())
    return sent


def _read_numbered(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    count = sum(name.startswith(prefix) for name in tensors)
    return tuple(tensors[f"{prefix}{k}"] for k in range(count))


def _own_sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(meta)), sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
