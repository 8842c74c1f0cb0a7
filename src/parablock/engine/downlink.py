"""The downlink: the commits that each client lacks, ahead of time in chunks with streaming.

A new value goes down as a difference if the wire format is narrower than the model, denser than updates if they are
sparse, and exactly otherwise; stacked adapters go down as the stack. A client that has missed a version gets
the whole value instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from parablock.algorithm.parablock import NEVER, Commit, ServerState, news_for
from parablock.wire.messages import Chunk, Finish, Mark, NewValue, RoundStart, Welcome, to_bytes
from parablock.wire.quantize import Encoding, Vector, bytes_per_element, downlink_format, join_chunks, pack
from parablock.wire.transport import Parcel, ServerTransport


class Downlink:
    """The way from the server to the clients.

    `held` are the block versions that each client holds; for `overwritten` see `RunState`.
    """

    def __init__(
        self,
        transport: ServerTransport,
        encoding: Encoding,
        held: Mapping[int, tuple[int, ...]],
        overwritten: Iterable[tuple[int, Commit]] = (),
    ) -> None:
        self._transport, self._encoding = transport, encoding
        self.held = dict(held)
        self._announced: dict[int, list[Vector]] = {}
        self._streamed_to: dict[int, dict[int, tuple[int, ...]]] = {}  # block → client → versions, oldest first
        self._news: dict[int, tuple[str, Vector]] = {}
        self.overwritten = tuple(overwritten)

    def send(self, client_id: int, round_index: int, message: RoundStart | Mark | Finish | Welcome) -> None:
        """Send a message whose bytes count for a round."""
        self._transport.send(client_id, Parcel(to_bytes(message), round_index))

    def finish(self, state: ServerState, client_id: int, *, is_lost: bool) -> None:
        """Send the last commits; whole ones to a client of which it is not known what it holds."""
        if is_lost:
            self.joins(client_id, (NEVER,) * len(state.params))
        self.send(client_id, len(state.history) - 1, Finish(state.committed, self.news_for(state, client_id)))

    def misfit(self, state: ServerState, versions: tuple[int, ...]) -> str:
        """Return why a client cannot hold these versions; empty if it can."""
        if len(versions) != len(state.params):
            return f"a model of {len(versions)} blocks where the server has {len(state.params)}"
        for b, (version, newest) in enumerate(zip(versions, state.versions, strict=True)):
            if version != NEVER and not (0 <= version <= newest and state.history[version] == b):
                return f"version {version} of block {b}, which the server never made"
        return ""

    def is_lossy(self, state: ServerState) -> bool:
        """Return whether new values are rounded on their way down."""
        return state.params[0].dtype.itemsize > bytes_per_element(self._encoding.format)

    def pack_chunk(
        self, state: ServerState, block_index: int, part: slice, value: Tensor, noise: np.random.Generator | None
    ) -> Chunk:
        """Return the next chunk of a block's new value.

        Args:
            state: The server before the commit of that value.
            block_index: The block.
            part: The chunk's elements.
            value: Their new value.
            noise: The draws of stochastic rounding.
        """
        version, kind, vector = state.committed + 1, "value", _exact(value)
        if self.is_lossy(state):
            difference = value.float() - state.view[block_index][part].float()
            kind, vector = "difference", pack(difference, downlink_format(self._encoding.format), noise)
            before = self._announced[block_index] if part.start else []
            self._announced[block_index] = [*before, vector]
        return Chunk(block_index, version, kind, vector)

    def stream(
        self, state: ServerState, chunk: Chunk, wanted: Iterable[int], round_index: int, *, first: bool
    ) -> None:
        """Send a chunk ahead to the `wanted` clients that hold the version before it, or have got that ahead."""
        b = chunk.block_index
        if first:
            ahead, before = self._streamed_to.get(b, {}), state.versions[b]
            self._streamed_to[b] = {
                client_id: (*ahead.get(client_id, ()), chunk.version)
                for client_id in wanted
                if (self.held[client_id][b], *ahead.get(client_id, ()))[-1] == before
            }
        parcel = Parcel(to_bytes(chunk), round_index)
        for client_id in sorted(self._streamed_to[b]):
            self._transport.send(client_id, parcel)

    def retract(self, block_index: int) -> None:
        """Drop the streamed chunks of a block, whose value will be another one and come whole."""
        self._streamed_to.pop(block_index, None)
        self._announced.pop(block_index, None)

    def announce(self, block_index: int, value: Tensor, view: Tensor) -> Tensor:
        """Return a new value as the clients see it: the view plus the difference that was packed in chunks."""
        assert value.shape == view.shape
        return (view.float() + join_chunks(self._announced[block_index])).to(view.dtype)

    def announce_news(self, block_index: int, news: tuple[str, Vector] | None) -> None:
        """Note the message of the coming commit; None if it is the value."""
        if news is not None:
            self._news[block_index] = news

    def joins(self, client_id: int, versions: tuple[int, ...]) -> None:
        """Note the versions that a restarted client holds; chunks that it got before are lost."""
        self.held[client_id] = versions
        for streamed_to in self._streamed_to.values():
            streamed_to.pop(client_id, None)

    def news_for(self, state: ServerState, client_id: int) -> tuple[NewValue, ...]:
        """Return the commits that a client lacks, and note that it has them."""
        held, news = self.held[client_id], []
        for new in news_for(state, held):
            b, nothing = new.block_index, _exact(new.value[:0])
            ahead = self._streamed_to.get(b, {}).pop(client_id, ())
            if ahead and ahead[-1] == new.version:
                news += [NewValue(b, version, new.rho, "streamed", nothing) for version in ahead]
                continue
            if b in self._news and held[b] == _version_before(state, b):
                kind, vector = self._news[b]
            elif len(self._announced.get(b, ())) == 1 and held[b] == _version_before(state, b):
                kind, vector = "difference", self._announced[b][0]
            else:
                kind, vector = "value", _exact(new.value)
            news.append(NewValue(b, new.version, new.rho, kind, vector))
        self.held[client_id] = state.versions
        return tuple(news)

    def remember_until(self, round_index: int, before: ServerState, block_index: int) -> None:
        """Keep a block's value from before a commit, as long as rounds up to `round_index` can ask for it again."""
        b = block_index
        old = Commit(b, before.versions[b], before.view[b], before.rho[b])
        self.overwritten = (*self.overwritten, (round_index, old))

    def forget_old(self, committed: int) -> None:
        """Drop the values that no open round can ask for."""
        self.overwritten = tuple((t, old) for t, old in self.overwritten if t > committed)

    def news_as_of(self, state: ServerState, client_id: int, committed: int) -> tuple[NewValue, ...] | None:
        """Return the commits up to a round that a client lacks, and note that it has them.

        None if that state is gone: a block has been committed again, and the client has missed the value before.
        """
        held, news = list(self.held[client_id]), []
        kept = {(old.block_index, old.version): old for _, old in self.overwritten}
        for new in news_for(state, held):
            b = new.block_index
            if new.version > committed:
                versions = [t for t in range(held[b] + 1, committed + 1) if state.history[t] == b]
                known = [kept[b, t] for t in versions if (b, t) in kept]
                if not known and versions:
                    return None
                if not known:
                    continue
                new = known[-1]
            news.append(NewValue(b, new.version, new.rho, "value", _exact(new.value)))
            held[b] = new.version
        self.held[client_id] = tuple(held)
        return tuple(news)


def _version_before(state: ServerState, block_index: int) -> int:
    earlier = [t for t in range(state.versions[block_index]) if state.history[t] == block_index]
    return earlier[-1] if earlier else NEVER


def _exact(value: Tensor) -> Vector:
    return pack(value, str(value.dtype).removeprefix("torch."))
