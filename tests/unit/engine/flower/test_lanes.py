"""The parts of the Flower engine alone: streams, headers, the site's disk and socket, configuration, keys."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from math import inf
from multiprocessing import AuthenticationError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import push_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_grid import LoopGrid
from parablock.clock import RealClock
from parablock.config.load import parse_config
from parablock.deploy.keys import make_keys
from parablock.deploy.processes import (
    ServerFiles,
    run_status,
    superlink_command,
    supernode_command,
    supernodes_of,
    write_connection,
)
from parablock.deploy.site import configuration_at, load_site, shared_config, site_file
from parablock.deploy.superlink import server_config
from parablock.engine.flower import grid
from parablock.engine.flower.courier import client_app, pack, unpack
from parablock.engine.flower.exchange import (
    PROTOCOL,
    Reply,
    Request,
    error_of,
    frame_lengths,
    header_of,
    reply_of,
    request_of,
    word_of,
)
from parablock.engine.flower.lanes import Lane, Site, Speed, UnderWay, site_among
from parablock.engine.flower.local_socket import (
    accept,
    address_of,
    connect,
    listen,
    receive_request,
    secret_of,
    send,
)
from parablock.engine.flower.pace import READ_ELEMENTS, push_a_few_at_a_time
from parablock.engine.flower.session import Position, SessionFolder
from parablock.engine.flower.stream import START, Frame, Inbox, Outbox, Place
from parablock.errors import CodecError, ConfigError, InputError, ParaBlockError, StorageError
from parablock.trace import Trace

REQUEST = Request("run", "session", None, "train: {}", "abc")
SERVER = {
    "model": {"name_or_path": "/server/model"},
    "data": {"train": [], "test": ["/server/test.jsonl"], "max_length": 64},
    "engine": {"name": "flower"},
    "report_to": ["tensorboard"],
    "seed": 5,
}


def frame(message: int, content: bytes, offset: int = 0, size: int | None = None, checksum: int = 7) -> Frame:
    return Frame(message, offset, offset + len(content) if size is None else size, checksum, 0, content)


@given(
    messages=st.lists(st.binary(max_size=40), max_size=8),
    exchanges=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 9), st.sampled_from(["carry", "lose", "twice", "late"])),
        max_size=60,
    ),
)
@settings(max_examples=100, deadline=None)
def test_every_message_arrives_once_and_in_order_whatever_is_lost(messages, exchanges):
    out, inbox, received, late = Outbox(), Inbox(), [], []
    for message in messages:
        out.put(message, 0)
    for budget, longest, fate in [*exchanges, *[(1 << 20, 1 << 20, "carry")] * 2]:
        out.acknowledge(inbox.wanted)
        frames = out.after(inbox.wanted, budget, longest)
        assert frames == out.unconfirmed(budget, longest)
        assert all(len(frame.content) <= longest for frame in frames)
        before, brought = inbox.wanted, len(received)
        for _ in range({"lose": 0, "late": 0, "carry": 1, "twice": 2}[fate]):
            received += [message for message, _ in inbox.take(frames)]
        between = out.between(before, inbox.wanted)
        assert b"".join(f.content for f in between) == b"".join(
            f.content for f in frames if fate in ("carry", "twice")
        )
        assert len(received) - brought == sum(f.next_place.offset == 0 for f in between)
        received += [message for message, _ in inbox.take(late)]  # overtaken by a request of another cut
        late = frames if fate == "late" else []
    out.acknowledge(inbox.wanted)
    assert received == messages
    assert out.is_empty


@given(
    messages=st.lists(st.binary(max_size=40), min_size=1, max_size=8),
    pairs=st.lists(
        st.tuples(
            st.integers(1, 30),
            st.integers(1, 30),
            st.integers(1, 9),
            st.sampled_from(["both", "first", "second", "first, and second twice"]),
        ),
        max_size=40,
    ),
)
@settings(max_examples=100, deadline=None)
def test_of_two_exchanges_that_follow_each_other_only_what_was_lost_is_sent_again(messages, pairs):
    out, inbox, received, sent = Outbox(), Inbox(), [], 0
    for message in messages:
        out.put(message, 0)
    for first_bytes, second_bytes, longest, fate in [*pairs, *[(1 << 20, 1, 1 << 20, "both")] * 2]:
        out.acknowledge(inbox.wanted, inbox.ahead)
        first = out.unconfirmed(first_bytes, longest)
        is_gap = inbox.ahead is not None
        second = out.after(first[-1].next_place, second_bytes, longest) if first and not is_gap else []
        if "first" in fate or fate == "both":
            received += [message for message, _ in inbox.take(first)]
            sent += sum(len(each.content) for each in first)
        for _ in range({"first": 0, "first, and second twice": 2}.get(fate, 1)):
            received += [message for message, _ in inbox.take(second, follows=True)]
        sent += sum(len(each.content) for each in second) if fate != "first" else 0
    out.acknowledge(inbox.wanted)
    assert received == messages
    assert out.is_empty and inbox.ahead is None
    assert sent == sum(map(len, messages))  # what arrived was never sent again


def test_what_is_ahead_of_its_turn_has_to_follow_and_to_be_of_the_same_message():
    out, other, inbox = Outbox(), Outbox(), Inbox()
    out.put(b"1 s, and a delta", 0)
    other.put(b"2 s, and a delta", 0)
    second = out.after(out.after(START, 6, 6)[0].next_place, 100)
    with pytest.raises(CodecError, match="byte 6 of message 0 came where byte 0"):
        inbox.take(second)
    assert inbox.ahead is None
    assert inbox.take(second, follows=True) == []
    assert inbox.ahead is not None and inbox.ahead[:2] == (0, 6)
    assert [f.content for f in out.after(inbox.wanted, 100, until=inbox.ahead)] == [b"1 s, a"]
    assert [f.content for f in other.after(inbox.wanted, 100, until=inbox.ahead)] == [b"2 s, and a delta"]
    assert [m for m, _ in inbox.take(other.after(inbox.wanted, 100, until=inbox.ahead))] == [b"2 s, and a delta"]
    assert inbox.ahead is None


def test_a_missing_frame_is_an_error_and_a_known_one_is_not():
    inbox = Inbox()
    first, second = frame(0, b"a"), frame(1, b"bcd")
    assert inbox.take([first, first]) == [(b"a", first)]
    with pytest.raises(CodecError, match="byte 0 of message 2 came where byte 0 of message 1"):
        inbox.take([frame(2, b"b")])
    with pytest.raises(CodecError, match="byte 2 of message 1 came where byte 0 of message 1"):
        inbox.take([frame(1, b"d", offset=2)])
    assert inbox.take([frame(1, b"bc", size=3)]) == []
    assert inbox.fresh([second]) == [frame(1, b"d", offset=2)]
    assert inbox.take([second]) == [(b"bcd", frame(1, b"d", offset=2))]


def test_a_message_that_was_made_again_is_taken_from_its_beginning():
    """The sender died in the middle of it, and a measured time stands in it."""
    out, inbox = Outbox(), Inbox()
    out.put(b"1 s, and a delta", 0)
    inbox.take(out.after(inbox.wanted, 6, 6))
    assert inbox.wanted[:2] == (0, 6)
    same, other = Outbox(), Outbox()
    same.put(b"1 s, and a delta", 0)
    other.put(b"2 s, and a delta", 0)
    assert [f.offset for f in same.after(inbox.wanted, 100, 100)] == [6]
    assert [f.offset for f in other.after(inbox.wanted, 100, 100)] == [0]
    inbox.take(other.after(inbox.wanted, 4, 4))
    same.put(b"the next", 1)
    late = same.after(Place(0, 6, same.after(START, 1)[0].checksum), 100)
    assert [(f.message, f.offset) for f in late] == [(0, 6), (1, 0)]
    assert inbox.take(late) == []  # of the one that has died, overtaken: nothing of it is wanted any more
    assert inbox.wanted[:2] == (0, 4)
    assert [message for message, _ in inbox.take(other.after(inbox.wanted, 100))] == [b"2 s, and a delta"]


def test_a_sender_that_starts_again_keeps_the_numbers_and_does_not_send_what_is_known():
    out = Outbox(first=3)
    out.acknowledge(Place(5))
    for content in (b"3", b"4", b"5"):
        out.put(content, 0)
    assert [(frame.message, frame.content) for frame in out.unconfirmed(100)] == [(5, b"5")]
    assert not out.has(Place(6)) and out.has(Place(5))


def test_frames_are_as_long_as_the_link_is_worth():
    sizes = [Speed(bytes_per_s).frame_bytes for bytes_per_s in (0, 0.5e6, 4e6, 25e6)]
    assert sizes == [1 << 20, 1 << 20, 2_000_000, 8 << 20]
    site, lane = Site(up=Speed(4e6), down=Speed(3e6)), Lane("both", 1)
    site.out.put(bytes(7_000_000), 0)
    request = site.ask(lane, OPENING, 0.0)
    assert request.frame_bytes == 2_000_000
    assert [len(frame.content) for frame in request.frames] == [1_400_000] * 5


def test_headers_say_all_and_give_it_back():
    frames = (Frame(4, 3, 5, 99, 2, b"xy"), Frame(5, 0, 0, 1, 2, b""))
    request = replace(REQUEST, frames=frames, wanted=Place(7, 2, 9), restore=3)
    assert frame_lengths(header_of(request)) == [2, 0]
    assert request_of(header_of(request), [b"xy", b""]) == request
    reply = Reply(1, wanted=Place(2), held_rounds=(1, 2), spans=(("compute", "computing", 0.5, 1.0, {"a": 1}),))
    assert reply_of(header_of(reply), []) == reply
    with pytest.raises(CodecError, match="not a Reply"):
        reply_of(header_of(request), [b"xy", b""])
    with pytest.raises(CodecError, match="lengths"):
        request_of(header_of(request), [b"x", b""])


@given(contents=st.lists(st.binary(max_size=9), max_size=12), array_bytes=st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_frames_travel_in_arrays_that_are_as_long_as_wanted(contents: list[bytes], array_bytes: int):
    frames = tuple(frame(message, content) for message, content in enumerate(contents))
    record = pack(replace(REQUEST, frames=frames), array_bytes)
    lengths = [len(array.data) for array in record.array_records.get("frames", {}).values()]
    array_bytes += array_bytes // 4  # two chunks of 4 MiB and their headers go together into 8 MiB
    longest = max([array_bytes, *map(len, contents)])
    assert all(0 < length <= longest for length in lengths)
    assert all(sum(pair) > array_bytes for pair in pairwise(lengths))
    assert unpack(record) == (header_of(replace(REQUEST, frames=frames)), contents)


@pytest.mark.parametrize("fault", ["of the site", "of the server"])
def test_a_clientapp_that_cannot_begin_says_why(tmp_path: Path, fault: str):
    def site_of(_: Context) -> tuple[int, Path, list[str]]:
        if fault == "of the site":
            raise InputError("the site's file is not there")
        return 0, tmp_path, []

    Online()  # Flower's messages want to know in whose name they are made
    record = pack(REQUEST, 1)
    if fault == "of the server":
        record["said"] = ConfigRecord(
            {"header": header_of(REQUEST).replace(f'"protocol": {PROTOCOL}', '"protocol": 2')}
        )
    message = Message(record, dst_node_id=1, message_type="train")
    answer = client_app(site_of)(message, Context(1, 1, {}, RecordDict(), {}))
    word = {"of the site": "the site's file is not there", "of the server": "it speaks protocol 2"}[fault]
    assert word in error_of("client 0", reply_of(*unpack(answer.content)).error).what


def test_what_a_message_carries_is_copied_a_few_objects_at_a_time(monkeypatch: pytest.MonkeyPatch):
    copy, copied, most_ready = ArrayChunk.deflate, list[ArrayChunk](), dict[str, int]()
    monkeypatch.setattr(ArrayChunk, "deflate", lambda chunk: (copied.append(chunk), copy(chunk))[1])

    def push_with(module: SimpleNamespace, name: str) -> dict[str, bytes]:
        sender = Outbox()
        sender.put(bytes(range(256)) * 400, 0)
        record = pack(Reply(0, frames=tuple(sender.after(START, 1 << 20, 1000))), 1000)
        with no_object_id_recompute():
            objects = get_all_nested_objects(record)
            copied.clear()
            pushed = dict[str, bytes]()

            def push(object_id: str, content: bytes) -> None:
                time.sleep(0.002)  # as one that takes longer than a copy
                most_ready[name] = max(most_ready.get(name, 0), len(copied) - len(pushed))
                pushed[object_id] = content

            left_out = next(iter(objects))
            module.push_objects(objects, push, object_ids_to_push=set(objects) - {left_out})
        assert left_out not in pushed
        return pushed

    flowers = SimpleNamespace(push_objects=push_objects)
    ours = SimpleNamespace(push_objects=push_objects)
    for _ in range(2):  # once for each run in a process
        push_a_few_at_a_time(ours)
    everything = push_with(flowers, "Flower's")
    assert push_with(ours, "ours") == everything
    assert len(everything) > 150
    assert most_ready["ours"] <= READ_ELEMENTS
    assert most_ready["Flower's"] > 2 * READ_ELEMENTS


def test_arrays_that_are_not_as_the_header_says_are_refused():
    record = pack(replace(REQUEST, frames=(frame(0, b"abc"), frame(1, b"de"))), 100)
    short = ArrayRecord({"000000": Array("uint8", (4,), "parablock.bytes", b"abcd")})
    with pytest.raises(CodecError, match="not of the lengths"):
        request_of(*unpack(RecordDict({**record, "frames": short})))
    del record["frames"]
    with pytest.raises(CodecError, match="not of the lengths"):
        request_of(*unpack(record))


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        '{"protocol": 99, "frames": []}',
        '{"protocol": 3, "frames": [[0, 0, 99999999999, 1, 0, 99999999999]]}',
        '{"protocol": 3, "frames": [[-1, 0, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, true, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, 1, 1, 1, 0, 1]]}',
        '{"protocol": 3, "frames": [[0, 1, 1, 1, 0, 0]]}',
        '{"protocol": 3, "frames": [[0, 0, 1, 1, 0, -1]]}',
        '{"protocol": 3, "frames": [[0, 0, 1, 1, 1]]}',
        '{"protocol": 3, "kind": "Request", "frames": [], "surprise": 1}',
    ],
)
def test_a_broken_header_is_refused_before_anything_is_allocated(broken: str):
    with pytest.raises(CodecError, match="cannot be read"):
        request_of(broken, [])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(vars(Reply(0)))), value=ANYTHING)
@settings(max_examples=300, deadline=None)
def test_whatever_a_site_says_is_taken_as_it_is_meant_or_refused(name: str, value: object):
    said = json.loads(header_of(Reply(0, error=("what", "", "", 2))))
    said[name] = value
    try:
        reply = reply_of(json.dumps(said), [])
    except CodecError:
        return
    assert len(reply.wanted) == 3 and all(type(number) is int for number in reply.wanted)
    assert all(len(span) == 5 for span in reply.spans)
    assert len(reply.error) in (0, 4)


def test_a_sites_error_keeps_its_words_and_its_fault():
    told = reply_of(header_of(Reply(1, error=word_of(StorageError("full", cause="c", remedy="r")))), [])
    error = error_of("client 1", told.error)
    assert isinstance(error, InputError)
    assert (error.what, error.cause, error.remedy) == ("client 1: full", "c", "r")
    assert error_of("client 1", word_of(KeyError("x"))).exit_code == 1


def test_the_disk_gives_back_what_came_after_the_newest_snapshot(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    frames = [frame(number, b"%d" % number) for number in range(11)]
    halves = [frame(11, b"ab", size=4), frame(11, b"cd", offset=2)]
    folder.keep(reversed([*frames, *halves]))
    assert folder.opened_by() == REQUEST
    assert folder.kept() == [*frames, *halves]
    folder.move_to(Position(2, wanted=10, first_sent=1))
    again = SessionFolder(tmp_path, "run", "1")
    again.open(replace(REQUEST, config="another"))
    assert again.opened_by() == REQUEST
    assert again.position == Position(2, 10, 1)
    assert again.kept() == [frames[10], *halves]
    assert len(list((again.path / "frames").iterdir())) == 3  # the others are gone from the disk too
    assert again.finished is None
    again.finish(9)
    assert again.finished == 9


def test_a_sites_disk_that_takes_no_more_is_said_and_leaves_nothing_half_written(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    folder.keep([frame(0, b"there is room")])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written") as full:
            folder.keep([frame(1, bytes(200_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "Make room there" in full.value.remedy
    assert [frame.content for frame in folder.kept()] == [b"there is room"]


def test_a_new_session_starts_where_the_server_says_and_forgets_the_old_one(tmp_path: Path):
    SessionFolder(tmp_path, "run", "1").open(REQUEST)
    new = SessionFolder(tmp_path, "run", "2")
    for t in (7, 8, 9):
        (new.snapshots / f"round-{t:06d}").mkdir(parents=True)
    new.open(replace(REQUEST, session="2", restore=8))
    assert new.position == Position(8)
    assert new.held_rounds() == (7, 8)
    assert not SessionFolder(tmp_path, "run", "1").path.exists()
    with pytest.raises(ValueError, match="not the name of a run"):
        SessionFolder(tmp_path, "../run", "1")


def test_a_trainer_that_lost_the_secrets_of_its_masks_says_so_and_a_new_session_has_new_ones(tmp_path: Path):
    folder = SessionFolder(tmp_path, "run", "1")
    folder.open(REQUEST)
    folder.begin_secrets()
    with pytest.raises(ParaBlockError, match="its secrets with it") as refused:
        SessionFolder(tmp_path, "run", "1").begin_secrets()
    assert "parablock resume" in refused.value.remedy
    resumed = SessionFolder(tmp_path, "run", "2")
    resumed.open(replace(REQUEST, session="2"))
    resumed.begin_secrets()


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


def test_the_server_tells_no_path_and_a_site_brings_its_own(tmp_path: Path):
    shared = shared_config(parse_config(SERVER))
    assert "/server" not in shared and "tensorboard" not in shared
    file = tmp_path / "site.yaml"
    site = {"client_id": 1, "state_dir": "state", "model": {"name_or_path": "/site/model"}, "num_threads": 3}
    file.write_text(yaml.safe_dump({**site, "data": {"train": ["/site/rows.jsonl"]}}))
    loaded = load_site(file)
    config = configuration_at(loaded, shared)
    assert loaded.state_dir == tmp_path / "state"
    assert (config.model.name_or_path, config.data.train) == ("/site/model", ("/site/rows.jsonl",))
    assert (config.seed, config.data.max_length, config.engine.num_threads) == (5, 64, 3)


def test_a_server_without_rows_of_its_own_needs_some_to_score_on(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {name_or_path: m}\ndata: {test: [t.jsonl]}\n")
    config = server_config(file)
    assert (config.data.train, config.engine.name) == ((), "flower")
    file.write_text("model: {name_or_path: m}\ndata: {max_length: 64}\n")
    with pytest.raises(ConfigError, match=r"data\.train: names no file"):
        server_config(file)


def test_everything_wrong_in_a_sites_file_is_said_at_once(tmp_path: Path):
    file = tmp_path / "site.yaml"
    file.write_text("client_id: -1\nstate_dirr: x\n")
    with pytest.raises(ConfigError) as caught:
        load_site(file)
    said = str(caught.value)
    assert "client_id" in said and "did you mean `state_dir`" in said and "model: required" in said


def test_a_supernode_without_a_site_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PARABLOCK_SITE", raising=False)
    for node_config, run_config in (({}, {"output-dir": "/run"}), ({"partition-id": 1}, {"output-dir": ""})):
        with pytest.raises(ConfigError, match="deploy client"):
            site_file(node_config, run_config)
    monkeypatch.setenv("PARABLOCK_SITE", "/a.yaml")
    assert site_file({}, {}) == Path("/a.yaml")
    assert site_file({"site": "/b.yaml", "partition-id": 1}, {"output-dir": "/run"}) == Path("/b.yaml")


def test_keys_make_a_connection_that_only_their_authority_vouches_for(tmp_path: Path):
    make_keys(tmp_path / "keys", 2, ["localhost", "127.0.0.1"])
    make_keys(tmp_path / "other", 1, ["localhost"])
    assert sorted(path.name for path in (tmp_path / "keys" / "server").iterdir()) == [
        "ca.pem",
        "server.key",
        "server.pem",
        "site-0-down.pub",
        "site-0.pub",
        "site-1-down.pub",
        "site-1.pub",
    ]
    for secret in (tmp_path / "keys").rglob("*.key"):
        assert secret.stat().st_mode & 0o077 == 0
    assert _handshake(tmp_path / "keys", tmp_path / "keys" / "site-0" / "ca.pem") == ""
    assert "certificate verify failed" in _handshake(tmp_path / "keys", tmp_path / "other" / "ca.pem")
    with pytest.raises(StorageError, match="not empty"):
        make_keys(tmp_path / "keys", 1, ["localhost"])


def test_a_server_that_does_not_answer_leaves_the_status_unknown(tmp_path: Path):
    files = ServerFiles(tmp_path, None, "127.0.0.1:9")
    write_connection(files)
    assert run_status(files, "1") == "unknown"


def test_the_defaults_are_the_safe_ones(tmp_path: Path):
    server = superlink_command(ServerFiles(tmp_path, tmp_path, "127.0.0.1:8000"))
    site = supernode_command("host:8000", tmp_path, tmp_path / "site.yaml", 9094)
    assert "--enable-supernode-auth" in server and "--ssl-certfile" in server
    assert "--root-certificates" in site and "--auth-supernode-private-key" in site
    assert "--insecure" not in server + site
    assert "--insecure" in superlink_command(ServerFiles(tmp_path, None, "127.0.0.1:8000"))
    assert site[site.index("--node-config") + 1] == f'site="{tmp_path / "site.yaml"}" carries="both"'


def test_each_supernode_of_a_site_has_a_key_a_folder_and_a_port_of_its_own(tmp_path: Path):
    (up, up_env), (down, down_env) = supernodes_of(tmp_path / "home", "host:8000", tmp_path, tmp_path, 9094, 2)
    for option in ("--port", "--auth-supernode-private-key", "--node-config"):
        assert up[up.index(option) + 1] != down[down.index(option) + 1]
    assert up_env["FLWR_HOME"] != down_env["FLWR_HOME"]
    assert [words[-1] for words in (up, down)] == [str(tmp_path / "site.key"), str(tmp_path / "down.key")]
    ((both, _),) = supernodes_of(tmp_path / "home", "host:8000", None, tmp_path, 9094, 1)
    assert 'carries="both"' in both[both.index("--node-config") + 1]


def _handshake(keys: Path, authority: Path) -> str:
    """Shake hands in memory; give why it fails."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server" / "server.pem", keys / "server" / "server.key")
    client = ssl.create_default_context(cafile=str(authority))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return str(error)
    return ""


OPENING = Request("run", "session", None, "", "")


def test_where_a_reply_filled_what_it_may_carry_the_next_may_take_as_long_as_that_much_does():
    site, lane = Site(up=Speed(bytes_per_s=0.5e6, largest=8 << 20)), Lane("both", 1, held_s=0.0)
    # 30 MB at a third of 0.5 MB/s are 180 s; 8 MiB, the most that came so far, are 50.3 s; 30 s for all else
    lane.was_full = True
    site.ask(lane, OPENING, 5.0)
    assert lane.overdue_s == pytest.approx(5 + 30 + 180)
    lane.under_way.clear()
    lane.was_full = False
    site.ask(lane, OPENING, 0.0)
    assert lane.overdue_s == pytest.approx(30 + 3 * (8 << 20) / 0.5e6)


def test_what_goes_down_at_once_is_what_the_link_carries_in_a_minute_or_less_where_the_other_way_goes_on():
    sizes = {}
    for carries in ("both", "down"):
        site, lane = Site(), Lane(carries, 1)
        site.out.put(bytes(400 << 20), 0)
        first = site.ask(lane, OPENING, 0.0)
        brought = sum(len(frame.content) for frame in first.frames)
        assert brought == 8 << 20  # nothing is known of the link
        reply = Reply(0, wanted=first.frames[-1].next_place)
        times = (0.0, arrived := 5.0 + brought / 2**19, arrived, arrived)  # half a MiB/s
        site.note(lane, lane.under_way.pop(), reply, [], times)
        site.out.acknowledge(reply.wanted)
        sizes[carries] = sum(len(frame.content) for frame in site.ask(lane, OPENING, 0.0).frames) >> 20
    assert sizes == {"both": 30, "down": 15}
    assert Site(up=Speed(1 << 20)).ask(Lane("up", 1), OPENING, 0.0).budget_bytes == 30 << 20


def exchange(site: Site, lane: Lane) -> list[tuple[str, int, bool]]:
    """Ask as often as a lane is due; say of each what it carries, what it follows and whether it waits."""
    found = []
    while site.is_due(lane, is_missed=True):
        asked = site.ask(lane, OPENING, 0.0)
        found.append((asked.carries, asked.follows, asked.wait_s > 0))
    return found


def answer(site: Site, lane: Lane, size: int, round_index: int = 0) -> None:
    came = [replace(frame(0, bytes(size)), round_index=round_index)]
    site.note(lane, lane.under_way[0], Reply(0, wanted=lane.under_way[0].until), came, (0.0, 1.0, 1.0, 2.0))
    site.out.acknowledge(lane.under_way[0].until)
    lane.end(lane.under_way[0], is_lost=False)


def test_a_large_update_takes_two_exchanges_and_what_is_ready_comes_down_behind_the_second():
    site, lane = Site(down=Speed(1 << 20)), Lane("both", 1)
    assert exchange(site, lane) == [("both", 0, True)]  # nothing is known of the updates
    answer(site, lane, 30 << 20)
    assert exchange(site, lane) == [("both", 0, True), ("both", 2, False)]
    first, second = lane.under_way
    assert (first.asked_bytes, second.asked_bytes) == (18 << 20, 50 << 20)
    answer(site, lane, 18 << 20, 1)
    assert exchange(site, lane) == []  # the second will bring the rest
    site.out.put(bytes(1 << 20), 1)
    assert exchange(site, lane) == []  # which is not worth an exchange of its own
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == [("down", 3, False)]
    assert lane.under_way[1].until == Place(2)
    answer(site, lane, 12 << 20, 1)
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == [("both", 4, True)]
    site.out.put(bytes(20 << 20), 1)
    answer(site, lane, 0, 1)
    assert exchange(site, lane) == [("both", 5, False)]  # takes the rest of an update, and brings what there is
    assert lane.under_way[1].until == Place(4)


def test_a_small_update_takes_one_exchange_and_a_lane_down_never_waits():
    site, lane, down = Site(down=Speed(1 << 20)), Lane("both", 1), Lane("down", 2)
    exchange(site, lane)
    answer(site, lane, 8 << 20)
    assert exchange(site, lane) == [("both", 0, True)]
    site.out.put(bytes(8 << 20), 1)
    assert exchange(site, lane) == []  # the site may wait for its trainer for a minute
    assert exchange(site, down) == [("down", 0, False)]
    site.out.put(bytes(9 << 20), 1)
    assert exchange(site, down) == [("down", 1, False)]
    site.out.put(bytes(9 << 20), 1)
    assert exchange(site, down) == []


def test_after_a_loss_nothing_follows_until_all_is_answered():
    site, lane = Site(), Lane("both", 1)
    exchange(site, lane)
    answer(site, lane, 30 << 20)
    assert len(exchange(site, lane)) == 2
    lane.end(lane.under_way[0], is_lost=True)
    lane.more = True
    site.out.put(bytes(9 << 20), 1)  # which would be worth an exchange
    assert exchange(site, lane) == []
    lane.end(lane.under_way[0], is_lost=False)
    assert exchange(site, lane) == [("both", 0, True), ("both", 4, False)]
    lane.give_up()
    assert exchange(site, lane) == [("both", 0, True)]  # in doubt, one
    lane.end(UnderWay(1, 0, 0.0, 0.0, True, True, 0, START), is_lost=True)  # one that was given up: too late
    assert len(lane.under_way) == 1 and not lane.is_broken


def test_one_that_follows_may_take_as_long_as_one_alone_from_when_its_supernode_came_to_it():
    site, lane = Site(up=Speed(1 << 20, 8 << 20)), Lane("both", 1, held_s=0.0)
    assert lane.overdue_s == inf
    exchange(site, lane)
    answer(site, lane, 30 << 20)
    assert len(exchange(site, lane)) == 2
    first, second = lane.under_way
    assert lane.overdue_s == first.patience_s > 0
    lane.end(first, is_lost=False)
    lane.free_s = 500.0  # longer than both together might have taken from when they were asked for
    assert lane.overdue_s == 500.0 + second.patience_s > first.patience_s + second.patience_s
    lane.free_s = 1.0
    assert lane.overdue_s == 1.0 + second.patience_s  # and not what the first has left over, too


def with_a_site() -> tuple[grid.GridTransport, Site, Lane]:
    """Make the server's side of a site with one SuperNode, for which there are 12 MiB."""
    transport = grid.GridTransport(Online(), 1, OPENING, epoch_s=lambda: 0.0, tell=print)
    transport.begin(Trace(RealClock()), None)
    site = transport._sites[0]
    site.take_lane("both", 1)
    lane = site.lanes["both"]
    site.out.put(bytes(12 << 20), 0)
    return transport, site, lane


def test_of_what_a_site_lacks_only_that_is_sent_again_which_it_does_not_have_ahead():
    transport, site, lane = with_a_site()
    first, second = (site.ask(lane, OPENING, 0.0) for _ in range(2))
    assert first.frames and second.frames[0].place == first.frames[-1].next_place
    lost, other = (grid._Asked(0, lane, exchange, 0.0) for exchange in lane.under_way)
    has = Reply(0, wanted=START, ahead=second.frames[0].place)
    assert not transport._take(grid._Arrived(lost, 1.0, problem="a link broke"))
    assert lane.overdue_s == 1.0 + other.exchange.patience_s  # its SuperNode comes to the other one only now
    assert transport._take(grid._Arrived(other, 2.0, has))
    site.down.note(1 << 30, 1.0)  # all might go at once
    again = site.ask(lane, OPENING, 0.0).frames
    assert sum(len(part.content) for part in again) == sum(len(part.content) for part in first.frames)


def test_where_flower_has_lost_sight_of_a_supernode_a_frame_tells_first_what_the_site_has():
    sizes = []
    for node_is_gone in (False, True):
        transport, site, lane = with_a_site()
        for _ in range(2):
            request = site.ask(lane, OPENING, 0.0)
            sizes.append(sum(len(part.content) for part in request.frames))
            (exchange,) = lane.under_way
            lost = grid._Asked(0, lane, exchange, 0.0)
            assert not transport._take(grid._Arrived(lost, 1.0, problem="?", node_is_gone=node_is_gone))
        assert lane.offline is node_is_gone
    whole, frame_bytes = 8 << 20, 1 << 20
    assert sizes == [whole, whole, whole, frame_bytes]


def test_an_upward_lane_brings_nothing_and_is_asked_when_it_is_missed():
    site, up, down = Site(), Lane("up", 1), Lane("down", 2)
    site.out.put(b"x", 0)
    assert [site.is_due(lane, is_missed=False) for lane in (up, down)] == [False, True]
    assert [site.is_due(lane, is_missed=True) for lane in (up, down)] == [True, True]
    assert [len(site.ask(lane, OPENING, 0.0).frames) for lane in (up, down)] == [0, 1]
    assert [site.is_due(lane, is_missed=True) for lane in (up, down)] == [False, False]  # they are on their way


def test_a_supernode_that_comes_back_takes_its_place_and_a_second_one_does_not():
    site = Site()
    assert site.take_lane("up", 1) and not site.is_complete
    assert site.take_lane("down", 2) and site.is_complete
    assert not site.take_lane("up", 3)
    assert not site.take_lane("both", 3)
    site.lanes["up"].offline = True
    assert not site.take_lane("both", 3)  # the other direction still has one
    assert site.take_lane("up", 3) and site.lanes["up"].node_id == 3
    for lane in site.lanes.values():
        lane.offline = True
    assert site.take_lane("both", 4) and list(site.lanes) == ["both"]


def test_what_all_replies_together_may_carry_does_not_grow_with_the_sites():
    for num_sites, together in ((1, 50 << 20), (2, 100 << 20), (4, 100 << 20), (1000, 1000 * (8 << 20))):
        sites = [site_among(num_sites) for _ in range(num_sites)]
        budgets = []
        for site in sites:
            assert site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes == 8 << 20, "its speed is not known yet"
            site.up.note(1 << 30, 1.0)
            budgets.append(site.ask(Lane("up", 1), OPENING, 0.0).budget_bytes)
        assert sum(budgets) == together


def test_an_exchange_that_was_made_again_tells_nothing_of_the_link():
    part = frame(0, bytes(1 << 20))
    for silent, speed in ((False, 1 << 20), (True, 0.0)):
        site, lane = Site(), Lane("both", 1, silent=silent)
        site.ask(lane, OPENING, 0.0)
        site.note(lane, lane.under_way.pop(), Reply(0), [part], (0.0, 1.0, 1.0, 2.0))
        assert site.up.bytes_per_s == speed


def test_an_exchange_that_is_made_again_in_doubt_carries_a_frame_each_way():
    site, lane = Site(up=Speed(4e5), down=Speed(6e6)), Lane("both", 1)
    site.out.put(bytes(30_000_000), 0)
    carried = []
    for lane.doubted in (False, True, False):
        request = site.ask(lane, OPENING, 0.0)
        carried.append((sum(len(part.content) for part in request.frames), request.budget_bytes))
        lane.under_way.clear()
    assert carried == [(30_000_000, 24_000_000), (3_000_000, 1 << 20), (30_000_000, 24_000_000)]
    lane.doubted = True
    site.ask(lane, OPENING, 0.0)
    (asked,) = lane.under_way
    site.note(lane, asked, Reply(0), [frame(0, bytes(1 << 20))], (0.0, 1.0, 1.0, 2.0))
    assert not lane.was_full  # it brought all that was asked for, which tells nothing of what is left
    lane.doubted = False
    site.note(lane, asked, Reply(0), [frame(0, bytes(1 << 20))], (0.0, 1.0, 1.0, 2.0))
    assert lane.was_full


def test_a_small_reply_does_not_make_the_next_large_one_overdue():
    site, lane = Site(up=Speed(1 << 20)), Lane("up", 1)
    site.ask(lane, OPENING, 0.0)
    patience = []
    for size in (4 << 20, 10):
        site.note(lane, lane.under_way.pop(), Reply(0), [frame(0, bytes(size))], (0.0, 1.0, 1.0, 5.0))
        site.ask(lane, OPENING, 0.0)
        patience.append(lane.overdue_s)
    assert patience[1] >= patience[0]
    larger = [frame(0, bytes(6 << 20))]
    site.note(lane, lane.under_way.pop(), Reply(0), larger, (0.0, 1.0, 1.0, 7.0))  # as fast, and more
    site.ask(lane, OPENING, 0.0)
    assert lane.overdue_s > patience[0]


class Online(LoopGrid):
    """A Grid that only says who is online."""

    def __init__(self) -> None:
        super().__init__([], lambda *_: None, lambda *_: "carry")
        self.nodes: set[int] = set()

    def get_node_ids(self) -> set[int]:
        return self.nodes


def test_a_site_that_starts_again_without_keys_does_not_end_the_run():
    told, online = list[str](), Online()
    transport = grid.GridTransport(online, 1, OPENING, epoch_s=lambda: 0.0, tell=told.append)
    transport._welcome(1, Reply(0, carries="up"))
    transport._welcome(2, Reply(0, carries="down"))
    with pytest.raises(InputError, match="two sites say that they are client 0"):
        transport._welcome(3, Reply(0, carries="down"))  # before the run somebody has made a mistake
    transport.begin(Trace(RealClock()), None)
    site = transport._sites[0]
    transport._welcome(3, Reply(0, carries="down"))  # number 2 is gone, and nobody knows it yet
    assert site.lanes["down"].node_id == 2
    assert told == ["client 0 has connected", "another SuperNode says that it is client 0; its place is taken"]
    site.lanes["up"].offline = True
    online.nodes = {1}
    transport._look_for_the_lost()
    assert [site.lanes[carries].offline for carries in ("up", "down")] == [False, True]
    transport._welcome(3, Reply(0, carries="down"))
    assert site.lanes["down"].node_id == 3 and transport.is_there(0)
