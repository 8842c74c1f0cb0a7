"""Read runs from their directories, for the tables and figures of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from parablock.config.load import in_words, read_yaml
from parablock.config.methods import METHODS
from parablock.errors import InputError, ParaBlockError, unread
from parablock.printable import as_argument
from parablock.storage.run_directory import Row, RunDirectory
from parablock.trace import Span, read_chrome_trace

LEAST_COMMUNICATION = 0.02
"""The share of the time of all rounds below which nobody waits for real sites' links."""
REAL = ("remote", "flower")
"""The engines whose links are real."""


def _known(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"{method} is no method of this release, which has {', '.join(METHODS)}")
    return method


class _Summary(BaseModel):
    status: str
    method: Annotated[str, AfterValidator(_known)]
    clock: str
    delay: Any
    num_clients: int
    num_blocks: int
    num_rounds: int
    rounds_done: int
    initial_eval_loss: float
    final_eval_loss: float | None
    wall_time_s: float
    elapsed_s: float
    sequential_s: float
    overlap_fraction: float
    uplink_bytes: int
    downlink_bytes: int
    bytes_per_client_round: float
    peak_memory_bytes: int
    model_sha256: str | None


class _Round(BaseModel):
    round_index: int
    block_index: int | None
    participants: list[int]
    round_s: float
    uplink_bytes: int
    downlink_bytes: int
    train_loss: float | None = None
    eval_loss: float | None = None
    rho: float | None = None
    delta_norm: float | None = None
    participant_losses: list[float | None] = []


class _Answer(BaseModel):
    prompt: str
    reference: str = ""
    base: str = ""
    tuned: str = ""


class _Block(BaseModel):
    index: int
    name: Any
    parameters: int


class _Manifest(BaseModel):
    blocks: list[_Block] = []
    clients: list[dict[str, Any]] = []
    packages: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    chosen_settings: list[str] = []


_FORMS: dict[str, TypeAdapter[Any]] = {
    "summary.json": TypeAdapter(_Summary),
    "metrics.jsonl": TypeAdapter(list[_Round]),
    "answers.json": TypeAdapter(list[_Answer]),
    "manifest.json": TypeAdapter(_Manifest),
}
"""What a report needs of each file; others of its fields are not looked at."""


@dataclass(frozen=True)
class RunRecord:
    """One run, read from its directory.

    Attributes:
        name: Its name in tables and legends, unique among the runs of a report.
        path: The run directory.
        summary: `summary.json`.
        manifest: `manifest.json`.
        config: `config.yaml` as plain values.
        rows: `metrics.jsonl`, one row for each committed round.
        spans: `trace.json`, without waiting.
        answers: `answers.json`: prompt, reference, the answers `base` and `tuned`, and where each was cut.
    """

    name: str
    path: Path
    summary: dict[str, Any]
    manifest: dict[str, Any]
    config: dict[str, Any]
    rows: tuple[Row, ...]
    spans: tuple[Span, ...]
    answers: tuple[dict[str, Any], ...] = ()

    @property
    def has_link(self) -> bool:
        """Whether communication takes time that counts: over a link of the configuration, or to real sites."""
        if any(self.config.get("link", {}).values()):
            return True
        is_real = self.config.get("engine", {}).get("name") in REAL
        sent_s = sum(row.get("communication_s", 0.0) for row in self.rows)
        return is_real and sent_s >= LEAST_COMMUNICATION * self.summary["wall_time_s"]

    @property
    def newest_loss(self) -> tuple[int, float] | None:
        """The round that was scored last, counted from 1, and its eval loss; None if no round was scored."""
        scored = ((row["round_index"] + 1, row.get("eval_loss")) for row in reversed(self.rows))
        return next(((number, loss) for number, loss in scored if loss is not None), None)

    def block_name(self, block_index: int) -> str:
        """Return the name of a block, which says its layers."""
        blocks = self.manifest.get("blocks", [])
        return str(blocks[block_index]["name"]) if block_index < len(blocks) else f"block {block_index}"


def read_runs(paths: Sequence[Path]) -> tuple[RunRecord, ...]:
    """Read one or more runs, and name each by the shortest end of its path that tells it apart.

    Raises:
        InputError: A directory holds no run that has ended, or a file is damaged.
    """
    names = _distinct_names([path.resolve() for path in paths])
    return tuple(_read_run(path, name) for path, name in zip(paths, names, strict=True))


def answer_of(record: Mapping[str, Any], label: str) -> str:
    """Return a text of a record of `answers.json`; of an answer that was cut it says so."""
    note = cut_note(record, label)
    return f"{record[label].rstrip()} … {note}" if note else str(record[label])


def cut_note(record: Mapping[str, Any], label: str) -> str:
    """Say at how many tokens an answer was cut; "" if it was not."""
    cut_at = record.get(f"{label}_cut_at")
    return f"(cut at {cut_at} tokens)" if cut_at else ""


def is_run(path: Path) -> bool:
    """Return whether a folder holds a run, ended or not."""
    return RunDirectory(path).config.exists()


def has_ended(path: Path) -> bool:
    """Return whether a folder holds a run that completed, was interrupted, or failed."""
    return is_run(path) and RunDirectory(path).summary.exists()


def _read_run(path: Path, name: str) -> RunRecord:
    directory = RunDirectory(path)
    if not is_run(path):
        raise InputError(
            f"{path} holds no run: it has no config.yaml", remedy="Give the --output-dir of a `parablock run`."
        )
    if not has_ended(path):
        directory.check_idle()
        raise InputError(
            f"the run in {path} has not ended: it has no summary.json",
            cause=directory.how_it_ended(),
            remedy=f"Go on with it: parablock resume {as_argument(path)}",
        )
    try:
        config = read_yaml(directory.config.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("config.yaml does not hold sections")
        for section in ("link", "engine"):
            if not isinstance(config.get(section, {}), dict):
                raise ValueError(f"config.yaml, {section}: it does not hold settings")
        lines = directory.metrics.read_text(encoding="utf-8").splitlines()
        rows = tuple(_checked("metrics.jsonl", [json.loads(line) for line in lines]))
        summary = _checked("summary.json", directory.read_summary())
        if summary["status"] == "completed" and len(lines) < summary["rounds_done"]:
            raise ValueError(f"metrics.jsonl has {len(lines)} rounds, and {summary['rounds_done']} are done")
        return RunRecord(
            name=name,
            path=path,
            summary=summary,
            manifest=_checked("manifest.json", directory.read_manifest()),
            config=config,
            rows=rows,
            spans=tuple(read_chrome_trace(directory.trace)),
            answers=tuple(_checked("answers.json", _answers(directory))),
        )
    except PermissionError as error:
        raise unread(path, error) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"the run in {path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}",
            cause="A file is missing or damaged.",
            remedy=f"Put a copy of the file back{_or_resume(directory)}.",
        ) from None


def _answers(directory: RunDirectory) -> Any:
    text = directory.answers.read_text(encoding="utf-8") if directory.answers.exists() else "[]"
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"answers.json: {error}") from None


def _or_resume(directory: RunDirectory) -> str:
    """Say how the files are written anew, which a run that is complete does not do."""
    with suppress(ParaBlockError):
        if directory.read_summary().get("status") == "completed":
            return ""
    return f", or let the run write it anew: parablock resume {as_argument(directory.path)}"


def _checked(file: str, content: Any) -> Any:
    """Return the content of a file of a run, which has what a report needs."""
    try:
        _FORMS[file].validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}{f', {place}' if place else ''}: {in_words(first)}") from None
    return content


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"a run is named twice: {', '.join(map(str, paths))}", remedy="Name each run once.")
