"""Claims about reading rows from files and datasets."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from parablock.data.sources import Row, load_rows, rows_sha256
from parablock.errors import DataError


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def message_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, split="train")
    return str(caught.value)


def test_json_lines_keep_their_line_numbers_across_blank_lines(tmp_path: Path):
    source = written(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\r\n')
    assert load_rows(source, split="train") == [Row({"text": "one"}, source, 1), Row({"text": "two"}, source, 3)]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path):
    source = written(tmp_path / "a.jsonl", '{"text": "one\u2028still one"}\n{"text": "two"}\n')
    assert [row.line for row in load_rows(source, split="train")] == [1, 2]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    source = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\n')
    assert load_rows(source, split="train")[0].fields == {"text": "one"}


def test_a_json_file_may_hold_lines_or_one_array_and_both_know_their_lines(tmp_path: Path):
    lines = written(tmp_path / "lines.json", '{"a": 1}\n{"a": 2}\n')
    array = written(tmp_path / "array.json", '\n[\n  {"a":\n 1},\n\n  {"a": 2}\n]\n')
    compact = written(tmp_path / "compact.json", '[{"a": 1},{"a": 2}]')
    assert [(row.fields["a"], row.line) for row in load_rows(lines, split="train")] == [(1, 1), (2, 2)]
    assert [(row.fields["a"], row.line) for row in load_rows(array, split="train")] == [(1, 3), (2, 6)]
    assert [(row.fields["a"], row.line) for row in load_rows(compact, split="train")] == [(1, 1), (2, 1)]


def test_parquet_gives_the_same_fields_as_json_lines(tmp_path: Path):
    values = [{"messages": [{"role": "user", "content": f"q{n}"}], "label": n} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    lines = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, values)))
    parquet_rows = load_rows(str(tmp_path / "a.parquet"), split="train")
    assert [row.fields for row in parquet_rows] == [row.fields for row in load_rows(lines, split="train")]
    assert [row.line for row in parquet_rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "one"', "Expecting ',' delimiter at column 15"),
        (b"text", "Expecting value at column 1"),
        (b'{"text": "\xff"}', "byte 0xff at position 10 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str):
    source = written(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    message = message_of(source)
    assert f"{source}, line 2 is not JSON" in message
    assert reason in message


def test_a_broken_array_is_named_with_the_line_inside_it(tmp_path: Path):
    source = written(tmp_path / "a.json", '[\n{"a": 1},\n{"a": }\n]')
    assert f"{source}, line 3 is not JSON: Expecting value at column 7" in message_of(source)


@pytest.mark.parametrize(("value", "kind"), [("[1]", "list"), ('"text"', "str"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_named_with_what_it_is(tmp_path: Path, value: str, kind: str):
    source = written(tmp_path / "a.jsonl", '{"text": "fine"}\n' + value)
    assert f"{source}, line 2 holds a value of type {kind}, not an object" in message_of(source)


def test_an_item_of_an_array_that_is_no_object_is_named_with_its_line(tmp_path: Path):
    assert "line 2 holds a value of type int" in message_of(written(tmp_path / "a.json", '[{"a": 1},\n 7]'))


def test_a_parquet_file_without_rows_is_an_error(tmp_path: Path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet"
    )
    assert "is empty" in message_of(str(tmp_path / "a.parquet"))


def test_a_missing_file_is_an_error_that_knows_the_nearest_name(tmp_path: Path):
    near = written(tmp_path / "train.jsonl", '{"a": 1}')
    message = message_of(str(tmp_path / "trian.jsonl"))
    assert "does not exist" in message
    assert f"Did you mean {near}?" in message
    assert "Did you mean" not in message_of(str(tmp_path / "elsewhere" / "zzz.jsonl"))


@pytest.mark.parametrize("damage", ["cut", "junk", "no bytes"])
def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path, damage: str):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 1000}), path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "junk": b"junk" * 100, "no bytes": b""}[damage])
    assert f"{path} cannot be read" in message_of(str(path))


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("a.jsonl")
        assert "./a.jsonl is a socket, and no file." in message_of("./a.jsonl")


@pytest.fixture
def datasets_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub library's own switch for a machine without network, and a cache of our own."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("datasets_offline")
@pytest.mark.parametrize("name", ["nobody/no-such-set", "no-such-set", "nobody/no-such-set:main"])
def test_a_name_that_is_neither_a_file_nor_on_the_hub_is_an_error_that_says_both(name: str):
    assert f"{name!r} is neither a file here nor reachable as a dataset on the hub" in message_of(name)


@pytest.mark.usefixtures("datasets_offline")
def test_a_dataset_name_is_loaded_by_split_and_configuration(tmp_path: Path):
    """The library loads a folder with the very call that loads a name of the hub."""
    from parablock.data.sources import _read_hub

    folder = tmp_path / "set"
    (folder / "other").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n"
        "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}\n"
        "- config_name: other\n  data_files:\n  - {split: train, path: other/train.jsonl}\n---\n"
    )
    for name in ("train", "test", "other/train"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")

    texts = {
        (config, split): [row.fields["text"] for row in _read_hub(f"{folder}:{config}", split=split)]
        for config, split in [("main", "train"), ("main", "test"), ("other", "train")]
    }
    assert texts == {("main", "train"): ["train"], ("main", "test"): ["test"], ("other", "train"): ["other/train"]}
    assert _read_hub(f"{folder}:main", split="train")[0].line == 1
    with pytest.raises(DataError, match=r"Split 'nope' of dataset .* cannot be loaded: Unknown split"):
        _read_hub(f"{folder}:main", split="nope")
    with pytest.raises(DataError, match="BuilderConfig 'nope' not found"):
        _read_hub(f"{folder}:nope", split="train")


def test_the_hash_follows_content_and_order_but_not_place_or_field_order():
    rows = [Row({"a": 1, "b": "x"}, "one.jsonl", 1), Row({"a": 2, "b": "y"}, "one.jsonl", 2)]
    moved = [Row({"b": "x", "a": 1}, "two.jsonl", 5), Row({"b": "y", "a": 2}, "two.jsonl", 9)]
    changed = [Row({"a": 1, "b": "x"}, "one.jsonl", 1), Row({"a": 2, "b": "z"}, "one.jsonl", 2)]
    assert rows_sha256(rows) == rows_sha256(moved)
    assert rows_sha256(rows) != rows_sha256(changed)
    assert rows_sha256(rows) != rows_sha256(rows[::-1])
    assert rows_sha256(rows) != rows_sha256(rows[:1])


def test_importing_the_room_does_not_import_the_slow_libraries():
    code = (
        "import sys, parablock.data.batches, parablock.data.partition, parablock.data.prompts\n"
        "print(sorted({'datasets', 'flwr_datasets', 'pyarrow', 'transformers', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['torch']"


@pytest.mark.shared
def test_the_real_gsm8k_has_all_its_rows(shared_dir: Path):
    rows = load_rows(str(shared_dir / "data/gsm8k/test.jsonl"), split="test")
    assert len(rows) == 1319
    assert set(rows[0].fields) == {"question", "answer"}
