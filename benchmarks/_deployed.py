"""A deployment of real processes on this machine, watched from the side while something is done to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from _record import Material
from rich.console import Console

from parablock.config.keys import RunConfig
from parablock.config.load import parse_config
from parablock.deploy.one_machine import Deployment, watch
from parablock.errors import ParaBlockError
from parablock.experiment.progress import PlainProgress
from parablock.experiment.run import run

POLL_S = 0.05
PATIENCE_S = 600.0


class Watched:
    """A run over Flower that goes on while its processes are looked at; entered it runs, left it has ended.

    Args:
        deployment: Its processes, prepared and started.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.summary: dict[str, Any] = {}
        self.error: ParaBlockError | None = None

    def __enter__(self) -> Watched:
        run_id = self._deployment.submit()
        self._thread = threading.Thread(target=self._watch, args=(run_id,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if error is not None:
            self._deployment.kill("superlink")  # nobody waits for its end any more
        self._thread.join()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def _watch(self, run_id: str) -> None:
        try:
            self.summary = watch(self._deployment, run_id, quiet())
        except ParaBlockError as error:
            self.error = error

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """Wait until something is so; tell whether the run still went on then."""
        give_up = time.monotonic() + PATIENCE_S
        while not what():
            if self.has_ended:
                return False
            if time.monotonic() > give_up:
                raise TimeoutError(self._deployment.log("superlink").read_text(encoding="utf-8")[-3000:])
            time.sleep(POLL_S)
        return not self.has_ended

    @property
    def rounds_done(self) -> int:
        metrics = self._deployment.output_dir / "metrics.jsonl"
        return metrics.read_text(encoding="utf-8").count("\n") if metrics.exists() else 0


def quiet() -> PlainProgress:
    return PlainProgress(console=Console(quiet=True))


def deployed_config(
    material: Material, *, sites: int, rounds: int, seed: int, chunk_bytes: int, layers_per_block: int = 2
) -> RunConfig:
    return parse_config(
        {
            "model": {"name_or_path": str(Path(material.model).absolute())},
            "data": {
                "train": [str(Path(file).absolute()) for file in material.train[:sites]],
                "test": [str(Path(file).absolute()) for file in material.test],
                "max_length": 96,
                "partition": {"scheme": "by_file"},
            },
            "blocks": {"layers_per_block": layers_per_block},
            "federation": {"num_clients": sites, "num_rounds": rounds, "min_updates": sites},
            "train": {"num_local_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            "wire": {"chunk_bytes": chunk_bytes},
            "engine": {"name": "flower", "num_threads": 1},
            "evaluation": {"every_rounds": 0, "max_examples": 16},
            "checkpoint": {"every_rounds": 1},
            "seed": seed,
        }
    )


def in_one_process(config: RunConfig, directory: Path, *, seed: int | None = None) -> str:
    """Give the model that the same configuration ends with in one process, which is nobody's to kill or cut."""
    engine = config.engine.model_copy(update={"name": "inprocess"})
    changes = {"engine": engine, "seed": config.seed if seed is None else seed}
    return str(run(config.model_copy(update=changes), directory, progress=quiet())["model_sha256"])
