"""Claims about splitting rows over clients, and about the histogram of a split."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from parablock.data.histogram import partition_histogram
from parablock.data.partition import Partition, partition_rows
from parablock.data.sources import Row, load_rows
from parablock.errors import DataError

LABELS = ("sports", "business", "science")


def some_rows(count: int, source: str = "a.jsonl") -> list[Row]:
    return [Row({"text": f"{source} {n}", "label": LABELS[n % 3]}, source, n + 1) for n in range(count)]


def split(rows: Sequence[Sequence[Row]], scheme: str, num_clients: int, **options: Any) -> Partition:
    return partition_rows(rows, scheme=scheme, num_clients=num_clients, **{"seed": 0, **options})


def places(parts: Partition) -> list[list[str]]:
    return [[row.place for row in part] for part in parts]


ALL_SCHEMES = [("iid", None), ("dirichlet", "label"), ("by_field", "label"), ("by_file", None)]


@pytest.mark.parametrize(("scheme", "field"), ALL_SCHEMES)
def test_every_row_goes_to_one_client(scheme: str, field: str | None):
    sources = [some_rows(30, "a.jsonl"), some_rows(21, "b.jsonl"), some_rows(9, "c.jsonl")]
    parts = split(sources, scheme, 3, field=field)
    given = sorted(row.place for source in sources for row in source)
    assert sorted(place for part in places(parts) for place in part) == given
    assert len(parts) == 3
    assert all(parts)


@pytest.mark.parametrize(("scheme", "field"), ALL_SCHEMES)
def test_the_same_seed_gives_the_same_partition(scheme: str, field: str | None):
    sources = [some_rows(30, "a.jsonl"), some_rows(21, "b.jsonl"), some_rows(9, "c.jsonl")]
    first, again, other = (split(sources, scheme, 3, field=field, seed=seed) for seed in (1, 1, 2))
    assert first == again
    drawn = scheme in ("iid", "dirichlet")
    assert (first != other) is drawn


def test_iid_shares_are_equal_and_shuffled():
    parts = split([some_rows(100)], "iid", 3)
    assert [len(part) for part in parts] == [34, 33, 33]
    lines = [row.line for part in parts for row in part]
    assert lines != sorted(lines)
    assert all(len({row.fields["label"] for row in part}) == 3 for part in parts)


def test_a_smaller_alpha_makes_clients_differ_more():
    """Sum over clients and labels of the distance to the equal share of 300 / (3 labels · 5 clients) = 20."""

    def skew(alpha: float) -> float:
        parts = split([some_rows(300)], "dirichlet", 5, field="label", alpha=alpha)
        counts = [Counter(row.fields["label"] for row in part) for part in parts]
        return sum(abs(count[label] - 20) for count in counts for label in LABELS)

    assert skew(1000.0) < 0.25 * skew(0.3)


def test_dirichlet_follows_the_field_that_it_is_given():
    rows = [Row({"label": LABELS[n % 3], "parity": n % 2}, "a.jsonl", n + 1) for n in range(60)]
    by_label = split([rows], "dirichlet", 3, field="label")
    by_parity = split([rows], "dirichlet", 3, field="parity")
    assert places(by_label) != places(by_parity)


def test_by_field_gives_sorted_values_to_clients_in_order():
    parts = split([some_rows(10)], "by_field", 3, field="label")
    assert [{row.fields["label"] for row in part} for part in parts] == [{"business"}, {"science"}, {"sports"}]
    numbers = [Row({"site": site}, "a.jsonl", n + 1) for n, site in enumerate([10, 9, 10, 100])]
    assert [part[0].fields["site"] for part in split([numbers], "by_field", 3, field="site")] == [9, 10, 100]


def test_by_file_gives_sources_to_clients_in_the_given_order():
    first, second = some_rows(5, "z.jsonl"), some_rows(3, "a.jsonl")
    assert split([first, second], "by_file", 2) == (tuple(first), tuple(second))
    assert split([second, first], "by_file", 2) == (tuple(second), tuple(first))


@pytest.mark.parametrize(
    ("scheme", "num_clients", "options", "problem"),
    [
        ("by_file", 3, {}, "there are 2 sources and 3 clients: a.jsonl, b.jsonl"),
        ("by_field", 2, {"field": "label"}, "there are 3 values and 2 clients: 'business', 'science', 'sports'"),
        ("by_field", 8, {"field": "text"}, "there are 12 values and 8 clients: 'a.jsonl 0', "),
        ("by_field", 3, {}, "Partition scheme by_field needs a field"),
        ("dirichlet", 3, {}, "Set data.partition.field to one of: text, label"),
        ("dirichlet", 3, {"field": "lable"}, "a.jsonl, line 1 has no value in field 'lable'"),
        ("dirichlet", 12, {"field": "label", "alpha": 1e-3}, "No Dirichlet(0.001) draw over 12 rows and 3 values"),
        ("dirichlet", 3, {"field": "label", "alpha": 0.0}, "alpha is 0.0"),
        ("iid", 13, {}, "12 rows cannot be split over 13 clients"),
        ("iid", 0, {}, "12 rows cannot be split over 0 clients"),
        ("dirichlet", 13, {"field": "label"}, "12 rows cannot be split over 13 clients"),
        ("shards", 2, {}, "Unknown partition scheme 'shards'"),
    ],
)
def test_an_impossible_split_is_an_error_with_its_numbers(
    scheme: str, num_clients: int, options: dict[str, Any], problem: str
):
    with pytest.raises(DataError) as caught:
        split([some_rows(7, "a.jsonl"), some_rows(5, "b.jsonl")], scheme, num_clients, **options)
    assert problem in str(caught.value)


def test_an_empty_source_leaves_no_client_without_rows():
    with pytest.raises(DataError, match="Client 1 would have no rows"):
        split([some_rows(3), []], "by_file", 2)


@pytest.mark.parametrize("value", [None, ["sports"], {"a": 1}])
def test_a_row_without_a_single_value_is_named(value: Any):
    rows = [*some_rows(5), Row({"label": value}, "b.jsonl", 4)]
    with pytest.raises(DataError, match=r"b\.jsonl, line 4 has no (single )?value in (field )?'label'"):
        split([rows], "by_field", 3, field="label")


def test_the_library_writes_nothing_and_warns_nobody(capfd: pytest.CaptureFixture[str]):
    """Forty clients over 120 rows need several draws, about each of which the library would warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split([some_rows(120)], "by_field", 3, field="label")
        split([some_rows(400)], "dirichlet", 40, field="label", alpha=1.0)
    assert not [warning for warning in caught if "min_partition_size" in str(warning.message)]
    assert capfd.readouterr() == ("", "")


# The histogram


def test_the_histogram_has_a_line_for_each_client_with_count_and_bar():
    parts = split([some_rows(40, "dir/a.jsonl"), some_rows(20, "dir/b.jsonl")], "by_file", 2)
    heading, first, second = partition_histogram(parts)
    assert heading == "2 clients, 60 examples"
    assert partition_histogram([some_rows(1)])[0] == "1 client, 1 example"
    assert partition_histogram([some_rows(1234)])[0] == "1 client, 1,234 examples"
    assert first == f"client  0       40 {'█' * 24}  a.jsonl"
    assert second == f"client  1       20 {'█' * 12:<24}  b.jsonl"


def test_the_histogram_names_the_most_frequent_labels_when_a_field_is_given():
    rows = [Row({"label": label}, "a.jsonl", 1) for label in "aaabbbbccd"]
    assert partition_histogram([rows], field="label")[1].endswith("  b 4, a 3, c 2, d 1")
    assert partition_histogram([rows])[1].endswith("  a.jsonl")


def test_many_clients_are_summarised_by_size():
    parts = [some_rows(size) for size in range(1, 31)]
    heading, *bins, values = partition_histogram(parts, field="label")
    assert heading == "30 clients, 465 examples; smallest 1 (client 0), median 16, largest 30 (client 29)"
    # sizes 1 … 30 in steps of 29 // 8 + 1 = 4: seven bins of four clients and one of two
    assert [line.split()[-2] for line in bins] == ["4"] * 7 + ["2"]
    assert values == "values of label per client: fewest 1, median 3, most 3"
    assert len(partition_histogram(parts[:20])) == 21
    assert "30 clients" in partition_histogram([some_rows(5)] * 30)[1]


@pytest.mark.shared
def test_the_real_instruction_files_are_eight_clients(shared_dir: Path):
    files = sorted((shared_dir / "data/t0").glob("*.train.jsonl"))
    sources = [load_rows(str(path), split="train") for path in files]
    parts = split(sources, "by_file", 8)
    assert [len(part) for part in parts] == [1174, 708, 1620, 636, 1620, 1080, 1800, 1080]
    assert partition_histogram(parts)[1].endswith("ag_news.train.jsonl")
    templates = {row.fields["template"] for part in parts for row in part}
    assert len(split(sources, "by_field", len(templates), field="template")) == len(templates)
