"""A whole Flower federation on this machine: SuperLink, SuperNodes and trainers, brought up, watched, taken down.

DIR/             the run directory, as after `parablock run`
DIR/deployment/  keys, the sites' files and state, Flower's folders, the log of every process
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from parablock.config.keys import RunConfig
from parablock.config.load import load_config
from parablock.deploy.direct_local import leaves_nothing, write_site_files
from parablock.deploy.processes import (
    Process,
    ServerFiles,
    free_ports,
    make_flower_keys,
    register_sites,
    run_status,
    server_processes,
    site_processes,
    submit,
    wait_for_port,
    write_app,
    write_connection,
)
from parablock.deploy.status import control_of
from parablock.deploy.variables import (
    OUTPUT_VARIABLE,
    config_file,
    failure_file,
    server_log,
    site_file_of,
)
from parablock.errors import ConfigError, InputError, ParaBlockError
from parablock.experiment.progress import LoggedProgress, Progress
from parablock.printable import as_argument
from parablock.storage.files import last_lines, lock_folder
from parablock.storage.run_directory import RunDirectory

LOOK_S = 0.3
STATUS_S = 20.0
"""How long nothing may move before Flower is asked whether the run still lives; each time costs a process."""
HOST = "127.0.0.1"
AGAIN_S = 5.0
"""How long after its end a process is started again; a SuperNode may be refused for a minute."""
MOST_STARTS = 20
"""How often a process that ends by itself is started at most."""


class Deployment:
    """The processes of one deployment; they run while the context lasts. The server is reached at `host`."""

    host = HOST

    def __init__(self, output_dir: Path, num_clients: int, *, insecure: bool = False) -> None:
        self.output_dir, self.num_clients, self.insecure = output_dir.absolute(), num_clients, insecure
        self.folder = self.output_dir / "deployment"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, Process] = {}
        self._starts = Counter[str]()
        self._ended_s: dict[str, float] = {}

    def prepare(self, config: RunConfig) -> None:
        """Write all files: the server's configuration, one file for each site, keys."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config_file(self.output_dir).write_text(config.to_yaml(), encoding="utf-8")
        write_site_files(self.output_dir, config)
        if not self.insecure:
            make_flower_keys(self.folder / "keys", self.num_clients, [self.host])
        write_app(self.folder / "app", self.output_dir)

    def log(self, name: str) -> Path:
        """Return the log of a process."""
        return self.folder / "logs" / f"{name}.log"

    def __enter__(self) -> Deployment:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> None:
        self._end_leftovers()
        port, *self._site_ports = free_ports(1 + self.num_clients)
        keys = None if self.insecure else self.folder / "keys" / "server"
        self.files = ServerFiles(self.folder / "flower", keys, f"{self.host}:{port}")
        for home in [self.files.home, *map(self._home, range(self.num_clients))]:
            shutil.rmtree(home, ignore_errors=True)  # what Flower remembers of earlier processes keeps new ones out
        write_connection(self.files)
        self.start_superlink()
        if not self.insecure:
            write_app(self.folder / "app", self.output_dir, register_sites(self.files))
        for client_id in range(self.num_clients):
            self.start_supernode(client_id)

    def start_superlink(self) -> None:
        """Start the server's processes."""
        more = {OUTPUT_VARIABLE: str(self.output_dir)}
        commands = server_processes(self.files, self.files.address, more)
        self._launch("superlink", commands["superlink"])
        wait_for_port(self.files.address, self.processes["superlink"], self.log("superlink"))
        self._launch("superlink-helper", commands["helper"])

    def start_supernode(self, client_id: int, superlink: str | None = None) -> None:
        """Start a site's processes, towards the server or towards what stands before it."""
        keys = None if self.insecure else self.folder / "keys" / f"site-{client_id}"
        port, site_file = self._site_ports[client_id], site_file_of(self.output_dir, client_id)
        address = superlink or self.files.address
        commands = site_processes(self._home(client_id), address, keys, site_file, port)
        self._launch(f"supernode-{client_id}", commands["supernode"])
        self._launch(f"supernode-{client_id}-helper", commands["helper"])

    def keep_up(self) -> None:
        """Start again what has ended by itself, after a while."""
        now_s = time.monotonic()
        for name, process in list(self.processes.items()):
            if process.poll() is None or self._starts[name] > MOST_STARTS:
                continue
            if now_s > self._ended_s.setdefault(name, now_s) + AGAIN_S:
                self._launch(name, self._commands[name])

    def gave_up(self, name: str) -> bool:
        """Return whether a process is not there, and is not started again either."""
        process = self.processes.get(name)
        return process is None or (process.poll() is not None and self._starts[name] > MOST_STARTS)

    def _home(self, client_id: int) -> Path:
        return self.folder / "flower-sites" / str(client_id)

    def submit(self) -> str:
        """Start a Flower run, or the next one of an interrupted run."""
        failure_file(self.output_dir).unlink(missing_ok=True)
        control_of(self.output_dir).clear()
        return submit(self.files, self.folder / "app")

    def trainer_pid(self, client_id: int) -> int | None:
        """Return the process number of a site's trainer, or None if there is none."""
        try:
            pid = int((self.folder / "state" / str(client_id) / "pid").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return pid if self._is_ours(pid) else None

    def kill(self, name: str) -> None:
        """End a process at once, as a power cut would; what it has started ends with it or by its own lease."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _launch(self, name: str, started: Process) -> None:
        command, env = self._commands[name] = started
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.processes[name] = process
        self._starts[name] += 1
        self._ended_s.pop(name, None)
        pids = {name: started.pid for name, started in self.processes.items()}
        (self.folder / "processes.json").write_text(json.dumps(pids), encoding="utf-8")

    def _end_leftovers(self) -> None:
        """End what an earlier command left running when it was killed: two servers must not write one folder."""
        try:
            pids = json.loads((self.folder / "processes.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        for pid in filter(self._is_ours, pids.values()):
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)

    def _is_ours(self, pid: int) -> bool:
        """Return whether a process was started for this deployment: its number may have been given away again."""
        try:
            known = psutil.Process(pid)
            words = [*known.cmdline(), *known.environ().values()]
        except psutil.Error:
            return False
        return any(word.startswith(f"{self.folder}/") for word in words)

    def _stop(self) -> None:
        trainers = [pid for pid in map(self.trainer_pid, range(self.num_clients)) if pid is not None]
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes.clear()
        for pid in filter(self._is_ours, trainers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def deploy_local(
    config: RunConfig,
    output_dir: Path,
    *,
    insecure: bool = False,
    progress: Progress | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run a configuration over real Flower processes on this machine; the run directory is as after `run`.

    Raises:
        InputError: Something that the user gave is wrong, or Flower is not installed.
        ParaBlockError: The run failed.
    """
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"name": "flower"})})
    deployment = Deployment(output_dir, config.federation.num_clients, insecure=insecure)
    with leaves_nothing(output_dir):
        deployment.prepare(config)
        return _run(deployment, progress, asked_to_stop)


def _run(deployment: Deployment, progress: Progress | None, asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
    with deployment:
        return watch(deployment, deployment.submit(), progress or LoggedProgress(), asked_to_stop)


def prepare_app(config: RunConfig, output_dir: Path) -> tuple[Path, int]:
    """Write a run as a Flower app that finds it on this machine; return the app's folder and the number of sites.

    Raises:
        InputError: The folder holds a run already.
    """
    RunDirectory(output_dir).check_unused()
    output_dir = output_dir.absolute()
    config_file(output_dir).parent.mkdir(parents=True, exist_ok=True)
    config_file(output_dir).write_text(config.to_yaml(), encoding="utf-8")
    return write_app(output_dir / "deployment" / "app", output_dir), config.federation.num_clients


def resume_local(
    output_dir: Path, *, progress: Progress | None = None, asked_to_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Bring an interrupted deployment up again and go on from its last checkpoint.

    What an earlier one left running is ended first, unless whoever started it still watches it.

    Raises:
        StorageError: So it is.
        InputError: There is no unfinished run, or its sites are not on this machine.
        ParaBlockError: The run failed.
    """
    directory = RunDirectory(output_dir)
    directory.check_resumable()
    config = load_config(directory.config)
    folder = Path(output_dir) / "deployment"
    if not (folder / "sites").exists():
        problem = (
            "this run's server and sites are not on this machine; start its SuperLink again and "
            "submit the app with `flwr run`: it goes on by itself"
        )
        raise ConfigError([problem], source=str(output_dir))
    insecure = not (folder / "keys").exists()
    deployment = Deployment(output_dir, config.federation.num_clients, insecure=insecure)
    with lock_folder(deployment.folder):
        return _run(deployment, progress, asked_to_stop)


def watch(
    deployment: Deployment, run_id: str, progress: Progress, asked_to_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Show the rounds as they are written, until the run ends.

    Raises:
        ParaBlockError: What the server or a process ended with.
    """
    directory = RunDirectory(deployment.output_dir)
    began = time.time_ns()
    look = _rows(deployment, progress)
    next_status, shown, ended = time.monotonic() + STATUS_S, 0, False
    while True:
        if (rounds := look()) > shown:
            next_status, shown = time.monotonic() + STATUS_S, rounds
        if asked_to_stop():
            control_of(deployment.output_dir).ask("stop")
        failure = failure_file(deployment.output_dir)
        if failure.exists():
            word = json.loads(failure.read_text(encoding="utf-8"))
            failure.unlink()
            kind = InputError if word.pop("exit_code") == InputError.exit_code else ParaBlockError
            raise kind(**word)
        is_over = directory.summary.exists() and directory.summary.stat().st_mtime_ns > began
        if is_over and (summary := directory.read_summary())["status"] != "failed":
            look()
            return summary
        deployment.keep_up()
        if deployment.gave_up("superlink"):
            raise _ended("the SuperLink ended", deployment.log("superlink"), deployment.output_dir)
        if ended:
            raise _ended("the ServerApp ended", server_log(deployment.output_dir), deployment.output_dir)
        if time.monotonic() > next_status and deployment.processes["superlink"].poll() is None:
            next_status = time.monotonic() + STATUS_S
            if ended := run_status(deployment.files, run_id).startswith("finished"):
                time.sleep(2)  # its last files may be on their way; it is looked for them once more
        time.sleep(LOOK_S)


def _rows(deployment: Deployment, progress: Progress) -> Callable[[], int]:
    """Return a function that shows the rounds that are new, and returns the number of all rounds so far."""
    directory = RunDirectory(deployment.output_dir)
    shown, num_rounds = 0, 0

    def look() -> int:
        nonlocal shown, num_rounds
        if not directory.metrics.exists():
            return 0
        text = directory.metrics.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may be half written
        if not num_rounds:
            federation = load_config(config_file(deployment.output_dir)).federation
            shown, num_rounds = len(lines), federation.num_rounds
            progress.start(num_rounds, federation.num_clients, shown)
        for line in lines[shown:]:
            progress.round_done(json.loads(line))
        shown = max(shown, len(lines))
        if shown == num_rounds:
            progress.rounds_over()
        return shown

    progress.message(
        f"SuperLink and {deployment.num_clients} SuperNodes start; logs in {deployment.folder / 'logs'}"
    )
    return look


def _ended(what: str, log: Path, output_dir: Path) -> ParaBlockError:
    return ParaBlockError(
        f"{what}; its log ends with:",
        lines=last_lines(log, 10),
        cause=f"The whole log is {log}.",
        remedy=f"Go on from the last checkpoint: parablock resume {as_argument(output_dir)}",
    )
