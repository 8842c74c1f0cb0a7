"""The ServerApp, as Flower loads it: one run of the configuration that a deployment was prepared with.

`parablock deploy server` puts the run directory into the environment of the SuperLink, which is inherited; the app
that `parablock deploy app` writes names it itself. A run that is there already is gone on with.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parablock.config.load import load_config
from parablock.deploy.site import shared_config
from parablock.deploy.variables import config_file, failure_file, output_dir_of, server_log, stop_file
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.flower.engine import run_over_flower, server_app
from parablock.engine.flower.exchange import Request, word_of
from parablock.engine.flower.grid import GridTransport
from parablock.errors import ParaBlockError
from parablock.experiment.engines import clients_of
from parablock.experiment.progress import LoggedProgress
from parablock.experiment.run import resume, run
from parablock.methods.base import RunInputs
from parablock.storage.files import lock_folder, write_atomically


class FlowerEngine:
    """The engine that runs over the connected SuperNodes; `session` is the id of the Flower run.

    The run directory keeps the key that sites know the run by.

    Raises:
        StallError: Some site does not come.
    """

    is_local = False

    def __init__(
        self, grid: Any, session: str, output_dir: Path, job: RunInputs, tell: Callable[[str], None]
    ) -> None:
        config = job.config
        opening = Request(
            run_key=_run_key(output_dir),
            session=session,
            restore=None,
            config=shared_config(config),
            base_sha256=job.manifest["base_sha256"],
        )
        num_clients = clients_of(config)
        self._transport = GridTransport(
            grid, num_clients, opening, epoch_s=lambda: datetime.now(UTC).timestamp(), tell=tell
        )
        tell(f"waiting for {num_clients} sites")
        self.held_rounds: frozenset[int] | None = self._transport.gather(config.federation.stall_timeout_s)

    def run(self, given: EngineInput) -> EngineResult:
        """Run to the end; the trainers are at the sites, where real plugs are pulled."""
        return run_over_flower(given, self._transport)


def main(grid: Any, context: Any) -> None:
    """Run or go on, and leave a word where it fails."""
    output_dir = output_dir_of(os.environ, context.run_config)
    failure = failure_file(output_dir)
    with only_one(output_dir), _logged(output_dir):
        failure.unlink(missing_ok=True)
        try:
            _run(grid, str(context.run_id), output_dir)
        except Exception as error:
            what, cause, remedy, exit_code = word_of(error)
            if not isinstance(
                error, ParaBlockError
            ):  # whoever started the run need not search Flower's logs for it
                cause = traceback.format_exc()
            word = {"what": what, "cause": cause, "remedy": remedy, "exit_code": exit_code}
            write_atomically(failure, json.dumps(word))
            raise


@contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """Keep a run directory for one Flower run at a time.

    Raises:
        StorageError: Another one has it.
    """
    folder = config_file(output_dir).parent / "server"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, remedy="Wait for the end of the other Flower run, or end it with `flwr stop`."):
        yield


@contextmanager
def _logged(output_dir: Path) -> Iterator[None]:
    """Write what the run says into a file: Flower keeps the output of its processes to itself."""
    logger, handler = logging.getLogger("parablock"), logging.FileHandler(server_log(output_dir))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _run(grid: Any, session: str, output_dir: Path) -> None:
    progress, asked_to_stop = LoggedProgress(), stop_file(output_dir).exists

    def connect(job: RunInputs) -> FlowerEngine:
        return FlowerEngine(grid, session, output_dir, job, progress.message)

    if (output_dir / "config.yaml").exists():
        resume(output_dir, progress=progress, connect=connect, asked_to_stop=asked_to_stop)
    else:
        config = load_config(config_file(output_dir))
        run(config, output_dir, progress=progress, connect=connect, asked_to_stop=asked_to_stop)


def _run_key(output_dir: Path) -> str:
    path = output_dir / "run_key"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


app = server_app(main)
