"""The command `parablock`, and `python -m parablock`.

It begins with next to nothing: all that follows takes a second to load, in which a Ctrl-C would end in the middle
of an import, with a traceback of whatever library it met.
"""

from __future__ import annotations

import os
import signal

INTERRUPTED = 130


def main() -> None:
    """Run the command line; until a command begins, Ctrl-C ends the process, as nothing is begun."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is of what a shell script has put behind
        signal.signal(signal.SIGINT, _leave)
    from parablock.cli.main import main as command_line

    command_line()


def _leave(number: int, frame: object) -> None:
    del number, frame
    os.write(2, b"stopped at once; nothing was begun, and nothing is left behind\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
