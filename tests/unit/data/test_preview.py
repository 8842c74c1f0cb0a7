"""A look at rows: what is learnt is marked, with a model and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast as Tokenizer

from parablock.data.preview import Stretch, stretches_of, turns_of
from parablock.data.sources import Row
from tiny_runs import Workshop, assert_refused, command, done, write_rows
from tokens import tokenized

TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Ten.", "weight": 0},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "Twelve."},
]
ROW = Row({"messages": TURNS}, "set.jsonl", 1)


def test_stretches_are_the_text_and_what_is_learnt_of_it(tiny_tokenizer: Tokenizer):
    (example,) = tokenized([ROW], tiny_tokenizer).examples
    read, learnt = stretches_of(example, tiny_tokenizer)
    assert (read.is_learnt, learnt) == (False, Stretch("Twelve.<|im_end|>\n", True))
    assert read.text + learnt.text == tiny_tokenizer.apply_chat_template(TURNS, tokenize=False)
    (cut,) = tokenized([ROW], tiny_tokenizer, max_length=len(example.input_ids) - 1).examples
    assert stretches_of(cut, tiny_tokenizer)[1].text == "Twelve.<|im_end|>"


def test_turns_are_marked_without_a_model():
    (turns,) = turns_of([ROW], "auto")
    assert [stretch.is_learnt for stretch in turns] == [False, False, False, True]
    assert turns[3].text == "assistant: Twelve.\n"
    assert turns_of([Row({"text": "a"}, "set.jsonl", 1)], "auto") == [[Stretch("a", True)]]


def test_an_answer_without_text_is_not_learnt():
    for content, is_learnt in (("", False), (" ", False), ("4", True)):
        turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": content}]
        ((_, answer),) = turns_of([Row({"messages": turns}, "a.jsonl", 1)], "auto")
        assert answer.is_learnt == is_learnt


@pytest.mark.parametrize("with_model", [False, True])
def test_the_command_marks_what_is_learnt_and_counts_what_is_not_used(
    workshop: Workshop, tmp_path: Path, with_model: bool
):
    rows = [{"messages": TURNS, "id": 1}, {"messages": TURNS[:1], "id": 2}]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    model = ("--model", str(workshop.model)) if with_model else ()
    said = done("data", file, *model, "--rows", "1").stdout
    assert "[[Twelve.<|im_end|>\n]]" in said if with_model else "[[assistant: Twelve.\n]]" in said
    assert "[[Ten." not in said
    assert f"{file}, line 2: " not in said.partition("rows.jsonl: ")[0]
    if with_model:
        assert f"not trained on: {file}, line 2: no turn is the assistant's" in said
        assert "not used: field id (2 rows)" in said
    renamed = str(write_rows(tmp_path / "renamed.jsonl", [{"frage": "How many?", "antwort": "Twelve."}]))
    columns = ("--column", "prompt=frage", "--column", "completion=antwort")
    twice = command("data", renamed, *columns, "--column", "prompt=antwort")
    assert_refused(twice, "prompt is given 2 times: prompt=frage, prompt=antwort")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "sheet.xlsx").write_bytes(b"")
    write_rows(folder / "rows.jsonl", rows)
    assert f"not read in {folder}: sheet.xlsx" in done("data", str(folder), "--rows", "0", *model).stdout
    assert "[[assistant: Twelve.\n]]" in done("data", renamed, *columns).stdout
