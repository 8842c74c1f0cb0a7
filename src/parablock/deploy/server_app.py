"""The ServerApp, as Flower loads it: one run of the configuration that the SuperLink was started with.

`parablock deploy server` puts the two paths into the environment of the SuperLink, which is inherited. A run
directory that is there already is gone on with.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parablock.assembly import EngineInput, clients_of, server_plan
from parablock.checkpoint import write_atomically
from parablock.config import load_config
from parablock.deploy.site import shared_config
from parablock.deploy.variables import CONFIG_VARIABLE, OUTPUT_VARIABLE, failure_file, stop_file
from parablock.engine.flower.engine import run_over_flower, server_app
from parablock.engine.flower.exchange import Request
from parablock.engine.flower.grid import GridTransport
from parablock.engine.inprocess import EngineResult
from parablock.errors import ConfigError, ParaBlockError
from parablock.experiment import resume, run
from parablock.job import Job
from parablock.report.progress import LoggedProgress
from parablock.safeguards import masking_of


class FlowerEngine:
    """Runs a job over the SuperNodes that are connected.

    Args:
        grid: Flower's.
        session: The Flower run's id.
        output_dir: The run directory; it keeps the key that sites know the run by.
        job: The server's.
        tell: Told what a user should know.

    Raises:
        StallError: Some site does not come.
    """

    is_local = False

    def __init__(self, grid: Any, session: str, output_dir: Path, job: Job, tell: Callable[[str], None]) -> None:
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
        return run_over_flower(
            given.params,
            server_plan(given.config, given.secret),
            given.trace,
            given.hooks,
            self._transport,
            resumed=given.resumed,
            masking=masking_of(given.config),
        )


def main(grid: Any, context: Any) -> None:
    """Run or go on, and leave a word where it fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output_dir = Path(os.environ.get(OUTPUT_VARIABLE, "")).absolute()
    failure = failure_file(output_dir)
    failure.unlink(missing_ok=True)
    try:
        for name in (CONFIG_VARIABLE, OUTPUT_VARIABLE):
            if name not in os.environ:
                raise ConfigError(
                    [f"{name} is not set; start the SuperLink with `parablock deploy server`"],
                    source="the SuperLink",
                )
        progress = LoggedProgress()

        def connect(job: Job) -> FlowerEngine:
            return FlowerEngine(grid, str(context.run_id), output_dir, job, progress.message)

        if (output_dir / "config.yaml").exists():
            resume(output_dir, progress=progress, connect=connect, asked_to_stop=stop_file(output_dir).exists)
        else:
            config = load_config(os.environ[CONFIG_VARIABLE])
            run(config, output_dir, progress=progress, connect=connect, asked_to_stop=stop_file(output_dir).exists)
    except ParaBlockError as error:
        word = {"what": error.what, "cause": error.cause, "remedy": error.remedy, "exit_code": error.exit_code}
        write_atomically(failure, json.dumps(word))
        raise
    except (
        Exception
    ) as error:  # not foreseen: whoever started the run must not have to look for it in Flower's logs
        cause = traceback.format_exc()
        write_atomically(failure, json.dumps({"what": repr(error), "cause": cause, "remedy": "", "exit_code": 1}))
        raise


def _run_key(output_dir: Path) -> str:
    path = output_dir / "run_key"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")


app = server_app(main)
