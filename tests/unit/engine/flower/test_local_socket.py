"""The socket between a trainer and its ClientApps, and its secret."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from frames import REQUEST
from parablock.engine.flower.local_socket import (
    accept,
    address_of,
    connect,
    listen,
    receive_request,
    secret_of,
    send,
)
from parablock.errors import StorageError


def test_only_who_knows_the_secret_reaches_the_trainer(tmp_path: Path):
    secret, address = secret_of(tmp_path), address_of(tmp_path)
    served: list[object] = []
    with closing(listen(address)) as listener:

        def serve() -> None:
            for _ in range(3):
                connection = accept(listener, secret)
                served.append(None if connection is None else receive_request(connection))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(AuthenticationError):
            connect(address, b"another secret")
        socket.socket(socket.AF_UNIX).close()
        with closing(socket.socket(socket.AF_UNIX)) as silent:
            silent.connect(address)
            silent.shutdown(socket.SHUT_RDWR)
        with closing(connect(address, secret)) as connection:
            send(connection, REQUEST)
            thread.join()
    assert served == [None, None, REQUEST]
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert Path(address).parent.stat().st_mode & 0o077 == 0


def test_all_who_ask_for_the_secret_at_once_get_the_same_whole_one(tmp_path: Path):
    found: set[bytes] = set()
    threads = [threading.Thread(target=lambda: found.add(secret_of(tmp_path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(secret) for secret in found] == [32]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path):
    secret_of(tmp_path)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(StorageError, match="can be read by others"):
        secret_of(tmp_path)
