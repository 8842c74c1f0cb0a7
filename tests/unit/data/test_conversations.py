"""Turns of every spelling are one conversation, and what is not to be learnt is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parablock.data.formats import read_conversation
from parablock.data.sources import Row
from parablock.errors import DataError

USER, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Twelve."}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Ulm"}'}}


def conversation(turns: Any, **fields: Any) -> Any:
    return read_conversation(Row({"messages": turns, **fields}, "set.jsonl", 3), "messages")


def said(turns: Any, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        conversation(turns, **fields)
    assert "set.jsonl, line 3" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "human", "content": "How many?"}, {"role": "gpt", "content": "Twelve."}],
        [{"role": "User", "content": "How many?"}, {"role": "Model", "content": "Twelve."}],
        [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Twelve."}],
        [
            {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
            ANSWER,
        ],
        [{**USER, "tool_calls": None, "weight": None}, ANSWER],
        json.dumps([USER, ANSWER]),
    ],
)
def test_other_spellings_are_the_same_conversation(turns: Any):
    assert conversation(turns) == conversation([USER, ANSWER])
    assert conversation([USER, ANSWER]).learnt == (False, True)
    assert conversation(turns) != conversation([USER, {**ANSWER, "content": "Ten."}])


@pytest.mark.parametrize("switch", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_a_turn_that_is_not_to_be_learnt_is_read_and_not_learnt(switch: dict[str, Any]):
    turns = [USER, {**ANSWER, **switch}, USER, {**ANSWER, **dict.fromkeys(switch, 1)}]
    read = conversation(turns)
    assert read.learnt == (False, False, False, True)
    assert read.turns == conversation([USER, ANSWER, USER, ANSWER]).turns


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], "turn 2 has weight 0.5; a turn is learnt (1, true) or not (0, false)"),
        ([{**USER, "train": True}, ANSWER], "turn 1 of the user is to be learnt (train: True)"),
        ([USER, {"role": "narrator", "content": "x"}], "turn 2 of messages has the unknown role 'narrator'"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 of messages has no role and content"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "its content is a part of type 'image'"),
        ([USER, {**ANSWER, "tool_calls": "f()"}], "tool_calls of turn 2 of messages is of type str"),
        ([{"role": "user", "content": "a \ud83d"}, ANSWER], "turn 1 of messages holds \\ud83d at character 3"),
        ([USER, {**ANSWER, "reasoning": "\udc00"}], "the reasoning of turn 2 of messages holds \\udc00"),
        ("[unclosed", "messages is of type str, not a list of turns"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(turns: Any, words: str):
    assert words in said(turns)


def test_tools_are_a_list_or_its_json_and_arguments_are_an_object():
    read = conversation(
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], tools='[{"name": "f"}]'
    )
    assert read.tools == ({"name": "f"},)
    assert read.turns[1]["content"] == ""
    assert read.turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}
    assert read.learnt == (False, True)
    assert "field tools is of type dict, not a list" in said([USER, ANSWER], tools={"name": "f"})


def test_a_system_field_comes_first_unless_a_turn_does():
    assert conversation([USER, ANSWER], system="Be brief.").turns[0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "Mine."}, USER, ANSWER]
    assert conversation(own, system="Be brief.").turns == conversation(own).turns


def test_an_opening_turn_of_the_assistant_is_read_and_not_learnt():
    read = conversation([ANSWER, USER, ANSWER])
    assert read.learnt == (False, False, True)
    assert read.begins_with_the_assistant
    assert not conversation([USER, ANSWER]).begins_with_the_assistant


def test_a_prompt_of_turns_is_not_learnt_and_its_completion_is():
    row = Row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "set.jsonl", 1)
    assert read_conversation(row, "prompt_completion").learnt == (False, False, False, True)
