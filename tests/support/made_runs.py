"""Run directories of any size, made without a model: rows and spans as a run with overlap has them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from parablock.config.keys import RunConfig
from parablock.report.reading import RunRecord, read_runs
from parablock.storage.run_directory import time_and_bytes
from parablock.trace import Span, write_chrome_trace

BLOCK_PARAMETERS = 725_504
COMPUTE_S, UPLOAD_S, DOWNLOAD_S = 2.0, 0.9, 0.7
LABELS = ("business", "sports", "science", "world")


def make_run(
    directory: Path,
    *,
    num_rounds: int = 12,
    num_clients: int = 3,
    num_blocks: int = 4,
    delay: int = 1,
    status: str = "completed",
    **settings: Any,
) -> Path:
    """Write the files of a run; `settings` are sections of its configuration."""
    directory.mkdir(parents=True)
    rows = [_row(t, num_clients, num_blocks, delay, num_rounds) for t in range(num_rounds)]
    spans = [
        span for t in range(num_rounds) for i in range(num_clients) for span in _spans(t, i, num_blocks, delay)
    ]
    write_chrome_trace(spans, directory / "trace.json")
    config = RunConfig.model_validate(
        {
            "model": {"name_or_path": "models/tiny"},
            "data": {"train": [f"site-{i}.jsonl" for i in range(num_clients)]},
            "federation": {"num_clients": num_clients, "num_rounds": num_rounds, "delay": delay},
            "link": {"upload_mbps": 13, "download_mbps": 17},
            **settings,
        }
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "manifest.json").write_text(json.dumps(_manifest(num_clients, num_blocks)))
    summary = _summary(config, rows, spans, num_blocks, status)
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def a_run(folder: Path, **sizes: Any) -> RunRecord:
    """Make a run and read it."""
    return read_runs([make_run(folder / "run", **sizes)])[0]


def _row(t: int, num_clients: int, num_blocks: int, delay: int, num_rounds: int) -> dict[str, Any]:
    loss = 1.2 + 2.4 * math.exp(-2.5 * t / num_rounds) + 0.06 * math.sin(5 * t)
    return {
        "round_index": t,
        "block_index": _block(t, num_blocks),
        "train_loss": loss,
        "eval_loss": loss + 0.1 if (t + 1) % 8 == 0 or t == num_rounds - 1 else None,
        "compute_s": COMPUTE_S,
        "communication_s": UPLOAD_S + DOWNLOAD_S,
        "round_s": COMPUTE_S if delay else COMPUTE_S + UPLOAD_S + DOWNLOAD_S,
        "sequential_s": COMPUTE_S + UPLOAD_S + DOWNLOAD_S,
        "uplink_bytes": 2 * BLOCK_PARAMETERS * num_clients,
        "downlink_bytes": 2 * BLOCK_PARAMETERS * num_clients,
        "staleness": min(t, delay),
        "participants": list(range(num_clients)),
        "rho": 0.3 + 0.2 * math.cos(t),
        "delta_norm": 0.8 * math.exp(-1.5 * t / num_rounds) * (1 + 0.3 * _block(t, num_blocks) / num_blocks),
        "num_local_steps": 8,
        "participant_losses": [loss + 0.1 * client_id for client_id in range(num_clients)],
    }


def _block(t: int, num_blocks: int) -> int:
    return (5 * t + t // num_blocks) % num_blocks


def _spans(t: int, client_id: int, num_blocks: int, delay: int) -> list[Span]:
    pace = 1 + 0.03 * math.sin(client_id + 3 * t)
    exchange_s = UPLOAD_S + DOWNLOAD_S
    start = t * (COMPUTE_S * 1.1 if delay else COMPUTE_S * 1.1 + exchange_s)
    end, computed = start + COMPUTE_S * pace, {"round_index": t, "block_index": _block(t, num_blocks)}
    return [
        Span(client_id, "compute", "computing", start, end - start, computed),
        Span(client_id, "communication", "uploading", end, UPLOAD_S, _facts(t)),
        Span(client_id, "communication", "downloading", end + UPLOAD_S, DOWNLOAD_S, _facts(t)),
    ]


def _facts(t: int) -> dict[str, Any]:
    return {"round_index": t, "payload_bytes": 2 * BLOCK_PARAMETERS}


def _manifest(num_clients: int, num_blocks: int) -> dict[str, Any]:
    clients = []
    for i in range(num_clients):
        labels = {label: 40 + 37 * (i + k) % 90 for k, label in enumerate(LABELS)}
        examples = sum(labels.values())
        clients.append(
            {"examples": examples, "tokens": 80 * examples, "target_tokens": 9 * examples, "labels": labels}
        )
    return {
        "clients": clients,
        "blocks": [{"index": b, "name": f"layers.{b}", "parameters": BLOCK_PARAMETERS} for b in range(num_blocks)],
        "base_sha256": "b" * 64,
        "seed": 0,
        "parablock": "0.1.0",
        "commit": "c" * 40,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "machine": {"platform": "Linux", "cpu_count": 2, "cuda": None},
    }


def _summary(
    config: RunConfig, rows: list[dict[str, Any]], spans: list[Span], num_blocks: int, status: str
) -> dict[str, Any]:
    federation = config.federation
    return {
        "status": status,
        "method": federation.method,
        "delay": federation.delay,
        "num_rounds": federation.num_rounds,
        "rounds_done": len(rows),
        "num_clients": federation.num_clients,
        "num_blocks": num_blocks,
        "seed": 0,
        "clock": "virtual",
        "initial_eval_loss": 3.8,
        "final_eval_loss": rows[-1]["eval_loss"] if rows and status == "completed" else None,
        "wall_time_s": sum(row["round_s"] for row in rows),
        "elapsed_s": 90.0,
        **time_and_bytes(rows, spans),
        "peak_memory_bytes": 1_700_000_000,
        "model_sha256": "a" * 64 if status == "completed" else None,
    }


def figures_in(page: str) -> dict[str, Any]:
    """Read the figures of a report's page."""
    (content,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, flags=re.DOTALL)
    figures: dict[str, Any] = json.loads(content)
    return figures


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what a run has told TensorBoard: tag → (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
