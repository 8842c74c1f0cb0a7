"""A site's process: it waits for a run, takes part, and waits for the next one, until its operator stops it."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parablock.clock import RealClock
from parablock.deploy.door import server_of
from parablock.deploy.log_files import PlainLines, log_to
from parablock.deploy.site import SiteConfig
from parablock.deploy.site_session import load_libraries, take_part
from parablock.engine.remote.site_channel import Refused, ServerEnd, SessionOver, SiteCaller
from parablock.errors import ParaBlockError, StallError, StorageError

LOGGER = logging.getLogger("parablock")
AGAIN_S = 0.05


def start_site(site: SiteConfig, address: str, keys: Path | None, *, once: bool = False) -> None:
    """Be the process of a site, with a log on the terminal and in its folder, until a signal ends it.

    With `once` it ends with its first run, and with the error that made it leave.
    """
    interrupt_for_certain()
    LOGGER.setLevel(logging.INFO)
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(PlainLines())
    for handler in (screen, log_to(site.state_dir / "log" / "site.log")):
        LOGGER.addHandler(handler)
    LOGGER.propagate = False
    try:
        serve(site, server_of(address, keys, LOGGER.warning), once=once)
    except KeyboardInterrupt:
        LOGGER.info("this site has left, as its operator asked")


def interrupt_for_certain() -> None:
    """Let SIGTERM, by which service managers stop a site, interrupt as Ctrl-C does, wherever the process is.

    Python drops an exception that is raised in a destructor or in the callback of a weak reference; one that was
    an interrupt comes again.
    """
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    report = sys.unraisablehook

    def on_dropped(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            report(dropped)

    sys.unraisablehook = on_dropped


def serve(site: SiteConfig, server: ServerEnd, *, once: bool = False) -> None:
    """Serve the runs of a server, one after another, or one alone.

    Whatever goes wrong here ends this site's part of a run, never the process; the site waits for the next session.

    Raises:
        Refused: The server refuses this site, and waiting does not cure it.
        StorageError: Another process serves this site, or its folder cannot be written.
    """
    caller, finished = SiteCaller(site.client_id, server, LOGGER.info), ""
    with only_process(site):
        while True:
            # there is time to load what trains; where a run waits for the site, it connects first
            opening = caller.wait_for_session(RealClock(), finished, meanwhile=load_libraries)
            LOGGER.info("takes part in run %s, session %s", opening.run, opening.session)
            try:
                take_part(site, caller, opening)
                if once:
                    return
                LOGGER.info("the run has ended, or stops; waiting for the next one")
                finished = opening.session
            except SessionOver:
                LOGGER.info("the session has ended")
            except Refused:
                raise
            except StallError as error:
                LOGGER.warning("%s; the model leaves memory until the server is back", error.what)
            except ParaBlockError as error:
                if once:
                    raise
                LOGGER.error("this site leaves the run: %s", error.in_one_line)
                LOGGER.error("It takes part again in the next session, or once it is started again.")
                finished = opening.session
            gc.unfreeze()  # where libraries were loaded within the session, it is among what stays with them
            gc.collect()


@contextmanager
def only_process(site: SiteConfig) -> Iterator[None]:
    """Keep other processes out of the site's folder, and say which process is there."""
    site.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = site.state_dir / "pid"
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise StorageError(
                f"another process serves the site of {site.state_dir}: number {file.read().strip() or 'unknown'}",
                cause="It was started before, or an earlier start did not end.",
                remedy="End it first, or give this site a state_dir of its own.",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)
