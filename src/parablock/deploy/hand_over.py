"""Run by itself as a SuperNode's `flwr-clientapp`: lets the keeper of `warm.py` fork a ClientApp, else starts one.

Only what Python has without its site packages, and little of that: this is started for each message.
"""

import os
import socket
import sys

KEEPER_VARIABLE = "PARABLOCK_KEEPER"
"""The environment variable that says where the keeper listens."""

ANSWER_S = 30.0
"""How long a keeper may take; it answers in milliseconds."""


def hand_over(address: str, arguments: list[str]) -> bool:
    """Pass the arguments of a command to a keeper; return whether one answers."""
    with socket.socket(socket.AF_UNIX) as keeper:
        keeper.settimeout(ANSWER_S)
        try:
            keeper.connect(address)
            keeper.sendall(os.fsencode("\0".join(arguments)))
            keeper.shutdown(socket.SHUT_WR)
            return bool(keeper.recv(1))
        except OSError:
            return False


if __name__ == "__main__":
    if not hand_over(os.environ.get(KEEPER_VARIABLE, ""), sys.argv[2:]):
        os.execv(sys.argv[1], sys.argv[1:])
