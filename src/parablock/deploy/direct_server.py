"""The server of a direct deployment: one process that listens, runs, and shows who is there."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parablock.clock import RealClock
from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.deploy.door import listen
from parablock.deploy.log_files import log_to
from parablock.deploy.server_audit import audit_door, audited, server_log_of
from parablock.deploy.site import shared_config
from parablock.deploy.status import StatusBoard, control_of
from parablock.engine.contract import EngineInput, EngineResult
from parablock.engine.remote.listener import Listener
from parablock.engine.remote.remote_engine import RunFacts, run_remote
from parablock.errors import CheckpointError, ConfigError
from parablock.experiment.engines import clients_of
from parablock.experiment.progress import LoggedProgress, Progress
from parablock.experiment.protections import masking_of
from parablock.experiment.run import resume, run
from parablock.methods.base import RunInputs
from parablock.printable import as_argument
from parablock.storage.files import write_atomically
from parablock.storage.run_directory import RunDirectory

PAUSE_S = 0.5


class RemoteEngine:
    """The engine that runs with the sites that connect to a listener."""

    is_local = False

    def __init__(self, listener: Listener, job: RunInputs, output_dir: Path, num_sites: int | None) -> None:
        self._listener, self._output_dir = listener, output_dir
        self._num_sites = clients_of(job.config) if num_sites is None else num_sites
        base = job.manifest["base_sha256"], job.manifest["base_parts"]
        self._facts = RunFacts(run_key_of(output_dir), shared_config(job.config), *base)

    def run(self, given: EngineInput) -> EngineResult:
        """Run to the end, or to a stop."""
        given = audited(given, server_log_of(self._output_dir), self._facts)
        with StatusBoard(self._output_dir, given.trace, self._listener) as board:
            return run_remote(given, self._listener, self._facts, num_sites=self._num_sites, on_open=board.watch)


def serve_run(
    config: RunConfig,
    output_dir: Path,
    *,
    keys: Path | None,
    address: str,
    num_sites: int | None = None,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    on_listen: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Listen, run with the sites that come, and return the summary; a run that is in the folder goes on.

    Args:
        config: The run; one that goes on keeps the configuration that it began with.
        output_dir: The run directory.
        keys: The folder with the server's key and certificate; None: no TLS, and on the loopback alone.
        address: host:port to listen at; port 0 is any free one.
        num_sites: The run begins once so many sites are there; None: all clients of the run.
        progress: Shows how the run goes.
        asked_to_stop: As for `run`.
        on_listen: Called with the port once the server listens.

    Raises:
        InputError: Something that the user gave is wrong.
        ParaBlockError: The run failed.
    """
    output_dir = output_dir.absolute()
    directory, progress = RunDirectory(output_dir), progress or LoggedProgress()
    if num_sites is not None and num_sites < clients_of(config) and masking_of(config) is not None:
        problem = (
            f"--sites {num_sites}: masked updates need all {clients_of(config)} clients at the start; leave it out"
        )
        raise ConfigError([problem], source="the command line")
    goes_on = directory.config.exists()
    if goes_on:
        _check_same(directory, config)
        directory.check_resumable()
    else:
        directory.check_unused()
    told: list[str] = []
    listener = listen(address, keys, clients_of(config), told.append)
    try:
        with _logged(output_dir, progress) as tell:
            for line in told:
                tell(line)
            audit_door(listener, server_log_of(output_dir), tell)
            on_listen(listener.port)
            tell(f"listening at {address.rpartition(':')[0]}:{listener.port}")

            def connect(job: RunInputs) -> RemoteEngine:
                return RemoteEngine(listener, job, output_dir, num_sites)

            options: dict[str, Any] = {
                "progress": _Told(progress, tell),
                "connect": connect,
                "asked_to_stop": stop_or_pause(output_dir, asked_to_stop, tell),
            }
            return resume(output_dir, **options) if goes_on else run(config, output_dir, **options)
    finally:
        listener.close()


class _Told(Progress):
    """A display whose messages go to the log too."""

    def __init__(self, inner: Progress, tell: Callable[[str], None]) -> None:
        self._inner, self._tell = inner, tell

    def stage(self, name: str, total: int | None = None, *, is_brief: bool = False, scores: bool = False) -> None:
        if name and not is_brief:
            self._tell(name)
        self._inner.stage(name, total, is_brief=True, scores=scores)

    def done(self, count: int) -> None:
        self._inner.done(count)

    def start(self, num_rounds: int, num_clients: int, first_round: int, *args: Any, **kwargs: Any) -> None:
        self._inner.start(num_rounds, num_clients, first_round, *args, **kwargs)

    def rounds_over(self) -> None:
        self._inner.rounds_over()

    def step(self, client_id: int, number: int, num_steps: int) -> None:
        self._inner.step(client_id, number, num_steps)

    def awaited(self) -> str:
        return self._inner.awaited()

    def begins(self, client_id: int | None, activity: str) -> None:
        self._inner.begins(client_id, activity)

    def ends(self, client_id: int | None, activity: str) -> None:
        self._inner.ends(client_id, activity)

    def round_done(self, row: Mapping[str, Any]) -> None:
        self._inner.round_done(row)

    def message(self, text: str) -> None:
        self._tell(text)

    def close(self) -> None:
        self._inner.close()


def _check_same(directory: RunDirectory, config: RunConfig) -> None:
    """Refuse another run than the one that is in the folder."""
    before = load_config(directory.config).model_dump(mode="json")
    different = [key for key, value in config.model_dump(mode="json").items() if value != before[key]]
    different = [key for key in different if key != "engine"]
    if different:
        raise CheckpointError(
            f"the run in {directory.path} was begun with another configuration: {', '.join(different)} differ",
            cause="A run goes on with the configuration that it began with.",
            remedy="Give the file that it began with, or another --output-dir for a new run.",
        )


def stop_or_pause(
    output_dir: Path, asked_to_stop: Callable[[], bool], tell: Callable[[str], None]
) -> Callable[[], bool]:
    """Return whether to stop, after waiting as long as the run is paused; see `parablock deploy pause`."""
    control, clock, is_paused = control_of(output_dir), RealClock(), False
    control.clear()

    def stop() -> bool:
        nonlocal is_paused
        while control.is_paused and not (asked_to_stop() or control.is_stopping):
            if not is_paused:
                tell(f"paused; go on with: parablock deploy pause {as_argument(output_dir)} --off")
            is_paused = True
            clock.sleep(PAUSE_S)
        is_paused = False
        return asked_to_stop() or control.is_stopping

    return stop


@contextmanager
def _logged(output_dir: Path, progress: Progress) -> Iterator[Callable[[str], None]]:
    """Yield a function whose lines are shown, and stand in the log of the server."""
    handler = log_to(output_dir / "deployment" / "server.log")
    logger = logging.Logger("parablock.server")  # of its own: what is shown is not shown twice
    logger.addHandler(handler)

    def tell(text: str) -> None:
        logger.info(text)
        progress.message(text)

    try:
        yield tell
    finally:
        logger.removeHandler(handler)
        handler.close()


def run_key_of(output_dir: Path) -> str:
    """Return the word that sites know the run of a folder by; it is made once."""
    path = output_dir / "run_key"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8")
