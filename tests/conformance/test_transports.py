"""What every transport does, in both directions and where somebody fails or is gone; see `transports`."""

from __future__ import annotations

import pytest

from parablock.clock import VirtualClock
from parablock.errors import CodecError, ParaBlockError, StallError
from parablock.wire.messages import Leave, from_bytes
from parablock.wire.transport import Parcel, StopAsked
from transports import CONNECTED, TRANSPORTS, Gone, Mail

LARGE = bytes(range(256)) * 16
NAME = pytest.StashKey[str]()


@pytest.fixture(params=TRANSPORTS)
def meet(request, tmp_path):
    request.node.stash[NAME] = request.param
    return TRANSPORTS[request.param](tmp_path)


def answered(transport, num_messages: int) -> dict[int, list[bytes]]:
    """Receive so many messages; return those of each client in order."""
    found: dict[int, list[bytes]] = {}
    for number in range(num_messages):
        client_id, message = transport.receive(10.0, f"message {number}")
        found.setdefault(client_id, []).append(message)
    return found


def echo(num_messages: int):
    def client(client_id: int, mail: Mail) -> None:
        for t in range(num_messages):
            mail.send(b"%d says " % client_id + mail.receive(), t)

    return client


def test_messages_reach_their_client_and_no_other_and_come_back_each_once_and_in_order(meet):
    num_clients, num_messages = 3, 5

    def server(transport, clock):
        for t in range(num_messages):
            for client_id in range(num_clients):
                transport.send(client_id, Parcel(b"%d for %d" % (t, client_id), t))
        assert answered(transport, num_clients * num_messages) == {
            i: [b"%d says %d for %d" % (i, t, i) for t in range(num_messages)] for i in range(num_clients)
        }
        assert transport.receive_until(clock.now() + 0.1, ()) is None

    meet(server, echo(num_messages), num_clients=num_clients)


def test_many_messages_before_the_first_answer_keep_their_order_beside_a_large_one(meet):
    sent = [b"small", LARGE, b"behind it", LARGE[::-1], b"last"]

    def server(transport, clock):
        for t, message in enumerate(sent):
            transport.send(0, Parcel(message, t))
        assert answered(transport, len(sent)) == {0: [b"0 says " + message for message in sent]}

    meet(server, echo(len(sent)), num_clients=1)


@pytest.mark.parametrize("size", [0, 1, 1 << 10, len(LARGE)])
def test_a_message_of_any_length_arrives_whole(meet, size: int):
    def client(client_id: int, mail: Mail) -> None:
        message = mail.receive()
        assert message == LARGE[:size]
        mail.send(message[::-1], 0)

    def server(transport, clock):
        transport.send(0, Parcel(LARGE[:size], 0))
        assert transport.receive(10.0, "it back") == (0, LARGE[:size][::-1])

    meet(server, client, num_clients=1)


def test_bytes_are_counted_by_round_client_and_direction(meet):
    def client(client_id: int, mail: Mail) -> None:
        for t in range(2):
            mail.send(mail.receive() * (1 + client_id), 3 + t)

    def server(transport, clock):
        for client_id in range(2):
            transport.send(client_id, Parcel(LARGE, 3))
            transport.send(client_id, Parcel(b"four", 4))
        answered(transport, 4)

    ledger = meet(server, client)
    counted = {
        t: {i: (ledger.of_round(t).up[i][0], ledger.of_round(t).down[i][0]) for i in range(2)} for t in (3, 4)
    }
    large = len(LARGE)
    assert counted == {3: {0: (large, large), 1: (2 * large, large)}, 4: {0: (4, 4), 1: (8, 4)}}
    assert (ledger.of_round(3).uplink_bytes, ledger.of_round(3).downlink_bytes) == (3 * large, 2 * large)
    assert not ledger.of_round(99).up


def test_what_a_client_sends_by_itself_arrives_in_order(meet):
    def client(client_id: int, mail: Mail) -> None:
        for t in range(3):
            mail.send(LARGE[t:], t)

    def server(transport, clock):
        assert answered(transport, 3) == {0: [LARGE, LARGE[1:], LARGE[2:]]}

    meet(server, client, num_clients=1)


def test_a_message_is_waited_for_until_a_time_and_is_there_when_it_comes(meet):
    def server(transport, clock):
        before_s = clock.now()
        assert transport.receive_until(before_s + 0.2, ()) is None
        assert clock.now() >= before_s + 0.2
        transport.send(0, Parcel(b"now", 0))
        assert transport.receive_until(clock.now() + 10.0) == (0, b"0 says now")

    meet(server, echo(1), num_clients=1)


def test_a_server_that_nobody_answers_says_what_it_waited_for(meet):
    def client(client_id: int, mail: Mail) -> None:
        mail.receive()
        raise Gone

    def server(transport, clock):
        for client_id in range(2):
            transport.send(client_id, Parcel(b"go", 0))
        with pytest.raises(StallError, match="the update of round 7"):
            transport.receive(1.0, "the update of round 7")

    meet(server, client, patience_s=2.0)


def test_a_client_whose_server_is_silent_ends_and_says_so(meet, request):
    errors = list[StallError]()

    def client(client_id: int, mail: Mail) -> None:
        mail.send(b"here", 0)
        try:
            mail.receive()
        except StallError as error:
            errors.append(error)
            raise Gone from None

    def server(transport, clock):
        transport.receive(10.0, "a sign")
        with pytest.raises(StallError):
            transport.receive(3.0, "what never comes", ())  # and asks nobody for it

    meet(server, client, num_clients=1, patience_s=0.5)
    if request.node.stash[NAME] in CONNECTED:
        assert not errors
        return
    (error,) = errors
    assert "client 0" in error.what


def test_an_error_of_a_client_reaches_the_server_that_waits_for_another(meet, request):
    def client(client_id: int, mail: Mail) -> None:
        message = mail.receive()
        if client_id == 1:
            raise CodecError("client 1 cannot read its block")
        mail.send(message, 0)
        mail.receive()

    def server(transport, clock):
        for client_id in range(2):
            transport.send(client_id, Parcel(b"go", 0))
        assert from_bytes(answered(transport, 2)[1][0]) == Leave("it could not read a message of the server")

    if request.node.stash[NAME] in CONNECTED:  # a site's trouble is its own
        meet(server, client, patience_s=2.0)
        return
    with pytest.raises(ParaBlockError, match="client 1 cannot read its block"):
        meet(server, client, patience_s=2.0)


@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_ends_the_wait_for_a_client_that_is_gone_and_no_other_wait(
    meet, asked: bool, request: pytest.FixtureRequest
):
    def client(client_id: int, mail: Mail) -> None:
        mail.send(mail.receive(), 0)
        mail.receive()
        if client_id == 1:
            raise Gone
        mail.send(b"back", 1)

    def server(transport, clock):
        for client_id in range(2):
            transport.send(client_id, Parcel(b"go", 0))
        answered(transport, 2)
        assert transport.is_there(0) and transport.is_there(1)
        for client_id in range(2):
            transport.send(client_id, Parcel(b"on", 1))
        assert transport.receive(10.0, "the one that is there", {0}) == (0, b"back")
        stops = asked and not isinstance(clock, VirtualClock)  # whose patience takes no time
        with pytest.raises(StopAsked if stops else StallError, match="client 1" if stops else "the other"):
            transport.receive(2.0, "the other", {1})
        assert not transport.is_there(1)
        if asked and request.node.stash[NAME] in CONNECTED:  # with a deadline too
            with pytest.raises(StopAsked, match="client 1"):
                transport.receive_until(clock.now() + 60.0, {1})
        assert transport.receive_until(clock.now() + 0.6, {0}) is None, "who is there is waited for"

    meet(server, client, patience_s=3.0, asked_to_stop=lambda: asked)


def test_nothing_is_taken_of_a_message_whose_sender_is_gone_before_its_end(meet):
    def client(client_id: int, mail: Mail) -> None:
        mail.send(mail.receive(), 0)
        mail.receive()
        mail.send(LARGE, 1)
        raise Gone

    def server(transport, clock):
        transport.send(0, Parcel(b"go", 0))
        assert transport.receive(10.0, "the first") == (0, b"go")
        transport.send(0, Parcel(b"on", 1))
        assert transport.receive_until(clock.now() + 0.5) in {None, (0, LARGE)}

    meet(server, client, num_clients=1, patience_s=1.0)
