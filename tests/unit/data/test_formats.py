"""What fits no format is refused with the cause: a null, a capital, a slip of the pen, a column without a name."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from parablock.data.formats import check_columns, check_rows
from parablock.data.sources import load_rows
from parablock.errors import DataError
from tiny_runs import assert_refused, command, done, write_rows

CHECK = partial(check_rows, data_format="auto")
PAIR = {"question": "q", "answer": "a"}


def said_of(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(str(path), split="train", check=CHECK, **options)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_null_is_told_apart_from_a_field_that_no_format_has(tmp_path: Path, suffix: str):
    rows, file = [PAIR, {**PAIR, "answer": None}], tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write_rows(file, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    said = said_of(file)
    assert "line 2 fits no known format: it has the fields question, answer (null)." in said
    assert "A field that is null or NaN counts as none: give answer a text" in said
    write_rows(tmp_path / "b.jsonl", [{"prompt": None, "reply": "a"}])
    assert "it has the fields prompt (null), reply." in said_of(tmp_path / "b.jsonl")
    write_rows(tmp_path / "c.jsonl", [{"frage": "q"}])
    assert "null or NaN" not in said_of(tmp_path / "c.jsonl")


def test_fields_that_differ_in_capitals_or_in_a_letter_are_recognised(tmp_path: Path):
    file = write_rows(tmp_path / "a.jsonl", [{"Question": "q", " ANSWER": "a"}])
    advice = said_of(file).partition("Capitals and blanks count: ")[2]
    columns = yaml.safe_load(advice)["data.columns"]
    assert columns == {"question": "Question", "answer": " ANSWER"}
    assert load_rows(str(file), split="train", check=CHECK, columns=columns)[0].fields == PAIR
    said = said_of(write_rows(tmp_path / "b.jsonl", [{"promt": "q", "completion": "a"}]))
    assert "Did you mean prompt for 'promt'?" in said
    assert "Did you mean" not in said_of(write_rows(tmp_path / "c.jsonl", [{"frage": "q", "antwort": "a"}]))


def test_columns_are_of_fields_that_there_are_and_each_of_one(tmp_path: Path):
    file = str(write_rows(tmp_path / "a.jsonl", [PAIR]))
    for pairs, says in (
        (("promt=question", "completion=answer"), "no format has a field 'promt' (did you mean prompt?)"),
        (("prompt=question", "completion=question"), "prompt and completion are both column 'question'"),
    ):
        columns = [word for pair in pairs for word in ("--column", pair)]
        assert_refused(command("data", file, *columns), says, "--column has 1 problem")
    assert (
        "[[assistant: a\n]]"
        in done("data", file, "--column", "prompt=question", "--column", "completion=answer").stdout
    )
    said = said_of(Path(file), columns={"prompt": "qestion"})
    assert "has no column 'qestion'" in said and "Did you mean question?" in said
    check_columns({"prompt": "frage", "completion": "antwort"})
    with pytest.raises(ValueError, match="both column 'x'"):
        check_columns({"input": "x", "output": "x"})


def test_row_labels_without_a_name_are_not_used_and_said(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text('"","question","answer"\n0,q,a\n1,q2,NA\n')
    said = done("data", str(file)).stdout
    assert "[[assistant: a\n]]" in said
    assert "not used: field Unnamed: 0 (2 rows)" in said
    assert "warning: answer is 'NA' in 1 row, which is learnt as that word" in said
    assert f"{file}: 2 rows" in said
    file.write_text('"question","answer","note"\nq,a,NA\n')
    said = done("data", str(file)).stdout
    assert "warning" not in said and f"{file}: 1 row\n" in said


@pytest.mark.parametrize(
    ("heading", "says"),
    [
        ("question,,answer", "the heading has no name for column 2 of 3: question, , answer."),
        (",,answer", "the heading has no name for column 2 of 3"),
        ("question,answer,question", "the heading has the column 'question' 2 times: question, answer, question."),
    ],
)
def test_a_column_without_a_name_is_told_apart_from_one_that_stands_twice(tmp_path: Path, heading: str, says: str):
    (tmp_path / "a.csv").write_text(f"{heading}\na,b,c\n")
    said = said_of(tmp_path / "a.csv")
    assert f"a.csv, line 1: {says}" in said
    assert ("index=False" in said and "row.names=FALSE" in said) == ("no name" in says)


def test_a_table_with_a_column_twice_is_sound_and_says_which(tmp_path: Path):
    table = pyarrow.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    sink = io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes(sink.getvalue())
    for name in ("a.parquet", "a.arrow"):
        said = said_of(tmp_path / name)
        assert f"{name} has the column 'answer' 2 times: question, answer, answer." in said
        assert "damaged" not in said


def test_json_of_a_row_is_what_it_was(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**PAIR, "note": None}))
    assert load_rows(str(tmp_path / "a.jsonl"), split="train", check=CHECK)[0].fields == {**PAIR, "note": None}
