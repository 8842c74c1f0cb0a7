"""A round's updates at the server: what is kept outside memory is folded to the same numbers, and then gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parablock.algorithm.aggregate import PIECE, Aggregate
from parablock.algorithm.fixed_point import FixedPointGrid
from parablock.algorithm.robust import Rule, aggregate_by
from parablock.algorithm.stacking import Factors
from parablock.engine import round_fold as folding
from parablock.engine.refusals import Refusal
from parablock.engine.round_fold import RoundFold
from parablock.engine.update_form import Differences, FixedPointWords, SparseDifferences, StackedAdapters
from parablock.engine.update_store import UpdateStore
from parablock.errors import StorageError
from parablock.privacy.keystream import Keystream
from parablock.seeding import generator_for
from parablock.wire.messages import Update
from parablock.wire.quantize import CHUNK_PIECE, FORMATS, Encoding, Vector, pack

CLIENTS = 4
SIZE = 9 * PIECE + 77
CUTS = [slice(0, 5 * PIECE), slice(5 * PIECE, 6 * PIECE), slice(6 * PIECE, SIZE)]
Order = Sequence[tuple[int, int]]
ORDERS: dict[str, Order] = {
    "in turns": [(i, k) for k in range(3) for i in range(CLIENTS)],
    "one after the other": [(i, k) for i in range(CLIENTS) for k in range(3)],
    "the first one late": [(i, k) for i in (3, 2, 1, 0) for k in range(3)],
    "backwards": [(i, k) for k in (2, 1, 0) for i in (2, 0, 3, 1)],
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces of each update are read at a time, so that a chunk is read in several parts."""
    monkeypatch.setattr(folding, "READ_ELEMENTS", 2 * PIECE * CLIENTS)


@pytest.fixture
def nothing_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "IN_MEMORY_BYTES", 0)


def deltas(size: int = SIZE) -> list[Tensor]:
    return [
        torch.from_numpy(generator_for(0, "test", i).normal(size=size)).float() + 0.2 * i for i in range(CLIENTS)
    ]


def update(client_id: int, index: int, vector: Vector, count: int = 3) -> Update:
    return Update(0, 0, client_id, 5 + client_id, -1, 1.0, 1, 0.5, index, count, vector)


def fold_all(fold: RoundFold, chunks: Sequence[Sequence[Vector]], order: Order) -> Aggregate:
    for client_id, k in order:
        assert fold.take(client_id, update(client_id, k, chunks[client_id][k])) is None
        while not fold.is_complete and fold.is_next_ready:
            fold.fold_next()
    return fold.aggregate()


class InThree(Differences):
    """Differences that travel in three chunks of unlike lengths."""

    def cuts(self, num_parameters: int) -> list[slice]:
        assert num_parameters == SIZE
        return CUTS


def new_fold(
    rule: str = "mean", folder: Path | None = None, clients: int = CLIENTS, wire_format: str = "float32"
) -> RoundFold:
    form = InThree(Encoding(wire_format), *RULES[rule])
    return RoundFold(0, 0, dict.fromkeys(range(clients), 1), SIZE, form, folder)


def alike(one: Aggregate, other: Aggregate) -> bool:
    return torch.equal(one.mean_delta, other.mean_delta) and (one.rho, one.squared_delta) == (
        other.rho,
        other.squared_delta,
    )


# -- the bytes of a part --------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload_format", [*FORMATS, "word32"])
def test_a_part_of_a_vector_has_the_elements_of_the_whole_in_memory_and_from_the_file(
    payload_format: str, tmp_path: Path
):
    values = 1000 * deltas()[0] if payload_format == "word32" else deltas()[0]
    whole, spool = pack(values, payload_format), UpdateStore(tmp_path, 0)
    spool.put(3, 1, whole)
    for part in (slice(0, SIZE), slice(0, CHUNK_PIECE), slice(3 * CHUNK_PIECE, SIZE), slice(PIECE, 4 * PIECE)):
        expected = whole.values[part]
        assert torch.equal(whole.part(part).values, expected)
        read = spool.read(3, 1, part)
        assert torch.equal(read.values, expected)
        assert (read.format, read.num_elements) == (payload_format, len(expected))
        other = slice(part.start + CHUNK_PIECE, part.stop + CHUNK_PIECE)
        assert other.stop > SIZE or not torch.equal(whole.part(other).values, expected)
    assert spool.file_bytes == whole.raw.numel()
    spool.close()


FORMS = {
    "float32": Differences(Encoding("float32")),
    "int8": Differences(Encoding("int8")),
    "sparse2-82": SparseDifferences(Encoding("sparse2-82", error_feedback=True)),
    "word32": FixedPointWords(FixedPointGrid(1.0, CLIENTS)),
    "stack": StackedAdapters(Factors(((4, 5),), (False,), 2, 1.0)),
}


@pytest.mark.parametrize("name", FORMS)
def test_an_update_in_another_format_than_that_of_the_run_is_refused(name: str):
    form, own = FORMS[name], {"stack": "float32"}.get(name, name)
    size = form.cuts(18)[0].stop
    for other in (*FORMATS, "sparse2-82", "word32", "bytes"):
        values = torch.arange(size) if other in ("word32", "bytes") else torch.linspace(-1, 1, size)
        sent = Update(0, 0, 0, 5, -1, 1.0, 1, 0.5, 0, 1, pack(values, other))
        refusal = RoundFold(0, 0, {0: 1}, 18, form).take(0, sent)
        assert (refusal is None) is (other == own), (name, other)
        assert refusal is None or (refusal.reason, refusal.text) == ("misfit", f"{other} where updates are {own}")


def test_adapters_are_as_long_as_what_they_add():
    """A begins at random and is long, so that a B that is far too long is not seen beside it."""
    factors = Factors(((40, 50),), (False,), 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    adapters = [torch.randn(180, generator=generator) for _ in range(CLIENTS)]
    places = torch.zeros(180, dtype=torch.bool)
    for _, b in factors.split(torch.arange(180.0)):
        places[b.flatten().long()] = True
    for flat in adapters:
        flat[places] *= 1e-3
    adapters[3][places] *= 1e4
    fold = RoundFold(0, 0, dict.fromkeys(range(CLIENTS), 1), 2000, StackedAdapters(factors))
    for client_id, flat in enumerate(adapters):
        assert (
            fold.take(client_id, Update(0, 0, client_id, 5, -1, 1.0, 1, 0.5, 0, 1, pack(flat, "float32"))) is None
        )
    assert [found.reason for found in fold.outliers(torch.ones(2000)).values()] == ["norm"]
    assert [*fold.outliers(torch.ones(2000))] == [3]
    assert max(flat.norm() for flat in adapters) < 100 * min(flat.norm() for flat in adapters), (
        "as flat vectors none is"
    )


def test_adapters_whose_product_is_nothing_or_not_finite():
    factors = Factors(((40, 50),), (False,), 2, 1.0)

    def taken(adapters: list[Tensor]) -> tuple[list[Refusal | None], RoundFold]:
        fold = RoundFold(0, 0, dict.fromkeys(range(len(adapters)), 1), 2000, StackedAdapters(factors))
        found = [
            fold.take(i, Update(0, 0, i, 5, -1, 1.0, 1, 0.5, 0, 1, pack(flat, "float32")))
            for i, flat in enumerate(adapters)
        ]
        return found, fold

    for seed in range(2000):  # both outer products cancel, and rounding leaves less than nothing in one of 100
        a, b = torch.randn(90, generator=torch.Generator().manual_seed(seed)).split([50, 40])
        cancelled = torch.cat([torch.stack([a, 3 * a]).flatten(), torch.stack([3 * b, -b], 1).flatten()])
        assert 0 <= factors.squared_norm(cancelled) < 1e-6
        if seed % 500:
            continue
        found, fold = taken([cancelled, torch.ones(180), torch.ones(180)])
        assert found == [None] * 3 and not fold.outliers(torch.ones(2000))
    found, _ = taken([torch.full((180,), 1e25), torch.ones(180)])
    assert [refusal and refusal.reason for refusal in found] == ["not_finite", None]


def test_what_a_client_sends_anew_takes_the_place_of_what_it_had_sent(tmp_path: Path):
    first, second = (pack(delta[:PIECE], "float32") for delta in deltas()[:2])
    spool = UpdateStore(tmp_path, 0)
    for vector in (first, second, first, second):
        spool.put(0, 0, vector)
        spool.put(1, 0, first)
        assert torch.equal(spool.read(0, 0, slice(0, PIECE)).values, vector.values)
        spool.drop(0)
        assert torch.equal(spool.read(1, 0, slice(0, PIECE)).values, first.values), "another client's stays"
        spool.drop(1)
    assert spool.file_bytes == 8 * PIECE
    spool.put(0, 0, pack(deltas()[0][:PIECE], "int8"))
    assert spool.file_bytes > 8 * PIECE, "what is of another size needs a place of its own"
    spool.close()


def test_memory_holds_its_part_and_the_file_the_rest_however_many_clients_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folding, "IN_MEMORY_BYTES", 4 * SIZE)
    for clients in (1, 2, 4):
        fold = new_fold(folder=tmp_path, clients=clients)
        for client_id in range(clients):
            for k, cut in enumerate(CUTS):
                fold.take(client_id, update(client_id, k, pack(deltas()[client_id][cut], "float32")))
        assert fold.file_bytes == 4 * SIZE * (clients - 1)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        fold.close()


# -- the fold -------------------------------------------------------------------------------------------------


def noise(clients: tuple[int, ...], _content: str = "") -> Callable[[int], Tensor]:
    return Keystream(bytes([*clients, *bytes(32 - len(clients))])).normals


RULES: dict[str, tuple[Any, ...]] = {
    "mean": (Rule(),),
    "median": (Rule("median"),),
    "trimmed mean, clipped": (Rule("trimmed_mean", trim_fraction=0.3, clip_norm=400.0),),
    "krum, clipped": (Rule("krum", assumed_attackers=0, clip_norm=395.0),),
    "mean with noise": (
        Rule(clip_norm=50.0, noise_multiplier=0.1),
        lambda _round, clients, _content: noise(clients),
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("payload_format", ["float32", "int4"])
@pytest.mark.usefixtures("nothing_in_memory")
def test_from_the_file_in_any_order_comes_bitwise_the_aggregate_of_whole_updates_in_memory(
    rule: str, payload_format: str, tmp_path: Path
):
    vectors = [pack(delta, payload_format) for delta in deltas()]
    chunks = [[vector.part(cut) for cut in CUTS] for vector in vectors]
    by, *draws = RULES[rule]
    normals = noise if draws else None
    whole = aggregate_by(by, {i: (vector.values, 5 + i) for i, vector in enumerate(vectors)}, normals)
    for order in ORDERS.values():
        fold = new_fold(rule, tmp_path, wire_format=payload_format)
        assert alike(fold_all(fold, chunks, order), whole)
        assert fold.file_bytes == sum(vector.raw.numel() for vector in vectors)
    lost = [[pack(0 * own[0].values, payload_format), *own[1:]] for own in chunks]
    assert not alike(fold_all(new_fold(rule, wire_format=payload_format), lost, ORDERS["in turns"]), whole)


class Unmasks:
    """Knows the sum of all masks, and the set of clients that it belongs to."""

    def __init__(self, masks: Tensor, fixed: tuple[int, ...] = tuple(range(CLIENTS))) -> None:
        self.masks, self.fixed = masks, fixed

    def unfit(self, *_) -> dict[int, str]:
        return {}

    def fixed_set(self, *_) -> tuple[int, ...]:
        return self.fixed

    def masks_of(self, *_) -> Tensor:
        return self.masks


def test_a_sum_whose_set_was_fixed_without_a_client_goes_on_without_it():
    grid = FixedPointGrid(500.0, CLIENTS)
    fold = RoundFold(0, 0, dict.fromkeys(range(CLIENTS), 1), SIZE, FixedPointWords(grid))
    assert list(fold.unmask(Unmasks(torch.zeros(SIZE + 1), (0, 2)))) == [1, 3]


def test_a_sum_that_cannot_be_one_of_updates_within_the_bound_is_absurd():
    grid = FixedPointGrid(2.0, 3)
    mean = torch.full((100,), 0.15)  # of norm 1.5
    assert grid.absurd(mean, 2.25, 3) == grid.absurd(mean, 4.0, 3) == ""
    assert "more than the mean of theirs" in grid.absurd(mean, 2.2, 3)
    assert "beyond the bound" in grid.absurd(mean, 4.1, 3)
    assert "beyond the bound" in grid.absurd(0 * mean, -0.1, 3)


@pytest.mark.usefixtures("nothing_in_memory")
def test_words_of_the_grid_add_up_modulo_2_to_the_32_one_update_after_the_other(tmp_path: Path):
    grid = FixedPointGrid(500.0, CLIENTS)
    words = [grid.encode(delta) for delta in deltas()]
    masks = torch.randint(-(2**31), 2**31, (CLIENTS, SIZE + 1), generator=torch.Generator().manual_seed(1))
    masked = [((w + m + 2**31) % 2**32 - 2**31).int() for w, m in zip(words, masks, strict=True)]
    assert any((m.long() != w.long() + mask).any() for m, w, mask in zip(masked, words, masks, strict=True))
    fold = RoundFold(0, 0, dict.fromkeys(range(CLIENTS), 1), SIZE, FixedPointWords(grid), tmp_path)
    for client_id, vector in enumerate(masked):
        assert fold.take(client_id, update(client_id, 0, pack(vector, "word32"), 1)) is None
    hidden = (masks.sum(0) + 2**31) % 2**32 - 2**31
    assert fold.unmask(Unmasks(hidden.int())) == {}
    fold.fold_next()
    mean, _ = grid.mean(torch.stack(words).sum(0), CLIENTS)
    assert torch.equal(fold.aggregate().mean_delta, mean)
    assert torch.allclose(mean, torch.stack(deltas()).mean(0), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("nothing_in_memory")
def test_a_client_that_is_taken_out_late_leaves_bitwise_what_would_have_come_without_it(rule: str, tmp_path: Path):
    chunks = [[pack(delta[cut], "float32") for cut in CUTS] for delta in deltas()]
    everybody = fold_all(new_fold(rule), chunks, ORDERS["in turns"])
    without = new_fold(rule)
    without.take_out(1, Refusal("late", "nothing"))
    others = [(i, k) for i, k in ORDERS["in turns"] if i != 1]
    expected = fold_all(without, chunks, others)

    fold = new_fold(rule, tmp_path)
    for client_id, k in ORDERS["in turns"][:-2]:  # two of the three chunks are folded where the rule allows it
        fold.take(client_id, update(client_id, k, chunks[client_id][k]))
        while fold.is_next_ready:
            fold.fold_next()
    fold.take_out(1, Refusal("late", "two chunks"))
    assert fold.began_again == (rule in ("mean", "median"))
    aggregate = fold_all(fold, chunks, [(3, 2)] if fold.take(2, update(2, 2, chunks[2][2])) is None else [])
    assert alike(aggregate, expected)
    assert not torch.equal(aggregate.mean_delta, everybody.mean_delta) or rule == "krum, clipped"
    assert [told.client_id for told in fold.updates] == [0, 2, 3]


# -- the end, and the full disk -------------------------------------------------------------------------------


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    written, write = [0], os.pwrite

    def limit(num_bytes: int) -> None:
        def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
            if written[0] >= num_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
            some = min(len(content), num_bytes - written[0])  # as a disk does: a part, and then no more
            written[0] += some
            return write(descriptor, content[:some], offset)

        monkeypatch.setattr("parablock.engine.update_store.os.pwrite", pwrite)

    yield limit


@pytest.mark.usefixtures("nothing_in_memory")
def test_a_full_disk_says_so_with_the_run_directory_and_what_to_do(
    full_after: Callable[[int], None], tmp_path: Path
):
    full_after(4 * SIZE + 1000)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()  # it is that of a run that has begun
    fold = new_fold(folder=tmp_path)
    for k, cut in enumerate(CUTS):
        assert fold.take(0, update(0, k, pack(deltas()[0][cut], "float32"))) is None
    with pytest.raises(StorageError, match="the disk is full") as full:
        fold.take(1, update(1, 0, pack(deltas()[1][CUTS[0]], "float32")))
    assert str(tmp_path) in full.value.what and "parablock resume" in full.value.remedy
    fold.close()
    missing = new_fold(folder=tmp_path / "nowhere")
    with pytest.raises(StorageError, match="nowhere cannot be written"):
        missing.take(0, update(0, 0, pack(deltas()[0][CUTS[0]], "float32")))


@pytest.mark.usefixtures("nothing_in_memory")
def test_a_file_that_has_lost_its_end_is_a_storage_error(tmp_path: Path):
    fold = new_fold(folder=tmp_path)
    for client_id in range(CLIENTS):
        fold.take(client_id, update(client_id, 0, pack(deltas()[client_id][CUTS[0]], "float32")))
    file = fold._store._file
    assert file is not None
    file.truncate(100)
    with pytest.raises(StorageError, match="cannot be read back"):
        fold.fold_next()
    fold.close()


def test_encodings_are_cut_where_parts_can_be_read():
    for payload_format in FORMATS:
        cuts = Encoding(payload_format, chunk_bytes=100_000).cut(10 * SIZE)
        assert len(cuts) > 2 and all(cut.start % CHUNK_PIECE == 0 for cut in cuts)
    assert CHUNK_PIECE % PIECE == 0
