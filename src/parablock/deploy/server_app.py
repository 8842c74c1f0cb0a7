"""The ServerApp, as Flower loads it: one run of the configuration that a deployment was prepared with.

`parablock deploy` puts the run directory into the environment of Flower's processes at the server, or the app that
`parablock deploy app` writes names it. A run that is there already is gone on with.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parablock.config.load import load_config
from parablock.deploy.direct_server import run_key_of, stop_or_pause
from parablock.deploy.log_files import PlainLines
from parablock.deploy.server_audit import audited, server_log_of
from parablock.deploy.site import shared_config
from parablock.deploy.status import StatusBoard
from parablock.deploy.variables import (
    client_of_node,
    config_file,
    data_port_of,
    failure_file,
    output_dir_of,
    server_log,
)
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.flower.invitations import run_in_federation, server_app
from parablock.engine.remote.remote_engine import RunFacts
from parablock.errors import ParaBlockError
from parablock.experiment.progress import LoggedProgress
from parablock.experiment.run import resume, run
from parablock.methods.base import RunInputs
from parablock.storage.files import lock_folder, write_atomically


class FlowerEngine:
    """The engine that runs with the sites of a Flower federation; `settings` is the Flower run's configuration.

    The run directory keeps the word that sites know the run by.

    Raises:
        ConfigError: The settings cannot be read.
    """

    is_local = False

    def __init__(self, grid: Any, settings: Mapping[str, Any], output_dir: Path, job: RunInputs) -> None:
        self._grid, self._output_dir = grid, output_dir
        self._port, self._client_of = data_port_of(settings), client_of_node(settings)
        config = shared_config(job.config)
        base = str(job.manifest["base_sha256"]), job.manifest["base_parts"]
        self._facts = RunFacts(run_key_of(output_dir), config, *base)

    def run(self, given: EngineInput) -> EngineResult:
        """Run to the end; the trainers are at the sites, where real plugs are pulled."""
        return run_in_federation(
            audited(given, server_log_of(self._output_dir), self._facts),
            self._grid,
            self._facts,
            port=self._port,
            client_of=self._client_of,
            board=lambda listener: StatusBoard(self._output_dir, given.trace, listener),
        )


def main(grid: Any, context: Any) -> None:
    """Run or go on, and leave a word where it fails."""
    output_dir = output_dir_of(os.environ, context.run_config)
    failure = failure_file(output_dir)
    with only_one(output_dir), _logged(output_dir):
        failure.unlink(missing_ok=True)
        try:
            _run(grid, context.run_config, output_dir)
        except ParaBlockError as error:
            what, *lines = error.what.split("\n")
            _leave_word(failure, what, lines, error.exit_code, cause=error.cause, remedy=error.remedy)
            raise
        except Exception as error:  # whoever started the run need not search Flower's logs for it
            _leave_word(failure, repr(error), traceback.format_exc().splitlines(), 1)
            raise


def _leave_word(failure: Path, what: str, lines: Sequence[str], exit_code: int, **more: str) -> None:
    word = {"what": what, "lines": lines, "exit_code": exit_code, **more}
    write_atomically(failure, json.dumps(word))


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
    handler.setFormatter(PlainLines())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _run(grid: Any, settings: Mapping[str, Any], output_dir: Path) -> None:
    progress = LoggedProgress()
    asked_to_stop = stop_or_pause(output_dir, lambda: False, progress.message)

    def connect(job: RunInputs) -> FlowerEngine:
        return FlowerEngine(grid, settings, output_dir, job)

    if (output_dir / "config.yaml").exists():
        resume(output_dir, progress=progress, connect=connect, asked_to_stop=asked_to_stop)
    else:
        config = load_config(config_file(output_dir))
        run(config, output_dir, progress=progress, connect=connect, asked_to_stop=asked_to_stop)


app = server_app(main)
