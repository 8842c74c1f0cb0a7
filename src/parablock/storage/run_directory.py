"""The run directory: all files of one run, and the totals of its rows and spans."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from parablock.errors import CheckpointError, ModelError, StorageError, did_you_mean, unread
from parablock.printable import as_argument
from parablock.storage.files import check_writable, lock_folder, storage, write_atomically, write_beside
from parablock.trace import Span, times_by_client, write_chrome_trace

SECRET_BYTES = 32
"""Length of the key of a run's noise."""
Row = dict[str, Any]
"""One line of `metrics.jsonl`."""


class RunDirectory:
    """The files of one run, in a folder that `create` makes."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config, self.manifest = self.path / "config.yaml", self.path / "manifest.json"
        self.metrics, self.trace = self.path / "metrics.jsonl", self.path / "trace.json"
        self.summary, self.model = self.path / "summary.json", self.path / "model"
        self.checkpoints, self.answers = self.path / "checkpoints", self.path / "answers.json"
        self.secret = self.path / "privacy.key"

    def check_unused(self) -> None:
        """Refuse a folder that holds a run already or cannot be made, with a `StorageError`."""
        check_writable(self.path)
        if self.config.exists():
            with lock_folder(self.path, "Choose another --output-dir, or wait for its end."):
                pass  # nobody is at work there
            raise StorageError(
                f"{self.path} holds a run already",
                cause="A run never writes over another one.",
                remedy=self._instead(),
            )

    def _instead(self) -> str:
        with suppress(OSError, CheckpointError):
            if self.read_summary().get("status") == "completed":
                return f"Choose another --output-dir, or look at it: parablock eval {as_argument(self.path)}"
        return f"Choose another --output-dir, or go on with it: {self._resume()}"

    def create(self, config_yaml: str, manifest: dict[str, Any], secret: bytes | None = None) -> None:
        """Make the folder with its manifest, a key of noise, and last its configuration; see `check_unused`."""
        self.check_unused()
        made = [place for place in (self.path, *self.path.absolute().parents) if not place.exists()]
        try:
            with storage(self.path):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.metrics.write_text("", encoding="utf-8")
            write_atomically(self.manifest, json.dumps(manifest, indent=2) + "\n")
            if secret is not None:
                self.write_secret(secret)
            write_atomically(self.config, config_yaml)
        except StorageError:
            self._unmake(made)
            raise

    def _unmake(self, folders: Sequence[Path]) -> None:
        """Remove the files and folders that `create` has made; folders that were there before stay."""
        for path in (self.config, self.manifest, self.metrics, self.secret):
            with suppress(OSError):
                path.unlink()
        for folder in (self.checkpoints, *folders):
            with suppress(OSError):
                folder.rmdir()

    def _resume(self) -> str:
        return f"parablock resume {as_argument(self.path)}"

    def check_holds_run(self) -> None:
        """Refuse a folder that is not there, or holds no run, with a `CheckpointError`."""
        wanted = "Give the --output-dir of an earlier `parablock run`."
        if not self.path.exists():
            raise CheckpointError(
                f"{self.path} does not exist",
                cause=f"Relative paths start from {Path.cwd()}.",
                remedy=f"{did_you_mean(self.path)} {wanted}".strip(),
            )
        if not self.config.exists() or not self.manifest.exists():
            raise CheckpointError(
                f"{self.path} holds no run: it has no config.yaml and manifest.json", remedy=wanted
            )

    def check_idle(self) -> None:
        """Refuse a run that is still at work, with a `StorageError`."""
        remedy = f"Wait for its end, or stop it: Ctrl-C saves it, and it goes on with: {self._resume()}"
        with lock_folder(self.path, remedy=remedy):
            pass

    def check_has_model(self) -> None:
        """Refuse a run whose model is not written yet.

        Raises:
            StorageError: It is still at work.
            ModelError: It was stopped, it failed, or it was killed.
        """
        if self.model.is_dir():
            return
        self.check_idle()
        raise ModelError(
            f"the run in {self.path} has no model yet",
            cause=self.how_it_ended(),
            remedy=f"Finish it with: {self._resume()}",
        )

    def how_it_ended(self) -> str:
        """Say how a run ended that is not complete, and after how many rounds."""
        status, num_rounds = "", None
        with suppress(OSError, CheckpointError):
            summary = self.read_summary()
            status, num_rounds = summary.get("status", ""), summary.get("num_rounds")
        with suppress(OSError, UnicodeDecodeError):
            rounds = len(self.metrics.read_text(encoding="utf-8").splitlines())
            after = f" after round {rounds}" + (f" of {num_rounds}" if num_rounds else "") if rounds else ""
            after = after or " before its first round was over"
        how = {"interrupted": "It was stopped", "failed": "It failed"}.get(status, "It was killed")
        return f"{how}{after}."

    def check_resumable(self) -> None:
        """Refuse a folder without an unfinished run, with a `CheckpointError`."""
        self.check_holds_run()
        if self.summary.exists() and self.read_summary().get("status") == "completed":
            raise CheckpointError(
                f"the run in {self.path} is complete; there is nothing to resume",
                remedy=f"Look at it with: parablock eval {as_argument(self.path)}",
            )

    def append(self, row: Row) -> None:
        """Append a round to `metrics.jsonl`."""
        with storage(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows_before(self, round_index: int) -> list[Row]:
        """Read the rounds before `round_index`, and drop all later lines from the file.

        Raises:
            CheckpointError: A round is missing.
        """
        rows: list[Row] = []
        with suppress(OSError, ValueError):  # the check below finds a line that is missing
            for line in self.metrics.read_text(encoding="utf-8").splitlines()[:round_index]:
                rows.append(json.loads(line))
        if [row.get("round_index") for row in rows if isinstance(row, dict)] != list(range(round_index)):
            raise CheckpointError(
                f"{self.metrics} does not hold the {round_index} rounds that the checkpoint has behind it",
                cause="Lines were lost or changed.",
                remedy="Put the file back, or start the run anew in another folder.",
            )
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def write_trace(self, spans: list[Span]) -> None:
        """Write `trace.json`."""
        with write_beside(self.trace) as beside:
            write_chrome_trace(spans, beside)

    def write_answers(self, label: str, answers: list[dict[str, Any]]) -> None:
        """Write the answers of one model (base | tuned) beside those that are in `answers.json`."""
        records = self.read_answers() or [dict.fromkeys(("prompt", "reference"), "") for _ in answers]
        for record, given in zip(records, answers, strict=False):
            record |= {"prompt": given["prompt"], "reference": given["reference"], label: given["answer"]}
            record |= {f"{label}_cut_at": given["cut_at"]} if given["cut_at"] else {}
        if records:
            write_atomically(self.answers, json.dumps(records, indent=2, ensure_ascii=False) + "\n")

    def read_answers(self) -> list[dict[str, Any]]:
        """Read `answers.json`; empty if there is none, as of an earlier release."""
        try:
            content: list[dict[str, Any]] = json.loads(self.answers.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return content

    def write_secret(self, key: bytes) -> None:
        """Write the key of a run's noise, readable for this user alone."""
        with storage(self.secret):
            self.secret.touch(mode=0o600)
            self.secret.write_text(key.hex() + "\n", encoding="ascii")

    def read_secret(self) -> bytes:
        """Read the key of the noise.

        Raises:
            CheckpointError: The file is gone or damaged.
        """
        try:
            key = bytes.fromhex(self.secret.read_text(encoding="ascii"))
            if len(key) != SECRET_BYTES:
                raise ValueError(f"it has {len(key)} bytes, not {SECRET_BYTES}")
            return key
        except PermissionError as error:
            raise unread(self.secret, error, CheckpointError) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.secret} cannot be read: {error}",
                cause="The run adds noise that follows from this key, and has to go on with the same.",
                remedy="Put the file back, or start the run anew in another folder.",
            ) from None

    def read_summary(self) -> dict[str, Any]:
        """Read `summary.json`; a damaged file is a `CheckpointError`."""
        return _read_object(self.summary)

    def read_manifest(self) -> dict[str, Any]:
        """Read `manifest.json`; a damaged file is a `CheckpointError`."""
        return _read_object(self.manifest)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except PermissionError as error:
        raise unread(path, error, CheckpointError) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}",
            cause="It was changed by hand, or the disk lost a part of it.",
            remedy="Put back a copy of it, or start the run anew in another folder.",
        ) from None
    return content


def time_and_bytes(rows: Sequence[Row], spans: Sequence[Span]) -> dict[str, Any]:
    """Add up the times and bytes of all rounds.

    Returns:
        compute_s, communication_s: sums over rounds of the slowest client's; sequential_s: the same rounds
        without overlap; overlap_fraction; uplink_bytes, downlink_bytes; bytes_per_client_round.
    """
    visits = sum(len(row["participants"]) for row in rows)
    uplink, downlink = (sum(row[key] for row in rows) for key in ("uplink_bytes", "downlink_bytes"))
    return {
        **{key: sum(row[key] for row in rows) for key in ("compute_s", "communication_s", "sequential_s")},
        "overlap_fraction": overlap_fraction(spans),
        "uplink_bytes": uplink,
        "downlink_bytes": downlink,
        "bytes_per_client_round": round((uplink + downlink) / visits) if visits else 0,
    }


def overlap_fraction(spans: Iterable[Span]) -> float:
    """Return the fraction of all clients' communication time that their own computation hid.

    Communication is the time in which bytes move on a client's link; waiting for other clients is not counted.
    """
    times = times_by_client(spans).values()
    total = sum(client.communication_s for client in times)
    return sum(client.hidden_s for client in times) / total if total > 0 else 0.0
