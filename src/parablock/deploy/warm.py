"""A ClientApp that is there at once: Flower is loaded one time, and a copy of the process is forked for a message.

A SuperNode starts Flower's command `flwr-clientapp` anew for each message, and most of that is imports: 1.6 CPU
seconds. It finds its commands by PATH, where a site has two of ours before them (`write_commands`):

    flower-supernode ──► flower-superexec: forks a keeper, and then is Flower's own
                              │                      │ forks, for each message
                              └──► flwr-clientapp: ──┴──► Flower's own flwr-clientapp
                                   hands its arguments over, and is Flower's own itself where no keeper answers

The forked one begins long before the message is at the SuperNode, and asks for it more often than Flower's own
(`pace.py`).
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from select import select

from parablock.deploy import hand_over
from parablock.engine.flower.local_socket import address_of, listen
from parablock.engine.flower.pace import ONE_BY_ONE, ask_often
from parablock.errors import ParaBlockError

PAUSE_S = 0.25
"""How long a forked ClientApp waits before it asks again for a message that is on its way to the SuperNode."""
CALL_S = 5.0
"""How long a call may take to say its arguments."""


def write_commands(folder: Path, clientapp: str) -> bool:
    """Write the two commands into a folder that comes first in a SuperNode's PATH; `clientapp` is Flower's own.

    Return False on a system where a process that has loaded so much cannot be forked safely.
    """
    if sys.platform != "linux":
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in (
        ("flower-superexec", [sys.executable, "-m", __name__]),
        ("flwr-clientapp", [sys.executable, "-IS", hand_over.__file__, clientapp]),
    ):
        beside = folder / f".{name}-{os.getpid()}"
        beside.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
        beside.chmod(0o755)
        beside.replace(folder / name)
    return True


def superexec() -> None:
    """Be Flower's `flower-superexec`, beside a keeper that ends when this process does."""
    os.environ.update(ONE_BY_ONE)  # Flower reads it when it is loaded
    run, clientapp = _load("flower-superexec"), _load("flwr-clientapp")
    import_module("httpcore")  # which Flower's HTTP client loads with its first connection
    ask_often(import_module("flwr.supernode.runtime.run_clientapp"), "pull_and_inflate_object_from_tree", PAUSE_S)
    try:
        arguments = _begin_to_keep()
    except (OSError, ParaBlockError) as error:
        sys.stderr.write(f"Each ClientApp starts from nothing, for none can be kept loaded: {error}\n")
        arguments = None
    if arguments is not None:
        sys.argv = ["flwr-clientapp", *arguments]
        _run_to_the_end(clientapp)
    sys.exit(run())


def _run_to_the_end(command: Callable[[], int | None]) -> None:
    """Run a command and end the process, without taking apart all that the keeper has loaded."""
    try:
        status = command()
    except SystemExit as end:
        if isinstance(end.code, str):  # which Python will say
            raise
        status = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def _load(name: str) -> Callable[[], int | None]:
    (script,) = entry_points(group="console_scripts", name=name)
    run: Callable[[], int | None] = script.load()
    return run


def _begin_to_keep() -> list[str] | None:
    """Fork a keeper; return None here, and the arguments of the call in a process that the keeper forks later."""
    address = address_of(Path(os.environ["FLWR_HOME"]) / "keeper")
    listener, (alive, keep_alive) = listen(address), os.pipe()
    if os.fork() == 0:
        os.close(keep_alive)
        try:
            arguments = _keep(listener, alive)
        except OSError:  # whoever calls finds nobody, and starts a ClientApp from nothing
            os._exit(1)
        if arguments is None:
            os._exit(0)
        return arguments
    os.close(alive)
    listener.close()
    os.environ[hand_over.KEEPER_VARIABLE] = address
    return None


def _keep(listener: socket.socket, alive: int) -> list[str] | None:
    """Fork for each call: return its arguments in the new process, and None in this one once `alive` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; this ends with the SuperExec
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for what is forked
    _name("flwr-keeper")
    gc.collect()
    gc.freeze()  # else each forked process would look through, and so copy, all that is loaded
    watched: list[socket.socket | int] = [listener, alive]
    while alive not in select(watched, [], [])[0]:
        with suppress(OSError), listener.accept()[0] as caller:
            caller.settimeout(CALL_S)
            told = b"".join(iter(partial(caller.recv, 1 << 16), b""))
            if os.fork() == 0:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _name("flwr-clientapp")
                listener.close()
                os.close(alive)
                return os.fsdecode(told).split("\0")
            caller.sendall(b"1")
    return None


def _name(name: str) -> None:
    """Call this process so in the system's list."""
    Path("/proc/self/comm").write_text(name, encoding="ascii")


if __name__ == "__main__":
    superexec()
