"""A site's ClientApp: a short-lived courier between Flower and the trainer, which it starts where there is none.

A SuperNode runs a new process for each message, so nothing here imports torch, and everything that has to
last stays in the trainer. The courier waits until the trainer has something to send, for as long as the
server allows.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from parablock.engine.flower.exchange import BOTH, Reply, Request, frame_lengths, header_of, request_of, word_of
from parablock.engine.flower.local_socket import address_of, connect, receive_reply, secret_of, send
from parablock.engine.flower.session import SessionFolder
from parablock.engine.flower.stream import PART_BYTES, Place, together_bytes
from parablock.errors import ParaBlockError, StallError
from parablock.storage.files import last_lines

Arrays = dict[tuple[bytes, ...], Array]
"""By the contents of the frames that are in it."""

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}
"""Makes the C library keep for the next round what a trainer has freed: memory that is new has to be cleared."""

ATTEMPTS = 3
START_S = 120.0
"""How long a trainer may take to open its socket."""


def client_app(site_of: Callable[[Context], tuple[int, Path, list[str]]]) -> ClientApp:
    """Make the ClientApp of a site.

    `site_of` returns (client_id, state folder, command of the trainer) for the context of a SuperNode; the session
    folder becomes the last argument of that command.
    """
    app = ClientApp()

    @app.train()
    def exchange(message: Message, context: Context) -> Message:
        array_bytes = PART_BYTES
        try:
            client_id, state_dir, command = site_of(context)
            request = request_of(*unpack(message.content))
            array_bytes = request.frame_bytes
            reply = _carry(request, client_id, state_dir, command)
            if request.hello:
                reply = replace(reply, carries=str(context.node_config.get("carries", BOTH)))
        except ParaBlockError as error:
            reply = Reply(client_id=-1, error=word_of(error))
        message.content = RecordDict()  # Flower holds the message to the end; a reply may be as large
        return Message(pack(reply, array_bytes), reply_to=message)

    return app


def pack(said: Request | Reply, array_bytes: int, made: Arrays | None = None) -> RecordDict:
    """Put a request or a reply into Flower's records: a line of JSON, and Arrays with the frames one after another.

    An Array takes about `array_bytes`; it is a request of its own through Flower. `made` are the Arrays of requests
    that go together: those of the same frames are shared, and new ones are added.
    """
    made, arrays = {} if made is None else made, ArrayRecord()
    for place, contents in enumerate(
        _together((frame.content for frame in said.frames), together_bytes(array_bytes))
    ):
        if contents not in made:
            content = contents[0] if len(contents) == 1 else b"".join(contents)
            made[contents] = Array("uint8", (len(content),), "parablock.bytes", content)
        arrays[f"{place:06d}"] = made[contents]
    record = RecordDict({"said": ConfigRecord({"header": header_of(said)})})
    if arrays:
        record["frames"] = arrays
    return record


def unpack(record: RecordDict) -> tuple[str, list[bytes]]:
    """Take apart what `pack` made: the header and the frames' contents, which leave the record."""
    header = str(record.config_records["said"]["header"])
    arrays = record.array_records.get("frames", ArrayRecord())
    return header, list(_apart((arrays.pop(name).data for name in sorted(arrays)), frame_lengths(header)))


def _together(contents: Iterable[bytes], most_bytes: int) -> Iterator[tuple[bytes, ...]]:
    """Put together what follows each other, up to so many bytes; what is longer stays alone."""
    group, size = list[bytes](), 0
    for content in filter(None, contents):
        if group and size + len(content) > most_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(content)
        size += len(content)
    if group:
        yield tuple(group)


def _apart(arrays: Iterator[bytes], lengths: Iterable[int]) -> Iterator[bytes]:
    """Cut what was joined into what it was; shorter where it is not as long as it should be."""
    joined, first = b"", 0
    for length in lengths:
        if length and first == len(joined):
            joined, first = next(arrays, b""), 0
        yield joined[first : first + length]
        first += length


def _carry(request: Request, client_id: int, state_dir: Path, command: list[str]) -> Reply:
    folder = SessionFolder(state_dir, request.run_key, request.session)
    if request.hello:
        return Reply(client_id, held_rounds=folder.held_rounds())
    for _ in range(ATTEMPTS):
        with _alone(state_dir):
            folder.open(request)
            if folder.finished is not None:
                now = datetime.now(UTC).timestamp()
                wanted = Place(folder.finished, 0, 0)
                return Reply(client_id, wanted, arrived_s=now, left_s=now, idle=True, finished=True)
            trainer = _reach_trainer(folder, state_dir, command)
        with closing(trainer) as connection:
            try:
                send(connection, request)
                return receive_reply(connection)
            except (EOFError, OSError):
                continue  # it died just now, or it served an earlier session and makes room for this one
    raise StallError(
        f"the trainer of {state_dir} ended {ATTEMPTS} times while it was asked",
        cause="Most often its memory: the system ends a process that asks for too much.",
        remedy=f"Look at {folder.path / 'trainer.log'} on that site.",
    )


@contextmanager
def _alone(state_dir: Path) -> Iterator[None]:
    """Keep the ClientApp of the site's other SuperNode out: a session is opened, and a trainer started, once."""
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state_dir / "couriers").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def trainer_environment() -> dict[str, str]:
    """Return the environment of a trainer: this process's, but for how the C library goes about memory."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | KEPT


def _reach_trainer(folder: SessionFolder, state_dir: Path, command: list[str]) -> Connection:
    """Connect to the session's trainer; start it where nobody answers."""
    address, secret = address_of(state_dir), secret_of(state_dir)
    started: subprocess.Popen[bytes] | None = None
    log = folder.path / "trainer.log"
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up:
        try:
            return connect(address, secret)
        except (OSError, EOFError, AuthenticationError):
            if started is None:
                with log.open("ab") as output:
                    started = subprocess.Popen(
                        [*command, str(folder.path)],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=trainer_environment(),
                        start_new_session=True,  # it outlives this process and the SuperNode
                    )
            elif started.poll() is not None:
                break
            time.sleep(0.1)
    raise StallError(
        f"the trainer of {state_dir} did not start; its log ends with:\n{last_lines(log, 12)}",
        cause="The site's own configuration, data or model, or its memory.",
        remedy=f"Look at {log} on that site.",
    )
