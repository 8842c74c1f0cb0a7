"""Files of other kinds than their names say are named as what they are, and the cure reads them."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from parablock.data.sources import load_rows
from parablock.errors import DataError

TEXT = b'{"prompt": "a", "completion": "b"}\n' * 5


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), sink)
    return bytes(sink.getvalue())


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "one")
    return file.getvalue()


def compressed(codec: str) -> bytes:
    return bytes(pyarrow.Codec(codec).compress(TEXT, asbytes=True))


KINDS = {
    "gzip": (gzip.compress(TEXT), "compressed with gzip", ".gz"),
    "zstd": (compressed("zstd"), "compressed with zstd", ".zst"),
    "Parquet": (parquet(), "a Parquet file", ".parquet"),
    "zip": (zipped(), "a zip archive, or a workbook such as .xlsx", "save its sheet as CSV"),
    "zeros": (bytes(5000), "no text: its first bytes are 00 00", "Fetch or export it again"),
    "random": (bytes(range(256)) * 20, "no text: its first bytes are 00 01", "Fetch or export it again"),
}


def said_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows(str(path), split="train")
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_bytes_tell_what_a_file_is(tmp_path: Path, kind: str, suffix: str):
    content, name, cure = KINDS[kind]
    said = said_of(tmp_path / f"a{suffix}", content)
    assert f"a{suffix} is {name}" in said
    assert cure in said
    assert "UTF-16" not in said and "WINDOWS-1252" not in said


@pytest.mark.parametrize(("suffix", "name"), [(".jsonl", "a.jsonl.gz"), (".json", "a.json.gz")])
def test_the_new_name_that_is_said_is_read(tmp_path: Path, suffix: str, name: str):
    assert f"Rename it: as {name} it is read" in said_of(tmp_path / f"a{suffix}", gzip.compress(TEXT))
    assert len(load_rows(str((tmp_path / f"a{suffix}").rename(tmp_path / name)), split="train")) == 5


def test_what_is_compressed_twice_is_unpacked_by_the_command_that_is_said(tmp_path: Path):
    said = said_of(tmp_path / "a b.jsonl.gz", gzip.compress(gzip.compress(TEXT)))
    assert "a b.jsonl.gz is compressed with gzip inside" in said
    subprocess.run(said.partition("Unpack it once: ")[2], shell=True, check=True, cwd=tmp_path)
    assert len(load_rows(str(tmp_path / "unpacked_a b.jsonl.gz"), split="train")) == 5


def test_a_table_that_is_text_or_another_table_is_told_apart_from_a_damaged_one(tmp_path: Path):
    assert "a.parquet is compressed with gzip" in said_of(tmp_path / "a.parquet", gzip.compress(TEXT))
    assert "a.feather is a Parquet file" in said_of(tmp_path / "a.feather", parquet())
    assert "a.parquet cannot be read" in said_of(tmp_path / "a.parquet", parquet()[:-20])


@pytest.mark.parametrize("encoding", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"])
def test_text_of_two_or_four_bytes_without_a_mark_is_converted_by_the_command_that_is_said(
    tmp_path: Path, encoding: str
):
    said = said_of(tmp_path / "a.jsonl", (TEXT.decode() + '{"text": "é 😀 字"}\n').encode(encoding))
    assert f"a.jsonl is in {encoding[:6]}" in said
    command = said.partition("Convert it: ")[2].partition(" > ")[0]
    ended = subprocess.run(command, shell=True, capture_output=True, check=True, cwd=tmp_path)
    assert ended.stdout.decode() == TEXT.decode() + '{"text": "é 😀 字"}\n'


def test_one_wrong_byte_is_no_binary_file(tmp_path: Path):
    assert "line 6 is not JSON: Invalid control character" in said_of(tmp_path / "a.jsonl", TEXT + b'{"a": "\0"}')


def test_links_that_lead_nowhere_are_named_as_such(tmp_path: Path):
    (tmp_path / "dead.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "round.jsonl").symlink_to("round.jsonl")
    (tmp_path / "bare").symlink_to("bare")
    for name, target in (("dead.jsonl", "gone.jsonl"), ("round.jsonl", "round.jsonl")):
        with pytest.raises(DataError, match=f"{name} is a link to {target}, and nothing is there") as caught:
            load_rows(str(tmp_path / name), split="train")
        assert "Did you mean" not in str(caught.value)
    here = Path.cwd()
    try:
        os.chdir(tmp_path)
        with pytest.raises(DataError, match="bare has no suffix, by which files are told apart"):
            load_rows("bare", split="train")  # and is no name of the hub
    finally:
        os.chdir(here)
    (tmp_path / "gone.jsonl").write_bytes(TEXT)
    assert len(load_rows(str(tmp_path / "dead.jsonl"), split="train")) == 5
