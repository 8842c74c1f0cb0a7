"""Flower's Grid in one process: messages go to sites through the real courier's records and the real socket.

Every exchange may be lost on its way back, or answered twice, as a test says. What Flower itself does is tested
with real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from parablock.engine.flower.courier import pack, unpack
from parablock.engine.flower.exchange import Reply, Request, request_of
from parablock.engine.flower.local_socket import address_of, connect, receive_reply, secret_of, send
from parablock.engine.flower.session import SessionFolder
from parablock.engine.flower.stream import Place

Fate = Callable[[int, int], str]
"""Gives carry | lose | refuse | die for (client_id, which exchange with it), fail for a greeting, the 0th.

At `die` the site's trainer makes room for another if it is asked for the rest of a message.
"""


class LoopGrid(Grid):
    """For each client a node, or two of them, one for each direction.

    Args:
        state_dirs: A folder for each client.
        start: Starts a client's trainer.
        fate: What becomes of each exchange.
        carries: What the nodes of one client after the other carry, and so on from the first again.
    """

    def __init__(
        self,
        state_dirs: list[Path],
        start: Callable[[int, SessionFolder], None],
        fate: Fate,
        carries: Sequence[tuple[str, ...]] = (("both",),),
    ) -> None:
        self._nodes = [(i, way) for i in range(len(state_dirs)) for way in carries[i % len(carries)]]
        self._starting = threading.Lock()
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self._dirs, self._start, self._fate = state_dirs, start, fate
        self._replies: dict[str, Message | None] = {}
        self._count = 0
        self._newest: dict[int, threading.Thread] = {}
        self.exchanges = [0] * len(state_dirs)
        self._started: set[Path] = set()
        self.deaths = self.following = self.reply_bytes = 0
        self.attempts: dict[int, list[int]] = {}
        self.is_over = threading.Event()  # who sets it ends every courier that waits for a trainer

    def set_run(self, run: object) -> None:
        """Nothing to set."""

    @property
    def run(self) -> object:
        return None

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, 1 + len(self._nodes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        message_ids = []
        for message in messages:
            self._count += 1
            message_ids.append(message_id := str(self._count))
            self._replies[message_id] = None
            message.metadata.__dict__["_message_id"] = message_id
            before = self._newest.get(message.metadata.dst_node_id)
            serving = threading.Thread(target=self._serve_after, args=(before, message, message_id), daemon=True)
            serving.start()
            self._newest[message.metadata.dst_node_id] = serving
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for message_id in message_ids if (reply := self._replies.pop(message_id, None)) is not None]

    def _serve_after(self, before: threading.Thread | None, message: Message, message_id: str) -> None:
        """Deal with a message when the one before it is done with, as a SuperNode does."""
        if before is not None:
            before.join()
        self._serve(message, message_id)

    def _serve(self, message: Message, message_id: str) -> None:
        client_id, carries = self._nodes[message.metadata.dst_node_id - 1]
        request = request_of(*unpack(message.content))
        folder = SessionFolder(self._dirs[client_id], request.run_key, request.session)
        if request.hello and self._fate(client_id, 0) == "fail":
            self._replies[message_id] = Message(Error(code=1, reason="there is no such app"), reply_to=message)
            return
        if request.hello:
            reply = Reply(client_id, held_rounds=folder.held_rounds(), carries=carries)
        else:
            self.exchanges[client_id] += 1
            self.following += request.follows > 0
            self.attempts.setdefault(message.metadata.dst_node_id, []).append(request.attempt)
            if self._fate(client_id, self.exchanges[client_id]) == "refuse":
                return
            if folder.path.exists() and folder.finished is not None:
                reply = Reply(client_id, wanted=Place(folder.finished, 0, 0), idle=True, finished=True)
            else:
                reply = self._carry(client_id, folder, request)
            self.reply_bytes += sum(len(frame.content) for frame in reply.frames)
            if self._fate(client_id, self.exchanges[client_id]) == "lose":
                return
        self._replies[message_id] = Message(pack(reply, request.frame_bytes), reply_to=message)

    def _carry(self, client_id: int, folder: SessionFolder, request: Request) -> Reply:
        with self._starting:
            folder.open(request)
            is_within = request.wanted.offset or request.follows
            if is_within and self._fate(client_id, self.exchanges[client_id]) == "die":
                self._started.discard(folder.path)
                Path(address_of(self._dirs[client_id])).unlink()  # the dead hear nobody
                self.deaths += 1
            if folder.path not in self._started:
                self._started.add(folder.path)
                self._start(client_id, folder)
        state_dir = self._dirs[client_id]
        while folder.finished is None and not self.is_over.is_set():
            try:
                with closing(connect(address_of(state_dir), secret_of(state_dir))) as connection:
                    send(connection, request)
                    return receive_reply(connection)
            except (OSError, EOFError):
                self.is_over.wait(0.01)
        return Reply(client_id, wanted=Place(folder.finished or 0, 0, 0), idle=True, finished=True)


class Online(LoopGrid):
    """A Grid that only says who is online."""

    def __init__(self) -> None:
        super().__init__([], lambda *_: None, lambda *_: "carry")
        self.nodes: set[int] = set()

    def get_node_ids(self) -> set[int]:
        return self.nodes
