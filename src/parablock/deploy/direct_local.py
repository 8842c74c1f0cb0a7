"""A whole direct deployment on this machine: the server in this process, and a process for each site.

DIR/             the run directory, as after `parablock run`
DIR/deployment/  keys, the sites' files and state, the log of every process
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.deploy.direct_server import serve_run
from parablock.deploy.policy import OPEN_POLICY
from parablock.deploy.variables import site_file_of
from parablock.errors import CheckpointError, InputError, ParaBlockError
from parablock.experiment.progress import Progress
from parablock.printable import as_argument
from parablock.storage.files import last_lines, lock_folder, storage, write_atomically
from parablock.storage.run_directory import RunDirectory

HOST = "127.0.0.1"
END_S = 10.0
"""How long a site may take to end when it is asked to."""


def write_site_files(output_dir: Path, config: RunConfig) -> None:
    """Write a file for each site of a run that is all on this machine."""
    for client_id in range(config.federation.num_clients):
        site = {
            "client_id": client_id,
            "state_dir": f"../state/{client_id}",
            "model": config.model.model_dump(mode="json", include={"name_or_path", "device"}),
            "data": config.data.model_dump(mode="json"),
            "share": "part",
            "policy": OPEN_POLICY,
        }
        file = site_file_of(output_dir, client_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, yaml.safe_dump(site, sort_keys=False))


@contextmanager
def leaves_nothing(output_dir: Path) -> Iterator[None]:
    """Remove what was written for a run that has not begun, where something that the user gave is wrong.

    Raises:
        InputError: The folder holds a run already, another process is at work there, or what the block raised.
    """
    directory, was_there, folder = RunDirectory(output_dir), output_dir.exists(), output_dir / "deployment"
    directory.check_unused()
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):  # before anything is written: what is there may be another process's
        directory.check_unused()
        try:
            yield
        except InputError:
            if not directory.config.exists():
                shutil.rmtree(folder if was_there else output_dir, ignore_errors=True)
            raise


class LocalSites:
    """The processes of sites on this machine; they run while the context lasts.

    Args:
        output_dir: The run directory.
        config: The run.
        insecure: Whether there is no TLS.
    """

    def __init__(self, output_dir: Path, config: RunConfig, *, insecure: bool = False) -> None:
        self.folder = output_dir.absolute() / "deployment"
        self.config, self.insecure = config, insecure
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def num_sites(self) -> int:
        """One for each client."""
        return self.config.federation.num_clients

    def prepare(self) -> None:
        """Write a file for each site, and the keys of all."""
        write_site_files(self.folder.parent, self.config)
        if not self.insecure and not (self.folder / "keys").exists():
            from parablock.deploy.authority import make_all

            make_all(self.folder / "keys", self.num_sites, [HOST])

    def site_file(self, client_id: int) -> Path:
        """Return the file of a site."""
        return site_file_of(self.folder.parent, client_id)

    def log(self, client_id: int) -> Path:
        """Return the log of a site's process."""
        return self.folder / "logs" / f"site-{client_id}.log"

    def keys_of(self, name: str) -> Path | None:
        """Return the keys of the server, or of site-N; None without TLS."""
        return None if self.insecure else self.folder / "keys" / name

    def start(self, client_id: int, address: str) -> subprocess.Popen[bytes]:
        """Start the process of a site, as its operator would."""
        keys = self.keys_of(f"site-{client_id}")
        command = [sys.executable, "-m", "parablock", "deploy", "client", str(self.site_file(client_id))]
        command += ["--once", "--server", address, *(["--insecure"] if keys is None else ["--keys", str(keys)])]
        self.log(client_id).parent.mkdir(parents=True, exist_ok=True)
        with self.log(client_id).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[client_id] = process
        return process

    def start_all(self, port: int) -> None:
        """Start all sites."""
        for client_id in range(self.num_sites):
            self.start(client_id, f"{HOST}:{port}")

    def check(self) -> None:
        """Raise the error of a site that has ended by itself."""
        for client_id, process in self.processes.items():
            if process.poll():
                raise ParaBlockError(
                    f"the process of site {client_id} ended; its log ends with:",
                    lines=last_lines(self.log(client_id), 10),
                    cause=f"The whole log is {self.log(client_id)}.",
                    remedy=f"Go on from the last checkpoint: parablock resume {as_argument(self.folder.parent)}",
                )

    def __enter__(self) -> LocalSites:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def deploy_direct(
    config: RunConfig,
    output_dir: Path,
    *,
    insecure: bool = False,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a configuration over real processes on this machine; the run directory is as after `run`.

    Raises:
        InputError: Something that the user gave is wrong.
        ParaBlockError: The run failed.
    """
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "remote"})})
    sites = LocalSites(output_dir, config, insecure=insecure)
    with leaves_nothing(output_dir):
        sites.prepare()
        return _run(sites, output_dir, progress, asked_to_stop)


def resume_direct(
    output_dir: Path, *, progress: Progress | None = None, asked_to_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Bring an interrupted deployment on this machine up again, and go on from its last checkpoint.

    Raises:
        CheckpointError: There is no unfinished run, or its sites are not on this machine.
        ParaBlockError: The run failed.
    """
    directory = RunDirectory(output_dir)
    directory.check_resumable()
    config = load_config(directory.config)
    sites = LocalSites(output_dir, config, insecure=not (output_dir / "deployment" / "keys").exists())
    if not sites.site_file(0).exists():
        raise CheckpointError(
            f"the sites of the run in {output_dir} are not on this machine",
            remedy="Start its server again as before, with `parablock deploy server`: the run goes on by itself.",
        )
    with lock_folder(sites.folder):
        return _run(sites, output_dir, progress, asked_to_stop)


def _run(
    sites: LocalSites, output_dir: Path, progress: Progress | None, asked_to_stop: Callable[[], bool]
) -> dict[str, Any]:
    def stop() -> bool:
        sites.check()
        return asked_to_stop()

    with sites:
        return serve_run(
            sites.config,
            output_dir,
            keys=sites.keys_of("server"),
            address=f"{HOST}:0",
            progress=progress,
            asked_to_stop=stop,
            on_listen=sites.start_all,
        )
