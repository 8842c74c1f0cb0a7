"""The command `parablock`, and `python -m parablock`.

It begins with next to nothing: all that follows takes a second to load, in which a Ctrl-C would end in the middle
of an import, with a traceback of whatever library it met.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line; until a command begins, Ctrl-C and its like end the process, as nothing is begun."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as it is of what a shell script has put behind
            signal.signal(number, _leave)
    _open_what_is_closed()
    if sys.argv[1:2] == ["deploy"] and sys.argv[2:3] in (["client"], ["server"]):
        from parablock.deploy.allocation import keep_memory

        keep_memory()  # which begins this process again: here before all of that has to be loaded twice
    from parablock.cli.main import main as command_line

    command_line()


def _open_what_is_closed() -> None:
    """Lead standard streams that the caller has closed nowhere, so that no other file gets their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2: the first number that is free
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)  # nor shall a file of a program that this one starts
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _leave(number: int, frame: object) -> None:
    del number, frame
    os.write(2, b"stopped at once; nothing was begun, and nothing is left behind\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
