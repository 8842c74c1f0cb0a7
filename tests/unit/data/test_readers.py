"""Files of every kind give the rows of the plain JSON lines, or are refused by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import yaml
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.data.formats import check_rows, formats_by_source
from parablock.data.readers import remover_of_fill
from parablock.data.sources import describe_ignored, load_files, load_rows
from parablock.errors import DataError
from tokens import tokenized

ROWS = [
    {"prompt": "How many?\nSay it.", "completion": 'Ann said "12", é and 12.'},
    {"prompt": "2, or 3?", "completion": "😀 #### 12"},
    {"prompt": "a\ttab; and more", "completion": " 12"},
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def columnar(rows: list[dict[str, Any]], write: Callable[[pyarrow.Table, Any], None]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    write(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def stream(content: pyarrow.Table, sink: Any) -> None:
    with pyarrow.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)


def arrow(content: pyarrow.Table, sink: Any) -> None:
    with pyarrow.ipc.new_file(sink, content.schema) as writer:
        writer.write_table(content)


KINDS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "JSON lines": (".jsonl", lines),
    "JSON lines of another name": (".ndjson", lines),
    "JSON lines as .json": (".json", lines),
    "JSON array": (".json", lambda rows: json.dumps(rows, indent=1).encode()),
    "CSV": (".csv", lambda rows: table(rows, ",")),
    "CSV with semicolons": (".csv", lambda rows: table(rows, ";")),
    "TSV": (".tsv", lambda rows: table(rows, "\t")),
    "Parquet": (".parquet", lambda rows: columnar(rows, pyarrow.parquet.write_table)),
    "Arrow": (".arrow", lambda rows: columnar(rows, arrow)),
    "Arrow stream": (".arrow", lambda rows: columnar(rows, stream)),
    "Feather": (".feather", lambda rows: columnar(rows, pyarrow.feather.write_feather)),
}
CODECS = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


def write(path: Path, content: bytes, codec: str | None) -> str:
    with pyarrow.output_stream(str(path), compression=codec) as file:
        file.write(content)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", CODECS)
def test_every_kind_of_file_gives_the_same_tokens(
    tmp_path: Path, tiny_tokenizer: Tokenizer, kind: str, ending: str
):
    suffix, content_of = KINDS[kind]
    plain = load_rows(write(tmp_path / "plain.jsonl", lines(ROWS), None), split="train")
    wanted = [example.input_ids for example in tokenized(plain, tiny_tokenizer, max_length=512).examples]
    renamed = [{"frage": row["prompt"], "antwort": row["completion"]} for row in ROWS]
    columns = {"prompt": "frage", "completion": "antwort"}
    contents = {
        "as it is": (content_of(ROWS), None),
        "other columns": (content_of(renamed), columns),
    }
    if suffix not in (".parquet", ".arrow", ".feather"):
        contents["a byte order mark"] = (b"\xef\xbb\xbf" + content_of(ROWS), None)
    for name, (content, named) in contents.items():
        source = write(tmp_path / f"{name}{suffix}{ending}", content, CODECS[ending])
        rows = load_rows(source, split="train", columns=named)
        examples = tokenized(rows, tiny_tokenizer, max_length=512).examples
        assert [example.input_ids for example in examples] == wanted, name
    assert len(set(wanted)) == len(ROWS)


def refused(path: Path, content: bytes, **options: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(str(path), split="train", **options)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "UTF-32"])
def test_another_encoding_is_named_and_so_is_the_cure(tmp_path: Path, suffix: str, encoding: str):
    said = refused(tmp_path / f"a{suffix}", lines(ROWS).decode().encode(encoding))
    assert f"a{suffix} is in {encoding[:6]}, and not in UTF-8" in said
    assert f"iconv -f {encoding[:6]} -t UTF-8 {tmp_path}/a{suffix} > utf8_a{suffix}" in said


def test_a_cure_reads_what_is_compressed_and_any_name(tmp_path: Path):
    said = refused(tmp_path / "a b.jsonl.gz", gzip.compress(lines(ROWS).decode().encode("UTF-16")))
    assert f"zcat '{tmp_path}/a b.jsonl.gz' | iconv -f UTF-16 -t UTF-8 > 'utf8_a b.jsonl'" in said
    said = refused(tmp_path / "a.json.gz", gzip.compress(b'{"my rows": [\n{"text": "one"}\n]}'))
    assert f"""zcat {tmp_path}/a.json.gz | jq -c '.["my rows"][]' > rows.jsonl""" in said


def test_a_list_inside_one_object_is_taken_out(tmp_path: Path):
    content = b'{"data": [{"prompt": "a", "completion": "b"}]}'
    said = refused(tmp_path / "a.jsonl", content, check=partial(check_rows, data_format="auto"))
    assert f"jq -c '.data[]' {tmp_path}/a.jsonl > rows.jsonl" in said
    turns = b'{"conversation": [{"role": "user", "content": "a"}]}'
    said = refused(tmp_path / "c.jsonl", turns, check=partial(check_rows, data_format="auto"))
    assert "jq" not in said
    assert "For the turns in 'conversation': data.columns: {messages: conversation}" in said
    rows = columnar([{"data": [{"prompt": "a"}]}], pyarrow.parquet.write_table)
    said = refused(tmp_path / "d.parquet", rows, check=partial(check_rows, data_format="auto"))
    assert "jq" not in said
    assert said == said.rstrip()
    assert "jq" not in refused(
        tmp_path / "b.jsonl", b'{"data": [1]}', check=partial(check_rows, data_format="auto")
    )


@pytest.mark.parametrize("name", ["my turns", "null", "a: b", "Gespräch"])
def test_the_turns_are_found_beside_other_lists_and_named_as_yaml_reads_them(tmp_path: Path, name: str):
    fields = {"tools": [{"name": "f"}], "meta": [{"id": 1}], name: [{"role": "user", "content": "a"}]}
    said = refused(tmp_path / "a.jsonl", lines([fields]), check=partial(check_rows, data_format="auto"))
    assert "jq" not in said
    advice = said.partition(f"For the turns in {name!r}: ")[2]
    assert yaml.safe_load(advice) == {"data.columns": {"messages": name}}
    del fields[name]
    said = refused(tmp_path / "a.jsonl", lines([fields]), check=partial(check_rows, data_format="auto"))
    assert "jq -c '.meta[]'" in said
    del fields["meta"]
    assert "jq" not in refused(tmp_path / "a.jsonl", lines([fields]), check=partial(check_rows, data_format="auto"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"x": 1}\n{"text": \n', "line 2 fits no known format"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n{"x": 1}\n', "line 2: field text is of type int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n{"x": 1}\n', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"x": 1},\n{"text": }]', "line 2 fits no known format"),
        ("a.json", b'[{"text": "a"},\n{"text": },\n{"x": 1}]', "line 2 is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"x": 1},\n{"text": "\xe9"}]', "line 2 fits no known format"),
        ("a.json", b'[{"text": "a"}\n{"x": 1}]', "line 2 is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"text": "a"}] and more', "line 1 is not JSON: Extra data"),
        ("a.csv", b"text,id\na,1\nb\nc\xe9,3\n", "line 3 has 1 cell"),
        ("a.csv", b"text,id\na,1\nc\xe9,3\nb\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.csv", b'text,id\na,1\n"b\nc\xe9",3\n', "line 4: byte 0xe9 is not UTF-8"),
    ],
)
def test_the_first_wrong_row_is_the_one_that_is_named(tmp_path: Path, name: str, content: bytes, says: str):
    assert f"{name}, {says}" in refused(tmp_path / name, content, check=partial(check_rows, data_format="auto"))


def test_rows_of_two_formats_do_not_hide_an_earlier_wrong_row(tmp_path: Path):
    rows = load_rows(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 3}\n{"x": 1}\n', None), split="train")
    with pytest.raises(DataError, match="line 2: field text is of type int"):
        formats_by_source(rows, "auto")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", '{"text": "a"}\n{"text": "b", "more": {"x": 1, "x": 2}}'),
        (".json", '[{"text": "a"},\n{"x": 1, "x": 2}]'),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, suffix: str, content: str):
    assert f"a{suffix}, line 2: an object has the key 'x' twice" in refused(
        tmp_path / f"a{suffix}", content.encode()
    )
    turns = json.dumps({"messages": '[{"role": "user", "content": "a", "content": "b"}]'})
    check = partial(check_rows, data_format="auto")
    assert "messages: an object has the key 'content' twice" in refused(
        tmp_path / "b.jsonl", turns.encode(), check=check
    )


def test_bytes_that_are_half_a_pair_are_named_and_not_dropped(tmp_path: Path):
    check = partial(check_rows, data_format="auto")
    content = b'[{"text": "a \xed\xa0\xbd\xed\xb8\x80"}]'
    for mark in (b"", b"\xef\xbb\xbf"):
        said = refused(tmp_path / "a.json", mark + content, check=check)
        assert "line 1: field text holds \\ud83d at character 3" in said
        said = refused(tmp_path / "a.json", mark + '[{"text": "é'.encode() + b'\xff"}]', check=check)
        assert "line 1 is not JSON: byte 0xff at position 13" in said


def test_a_table_in_windows_1252_names_the_line(tmp_path: Path):
    said = refused(tmp_path / "a.csv", "prompt,completion\na,b\ncafé,c\n".encode("cp1252"))
    assert "a.csv, line 3: byte 0xe9 is not UTF-8" in said
    assert "iconv -f WINDOWS-1252" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prompt,completion\na,b\nc\n", "line 3 has 1 cell, and the heading names 2 columns (prompt, completion)"),
        ("prompt,completion\na,b,c\n", "line 2 has 3 cells"),
        ('prompt;completion\n"a"b;c\n', "line 2 is not CSV: ';' expected"),
        ("prompt;completion\na,b\n", "line 2 has 1 cell, and the heading names 2 columns (prompt, completion)"),
        ("prompt,completion,note;x\nonly;b\na,b,c\nd,e,f\n", "line 2 has 1 cell, and the heading names 3"),
        ("prompt;completion;note, x\na;b\n", "line 2 has 2 cells, and the heading names 3 columns (prompt, comp"),
        ("prompt;completion\na;b;\nc;d;\n", "line 2 has 3 cells, and the heading names 2 columns"),
        ("prompt;completion\na;b\nc\nd\n", "line 3 has 1 cell, and the heading names 2 columns"),
        ("prompt,prompt\na,b\n", "line 1: the heading has the column 'prompt' 2 times: prompt, prompt"),
        ('prompt,completion\na,b\n"c,d\n', "line 3 is not CSV: unexpected end of data"),
        ("prompt,completion\n", "is empty: it holds no row"),
    ],
)
def test_a_table_that_is_broken_names_the_line(tmp_path: Path, content: str, says: str):
    assert says in refused(tmp_path / "a.csv", content.encode())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("prompt;completion;note, if any\na;b;c, d\n", "prompt|completion|note, if any"),
        ("prompt,completion;\na;b,c\n", "prompt|completion;"),
        ('"prompt";"completion, all"\na;b\n', "prompt|completion, all"),
        ("sep=;\nprompt;completion\na;b\n", "prompt|completion"),
        ('"sep=|"\r\nprompt|completion\r\na|b\r\n', "prompt|completion"),
        ("prompt;completion\ra;b\rc;d, e, f\r", "prompt|completion"),
        ("text\none; two\n", "text"),
        ('prompt;completion;"note, if any"\na, b;c;d\n', "prompt|completion|note, if any"),
        (f"prompt;completion;note, x\n{'a b ' * 40_000};c;d\n", "prompt|completion|note, x"),
        ("question; in full\nHow many?\nAnd why?\n", "question; in full"),
        ('question; in full\n"How many, and why?"\n', "question; in full"),
        ("text\t\none\n", "text"),
        ("prompt;completion\na\tb;c\n", "prompt|completion"),
    ],
)
def test_what_parts_the_cells_is_found(tmp_path: Path, content: str, names: str):
    rows = load_rows(write(tmp_path / "a.csv", content.encode(), None), split="train")
    assert "|".join(rows[0].fields) == names
    assert len({len(row.fields) for row in rows}) == 1


def test_objects_of_a_table_have_no_fields_of_other_rows(tmp_path: Path):
    def calls(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"messages": [{"role": "user", "arguments": given, "list": [None, 1]}], "id": None}
            for given in arguments
        ]

    rows = calls({"city": "Rom"}, {"x": 1, "y": {"z": 2}})
    filled = pyarrow.Table.from_pylist(rows)
    assert filled.to_pylist() != rows
    pyarrow.parquet.write_table(filled, tmp_path / "a.parquet")
    assert [row.fields for row in load_rows(str(tmp_path / "a.parquet"), split="train")] == rows


def test_lines_of_a_table_are_those_where_rows_begin(tmp_path: Path):
    source = write(tmp_path / "a.csv", b'text\n"one\nand more"\n\ntwo\n', None)
    assert [(row.fields["text"], row.line) for row in load_rows(source, split="train")] == [
        ("one\nand more", 2),
        ("two", 5),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.json",
            b'{"data": [\n{"text": "one"}\n]}',
            "is one JSON object over several lines, with the fields data",
        ),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1 is not JSON: it has a number of more than 4300 digits"),
        ("a.txt", b"one\n", "has the suffix '.txt', which cannot be read"),
        ("a.xlsx", b"PK", "has the suffix '.xlsx', which cannot be read"),
        ("a.jsonl.gz", b"not compressed", "cannot be read"),
        ("a.jsonl.zst", b"not compressed", "cannot be read"),
        ("a.arrow", b"not arrow", "cannot be read"),
    ],
)
def test_what_cannot_be_read_says_what_it_is(tmp_path: Path, name: str, content: bytes, says: str):
    said = refused(tmp_path / name, content)
    assert str(tmp_path / name) in said
    assert says in said


def test_a_compressed_file_that_was_cut_is_refused(tmp_path: Path):
    whole = Path(write(tmp_path / "a.jsonl.gz", lines(ROWS * 50), "gzip")).read_bytes()
    assert "cannot be read" in refused(tmp_path / "a.jsonl.gz", whole[:-20])


# Folders, patterns, columns


def test_a_folder_and_a_pattern_are_their_files_in_order(tmp_path: Path):
    for name in ("b.jsonl", "a.csv", "below/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = table(ROWS[:1], ",") if name.endswith("csv") else lines(ROWS[:2])
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("not data")

    def files(source: Path) -> list[tuple[str, int]]:
        found = load_files(str(source), split="train")
        return [(str(Path(rows[0].source).relative_to(tmp_path)), len(rows)) for rows in found]

    assert files(tmp_path) == [("a.csv", 1), ("b.jsonl", 2)]
    assert describe_ignored(str(tmp_path), split="train") == [f"not read in {tmp_path}: README.md, below/"]
    assert describe_ignored(str(tmp_path / "*.jsonl"), split="train") == []
    assert files(tmp_path / "*.jsonl") == [("b.jsonl", 2)]
    assert files(tmp_path / "**/*.jsonl") == [("b.jsonl", 2), ("below/c.jsonl", 2)]
    with pytest.raises(DataError, match="matches no file"):
        load_files(str(tmp_path / "*.parquet"), split="train")
    (tmp_path / "[1].jsonl").write_bytes(lines(ROWS))
    assert files(tmp_path / "[1].jsonl") == [("[1].jsonl", 3)]  # a file of that very name


def test_a_folder_without_data_names_one_below_it(tmp_path: Path):
    (tmp_path / "below").mkdir()
    with pytest.raises(DataError, match="is a folder without a data file"):
        load_rows(str(tmp_path), split="train")
    (tmp_path / "below" / "a.jsonl").write_bytes(lines(ROWS))
    with pytest.raises(DataError, match=f"name that, or {tmp_path}/\\*\\*/\\*"):
        load_rows(str(tmp_path), split="train")


def test_a_saved_dataset_is_read_by_split(tmp_path: Path):
    import datasets

    sets = {name: datasets.Dataset.from_list(ROWS[:count]) for name, count in (("train", 3), ("test", 1))}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    for split, count in (("train", 3), ("test", 1)):
        rows = load_rows(str(tmp_path / "set"), split=split)
        assert [row.fields for row in rows] == ROWS[:count]
        assert [row.fields for row in load_rows(str(tmp_path / "set" / split), split="train")] == ROWS[:count]
    with pytest.raises(DataError, match="without a split 'validation'; it has test, train"):
        load_rows(str(tmp_path / "set"), split="validation")


def test_what_is_cached_beside_a_saved_dataset_is_not_read(tmp_path: Path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    datasets.load_from_disk(tmp_path / "set").map(lambda row: {"prompt": row["prompt"] + "!"})
    assert list((tmp_path / "set").glob("cache-*.arrow")), "the library keeps it there"
    assert [row.fields for row in load_rows(str(tmp_path / "set"), split="train")] == ROWS


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path):
    said = refused(tmp_path / "a.jsonl", lines(ROWS), columns={"prompt": "frage"})
    assert "a.jsonl, line 1 has no column 'frage', which data.columns names; it has prompt, completion" in said


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([2**40], pyarrow.timestamp("s")),
        pyarrow.array([2**62], pyarrow.duration("s")),
        pyarrow.array([1], pyarrow.timestamp("ns", tz="Mars/Base")),
        pyarrow.Array.from_buffers(
            pyarrow.string(), 1, [None, pyarrow.py_buffer(bytes(4) + b"\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
        ),
    ],
    ids=lambda column: str(column.type),
)
def test_a_value_of_a_table_that_cannot_be_held_is_named_by_its_column(tmp_path: Path, column: Any):
    content = pyarrow.table({"prompt": ["a"], "completion": ["b"], "when": column})
    pyarrow.parquet.write_table(content, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"a.parquet .* in column 'when', of type {column.type!s:.6}") as caught:
        load_rows(str(tmp_path / "a.parquet"), split="train")
    assert "Take the column out" in caught.value.remedy
    pyarrow.parquet.write_table(content.drop_columns("when"), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"), split="train")[0].fields == {"prompt": "a", "completion": "b"}


def test_only_columns_with_objects_are_searched_for_what_the_schema_fills_in():
    schema = pyarrow.schema(
        {"numbers": pyarrow.list_(pyarrow.int64()), "a": pyarrow.struct({"x": pyarrow.int64()})}
    )
    numbers = [1, 2]
    row = remover_of_fill(schema)({"numbers": numbers, "a": {"x": None}})
    assert row == {"numbers": [1, 2], "a": {}}
    assert row["numbers"] is numbers
