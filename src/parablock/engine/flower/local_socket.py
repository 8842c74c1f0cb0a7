"""The socket between a site's ClientApp and its trainer: one machine, one user, a shared secret, bounded messages.

The folder of the socket and the file of the secret are for this user alone; both sides prove that they know
the secret (the challenge of `multiprocessing.connection`, whose pickling half is never used).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from parablock.engine.flower.exchange import (
    HEADER_BYTES,
    Reply,
    Request,
    frame_lengths,
    header_of,
    reply_of,
    request_of,
)
from parablock.errors import StorageError


def secret_of(state_dir: Path) -> bytes:
    """Read the site's secret, or make it."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state_dir / "key"
    if not path.exists():  # written beside and linked: nobody ever reads half of it, and the first one wins
        beside = state_dir / f".key-{secrets.token_hex(8)}"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):
            os.link(beside, path)
        beside.unlink()
    mode = path.stat()
    if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
        raise StorageError(
            f"{path} can be read by others than user {os.getuid()}",
            cause="It is the secret between this site's ClientApp and its trainer.",
            remedy=f"Make it yours alone: chown and chmod 600 {path}",
        )
    return path.read_bytes()


def address_of(state_dir: Path) -> str:
    """Return the path of the site's socket, short enough for the kernel, in a folder that only this user enters."""
    folder = Path(tempfile.gettempdir()) / f"parablock-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    if owner.st_uid != os.getuid() or stat.S_IMODE(owner.st_mode) & 0o077 or not stat.S_ISDIR(owner.st_mode):
        raise StorageError(
            f"{folder} is not a folder of user {os.getuid()} alone",
            cause="The trainer's socket stands there.",
            remedy="Remove it, or set TMPDIR to a folder of yours.",
        )
    return str(folder / hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:16])


def listen(address: str) -> socket.socket:
    """Open the trainer's socket, in the place of one that a dead trainer has left."""
    Path(address).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    Path(address).chmod(0o600)
    listener.listen(4)
    return listener


def accept(listener: socket.socket, secret: bytes) -> Connection | None:
    """Take the next ClientApp; None for one that does not know the secret, or is gone already."""
    accepted, _ = listener.accept()
    connection = Connection(accepted.detach())
    try:
        if not connection.poll(5):  # whoever connects speaks first, so that a silent one holds nobody up
            raise EOFError
        connection.recv_bytes(8)
        deliver_challenge(connection, secret)
        answer_challenge(connection, secret)
    except (OSError, EOFError, AuthenticationError):
        connection.close()
        return None
    return connection


def connect(address: str, secret: bytes) -> Connection:
    """Reach the trainer.

    Raises:
        OSError: Nobody listens there.
        AuthenticationError: Whoever listens does not know the secret.
    """
    unix = socket.socket(socket.AF_UNIX)
    try:
        unix.connect(address)
    except OSError:
        unix.close()
        raise
    connection = Connection(unix.detach())
    connection.send_bytes(b"hello")
    answer_challenge(connection, secret)
    deliver_challenge(connection, secret)
    return connection


def send(connection: Connection, said: Request | Reply) -> None:
    """Write a request or a reply."""
    connection.send_bytes(header_of(said).encode())
    for frame in said.frames:
        connection.send_bytes(frame.content or b"\0")


def receive_request(connection: Connection) -> Request:
    """Read a request; no more is allocated than its header announces."""
    return request_of(*_receive(connection))


def receive_reply(connection: Connection) -> Reply:
    """Read a reply; no more is allocated than its header announces."""
    return reply_of(*_receive(connection))


def _receive(connection: Connection) -> tuple[str, list[bytes]]:
    header = connection.recv_bytes(HEADER_BYTES).decode()
    read: Callable[[int], bytes] = lambda length: connection.recv_bytes(max(1, length))[:length]  # noqa: E731
    return header, [read(length) for length in frame_lengths(header)]
