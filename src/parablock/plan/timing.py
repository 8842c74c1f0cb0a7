"""Simulate the times of a run: computation and messages on a clock, by the rules of the engine and the link.

A client computes in one thread and communicates in another; its link carries one message at a time in each
direction. The server starts round t after it has committed round t − 1 − d. It commits a round chunk by chunk: it
folds a chunk as soon as every client has sent it, and sends its new value down at once. Aggregation, evaluation and
checkpoints take no time.

Where updates are masked, clients and server agree on masks first, with four messages one after the other. A sum is
known once enough clients have answered a question that the server asks when all updates have come. An answer waits
behind the updates that were ready before it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

from parablock.plan.itinerary import Itinerary
from parablock.plan.traffic import Shipment, Sizes
from parablock.wire.transport import Link


@dataclass(frozen=True)
class Timing:
    """Times of a run; all but `wall_s` are means over the rounds.

    Attributes:
        compute_s: Computation of the slowest client.
        communication_s: Both directions of the client whose link is busy longest.
        sequential_s: Computation and communication of the client for which they take longest together.
        exchange_s: Time from the end of the computation to the aggregate's arrival, on a free link.
        cover_s: The computation that hides the exchange. With delay 1 it is as long as the exchange; a longer
            delay leaves the exchange more rounds, but each direction of the link only one.
        round_s: `wall_s` over the number of rounds, so that filling and draining are included.
        wall_s: The whole run.
    """

    compute_s: float
    communication_s: float
    sequential_s: float
    exchange_s: float
    cover_s: float
    round_s: float
    wall_s: float


@dataclass
class _Client:
    """Times at which the compute thread and the two directions of the link are free.

    Attributes:
        queue: Uploads that have not ended when the server's last round was committed: when each is ready, its
            seconds, and its round; −1 for an answer of secure aggregation.
    """

    compute_s: float = 0.0
    up_s: float = 0.0
    down_s: float = 0.0
    queue: list[tuple[float, float, int]] = field(default_factory=list)

    def upload(self, round_index: int) -> float:
        """Carry everything up to the update of a round; return when that begins."""
        while True:
            ready_s, seconds, t = self.queue.pop(0)
            begin_s = max(self.up_s, ready_s)
            self.up_s = begin_s + seconds
            if t == round_index:
                return begin_s

    def answer(self, ready_s: float, seconds: float) -> float:
        """Queue an answer; return when it has been carried."""
        own = (ready_s, seconds, -1)
        insort(self.queue, own, key=lambda each: each[0])
        end_s = self.up_s
        for each in self.queue[: self.queue.index(own) + 1]:
            end_s = max(end_s, each[0]) + each[1]
        return end_s


def time_rounds(
    itinerary: Itinerary, sizes: Sizes, compute_s: Callable[[int, int, int], float], link: Link, *, delay: int
) -> Timing:
    """Return the times of a run whose itinerary has this delay; `compute_s` is of (block, round, client)."""
    return _Run(itinerary, sizes, compute_s, link, delay).timing()


class _Run:
    def __init__(
        self,
        itinerary: Itinerary,
        sizes: Sizes,
        compute_s: Callable[[int, int, int], float],
        link: Link,
        delay: int,
    ) -> None:
        self._itinerary, self._sizes, self._link, self._delay = itinerary, sizes, link, delay
        self._compute_s = compute_s
        self._num_rounds = len(itinerary.blocks)
        self._clients = {client_id: _Client() for client_id in itinerary.drain}
        self._computing: list[dict[int, float]] = [{} for _ in itinerary.blocks]
        self._busy: list[dict[int, float]] = [dict.fromkeys(self._clients, 0.0) for _ in itinerary.blocks]
        self._masking, self._question_s = sizes.masking, cache(self._seconds_of_question)
        self._partners_s = link.upload_s(self._masking.partners) if self._masking else 0.0
        self._committed, self._committed_s = -1, 0.0

    def timing(self) -> Timing:
        self._agree_on_masks()
        for t in range(self._num_rounds):
            self._commit_through(t - 1 - self._delay)
            self._start_round(t)
        self._commit_through(self._num_rounds - 1)
        for client_id, news in self._itinerary.drain.items():
            self._download(client_id, self._link.download_s(self._sizes.finish(news)), self._num_rounds - 1)
        computing, busy = self._computing, self._busy
        exchanges = [self._exchange(t) for t in range(self._num_rounds)]
        wall_s = max(client.down_s for client in self._clients.values())
        own_busy = [[busy[t][i] for i in seconds] for t, seconds in enumerate(computing)]
        in_turn = [[busy[t][i] + own_s for i, own_s in seconds.items()] for t, seconds in enumerate(computing)]
        periods = max(1, self._delay)
        return Timing(
            compute_s=fmean(max(seconds.values()) for seconds in computing),
            communication_s=fmean(map(max, own_busy)),
            sequential_s=fmean(map(max, in_turn)),
            exchange_s=fmean(exchange_s for exchange_s, _ in exchanges),
            cover_s=fmean(max(exchange_s / periods, one_way_s) for exchange_s, one_way_s in exchanges),
            round_s=wall_s / self._num_rounds,
            wall_s=wall_s,
        )

    def _start_round(self, t: int) -> None:
        b = self._itinerary.blocks[t]
        for client_id in self._clients if t in self._itinerary.marks else ():
            self._download(client_id, self._link.download_s(self._sizes.mark), t)
        upload_s = self._partners_s + _total_s(self._sizes.update(b), self._link.upload_s)
        for client_id, news in self._itinerary.news[t].items():
            client = self._clients[client_id]
            self._download(client_id, self._link.download_s(self._sizes.round_start(news)), t)
            seconds = self._compute_s(b, t, client_id)
            client.compute_s = max(client.compute_s, client.down_s) + seconds
            client.queue.append((client.compute_s, upload_s, t))
            self._computing[t][client_id] = seconds
            self._busy[t][client_id] += upload_s

    def _download(self, client_id: int, seconds: float, round_index: int) -> None:
        client = self._clients[client_id]
        client.down_s = max(client.down_s, self._committed_s) + seconds
        self._busy[round_index][client_id] += seconds

    def _commit_through(self, last: int) -> None:
        for t in range(self._committed + 1, last + 1):
            b, needed_in = self._itinerary.blocks[t], min(t + 1 + self._delay, self._num_rounds - 1)
            begin_s = max(self._clients[client_id].upload(t) for client_id in self._itinerary.news[t])
            folded_s, arrived_s = self._stream(b, begin_s + self._partners_s, self._committed_s)
            folded_s = self._unmask(t, folded_s)
            down_s = _total_s(self._sizes.new_value(b), self._link.download_s)
            for client_id in self._itinerary.streams[t]:
                client = self._clients[client_id]
                client.down_s = max(client.down_s + down_s, arrived_s)
                self._busy[needed_in][client_id] += down_s
            self._committed, self._committed_s = t, folded_s

    def _agree_on_masks(self) -> None:
        """Exchange keys, then letters; each time the server waits for all clients."""
        if self._masking is None:
            return
        up, down = self._link.upload_s, self._link.download_s
        each = {i: self._masking.openings[i] for i in self._clients}
        keys_s = max(up(opening.advertise) for opening in each.values())
        for i, opening in each.items():
            self._clients[i].up_s = keys_s + down(opening.roster) + up(opening.shares)
        self._committed_s = max(client.up_s for client in self._clients.values())
        for i, opening in each.items():
            self._busy[0][i] += up(opening.advertise) + down(opening.roster) + up(opening.shares)
            self._download(i, down(opening.letters), 0)

    def _unmask(self, t: int, folded_s: float) -> float:
        """Return when the server can read a round's sum: once enough clients have answered."""
        if self._masking is None:
            return folded_s
        drawn, answered_s = tuple(self._itinerary.news[t]), []
        ask_s, answer_s = self._question_s(drawn)
        for client_id in drawn:
            client = self._clients[client_id]
            client.down_s = max(client.down_s, folded_s) + ask_s
            answered_s.append(client.answer(client.down_s, answer_s))
            self._busy[t][client_id] += ask_s + answer_s
        return sorted(answered_s)[self._masking.enough(drawn) - 1]

    def _seconds_of_question(self, drawn: tuple[int, ...]) -> tuple[float, float]:
        """Return the seconds of the question for a cohort's shares, and of an answer."""
        if self._masking is None:
            return 0.0, 0.0
        revealed, reveal = self._masking.revealed(drawn), self._masking.reveal(drawn)
        return self._link.download_s(reveal), self._link.upload_s(revealed)

    def _stream(self, block: int, begin_s: float, not_before_s: float) -> tuple[float, float]:
        """Carry a block's chunks up from `begin_s`, and their new values down as soon as they are folded.

        Returns:
            The times at which the last chunk is folded, and at which its new value arrives on a free link.
        """
        up, down = self._sizes.update(block), self._sizes.new_value(block)
        chunk_up_s, chunk_down_s = self._link.upload_s(up.chunk_bytes), self._link.download_s(down.chunk_bytes)
        last_down_s = self._link.download_s(down.last_bytes)
        up_s, down_s = _total_s(up, self._link.upload_s), _total_s(down, self._link.download_s)
        folded_s = max(not_before_s, begin_s + up_s)
        ends_s = [not_before_s + down_s, folded_s + last_down_s]
        if up.num_chunks > 1:  # the slower direction decides: it is busy from the first chunk, or up to the last
            ends_s.append(begin_s + chunk_up_s + down_s)
            ends_s.append(begin_s + chunk_up_s * (up.num_chunks - 1) + chunk_down_s + last_down_s)
        return folded_s, max(ends_s)

    def _exchange(self, t: int) -> tuple[float, float]:
        """Return the seconds of an exchange of this round's block, and those of its busier direction."""
        b, streamed = self._itinerary.blocks[t], bool(self._itinerary.streams[t])
        folded_s, arrived_s = self._stream(b, self._partners_s, 0.0)
        ask_s, answer_s = self._question_s(tuple(self._itinerary.news[t]))
        starts = self._itinerary.news[t].values()
        start_s = max(self._link.download_s(self._sizes.round_start(news)) for news in starts)
        down_s = start_s + (_total_s(self._sizes.new_value(b), self._link.download_s) if streamed else 0.0)
        exchange_s = (arrived_s if streamed else folded_s + ask_s + answer_s) + start_s
        return exchange_s, max(folded_s + answer_s, down_s + ask_s)


def _total_s(shipment: Shipment, seconds: Callable[[int], float]) -> float:
    return (shipment.num_chunks - 1) * seconds(shipment.chunk_bytes) + seconds(shipment.last_bytes)
